"""A run seen from outside: its heartbeat, the stacks of its threads when it stalls, and what starves it.

`heartbeat.json` says where the run is; a thread of its own writes it every few seconds, and `python -m tljax.status`
reads it. Nothing here stops a run: where the disk is full, the heartbeat is old.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from tljax import claims, command, durations, writers
from tljax.clock import Clock
from tljax.compiles import Compiles
from tljax.errors import Diverged, UserError
from tljax.profiling import Profile
from tljax.report import text
from tljax.report.console import Console
from tljax.waiting import InputWait
from tljax.workdir import Workdir

EVERY = 15.0  # seconds between two heartbeats
FILE, STACKS = "heartbeat.json", "stacks.txt"
STARVED = 0.2  # share of the time in training without a batch, from which on it is worth a line
ENOUGH = 30.0  # seconds in training, before which nothing is said of it


class Watch:
    """Watches a run through `over`, and notes how it ends; writes in its workdir from `begin` on.

    After config.stall without a step, a part's begin or a batch of an evaluation, the stacks of all threads are
    appended to `stacks.txt` (before `begin`: written to stderr), a line says so, and the run goes on.
    """

    def __init__(self, config: ConfigDict, workdir: Workdir, clock: Clock, console: Console):
        writers.check(config)
        self.config, self.workdir, self.clock, self.console = config, workdir, clock, console
        self.profile = Profile(config.profile, workdir, self.say, clock)
        self.compiles = Compiles()
        self.stall = durations.seconds(config.stall, "stall")
        self.step, self.total, self.begun, self.stalled, self.starving = 0, 0, False, False, False
        self._pace = None  # the first step of this process, and when
        self._alive = time.monotonic()
        self._patience = self.stall
        self._stacks = ""
        self._end, self._thread = threading.Event(), None
        self._process = jax.process_index()

    # ---- what the run tells

    def over(self, work: Callable[[], int]) -> int:
        """Returns the exit code of a run's `work`, watched to its end."""
        end = {"end": "failed", "why": ""}
        self._start()
        try:
            code = work()
            end = _end(code)
            return code
        except BaseException as error:
            end = _failure(error)
            raise
        finally:
            self.profile.close()
            self._end.set()
            self._thread.join(EVERY)
            self._beat(end)
            with contextlib.suppress(UserError):  # on a full disk, of which the run has told
                self.workdir.close()

    def begin(self) -> None:
        """The workdir is this run's, and gets its heartbeat."""
        self.begun = True
        self._start()

    def _start(self) -> None:
        if not self._thread:
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()

    def expect(self, total: int) -> None:
        """The run has so many steps in all. Raises UserError where config.profile asks for others."""
        self.profile.check(total)
        self.total = total

    def steps(self, start: int) -> InputWait:
        """The loop goes on behind step `start`. Returns what measures its input wait."""
        self.step, self._pace = start, None
        self.profile.begin(start)
        self.clock.enter("train")
        return InputWait(self._stepped)

    def alive(self) -> None:
        """Something other than a step has been done, as a batch of an evaluation."""
        self._alive = time.monotonic()

    def _stepped(self) -> None:
        self._alive, self.step = time.monotonic(), self.step + 1
        if self._pace is None:
            self._pace = self._alive, self.step

    def waited(self, seconds: float, cached: bool) -> None:
        """Says once, in a line, that the devices have waited so long for input, and what to change."""
        spent = self.clock.seconds.get("train", 0.0)
        if self.starving or spent < ENOUGH or seconds < STARVED * spent:
            return
        self.starving = True
        data, cores = self.config.data, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        more = [f"config.data.threads = {cores} (it is {data.threads}; so many cores)"] if cores > data.threads else []
        if not cached:
            more.append("config.cache_views = 4 (a frozen prefix is computed once)")
        more.append("a smaller config.image_size")
        share = text.percent(seconds / spent, 0)
        self.say(f"the devices have waited for input for {share} of the time in training; try {', '.join(more)}")

    def say(self, line: str) -> None:
        """A line on the console, and on stderr in processes other than 0 (`tljax.relay` gives it their number)."""
        if self.console.enabled:
            self.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)

    # ---- the thread

    def _watch(self) -> None:
        tick = min(EVERY, self.stall / 4) if self.stall else EVERY
        due = 0.0
        while True:
            with contextlib.suppress(Exception):
                if self.stall:
                    # Should a thread never give Python's lock back, this one cannot look: then C code does.
                    faulthandler.dump_traceback_later(self.stall + 2 * tick, file=sys.__stderr__)
                now = time.monotonic()
                if self._look(now) or now >= due:
                    due = now + EVERY if self.begun else 0.0
                    self._beat()
            if self._end.wait(tick if self.begun else min(tick, 1.0)):
                break
        faulthandler.cancel_dump_traceback_later()

    def _look(self, now: float) -> bool:
        """Looks whether the run stalls; returns whether that has changed."""
        quiet = now - max(self._alive, self.clock.since)
        if not self.stall or (quiet < self.stall and not self.stalled):
            return False
        if quiet < self.stall:
            self.stalled, self._patience = False, self.stall
            self.say(f"the run goes on, in {self.clock.part}, at step {self.step}")
            return True
        if quiet < self._patience:
            return False
        self.stalled, self._patience = True, 2 * quiet  # each silence is told a few times at most
        part = self.clock.part
        doing = f"step {self.step} of {self.total} was the last" if part == "train" else f"the run is in {part}"
        line = f"no step for {text.duration(quiet)}: {doing}"
        where = self._dump(line)
        self._beat()
        self.say(f"{line}; the run goes on; the stacks of all threads are in {where}")
        return True

    def _dump(self, line: str) -> str:
        """Appends the stacks of all threads to this process's file of them; returns where they are."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        names = "".join(f"Thread 0x{thread.ident:016x}: {thread.name}\n" for thread in threading.enumerate())
        if not self.begun:
            print(names, stacks, sep="\n", file=sys.stderr, flush=True)
            return "stderr"
        name = STACKS if not self._process else f"stacks-{self._process}.txt"
        self._stacks += f"{time.strftime('%F %T')} {claims.name()}: {line}\n{names}\n{stacks}\n"
        with contextlib.suppress(Exception):
            Workdir(self.workdir.path).write(name, self._stacks)
        return f"{self.workdir.path / name}"

    def _beat(self, end: dict | None = None) -> None:
        """Writes the heartbeat, or the last one, which says how the run has ended; of a workdir that it holds alone."""
        if not self.begun:
            return
        now, wall = time.monotonic(), time.time()
        ago = lambda moment: round(wall - (now - moment), 3)
        part, since, step = self.clock.part, self.clock.since, self.step
        left = None
        if self._pace and step > self._pace[1]:
            left = round((self._alive - self._pace[0]) / (step - self._pace[1]) * (self.total - step), 1)
        told = {
            "step": step, "total": self.total, "left": left, "part": part, "since": ago(since),
            "alive": ago(max(self._alive, since)), "stalled": self.stalled, "time": round(wall, 3),
            "every": EVERY, **(end or {"end": "", "why": ""}), **claims.identity(),
        }  # fmt: skip
        with contextlib.suppress(Exception):
            self.workdir.write(FILE, json.dumps(told) + "\n")


def _end(code: int) -> dict:
    """How a run has ended that has returned an exit code."""
    if code == 0:
        return {"end": "finished", "why": ""}
    try:
        return {"end": "stopped", "why": f"by {signal.Signals(code - 128).name}"}
    except ValueError:
        return {"end": "stopped", "why": f"exit code {code}"}


def _failure(error: BaseException) -> dict:
    """How a run has ended that has raised an exception."""
    if isinstance(error, KeyboardInterrupt):
        return {"end": "stopped", "why": "by SIGINT"}
    line = command.explained(error) if isinstance(error, Exception) else None
    line = line or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return {"end": "diverged" if isinstance(error, Diverged) else "failed", "why": line}
