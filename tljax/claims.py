"""Work that several processes share through a folder: files that appear whole, and claims that outlive no worker.

A piece of work has a folder of its own. Who begins it makes the file `claim-0001` there, and touches it every few
seconds. Claims are never removed, and the one of the highest number counts. It is free where a `claim-0001.left` lies
beside it, where nobody has touched it for `stale` seconds, or where its process was on this machine and is dead; it is
taken over by making `claim-0002`. Of several that try, one succeeds, and who has lost a claim finds the higher number.

Of the folder it is assumed that a hard link, or an exclusive creation, succeeds for one process alone (NFS: yes), and
that a touched file gets the time of the file system. No two machines' clocks are compared: what is now is read from a
file that is made for it. A folder may be one in a store (`tljax.claim_objects`), for claims alone.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tljax import files, stores
from tljax.claim_files import Files, publish
from tljax.claim_objects import Objects

STALE = 60.0  # seconds without a heartbeat, after which a holder counts as dead
POLL = 0.2  # seconds between two looks at what another process does


def once(folder: Path, name: str, make: Callable[[], str], stale: float = STALE) -> str:
    """The text of a file in a folder of its own: what `make` returns in the one process of several that calls it.

    The others wait for it. Where `make` raises an exception, another process makes it.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            return (folder / name).read_text()
        with take(folder, stale) or contextlib.nullcontext() as claim:
            if claim is None:
                time.sleep(POLL)
            elif not (folder / name).exists():
                publish(folder / name, make())


def take(folder: Path, stale: float = STALE) -> "Claim | None":
    """Claims the work of a folder, which is made where there is none; None where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        there = lying(folder)
        newest = _newest(there)
        if newest and not _free(there, newest, stale):
            return None
        return succeed(folder, newest, stale)
    except FileNotFoundError:  # another process has just removed the folder
        return None


def succeed(folder: Path, number: int, stale: float = STALE) -> "Claim | None":
    """Claims work of which the claim of this number, the last one that was seen, is free; None: another was faster."""
    there, name = lying(folder), f"claim-{number + 1:04d}"
    since = {"since": time.strftime("%F %T"), "claim": uuid.uuid4().hex}
    text = json.dumps(identity() | since) + "\n"
    try:
        if not there.create(name, text):
            return None
    except FileNotFoundError:  # removed by who was faster, and has tidied up
        return None
    if _newest(there) > number + 1:  # so was the claim of this number
        there.remove(name)
        return None
    return Claim(folder / name, text, there, stale)


def holder(folder: Path, stale: float = STALE) -> dict | None:
    """Who is at the work of a folder: {"worker", "host", "pid", "since", …}; None where nobody is."""
    there = lying(folder)
    newest = _newest(there)
    if not newest or _free(there, newest, stale):
        return None
    # A claim that is being written, or is damaged, does not say who.
    return {"worker": "another worker", "since": "now"} | _read(there, newest)[0]


class Last(NamedTuple):
    """The claim that counts: its number (0: there is none), whose, what a heartbeat changes, whether it was left."""

    number: int
    identity: dict
    touched: object
    left: bool


def last(folder: Path) -> Last:
    """The claim that counts."""
    there = lying(folder)
    names = there.names()
    number = _highest(names)
    try:
        found, touched = _read(there, number) if number else ({}, 0.0)
    except FileNotFoundError:  # tidied up by who has succeeded it
        return last(folder)
    return Last(number, found, touched, f"{_name(number)}.left" in names)


def age(folder: Path, claim: Last) -> float:
    """Seconds since a claim's last heartbeat, by the clock of the file system or the store."""
    return lying(folder).age(_name(claim.number), claim.touched)


def begun(folder: Path) -> bool:
    """Whether anybody has ever claimed the work of a folder."""
    return _newest(lying(folder)) > 0


