"""The end of a run: the figures of the chosen checkpoint, the summary, the pictures, the page."""

import json
import time

import jax
import numpy as np

from tljax import STARTED, data, experiment, forgetting, parallel, source
from tljax import plan as plans
from tljax.cache import views
from tljax.checkpoint import Damaged
from tljax.data.transforms import resize_and_centre_crop
from tljax.errors import UserError
from tljax.report import metrics, pictures, source_pictures
from tljax.report.page import html
from tljax.step import State, evaluated
from tljax.workdir import Workdir


def conclude(run, state: State) -> None:
    """Evaluates a `train.Run` on its whole test split and writes what its workdir shows. `state` is the last one."""
    steps = int(state.step)
    best, plan = run.keeper.notes["best"], run.plan
    run.keeper.verify(state, plan)
    chosen = best["step"] if best and run.config.select == "best" else steps
    features = run.cache
    if chosen != steps:
        features = None  # a checkpoint of another phase may have another prefix
        del state  # its memory is wanted
        try:
            plan, state = run.exp.restore(run.keeper.checkpoints, chosen, run.layout, len(run.dataset.train))
        except Damaged as error:
            path = run.workdir.path
            raise UserError(
                f"{error.what}: it was the best one. `python -m tljax.evaluate --workdir={path} --checkpoint=last` "
                f"tells the figures of the last one; when {path / 'checkpoints'} is deleted, the same command trains "
                "to the same best one again"
            ) from error
    run.keeper.checkpoints.close()
    params, stats = evaluated(state, plan)
    found, logits, shown = {}, None, None
    with run.clock("test"):
        for name in ("val", "test"):
            split = getattr(run.dataset, name)
            if len(split):
                shown, logits = split, run.evaluate(params, stats, split, features)
                found[name] = metrics.classification(logits, split.labels, run.dataset.classes, run.dataset.coarse)
    if run.source:
        params, stats = run.layout.to_host((params, stats))
    if not run.workdir.writes:
        return
    lost = {}
    if run.source:
        with run.clock("forgetting"):
            lost = {"forgetting": forgetting.measure(run.exp, source.network(run.exp), run.source, params, stats)}
    path = run.workdir.path
    with run.clock("report"):
        pictures.curves(run.workdir.rows(), path / "curves.png", best["step"] if best else None)
        if found:
            pictures.confusion(list(found.values())[-1]["confusion"], run.dataset.classes, path / "confusion.png")
            wrong = np.flatnonzero(logits.argmax(-1) != shown.labels)
            pictures.mistakes(mistakes(run, logits, shown, wrong), path / "mistakes.png", total=len(wrong))
        if lost:
            source_pictures.forgetting(lost["forgetting"], path / "forgetting.png")
    told = summary(run, steps) | {"best": best, "evaluated_step": chosen} | found | lost
    run.workdir.close(told)
    run.workdir.write("summary.json", json.dumps(told, indent=2) + "\n")
    page(run.workdir)
    run.console.final(told)
    for line in forgetting.lines(lost["forgetting"]) if lost else ():
        run.console.print(line)
    run.console.print(f"everything is in {path}; open {path / 'report.html'}")


def page(workdir: Workdir) -> None:
    """Writes report.html, where it is not there yet, from what the workdir holds."""
    if workdir.writes and not (workdir.path / "report.html").exists():
        html(workdir.path)


def mistakes(run, logits: np.ndarray, split: data.Split, wrong: np.ndarray) -> list[dict]:
    """The most confident of the wrong guesses (their indices), as `pictures.mistakes` takes them."""
    p, classes = run.exp.preprocessing, run.dataset.classes
    probabilities = metrics.softmax(logits)
    guess, sure = probabilities.argmax(-1), probabilities.max(-1)
    return [
        {
            "image": resize_and_centre_crop(split[i][0], p.size, p.crop, p.interpolation),
            "label": classes[split.labels[i]],
            "guess": classes[guess[i]],
            "confidence": float(sure[i]),
            "name": split.name(i),
        }
        for i in wrong[np.argsort(-sure[wrong], kind="stable")][: pictures.TILES]
    ]


def waited(run) -> dict | None:
    """How long the steps waited for their batches (`tljax.waiting`), and the share of the time in training."""
    spent = run.clock.seconds.get("train")
    return {"seconds": round(run.waited, 3), "share": round(run.waited / spent, 4)} if spent else None


def summary(run, steps: int) -> dict:
    """What a run's figures depend on and what it cost; the figures themselves are added by `conclude`."""
    config, plan, card, dataset = run.config, run.plan, run.exp.card, run.dataset
    speeds = [row["images_per_second"] for row in run.workdir.rows() if "images_per_second" in row]
    splits = {name: len(getattr(dataset, name)) for name in ("train", "val", "test")}
    return {
        "name": config.name,
        "seed": config.seed,
        "model": config.model,
        "weights": {"name": card.name, "licence": card.licence, "origin": card.origin} if card else None,
        "data": {"name": dataset.name, "licence": dataset.licence, "origin": dataset.origin}
        | {"classes": len(dataset.classes)}
        | splits,
        "strategy": config.phases or config.strategy,
        "plan": plan.totals() | {"optimizer_bytes": run.optimizer_bytes, "digest": plan.digest},
        "frozen": {
            "values": sum(run.never_trained.values()),
            "digest": plans.combined({path: run.keeper.notes["frozen"][path] for path in run.never_trained}),
            "verified": True,  # the keeper has raised otherwise
            "steps": steps,
        },
        "leaks": list(run.leaks),
        "cache": run.cache
        and {
            "cut": run.cache.cut,
            "where": run.cache.where,
            "views": views(config),
            "bytes": run.cache.nbytes,
        },
        "steps": steps,
        "epochs": round(steps / run.per_epoch, 3),
        "time": {k: round(v, 2) for k, v in (run.clock.seconds | {"total": time.perf_counter() - STARTED}).items()},
        "first_step_seconds": run.first_step,
        "images_per_second": float(np.median(speeds)) if speeds else None,
        "input_wait": waited(run),
        "compile": run.watch.compiles.told(),
        "checkpoint": {"delta": config.checkpoint.delta, "base": run.keeper.base_digest()} | run.checkpoint_bytes,
        **parallel.cost(run.train_step),
        "peak_memory_bytes": parallel.memory_peak(),
        "versions": experiment.versions(),
        "devices": {
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
        },
    }
