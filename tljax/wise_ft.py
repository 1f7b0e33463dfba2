"""Weights between the loaded and the trained ones: `python -m tljax.wise_ft --workdir=RUN` (Wortsman et al. 2022).

Every weight and statistic that was loaded becomes (1 − α) · loaded + α · trained. A new head stays the trained one for
the target task; for the source task the loaded one is put back. LoRA and IA3 are folded in first: their share is α as
well. Nothing is trained.
"""

from tljax import cluster, command

USAGE = {
    "description": __doc__,
    "config": False,
    "workdir": "the run",
    "alphas": "shares of the trained weights (default: 0,0.25,0.5,0.75,1)",
    "source": "photographs of the source task, as folder:DIR (default: config.source.data of the run, if any)",
    "checkpoint": "best, last or a step (default: what config.select says)",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

import json
from typing import Any

import jax
import numpy as np

from tljax import data, source
from tljax.errors import UserError
from tljax.evaluate import Evaluator, restore
from tljax.experiment import Experiment
from tljax.plan import flat, paths
from tljax.report import metrics, text
from tljax.weights.matcher import covers

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIGURES = ("examples", "accuracy", "coarse_accuracy", "macro_f1", "nll", "ece")


def interpolate(loaded: Any, trained: Any, alpha: float, reset: tuple[str, ...] = ()) -> Any:
    """(1 − α) · loaded + α · trained, leaf by leaf; what `reset` matches, and what did not move, stays as trained.

    So α = 1 gives the trained weights bit for bit, and α = 0 the loaded ones.
    """
    before = flat(loaded)

    def between(path, after):
        if path not in before or covers(reset, path):
            return after
        first, after = np.asarray(before[path]), np.asarray(after)
        mixed = (1 - alpha) * first.astype(np.float32) + alpha * after.astype(np.float32)
        return np.where(first == after, after, mixed.astype(after.dtype))

    leaves, structure = jax.tree.flatten(trained)
    return structure.unflatten([between(*pair) for pair in zip(paths(trained), leaves)])


def measure(
    exp: Experiment, layout, dataset, params, stats, alphas, task: tuple[source.Network, source.Photographs] | None
) -> dict[str, Any]:
    """Evaluates the path of alphas on val and test, and on the source task where there is one.

    Returns {"path": [{"alpha", "val", "test", "source"}], "best": by config.metric on val, or None, "source"}.
    """
    net, found = task or (source.network(exp), None)
    evaluator, on_source, before, points = Evaluator(exp, layout), None, None, []
    if found:
        loaded_evaluator = Evaluator(source.replaced(exp, net.model), layout)
        before = loaded_evaluator(net.params, net.stats, found.split)
        on_source = Evaluator(source.replaced(exp, source.under_loaded_head(exp, net, params)[0]), layout)
    for alpha in alphas:
        mixed = layout.place(interpolate(net.params, params, alpha, exp.reset))
        moved = layout.place(interpolate(net.stats, stats, alpha, exp.reset))
        point: dict[str, Any] = {"alpha": alpha}
        for name, split in (("val", dataset.val), ("test", dataset.test)):
            if len(split):
                logits = evaluator(mixed, moved, split)
                whole = metrics.classification(logits, split.labels, dataset.classes, dataset.coarse)
                point[name] = {key: whole[key] for key in FIGURES if key in whole}
        if found:
            _, under = source.under_loaded_head(exp, net, mixed)
            point["source"] = source.figures(on_source(under, moved, found.split), before, found.split.labels)
        points.append(point)
    metric = exp.config.metric.removeprefix("val/")
    best = None
    if len(dataset.val):
        chosen = max(points, key=lambda point: metrics.sign(metric) * point["val"][metric])
        best = {"alpha": chosen["alpha"], "metric": exp.config.metric, "value": chosen["val"][metric]}
    about = found and {"data": found.name, "examples": len(found.split), "labelled": found.labelled}
    return {"path": points, "best": best, "source": about}


def lines(found: dict) -> list[str]:
    """The path as a table, the best alpha marked."""
    points = found["path"]
    columns = [("alpha", lambda p: f"{p['alpha']:g}")]
    for split in ("val", "test"):
        if split in points[0]:
            columns.append((f"{split} accuracy", lambda p, s=split: text.percent(p[s]["accuracy"], 2)))
            columns.append((f"{split} NLL", lambda p, s=split: f"{p[s]['nll']:.4f}"))
    if found["source"]:
        for key, name in (("accuracy", "source accuracy"), ("nll", "source NLL"), ("agreement", "source agreement")):
            if key in points[0]["source"]:
                write = (lambda v: f"{v:.4f}") if key == "nll" else (lambda v: text.percent(v, 2))
                columns.append((name, lambda p, k=key, w=write: w(p["source"][k])))
    cells = [[name for name, _ in columns], *([write(point) for _, write in columns] for point in points)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    laid = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in cells]
    best = found["best"]
    if best is None:
        return [*laid, "no val split: nothing chooses among them"]
    marked = [points[i]["alpha"] == best["alpha"] for i in range(len(points))]
    laid[1:] = [line + ("  best by " + best["metric"] if mark else "") for line, mark in zip(laid[1:], marked)]
    return laid


def _alphas(given: str) -> tuple[float, ...]:
    try:
        found = tuple(float(item) for item in given.split(",")) if given else ALPHAS
        if not all(0 <= alpha <= 1 for alpha in found) or len(set(found)) < len(found):
            raise ValueError
    except ValueError:
        raise UserError(f"--alphas={given}: expected different numbers from 0 to 1, as 0,0.5,1") from None
    return found


def main(argv: list[str]) -> int:
    """Evaluates the weights between the loaded and the trained ones of a run, on its own task and the source's."""
    from tljax.report import source_pictures
    from tljax.report.console import Console, quiet_libraries
    from tljax.report.page import html
    from tljax.workdir import Workdir

    flags = command.from_command_line(argv, **USAGE)
    if not flags.workdir:
        raise UserError("no --workdir: give the folder of a run")
    alphas = _alphas(flags.alphas)
    quiet_libraries()
    workdir = Workdir(flags.workdir)
    config = workdir.config()
    cluster.alone("tljax.wise_ft")
    dataset = data.load(config.data)
    exp, layout, params, stats, notes = restore(workdir, flags.checkpoint)
    if tuple(notes["classes"]) != dataset.classes:
        raise UserError(f"the classes of {dataset.name} are not those that {workdir.path} was trained on")
    task = source.task(exp, flags.source) if flags.source or config.source.data else None
    console = Console()
    for line in task[1].report if task else ("no source task: give its photographs with --source=folder:DIR",):
        console.print(line)
    exp, params = source.without_adapters(exp, source.host(params))
    found = measure(exp, layout, dataset, params, source.host(stats), alphas, task) | {"step": notes["step"]}
    for line in lines(found):
        console.print(line)
    workdir.write("wise_ft.json", json.dumps(found, indent=2) + "\n")
    source_pictures.wise_ft(found, workdir.path / "wise_ft.png")
    if workdir.summary():
        html(workdir.path)
    console.print(f"written to wise_ft.json in {workdir.path}, drawn in wise_ft.png")
    return 0


if __name__ == "__main__":
    command.run(main)
