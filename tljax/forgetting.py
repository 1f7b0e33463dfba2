"""What a network has forgotten of its source task: `python -m tljax.forgetting --workdir=RUN`.

Measured on photographs of the source task (`config.source`): its metric under the loaded head, before and after, and
how far the features behind each stage have moved. Stages run one after another, a batch at a time: two maps of one
stage are held, and for CKA the mean of every map over its positions.
"""

from tljax import cluster, command

USAGE = {
    "description": __doc__,
    "config": False,
    "workdir": "the run",
    "source": "photographs of the source task, as folder:DIR (default: config.source.data of the run)",
    "checkpoint": "best, last or a step (default: what config.select says)",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import source
from tljax.errors import UserError
from tljax.experiment import Experiment
from tljax.report import text
from tljax.step import normalise


class Displacement:
    """Relative L2 distance and linear CKA between the features of two networks, from batches of them."""

    def __init__(self, examples: int):
        self.examples = examples
        self.moved = self.size = 0.0
        self.features: list[list[np.ndarray]] = [[], []]  # where there are fewer examples than features
        self.sums = None  # otherwise: means and second moments, for centred covariances

    def add(self, moved, size, first: np.ndarray, second: np.ndarray) -> None:
        """Adds a batch: squares of the difference and of the first's map, [b] each; both means [b, features]."""
        self.moved += float(np.sum(moved, dtype=np.float64))
        self.size += float(np.sum(size, dtype=np.float64))
        first, second = (np.asarray(x, np.float64) for x in (first, second))
        if self.examples <= first.shape[1]:
            self.features[0].append(first)
            self.features[1].append(second)
            return
        new = [first.sum(0), second.sum(0), first.T @ first, second.T @ second, first.T @ second]
        self.sums = new if self.sums is None else [a + b for a, b in zip(self.sums, new)]

    def relative_l2(self) -> float | None:
        """‖f₁ − f₀‖ / ‖f₀‖ over all examples and positions; None where f₀ is 0."""
        return float(np.sqrt(self.moved / self.size)) if self.size else None

    def cka(self) -> float | None:
        """Linear CKA (Kornblith et al. 2019) of the features' means over positions; None where they do not vary.

        From the Gram matrices [examples, examples] or the covariances [features, features], whichever is smaller:
        both give the same.
        """
        if not self.moved:
            return 1.0  # of equal features, whatever the rounding
        if self.sums is None:
            x, y = (np.concatenate(f) for f in self.features)
            x, y = x - x.mean(0), y - y.mean(0)
            k, h = x @ x.T, y @ y.T
            cross, own, other = np.sum(k * h), np.sum(k * k), np.sum(h * h)
        else:
            mean_x, mean_y, xx, yy, xy = (s / self.examples for s in self.sums)
            centred = lambda m, a, b: np.sum(np.square(m - np.outer(a, b)))
            cross, own, other = centred(xy, mean_x, mean_y), centred(xx, mean_x, mean_x), centred(yy, mean_y, mean_y)
        return float(cross / np.sqrt(own * other)) if own * other > 0 else None


@jax.jit
def _compare(first, second):
    first, second = (x.astype(jnp.float32) for x in (first, second))
    second = second[:, -first.shape[1] :] if first.ndim == 3 else second  # without the tokens of prompts
    inner = tuple(range(1, first.ndim))
    mean = lambda x: x.mean(inner[:-1]) if inner[:-1] else x
    return jnp.square(second - first).sum(inner), jnp.square(first).sum(inner), mean(first), mean(second)


def runs(exp: Experiment, net: source.Network, params: Any, stats: Any) -> tuple[Callable, Callable]:
    """Functions (x, start, stop) → y of the loaded and of the trained network, the latter under the loaded head.

    A stage of both is one compiled program, given one's weights or the other's: where these are equal, so is y. Only
    a stage with adapters is another one.
    """
    model, under = source.under_loaded_head(exp, net, params)
    sites = getattr(model, "sites", {})
    adapted = {path.split("/")[0] for paths in sites.values() for path in paths}
    jitted = lambda model: jax.jit(
        lambda variables, x, start, stop: model.apply(variables, x, start=start, stop=stop), static_argnums=(2, 3)
    )
    plain, own = jitted(net.model), jitted(model)

    def of(params, stats, program):
        placed = {
            stage: jax.device_put({"params": {stage: params[stage]}, "batch_stats": {stage: stats.get(stage, {})}})
            for stage in net.model.stages
        }
        return lambda x, start, stop: program(start)(placed[start], x, start, stop)

    first = of(net.params, net.stats, lambda stage: plain)
    return first, of(under, stats, lambda stage: own if stage in adapted else plain)


def measure(exp: Experiment, net: source.Network, found: source.Photographs, params: Any, stats: Any) -> dict[str, Any]:
    """Compares a trained network (`params`, `stats`) with the loaded one on photographs of the source task.

    Returns {"data", "examples", "labelled", "classes", "before": figures, "after": figures, "stages": {stage:
    {"relative_l2", "cka", "features"}}}, for summary.json. `figures` are those of `source.figures`.
    """
    first_run, second_run = runs(exp, net, params, stats)
    *body, head = net.model.stages
    displaced = {stage: Displacement(len(found.split)) for stage in body}
    features, logits, labels = dict.fromkeys(body, 0), ([], []), []
    p = exp.preprocessing
    for batch in source.batches(exp, found.split):
        first = second = normalise(batch["image"], p.mean, p.std)
        for stage, after in zip(body, (*body[1:], head)):
            first, second = first_run(first, stage, after), second_run(second, stage, after)
            moved, size, *means = map(np.asarray, _compare(first, second))
            displaced[stage].add(moved, size, *means)
            features[stage] = means[0].shape[1]
        logits[0].append(np.asarray(first_run(first, head, None)))
        logits[1].append(np.asarray(second_run(second, head, None)))
        labels.append(batch["label"])
    before, after, labels = (np.concatenate(x) for x in (*logits, labels))
    return {
        "data": found.name,
        "origin": found.origin,
        "licence": found.licence,
        "examples": len(labels),
        "labelled": found.labelled,
        "classes": net.classes,
        "before": source.figures(before, before, labels),
        "after": source.figures(after, before, labels),
        "stages": {
            stage: {"relative_l2": d.relative_l2(), "cka": d.cka(), "features": features[stage]}
            for stage, d in displaced.items()
        },
    }


ROWS = (
    ("accuracy", "top-1 accuracy", lambda v: text.percent(v, 2)),
    ("top5", "top-5 accuracy", lambda v: text.percent(v, 2)),
    ("nll", "negative log-likelihood", lambda v: f"{v:.4f}"),
    ("agreement", "guesses as the loaded network", lambda v: text.percent(v, 2)),
    ("kl", "KL from the loaded network", lambda v: f"{v:.4f}"),
)


def rows(found: dict) -> list[tuple[str, str, str]]:
    """(metric, before, after) of the source task, as text."""
    before, after = found["before"], found["after"]
    return [(name, write(before[key]), write(after[key])) for key, name, write in ROWS if key in after]


def lines(found: dict) -> list[str]:
    """The figures as a small table: the source task before and after, then the stages that moved."""
    count = f"{found['examples']:,} photographs of {found['data']}, {found['labelled']:,} labelled"
    table = [("source task", "before", "after"), *rows(found)]
    still = [stage for stage, moved in found["stages"].items() if moved["relative_l2"] == 0]
    stages = [("features behind", "relative L2", "linear CKA")]
    for stage, moved in found["stages"].items():
        if stage not in still:
            stages.append((stage, text.number(moved["relative_l2"]), _cka(moved["cka"])))
    if still:
        span = still[0] if len(still) == 1 else f"{still[0]} … {still[-1]}"
        stages.insert(1, (span, "0", "1"))
    width = max(len(row[0]) for row in table + stages)
    laid = lambda table: [f"{a:<{width}}  {b:>12}  {c:>12}" for a, b, c in table]
    return [f"forgetting, on {count}", *laid(table), "", *laid(stages)]


def _cka(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main(argv: list[str]) -> int:
    """Measures what a run's network has forgotten of its source task, and adds it to summary and report."""
    from tljax.evaluate import restore
    from tljax.report import source_pictures
    from tljax.report.console import Console, quiet_libraries
    from tljax.report.page import html
    from tljax.workdir import Workdir

    flags = command.from_command_line(argv, **USAGE)
    if not flags.workdir:
        raise UserError("no --workdir: give the folder of a run")
    quiet_libraries()
    workdir = Workdir(flags.workdir)
    cluster.alone("tljax.forgetting")
    exp, _, params, stats, _ = restore(workdir, flags.checkpoint)
    net, photographs = source.task(exp, flags.source)
    console = Console()
    for line in photographs.report:
        console.print(line)
    found = measure(exp, net, photographs, *source.host((params, stats)))
    for line in lines(found):
        console.print(line)
    summary = workdir.summary()
    if summary and not flags.checkpoint:
        workdir.write("summary.json", json.dumps(summary | {"forgetting": found}, indent=2) + "\n")
        source_pictures.forgetting(found, workdir.path / "forgetting.png")
        html(workdir.path)
        console.print(f"added to summary.json and report.html in {workdir.path}, drawn in forgetting.png")
    return 0


if __name__ == "__main__":
    command.run(main)
