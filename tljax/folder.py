"""The folder of a sweep: its plan, a folder for each unit of work, what units have left, and the tables."""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tljax import claims, files, stores
from tljax import config as configs
from tljax.errors import UserError, listing
from tljax.report import text
from tljax.workdir import Workdir

POLL = 0.5  # seconds between two looks for a unit that others have left


class Unit(NamedTuple):
    """Members that one worker trains: a group, or a part of one."""

    group: int  # of the plan
    kept: str  # where the features of its group are kept; "": nowhere
    numbers: tuple[int, ...]  # of its members

    @property
    def name(self) -> str:
        """The number of its first member, and a digest of all: generations of a search may train one member again."""
        return _name(self.numbers)


class Folder(Workdir):
    """`config.json` with its axes, `plans/`, `units/`, `sweep.csv`, `sweep.parquet`, `curves.jsonl`, `best.py`, a page.

    A worker without a heartbeat for `stale` seconds counts as dead.
    """

    def __init__(self, path: str | os.PathLike, stale: float = claims.STALE):
        if stores.is_remote(path):
            raise UserError(
                f"--workdir={path}: a sweep's folder is shared by links and touched files, which no store has: "
                "give one on a file system, and copy it when the sweep has ended"
            )
        super().__init__(path)
        self.stale = stale
        self.mark = f".{socket.gethostname()}-{os.getpid()}"  # several processes write the tables

    def config(self) -> ConfigDict:
        """The config of the sweep."""
        try:
            return configs.from_json((self.path / "config.json").read_text())
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path / 'config.json'} cannot be used: {error}") from error

    # ---- the plan

    def planned(self, numbers: Sequence[int], make: Callable[[], Sequence[Sequence[Unit]]]) -> list[Unit]:
        """The units of the members with these numbers: decided once, by the one process that calls `make`.

        `make` returns the units of each group. Of a sweep that cannot be planned no folder is left.
        """
        place = self.path / "plans" / _name(numbers)

        def made() -> str:
            groups = [{"kept": units[0].kept, "units": [unit.numbers for unit in units]} for units in make()]
            return json.dumps({"groups": groups}) + "\n"

        damaged = f"{place / 'plan.json'} cannot be read ({{}}); delete {self.path}"
        with self._reported():
            try:
                found = claims.once(place, "plan.json", made, self.stale)
            except UserError:
                if not self.begun:
                    self._vanish(place)
                raise
            except UnicodeDecodeError as error:
                raise UserError(damaged.format(error)) from error
        try:
            return [
                Unit(i, _checked(group["kept"], str), tuple(_checked(number, int) for number in _checked(unit, list)))
                for i, group in enumerate(files.parsed(found)["groups"])
                for unit in group["units"]
                if unit
            ]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(damaged.format(error)) from error

    def _vanish(self, place: Path) -> None:
        """Removes what planning has left, and the folder where nothing else is in it."""
        with contextlib.suppress(OSError):
            for file in place.iterdir():
                file.unlink()
            for folder in (place, place.parent, self.path):
                folder.rmdir()

    # ---- units

    def place(self, unit: Unit) -> Path:
        """The folder of a unit: its claims, its log, and its result."""
        return self.path / "units" / unit.name

    def done(self, unit: Unit) -> bool:
        """Whether a unit has a result."""
        return (self.place(unit) / "result.json").exists()

    def take(self, unit: Unit) -> claims.Claim | None:
        """Claims a unit; None where another worker has it, or has done it."""
        with self._reported():
            claim = claims.take(self.place(unit), self.stale)
        if claim and self.done(unit):  # by who has just ended
            claim.__exit__()
            return None
        return claim

    def holder(self, unit: Unit) -> dict | None:
        """Who is at a unit (`claims.holder`)."""
        with self._reported():
            return claims.holder(self.place(unit), self.stale)

    def keep(self, unit: Unit, rows: Sequence[dict]) -> bool:
        """Writes what a unit has left, unless another worker did; returns whether it is this one."""
        found = json.dumps({"worker": claims.name(), "rows": rows}) + "\n"
        with self._reported():
            return claims.publish(self.place(unit) / "result.json", found)

    def log(self, unit: Unit, line: str) -> None:
        """Appends a line to a unit's log."""
        with self._reported(), (self.place(unit) / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%F %T')} {claims.name()}: {line}\n")

    def finished(self) -> set[Path]:
        """The results that there are."""
        return set(self.path.glob("units/*/result.json"))

    def results(self) -> list[dict]:
        """The rows of all units that have ended, by number; of a member that was trained twice, one."""
        rows = {row["number"]: row for found in self._results() for row in found["rows"]}
        return [rows[number] for number in sorted(rows)]

    def workers(self) -> dict[str, int]:
        """{worker: how many units it has done}."""
        by = [found["worker"] for found in self._results()]
        return {name: by.count(name) for name in sorted(set(by))}

    def _results(self) -> list[dict]:
        found = []
        for file in sorted(self.finished()):
            try:
                found.append(files.parsed(file.read_text()))
                _checked(found[-1].setdefault("worker", ""), str)
                [_checked(row["number"], int) for row in found[-1]["rows"]]
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{file} cannot be read ({error}); delete it, and its members train again") from error
        return found


def _checked(value: Any, kind: type) -> Any:
    """The value, of the type that it must be of. Raises TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} where there should be {kind.__name__}")
    return value


def _name(numbers: Sequence[int]) -> str:
    return f"{numbers[0]:05d}-{hashlib.sha256(json.dumps(list(numbers)).encode()).hexdigest()[:8]}"


def share(folder: Folder, units: Sequence[Unit], work: Callable, say: Callable[[str], None], wait: bool = True) -> None:
    """Does units of work together with whoever else does: `work(unit, claim)` for each that is taken here.

    Taken are those of the group of the last one (what is compiled serves on), else of a group that no other worker has
    begun. Returns when all are done or, where it does not `wait`, another worker's.
    """
    group, told = -1, ""
    while left := [unit for unit in units if not folder.done(unit)]:
        begun = {unit.group for unit in left if claims.begun(folder.place(unit))}
        order = sorted(left, key=lambda unit: (unit.group != group, unit.group in begun))
        taken = next(((unit, claim) for unit in order if (claim := folder.take(unit))), None)
        if taken:
            group = taken[0].group
            with taken[1]:
                work(*taken)
            continue
        who = [(unit, folder.holder(unit)) for unit in left]
        held = [f"{unit.name} ({found['worker']}, since {found['since']})" for unit, found in who if found]
        line = f"{text.counted(len(held), 'unit')} with other workers: {listing(held)}"
        if held and line != told:
            say(line)
            told = line
        if len(held) == len(left) and not wait:
            return
        time.sleep(POLL)
