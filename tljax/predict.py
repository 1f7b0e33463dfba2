"""The top classes of image files: `python -m tljax.predict --workdir=… photo.jpg …`."""

from tljax import cluster, command

USAGE = {
    "description": __doc__,
    "config": False,
    "workdir": "the run",
    "top": "how many classes (5)",
    "rest": "image files",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

import jax
import numpy as np

from tljax import files
from tljax.errors import UserError
from tljax.evaluate import restore
from tljax.report.console import Console, quiet_libraries
from tljax.report.metrics import softmax
from tljax.step import make_predict_step
from tljax.stores import is_remote
from tljax.workdir import Workdir


def main(argv: list[str]) -> int:
    """Prints the top classes of image files, with probabilities, by the checkpoint that config.select chooses."""
    from tljax.data.images import BadImage
    from tljax.data.transforms import resize_and_centre_crop

    flags = command.from_command_line(argv, **USAGE)
    if not flags.workdir or not flags.rest:
        raise UserError("expected --workdir=RUN and image files")
    if not (flags.top or "5").isdigit() or flags.top == "0":
        raise UserError(f"--top={flags.top}: expected a whole number above 0")
    quiet_libraries()
    cluster.alone("tljax.predict")
    exp, _, params, stats, notes = restore(Workdir(flags.workdir))
    p, images = exp.preprocessing, []
    for file in flags.rest:
        try:
            with open(files.locate(file, "photograph") if is_remote(file) else file, "rb") as opened:
                images.append(resize_and_centre_crop(opened.read(), p.size, p.crop, p.interpolation))
        except (OSError, BadImage) as error:
            raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    predict = jax.jit(make_predict_step(exp.model, mean=p.mean, std=p.std))
    console = Console()
    for file, image in zip(flags.rest, images):
        probabilities = softmax(np.asarray(predict(params, stats, image[None])))[0]
        console.print(file)
        for i in np.argsort(-probabilities)[: int(flags.top or 5)]:
            console.print(f"  {100 * probabilities[i]:5.1f} %  {notes['classes'][i]}")
    return 0


if __name__ == "__main__":
    command.run(main)
