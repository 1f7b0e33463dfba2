"""The folder of a run: its config, its metrics, its summary. Files appear whole or not at all."""

import contextlib
import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from tljax import config as configs
from tljax.errors import UserError, listing


class Workdir:
    """`config.json`, `plan.txt`, `metrics.jsonl`, TensorBoard events, `checkpoints/`, `summary.json`, pictures.

    With `writes=False` (processes other than 0) nothing is written.
    """

    def __init__(self, path: str | os.PathLike, writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        self._events = None

    def claim(self, config: ConfigDict) -> None:
        """Makes the folder this experiment's. Raises UserError where it holds another one or is unwritable."""
        with self._reported():
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.json"
            if file.exists():
                differing = configs.differences(self.config(), config)
                if differing:
                    raise UserError(
                        f"{self.path} holds a run with another config: {listing(differing)}; "
                        "give another --workdir or delete this one"
                    )
            else:
                self.write("config.json", configs.to_json(config))

    def config(self) -> ConfigDict:
        """The config of the run. Raises UserError where there is none."""
        file = self.path / "config.json"
        try:
            return configs.from_json(file.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} is no workdir of a run: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    def write(self, name: str, text: str) -> None:
        """Writes a file whole: a reader, or a crash, never meets half of it."""
        if not self.writes:
            return
        with self._reported():
            temporary = self.path / f".{name}.tmp"
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl; a last line that a crash cut off is left out."""
        file, rows = self.path / "metrics.jsonl", []
        if file.exists():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return rows

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`: a run that resumes there writes them again."""
        from tensorboardX import SummaryWriter

        if not self.writes:
            return
        self.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows() if r["step"] <= step))
        with self._reported():
            self._events = SummaryWriter(os.fspath(self.path), purge_step=step + 1 if step else None)

    def log(self, row: dict) -> None:
        """Appends a row of metrics (it has a `step`) to metrics.jsonl and to the TensorBoard events."""
        if not self.writes:
            return
        with self._reported(), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._events.add_scalar(name, value, row["step"])

    def summary(self) -> dict | None:
        """The final figures, or None where the run has not ended."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def close(self) -> None:
        """Flushes the TensorBoard events."""
        if self._events is not None:
            self._events.close()

    @contextlib.contextmanager
    def _reported(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from error
