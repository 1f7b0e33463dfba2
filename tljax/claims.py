"""Work that several processes share through a folder: files that appear whole, and claims that outlive no worker.

A piece of work has a folder of its own. Who begins it makes the file `claim-0001` there, and touches it every few
seconds. Claims are never removed, and the one of the highest number counts. It is free where a `claim-0001.left` lies
beside it, where nobody has touched it for `stale` seconds, or where its process was on this machine and is dead; it is
taken over by making `claim-0002`. Of several that try, one succeeds, and who has lost a claim finds the higher number.

Of the folder it is assumed that a hard link, or an exclusive creation, succeeds for one process alone (NFS: yes), and
that a touched file gets the time of the file system. No two machines' clocks are compared: what is now is read from a
file that is made for it.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tljax import files

STALE = 60.0  # seconds without a heartbeat, after which a holder counts as dead
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
POLL = 0.2  # seconds between two looks at what another process does


def publish(path: Path, text: str) -> bool:
    """Writes a file whole, unless there is one; returns whether it is this one. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return os.stat(temporary).st_nlink == 2  # NFS may repeat a request that had succeeded
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _created(path, text)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _created(path: Path, text: str) -> bool:
    """As `publish`, where there are no hard links: exclusive, but for a moment not whole."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


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
        newest = _newest(folder)
        if newest and not _free(folder, newest, stale):
            return None
        return succeed(folder, newest, stale)
    except FileNotFoundError:  # another process has just removed the folder
        return None


def succeed(folder: Path, number: int, stale: float = STALE) -> "Claim | None":
    """Claims work of which the claim of this number, the last one that was seen, is free; None: another was faster."""
    path = folder / f"claim-{number + 1:04d}"
    try:
        if not publish(path, json.dumps(identity() | {"since": time.strftime("%F %T")}) + "\n"):
            return None
    except FileNotFoundError:  # removed by who was faster, and has tidied up
        return None
    if _newest(folder) > number + 1:  # so was the claim of this number
        path.unlink(missing_ok=True)
        return None
    return Claim(path, stale)


def holder(folder: Path, stale: float = STALE) -> dict | None:
    """Who is at the work of a folder: {"worker", "host", "pid", "since", …}; None where nobody is."""
    newest = _newest(folder)
    if not newest or _free(folder, newest, stale):
        return None
    # A claim that is being written, or is damaged, does not say who.
    return {"worker": "another worker", "since": "now"} | _read(folder / f"claim-{newest:04d}")[0]


class Last(NamedTuple):
    """The claim that counts: its number (0: there is none), whose it is, when it was touched, whether it was left."""

    number: int
    identity: dict
    touched: float
    left: bool


def last(folder: Path) -> Last:
    """The claim that counts."""
    number = _newest(folder)
    path = folder / f"claim-{number:04d}"
    try:
        found, touched = _read(path) if number else ({}, 0.0)
    except FileNotFoundError:  # tidied up by who has succeeded it
        return last(folder)
    return Last(number, found, touched, path.with_name(f"{path.name}.left").exists())


def age(folder: Path, claim: Last) -> float:
    """Seconds since a claim was touched, by the clock of the file system; what is to come has been long ago."""
    return abs(now(folder) - claim.touched)


def begun(folder: Path) -> bool:
    """Whether anybody has ever claimed the work of a folder."""
    return _newest(folder) > 0


class Claim(contextlib.AbstractContextManager):
    """A claim that is held: it is touched until it ends. `lost` tells whether another process has taken it over."""

    def __init__(self, path: Path, stale: float):
        self.path, self.number, self._end = path, int(path.name.rpartition("-")[2]), threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(stale / 10,), daemon=True)
        self._thread.start()

    def _beat(self, every: float) -> None:
        while not self._end.wait(every):
            with contextlib.suppress(OSError):  # a file system that is away may come back
                os.utime(self.path)

    @property
    def lost(self) -> bool:
        """Whether another process has taken the work over, as this one seemed dead."""
        return _newest(self.path.parent) > self.number

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(timeout=10)  # it may hang in a file system that is away
        with contextlib.suppress(OSError):  # a full disk: the claim is free when this process ends
            self.path.with_name(f"{self.path.name}.left").touch()


def _newest(folder: Path) -> int:
    """The number of the claim that counts; 0: there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(found[1]) for found in (re.fullmatch(r"claim-(\d+)", name) for name in names) if found), default=0)


def _free(folder: Path, number: int, stale: float) -> bool:
    """Whether the work may be taken over from the holder of a claim."""
    path = folder / f"claim-{number:04d}"
    if path.with_name(f"{path.name}.left").exists():
        return True
    found, touched = _read(path)
    # A holder whose clock has been set back is soon touched by it again.
    return _dead(found) or abs(now(folder) - touched) > stale


def _read(path: Path) -> tuple[dict, float]:
    """What a claim says, {} where it cannot be read, and when it was touched (opened, so that NFS looks it up anew)."""
    with path.open() as file:
        touched = os.fstat(file.fileno()).st_mtime
        try:
            found = files.parsed(file.read())
        except ValueError:
            found = {}
    return found if isinstance(found, dict) else {}, touched


def now(folder: Path) -> float:
    """The time of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as file:
        return os.fstat(file.fileno()).st_mtime


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
