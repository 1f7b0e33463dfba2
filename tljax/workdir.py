"""The folder of a run: its config, its metrics, its summary. Files appear whole or not at all.

It may lie in a store, as gs://bucket/run. What grows there, metrics and events, is kept in a local folder and copied
whole: at each evaluation, before each checkpoint, and every half a minute. So a checkpoint never stands there without
the rows that came before it.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from ml_collections import ConfigDict

from tljax import config as configs
from tljax import files, stores
from tljax.errors import UserError, listing

COPY_EVERY = 30.0  # seconds between two copies to a store of what has grown


class Workdir:
    """`config.json`, `plan.txt`, `metrics.jsonl`, TensorBoard events, `checkpoints/`, `summary.json`, pictures.

    With `writes=False` (processes other than 0) nothing is written.
    """

    def __init__(self, path: str | os.PathLike, writes: bool = True):
        self.remote = stores.is_remote(path)
        self.path = stores.place(path, "--workdir") if self.remote else Path(path)
        self.near = stores.near(self.path) if self.remote else self.path  # where what grows is written
        self.copied: dict[str, int] = {}  # of what grows, how many bytes the store has
        self.copied_at = 0.0
        self.writes = writes
        self.mark = ""  # tells apart the unfinished files of several processes that write one file
        self.check = lambda: None  # raises UserError where the workdir is another run's by now
        self.writers = []  # what else takes the rows of metrics (tljax.writers)
        self._events = None
        self._resumed = 0  # the step behind which the rows go on

    @property
    def begun(self) -> bool:
        """Whether there is a run already."""
        with self._reading():
            return (self.path / "config.json").exists()

    def claim(self, config: ConfigDict) -> None:
        """Makes the folder this experiment's. Raises UserError where it holds another one or is unwritable."""
        with self._reported():
            if not self.remote:
                self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.json"
            if file.exists():
                may = (*configs.ELASTIC, *configs.WATCHING)
                differing = configs.differences(self.config(), config, but=may)
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
            with self._reading():
                text = file.read_text()
            config = configs.from_json(text)
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
        content = content.encode() if isinstance(content, str) else content
        with self._reported():
            if self.remote:
                (self.path / name).write_bytes(content)
                return
            temporary = self.path / f".{name}{self.mark}.tmp"
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path / name)
            except OSError:  # what does not fit must not fill the disk
                temporary.unlink(missing_ok=True)
                raise

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl; a last line that a crash cut off is left out. Raises UserError for others."""
        file, rows = self.path / "metrics.jsonl", []
        if self._events is not None:
            file = self.near / "metrics.jsonl"
        with self._reading():
            lines = file.read_bytes().decode(errors="replace").splitlines() if file.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = files.parsed(line)
                if type(row["step"]) is not int:
                    raise ValueError
                rows.append(row)
            except (ValueError, TypeError, LookupError):
                if number < len(lines):
                    raise UserError(f"{file}, line {number}: expected a row of metrics, found {line[:40]!r}") from None
        return rows

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`: a run that resumes there writes them again."""
        if not self.writes:
            return
        kept = "".join(json.dumps(r) + "\n" for r in self.rows() if r["step"] <= step)
        self.write("metrics.jsonl", kept)
        self._resumed = step
        if self.remote:
            with self._reported():
                self._clear()
                self.near.mkdir(parents=True, exist_ok=True)
                (self.near / "metrics.jsonl").write_text(kept)
                self.copied = {"metrics.jsonl": len(kept.encode())}

    def log(self, row: dict) -> None:
        """Appends a row of metrics (it has a `step`) to metrics.jsonl and to the TensorBoard events."""
        if not self.writes:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._reported():
            with (self.near / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self._events is None:  # now, and not before: who starts again and again leaves no empty files
                self._events = self._opened()
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    event = Event(step=row["step"], wall_time=time.time(), summary=scalar(name, value))
                    self._events.write_event(event)
            self._events.flush()
        for writer in self.writers:
            writer.log(row)
        if time.monotonic() - self.copied_at > COPY_EVERY:
            self.flush()

    def flush(self) -> None:
        """Copies what has grown to the store, where the workdir lies in one."""
        if not (self.remote and self.writes and self._events):
            return
        with self._reported():
            self.check()
            for file in self._growing():
                length = file.stat().st_size
                if self.copied.get(file.name) != length:
                    stores.upload(file, self.path / file.name)
                    self.copied[file.name] = length
        self.copied_at = time.monotonic()

    def _growing(self) -> list[Path]:
        return [self.near / "metrics.jsonl", *sorted(self.near.glob("events.*"))]

    def _clear(self) -> None:
        """Removes the local copies of what grows."""
        for file in self._growing():
            file.unlink(missing_ok=True)

    def _opened(self):
        """A new file of TensorBoard events."""
        # Not SummaryWriter: on a full disk its thread dies, and the run waits for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        # The number of the process: within a second, or where the clock is set back, names would come twice.
        events = EventsWriter(os.path.join(self.near, "events"), f".{os.getpid()}")
        if self._resumed:  # TensorBoard forgets what came after
            start = SessionLog(status=SessionLog.START)
            events.write_event(Event(step=self._resumed + 1, session_log=start, wall_time=time.time()))
        return events

    def summary(self) -> dict | None:
        """The final figures, or None where the run has not ended."""
        file = self.path / "summary.json"
        try:
            with self._reading():
                text = file.read_text() if file.exists() else "null"
            found = files.parsed(text)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read: {error}; delete it, and the same command writes it anew"
            ) from error
        if not isinstance(found, dict | None):
            raise UserError(f"{file} holds {type(found).__name__}, expected an object; delete it")
        return found

    def close(self, summary: dict | None = None) -> None:
        """Ends the TensorBoard events and other writers, which get the final figures, if there are some."""
        others, self.writers = self.writers, []
        for writer in others:
            writer.close(summary)
        if self._events is None:
            return
        try:
            with self._reported():
                self._events.close()
            self.flush()
        finally:
            self._events = None
        if self.remote:
            self._clear()
            with contextlib.suppress(OSError):
                self.near.rmdir()

    @contextlib.contextmanager
    def _reported(self):
        if self.remote:
            with stores.reported("write to", self.path):
                yield
            return
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _reading(self):
        """Makes what a store's library raises one line; that there is no such file is left to the caller."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            if not self.remote:
                raise
            raise UserError(f"cannot read {self.path}: {stores.explained(error, str(self.path))}") from error
