"""Repeats the final figures of a run from its checkpoint: `python -m tljax.evaluate --workdir=…`."""

from tljax import cluster, command

USAGE = {
    "description": __doc__,
    "config": False,
    "workdir": "the run",
    "checkpoint": "best, last or a step (default: what config.select says)",
    **cluster.FLAGS,
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

from collections.abc import Callable

import jax
import numpy as np

from tljax import data, experiment, parallel
from tljax.cache import FeatureCache
from tljax.checkpoint import Checkpoints
from tljax.errors import UserError, listing
from tljax.report import metrics
from tljax.report.console import Console, quiet_libraries
from tljax.step import evaluated, make_predict_step
from tljax.workdir import Workdir


class Evaluator:
    """Gives the logits of every example of a split, in order, each exactly once; compiles once, and once a cut.

    `alive` is called after each batch.
    """

    def __init__(self, exp: experiment.Experiment, layout: parallel.Layout, alive: Callable[[], None] = lambda: None):
        self.exp, self.layout, self.alive = exp, layout, alive
        self._programs = {}

    def __call__(self, params, stats, split: data.Split, cache: FeatureCache | None = None) -> np.ndarray:
        """Returns float32 logits [examples, classes]; with `cache`, from the features at its cut."""
        config, p = self.exp.config, self.exp.preprocessing
        process = (jax.process_index(), jax.process_count())
        if cache is None:
            name = "image"
            batches = data.eval_batches(
                split, batch_size=self.layout.batch_size, size=p.size, crop=p.crop, interpolation=p.interpolation,
                threads=config.data.threads, process=process,
            )  # fmt: skip
        else:
            name, batches = "features", data.slices(cache(split), self.layout.batch_size, process)
        predict = self.predict(cache and cache.cut)
        logits = []
        for batch in batches:
            logits.append(np.asarray(predict(params, stats, self.layout.place_batch({name: batch[name]})[name])))
            self.alive()
        # Global batches lie in the order of the split; what fills the last one up comes at the end.
        return np.concatenate(logits)[: len(split)]

    def predict(self, start: str | None):
        """The compiled `predict(params, stats, images)`, or from the features that the stage `start` takes."""
        if start not in self._programs:
            p = self.exp.preprocessing
            step = make_predict_step(self.exp.model, mean=p.mean, std=p.std, start=start)
            self._programs[start] = self.layout.compile_predict(step)
        return self._programs[start]


def restore(workdir: Workdir, which: str = ""):
    """Returns (experiment, layout, params, stats, notes) of a checkpoint.

    `which`: "best", "last", a step, or "" for what config.select says. Raises UserError where it does not exist.
    """
    config = workdir.config()
    which = which or config.select
    checkpoints = Checkpoints(workdir.path / "checkpoints", create=False)
    last = checkpoints.latest()
    if last is None:
        raise UserError(f"{workdir.path} has no checkpoint yet")
    best = checkpoints.notes(last)["best"] if which == "best" else None
    step = best["step"] if best else last if which in ("best", "last") else which
    if step not in checkpoints.steps() and str(step) not in map(str, checkpoints.steps()):
        raise UserError(
            f"no checkpoint {step} in {workdir.path}; there are: {', '.join(map(str, checkpoints.steps()))}"
        )
    step = int(step)
    notes = checkpoints.notes(step)
    layout = parallel.Layout.for_evaluation(config.batch_size)
    exp = experiment.build(config, notes["classes"], layout)
    plan, state = exp.restore(checkpoints, step, layout, notes["examples"])
    checkpoints.close()
    return exp, layout, *evaluated(state, plan), notes


def main(argv: list[str]) -> int:
    """Evaluates a run's checkpoint on val and test, and says whether its summary has the same figures."""
    flags = command.from_command_line(argv, **USAGE)
    if not flags.workdir:
        raise UserError("no --workdir: give the folder of a run")
    quiet_libraries()
    workdir = Workdir(flags.workdir)
    config = workdir.config()
    cluster.join(flags, config, "tljax.evaluate")
    console = Console(enabled=jax.process_index() == 0)
    dataset = data.load(config.data)
    cluster.meet(photographs=lambda: dataset.digest[:16])
    exp, layout, params, stats, notes = restore(workdir, flags.checkpoint)
    if tuple(notes["classes"]) != dataset.classes:
        raise UserError(f"the classes of {dataset.name} are not those that {workdir.path} was trained on")
    evaluator, found = Evaluator(exp, layout), {}
    for name, split in (("val", dataset.val), ("test", dataset.test)):
        if len(split):
            logits = evaluator(params, stats, split)
            found[name] = metrics.classification(logits, split.labels, dataset.classes, dataset.coarse)
    console.final({"name": config.name, "evaluated_step": notes["step"], **found})
    summary = workdir.summary()
    if summary and not flags.checkpoint:
        others = differing(found, summary, config.dtype)
        said = f"NOT the figures of summary.json: {listing(others)}" if others else "the same figures as summary.json"
        console.print(said)
        return int(bool(others))
    return 0


def differing(found: dict, summary: dict, dtype: str) -> list[str]:
    """What is not as in a summary: {split: {"nll", "accuracy", "confusion"}}, computed in `dtype`.

    On other devices sums are rounded otherwise: in half precision by so much that a photograph on the border between
    two classes may fall to the other side.
    """
    close, border = (1e-4, 0.0) if dtype == "float32" else (2e-2, 0.01)
    said = []
    for split, figures in found.items():
        one = 1 / np.sum(figures["confusion"]) if border else 0.0  # photograph
        for name, bound in (("nll", close * figures["nll"]), ("accuracy", max(border, one))):
            now, then = figures[name], summary[split][name]
            if abs(now - then) > bound + 1e-9:
                said.append(f"{split}/{name} is {now:.6g}, was {then:.6g}")
    return said


if __name__ == "__main__":
    command.run(main)
