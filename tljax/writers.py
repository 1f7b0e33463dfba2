"""Where rows of metrics go besides the workdir: Weights & Biases, with `config.wandb = "PROJECT"` (extra `wandb`)."""

import importlib.util
import json
import uuid
from collections.abc import Callable
from typing import Protocol

from ml_collections import ConfigDict

from tljax.errors import UserError
from tljax.workdir import Workdir

ID = "wandb.json"  # which W&B run a workdir is: it moves with the workdir, and goes with it


class Writer(Protocol):
    """What takes rows of metrics. It raises nothing: figures that are lost elsewhere stop no run."""

    def log(self, row: dict) -> None:
        """Takes a row, as `Workdir.log` does."""

    def close(self, summary: dict | None = None) -> None:
        """Takes the final figures, where the run has come to them, and ends."""


def check(config: ConfigDict) -> None:
    """Raises UserError where a writer that the config asks for is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"config.wandb = {config.wandb!r}: wandb is not installed: pip install 'tljax[wandb]'")


def begin(config: ConfigDict, workdir: Workdir, say: Callable[[str], None]) -> list[Writer]:
    """The writers that a config asks for, in the one process that writes. Raises UserError."""
    return [WandB(config, workdir, say)] if config.wandb and workdir.writes else []


class WandB:
    """A run of Weights & Biases. Who resumes in the same workdir goes on in the same one."""

    def __init__(self, config: ConfigDict, workdir: Workdir, say: Callable[[str], None]):
        import wandb

        entity, _, project = config.wandb.rpartition("/")
        try:
            self.run = wandb.init(
                project=project, entity=entity or None, id=_identity(workdir), resume="allow",
                name=workdir.path.name, dir=str(workdir.near), config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except Exception as error:  # no account, no network, no right to the project
            line = " ".join(str(error).split())[:200]
            raise UserError(
                f"config.wandb = {config.wandb!r}: {line}; WANDB_MODE=offline keeps the figures in {workdir.near}"
            ) from error
        self.say = say
        later = f"offline; later: wandb sync {workdir.near}/wandb/offline-run-*"
        self.say(f"Weights & Biases: {later if self.run.offline else self.run.url}")

    def log(self, row: dict) -> None:
        """Takes a row, as `Workdir.log` does. Steps that a run repeats after a kill are known there already."""
        rest = {name: value for name, value in row.items() if name != "step"}
        self._try(lambda: self.run.log(rest, step=row["step"]))

    def close(self, summary: dict | None = None) -> None:
        """Takes the final figures, where the run has come to them, and ends."""
        if summary:
            self._try(lambda: self.run.summary.update({f"final/{k}": v for k, v in scalars(summary).items()}))
        self._try(lambda: self.run.finish(exit_code=None if summary else 1))
        self.run = None

    def _try(self, call: Callable[[], object]) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as error:
            self.run = None
            self.say(f"Weights & Biases has failed, the run goes on: {' '.join(str(error).split())[:200]}")


def scalars(summary: dict) -> dict[str, int | float | str]:
    """The figures of a summary, one level deep: {"test/accuracy": 0.84, …}."""
    flat = {}
    for name, value in summary.items():
        within = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name}/{k}": v for k, v in within} | ({} if within else {name: value})
    return {name: value for name, value in flat.items() if isinstance(value, int | float | str)}


def _identity(workdir: Workdir) -> str:
    """The id of the workdir's W&B run; a new one where it has none."""
    try:
        return str(json.loads((workdir.path / ID).read_text())["id"])
    except (OSError, ValueError, LookupError, TypeError):
        made = uuid.uuid4().hex[:12]
        workdir.write(ID, json.dumps({"id": made}) + "\n")
        return made