class Claim(contextlib.AbstractContextManager):
    """A claim that is held: it is touched until it ends. `lost` tells whether another process has taken it over."""

    def __init__(self, path: Path, text: str, there: Files | Objects, stale: float):
        self.path, self.number, self._end = path, int(path.name.rpartition("-")[2]), threading.Event()
        self._text, self._there = text, there
        self._thread = threading.Thread(target=self._beat, args=(stale * there.beat,), daemon=True)
        self._thread.start()

    def _beat(self, every: float) -> None:
        while not self._end.wait(every):
            with contextlib.suppress(Exception):  # what is away may come back
                self._there.touch(self.path.name, self._text)

    @property
    def lost(self) -> bool:
        """Whether another process has taken the work over, as this one seemed dead."""
        return _newest(self._there) > self.number

    @property
    def alone(self) -> bool:
        """Whether of several that try at once one alone gets the claim: a store may not know how to refuse others."""
        return self._there.refuses(self.path.name, self._text)

    def tidy(self) -> None:
        """Removes what earlier holders have left. The claim of the highest number stays: no number comes twice."""
        for name in self._there.names():
            if name != self.path.name:
                self._there.remove(name)

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(timeout=10)  # it may hang in a file system that is away
        with contextlib.suppress(Exception):  # a full disk: the claim is free when this process ends
            self._there.leave(self.path.name)


def lying(folder: Path) -> Files | Objects:
    """Claims as they lie in a folder."""
    return Objects(folder) if stores.is_remote(folder) else Files(folder)


def _name(number: int) -> str:
    return f"claim-{number:04d}"


def _highest(names: list[str]) -> int:
    """The number of the claim that counts; 0: there is none."""
    return max((int(found[1]) for found in (re.fullmatch(r"claim-(\d+)", name) for name in names) if found), default=0)


def _newest(there: Files | Objects) -> int:
    return _highest(there.names())


def _free(there: Files | Objects, number: int, stale: float) -> bool:
    """Whether the work may be taken over from the holder of a claim."""
    if f"{_name(number)}.left" in there.names():
        return True
    found, touched = _read(there, number)
    # A holder whose clock has been set back is soon touched by it again.
    return _dead(found) or there.age(_name(number), touched) > stale


def _read(there: Files | Objects, number: int) -> tuple[dict, object]:
    """What a claim says, {} where it cannot be read, and what a heartbeat changes."""
    text, touched = there.read(_name(number))
    try:
        found = files.parsed(text)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}, touched


# ---- who holds a claim


def identity() -> dict:
    """This process: its machine (as booted, and its space of process numbers), its number, when it was born."""
    return {
        "worker": name(), "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
        "born": _born(os.getpid()),
    }  # fmt: skip


def name() -> str:
    """What this process is called: as its launcher says, else by host and process number."""
    return os.environ.get("TLJAX_WORKER") or f"{socket.gethostname()}:{os.getpid()}"


@functools.cache
def _machine() -> str:
    """Tells machines, boots and containers apart, whatever they call themselves."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _dead(found: dict) -> bool:
    """Whether a claim's process was on this machine and is no more."""
    try:
        return found["machine"] == _machine() and _born(found["pid"]) not in (found["born"], "alive")
    except (LookupError, TypeError, ValueError, OverflowError):
        return False


def alive(found: dict) -> bool | None:
    """Whether a process, of which one has the `identity`, lives; None where that is not to be known from here."""
    return None if not found.get("machine") or found["machine"] != _machine() else not _dead(found)


def mark() -> str:
    """This process within a file's name, by which others of its machine can tell whether it lives (`died`)."""
    return f"{_short_machine()}.{os.getpid()}.{_born(os.getpid())}"


def died(of: str) -> bool | None:
    """Whether the process of a `mark` is dead; None where that is not to be known from here."""
    machine, _, process = of.partition(".")
    pid, _, born = process.partition(".")
    if machine != _short_machine() or not pid.isdigit():
        return None
    return _born(int(pid)) not in (born, "alive")


def _short_machine() -> str:
    return hashlib.sha256(_machine().encode()).hexdigest()[:8]


def _born(pid: int) -> str:
    """When a process of this machine began, in ticks; "" where there is none, "alive" where that is all one may know.

    A killed process whose parent has not asked for its end is there no more.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, LookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
