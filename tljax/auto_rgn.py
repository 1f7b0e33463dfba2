"""Auto-RGN: how much each stage wants to move, as multipliers (surgical fine-tuning, Lee et al. 2023).

The relative gradient norm of a stage is the norm of its gradient over the norm of its weights. It needs weights and
data, so it is measured once and written into a config as a `discriminative` strategy:
`python -m tljax.auto_rgn --config=… --batches=8` prints the line.
"""

from tljax import cluster, command

USAGE = {"description": __doc__, "batches": "how many batches (default: 8)"}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import UserError, unknown
from tljax.plan import paths

Tree = Any


def norms(tree: Tree) -> dict[str, jax.Array]:
    """The Euclidean norm of each stage (top-level key) of a tree, as float32 scalars, in the tree's order."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree)):
        stage = path.split("/")[0]
        squares[stage] = squares.get(stage, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {stage: jnp.sqrt(square) for stage, square in squares.items()}


def relative_gradient_norms(loss_fn: Callable, params: Tree, batches: Iterable) -> dict[str, float]:
    """Returns {stage: norm of the gradient / norm of the weights}, the mean over the batches.

    `loss_fn(params, batch) -> scalar`. Raises UserError where there is no batch or a ratio is not finite.
    """

    @jax.jit
    def measure(params, batch):
        gradient, weights = norms(jax.grad(loss_fn)(params, batch)), norms(params)
        return {stage: gradient[stage] / weights[stage] for stage in weights}

    found = [jax.device_get(measure(params, batch)) for batch in batches]
    if not found:
        raise UserError("auto_rgn: no batch to measure on")
    ratios = {stage: float(np.mean([ratio[stage] for ratio in found])) for stage in norms(params)}
    for stage, ratio in ratios.items():
        if not np.isfinite(ratio):
            raise UserError(f"auto_rgn: the relative gradient norm of {stage!r} is {ratio}: are its weights all 0?")
    return ratios


def multipliers(ratios: dict[str, float], head: str | None = None, digits: int = 3) -> dict[str, float]:
    """Divides by the largest, so that the stage that wants to move most has 1; rounded to so many digits.

    A `head` that starts anew has a gradient that says nothing of the weights: it has 1 and does not count.
    Raises UserError where no other stage has a gradient.
    """
    if head is not None and head not in ratios:
        raise unknown("stage", head, ratios)
    body = {stage: ratio for stage, ratio in ratios.items() if stage != head}
    largest = max(body.values(), default=0.0)
    if not largest > 0:
        raise UserError("auto_rgn: no stage but the head has a gradient")
    return {stage: 1.0 if stage == head else float(f"{ratios[stage] / largest:.{digits}g}") for stage in ratios}


def strategy(multipliers: dict[str, float]) -> str:
    """The multipliers as a config's text: `discriminative({'stem': 0.1, …})`."""
    return f"discriminative({multipliers!r})"


def main(argv: list[str]) -> int:
    """Measures Auto-RGN on an experiment's weights and training data, and prints the strategy for its config."""
    import itertools

    from tljax import data, experiment
    from tljax.config import check
    from tljax.data.mix import soft_targets
    from tljax.report.console import Console, quiet_libraries
    from tljax.step import normalise

    flags = command.from_command_line(argv, **USAGE)
    quiet_libraries()
    config = flags.config
    check(config)
    if not (flags.batches or "8").isdigit():
        raise UserError(f"--batches={flags.batches}: expected a whole number")
    cluster.alone("tljax.auto_rgn")
    dataset = data.load(config.data)
    exp = experiment.build(config, dataset.classes)
    p = exp.preprocessing
    params, stats, _ = exp.load()

    def loss(params, batch):
        images = normalise(batch["image"], p.mean, p.std)
        logits = exp.model.apply({"params": params, "batch_stats": stats}, images)
        targets = soft_targets(batch["label"], len(dataset.classes), config.label_smoothing)
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    batches = data.train_batches(
        dataset.train, batch_size=config.batch_size, seed=config.seed, start_step=0, stop_step=int(flags.batches or 8),
        size=p.size, augment=config.augment, interpolation=p.interpolation, crop=p.crop,
        threads=config.data.threads, process=(0, 1),
    )  # fmt: skip
    ratios = relative_gradient_norms(loss, params, itertools.islice(batches, int(flags.batches or 8)))
    ratios = {stage: ratios[stage] for stage in exp.model.stages}
    head = exp.model.stages[-1] if exp.card is None or exp.model.stages[-1] in exp.reset else None
    Console().print(f'config.strategy = "{strategy(multipliers(ratios, head))}"')
    return 0


if __name__ == "__main__":
    command.run(main)
