"""The workdir of a run as a source of weights: what it trained, its head kept, adapters folded in."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tljax.errors import UserError
from tljax.weights.cards import Card


def is_run(path: Path) -> bool:
    """Whether a folder is the workdir of a run."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def read(path: Path) -> Mapping[str, np.ndarray]:
    """The leaves of the checkpoint that config.select says, "params/…" and "batch_stats/…". Raises UserError."""
    from tljax import adapters, frozen_dtype, plan
    from tljax.evaluate import restore
    from tljax.workdir import Workdir

    exp, layout, params, stats, _ = restore(Workdir(path))
    params, stats = layout.to_host((params, stats))
    params = frozen_dtype.widened(exp, params)
    if getattr(exp.model, "adapters", ()):
        params = adapters.merge(exp.model, params)
    return plan.flat({"params": params, "batch_stats": stats})


def classes(path: Path) -> tuple[str, ...]:
    """The names of the classes that the run's head tells apart. Raises UserError."""
    from tljax.checkpoint import Checkpoints

    checkpoints = Checkpoints(path / "checkpoints", create=False)
    last = checkpoints.latest()
    if last is None:
        raise UserError(f"{path} has no checkpoint yet")
    return tuple(checkpoints.notes(last)["classes"])


def card(path: Path, spec: str) -> Card:
    """How the run's network saw images, and where its own weights came from. Raises UserError."""
    from tljax import experiment
    from tljax.workdir import Workdir

    config = Workdir(path).config()
    base = experiment.card_of(config)
    seen = experiment.preprocessing(config, base)
    return Card(
        name=spec.removeprefix("file:"),
        model=config.model,
        source=spec,
        sha256="",
        naming="tljax",
        input_size=seen.size,
        mean=seen.mean,
        std=seen.std,
        interpolation=seen.interpolation,
        crop=seen.crop,
        licence=base.licence if base else "unknown",
        origin=f"the run {path.resolve().name}" + (f", which began with {base.name} ({base.origin})" if base else ""),
        trained_on=config.data.source + (f", after {base.trained_on}" if base else ""),
        top1=None,
    )
