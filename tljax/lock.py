"""One run at a time in a workdir: a claim (`tljax.claims`) in its folder `.lock`, on a file system or in a store.

The processes of one run are one holder, process 0. A holder on this machine has the workdir as long as its process
lives, however long it sleeps; one on another machine as long as its heartbeat is seen to move. So no clock decides, and
who has been killed is in nobody's way for longer than `claims.STALE`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from tljax import claim_objects, claims, stores
from tljax.agreement import first_said
from tljax.errors import UserError

FOLDER = ".lock"
WAIT, TAKEN = "wait", "taken"
LOOK = 1.0  # seconds between two looks at another machine's heartbeat


class Lock(contextlib.AbstractContextManager):
    """The lock of a workdir: taken by `take`, left with the context."""

    def __init__(self, workdir: str | os.PathLike):
        self.path = stores.place(workdir, "--workdir") if stores.is_remote(workdir) else Path(workdir)
        self.claim: claims.Claim | None = None
        self._handler = None  # of SIGTERM, before

    def take(self, say: Callable[[str], None] = print) -> None:
        """Makes this run the workdir's. Raises UserError, in all processes, that names the run which is in it.

        In a store that cannot keep others out that is said, and the run goes on.
        """
        states = self._states(say) if jax.process_index() == 0 else iter(lambda: "", None)
        while (state := first_said(next(states))) == WAIT:
            pass
        if state != TAKEN:
            raise UserError(state)
        # Where nothing else takes SIGTERM (`tljax.termination`, of several processes JAX) it ends the process, which
        # on another machine would seem to live for a while.
        ours = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._handler = signal.signal(signal.SIGTERM, self._terminated)

    def check(self) -> None:
        """Raises UserError where another run has taken the workdir over, as this one seemed dead."""
        if self.claim and self.claim.lost:
            found = claims.last(self.claim.path.parent).identity
            raise UserError(f"{self._in_use(found)}; it took this one for dead")

    def _terminated(self, number, _):
        self.__exit__()
        os.kill(os.getpid(), number)

    def __exit__(self, *_):
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None
        if self.claim:
            self.claim.__exit__()
            self.claim = None

    def _states(self, say: Callable[[str], None]) -> Iterator[str]:
        """WAIT, as often as one has to, then TAKEN or why not."""
        remote = stores.is_remote(self.path)
        try:
            folder = self.path / FOLDER
            if remote and (why := claim_objects.lacking(folder)):
                say(f"nothing keeps another run out of {self.path}: {why}")
                yield TAKEN
            if not remote:
                folder.mkdir(parents=True, exist_ok=True)
            while not self.claim:
                last = claims.last(folder)
                if last.number and not last.left:
                    alive = claims.alive(last.identity)
                    if alive is None:
                        seen = Heartbeat(folder, last, say)
                        while (alive := seen.alive()) is None:
                            yield WAIT
                            time.sleep(LOOK)
                    if alive:
                        yield self._in_use(last.identity)
                        return
                self.claim = claims.succeed(folder, last.number)
            self.claim.tidy()
            if not self.claim.alone:
                say(f"two runs that begin at once are not kept apart in {self.path}: what is there is overwritten")
        except UserError as error:
            yield str(error)
        except Exception as error:  # a store's library raises any kind
            if not remote and not isinstance(error, OSError):
                raise
            why = stores.explained(error, str(self.path)) if remote else error.strerror or error
            yield f"cannot write to {self.path}: {why}"
        yield TAKEN

    def _in_use(self, found: dict) -> str:
        who = f"process {found.get('pid', '?')} on {found.get('host', '?')}, since {found.get('since', '?')}"
        return f"another run is in {self.path}: {who}; wait for its end, or give another --workdir"


class Heartbeat:
    """Whether the heartbeat of a holder on another machine moves, of which one may have to see a while."""

    def __init__(self, folder: Path, last: claims.Last, say: Callable[[str], None]):
        self.folder, self.last = folder, last
        # Two beats at least: it may seem old where the clock has jumped.
        least = 2 * claims.STALE * claims.lying(folder).beat
        self.patience = max(least, claims.STALE - claims.age(folder, last))
        self.begun = time.monotonic()
        host, pid = (last.identity.get(name, "?") for name in ("host", "pid"))
        say(f"process {pid} on {host} was here before: looking for {self.patience:.0f} s whether it lives")

    def alive(self) -> bool | None:
        """None: not known yet."""
        now = claims.last(self.folder)
        if now.number != self.last.number or now.touched != self.last.touched:
            return not now.left
        return False if time.monotonic() > self.begun + self.patience else None
