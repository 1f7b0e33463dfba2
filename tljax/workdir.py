"""The folder of a run: its config, its metrics, its summary. Files appear whole or not at all."""

import contextlib
import json
import os
import time
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
        self.mark = ""  # tells apart the unfinished files of several processes that write one file
        self.writers = []  # what else takes the rows of metrics (tljax.writers)
        self._events = None

    def claim(self, config: ConfigDict) -> None:
        """Makes the folder this experiment's. Raises UserError where it holds another one or is unwritable."""
        with self._reported():
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.json"
            if file.exists():
                differing = configs.differences(self.config(), config, but=configs.WATCHING)
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
            config = configs.from_json(file.read_text())
            configs.check(config)
            return config
        except FileNotFoundError:
            raise UserError(f"{self.path} is no workdir of a run: it has no config.json") from None
        except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{file} cannot be used: {getattr(error, 'strerror', None) or error}") from error

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file whole: a reader, or a crash, never meets half of it."""
        if not self.writes:
            return
        with self._reported():
            temporary = self.path / f".{name}{self.mark}.tmp"
            try:
                with temporary.open("wb") as file:
                    file.write(content.encode() if isinstance(content, str) else content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path / name)
            except OSError:  # what does not fit must not fill the disk
                temporary.unlink(missing_ok=True)
                raise

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl; a last line that a crash cut off is left out. Raises UserError for others."""
        file, rows = self.path / "metrics.jsonl", []
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                int(row["step"])
                rows.append(row)
            except (ValueError, TypeError, LookupError):
                if number < len(lines):
                    raise UserError(f"{file}, line {number}: expected a row of metrics, found {line[:40]!r}") from None
        return rows

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`: a run that resumes there writes them again."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if not self.writes:
            return
        self.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows() if r["step"] <= step))
        with self._reported():
            # Not SummaryWriter: on a full disk its thread dies, and the run waits for it for ever.
            self._events = EventsWriter(os.path.join(self.path, "events"))
            if step:  # TensorBoard forgets what came after
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=step + 1, session_log=start, wall_time=time.time()))

    def log(self, row: dict) -> None:
        """Appends a row of metrics (it has a `step`) to metrics.jsonl and to the TensorBoard events."""
        if not self.writes:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._reported():
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    event = Event(step=row["step"], wall_time=time.time(), summary=scalar(name, value))
                    self._events.write_event(event)
            self._events.flush()
        for writer in self.writers:
            writer.log(row)

    def summary(self) -> dict | None:
        """The final figures, or None where the run has not ended."""
        file = self.path / "summary.json"
        try:
            found = json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read: {error}; delete it, and the same command writes it anew"
            ) from error
        if not isinstance(found, dict | None):
            raise UserError(f"{file} holds {type(found).__name__}, expected an object; delete it")
        return found

    def close(self, summary: dict | None = None) -> None:
        """Ends the TensorBoard events and other writers, which get the final figures, if there are some."""
        events, self._events = self._events, None
        others, self.writers = self.writers, []
        for writer in others:
            writer.close(summary)
        if events is not None:
            with self._reported():
                events.close()

    @contextlib.contextmanager
    def _reported(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from error
