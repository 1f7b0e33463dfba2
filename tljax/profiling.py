"""A window of steps seen by JAX's profiler: `--config.profile=steps:100-110`."""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tljax import durations, stores
from tljax.clock import Clock
from tljax.errors import UserError
from tljax.workdir import Workdir


class Profile:
    """Calls the train step, and traces the calls of its window; says where the trace is and how to look at it.

    Only the process that writes does.
    """

    def __init__(self, window: str, workdir: Workdir, say: Callable[[str], None], clock: Clock):
        self.text, self.say, self.clock = window, say, clock
        self.folder, self.near = workdir.path / "profile", workdir.near / "profile"  # the same, but for a store's
        self.window = durations.window(window, "profile") if workdir.writes else None
        self._first = self._before = None  # the first step of a trace that runs; the result of the step before it

    def check(self, total: int) -> None:
        """Raises UserError where a run of so many steps never gets to the window's end."""
        if self.window and self.window[1] > total:
            raise UserError(f"config.profile = {self.text!r}: the run has {total} steps")

    def begin(self, start: int) -> None:
        """The run goes on behind step `start`: says what of the window is behind it already."""
        if not self.window or self._first or start < self.window[0]:
            return
        last = self.window[1]
        self.window = (start + 1, last) if start < last else None
        rest = f"steps {start + 1}–{last} are profiled" if self.window else "nothing is profiled"
        self.say(f"config.profile = {self.text!r}: the run goes on from step {start}; {rest}")

    def __call__(self, step: int, train_step: Callable, *arguments):
        """Returns `train_step(*arguments)`, (the state, the metrics) of a step."""
        if not self.window:
            return train_step(*arguments)
        first, last = self.window
        if step == first:
            with self.clock("profile"):  # not of the time in training
                self._start(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, measured = train_step(*arguments)
        self._before = measured
        if step == last and self._first:
            jax.block_until_ready(measured)
            with self.clock("profile"):
                self._stop(step)
        return state, measured

    def close(self) -> None:
        """Ends a trace that still runs, where the run ends within its window."""
        if self.window and self._first:
            self._stop(None)

    def _start(self, step: int) -> None:
        jax.block_until_ready(self._before)  # steps run asynchronously: those before would be in the trace
        self._begun = time.perf_counter()
        try:
            jax.profiler.start_trace(self.near)
            self._first = step
        except Exception as error:  # another profiler in this process, a read-only folder
            self._failed(error)

    def _stop(self, last: int | None) -> None:
        with contextlib.suppress(Exception):  # raised where the metrics are read
            jax.block_until_ready(self._before)
        spent, first = time.perf_counter() - self._begun, self._first
        steps = f"steps {first}–{last}" if last else f"the steps from {first} on"
        self.window = self._first = self._before = None
        try:
            jax.profiler.stop_trace()
            if self.near != self.folder:
                _move(self.near, self.folder)
            traces = sorted(self.folder.glob("plugins/profile/*/*.trace.json.gz"))
        except Exception as error:  # a full disk
            return self._failed(error)
        perfetto = f", or open {traces[-1]} at https://ui.perfetto.dev" if traces else ""
        self.say(
            f"profile of {steps} ({spent:.2f} s) in {self.folder}: pip install xprof && "
            f"xprof --logdir={self.folder} (or TensorBoard){perfetto}"
        )

    def _failed(self, error: Exception) -> None:
        self.window = None
        self.say(f"config.profile = {self.text!r}: no profile: {' '.join(str(error).split())[:200]}")


def _move(near: Path, far: Any) -> None:
    """Copies a local folder to a store, and removes it."""
    for file in sorted(near.rglob("*")):
        if file.is_file():
            stores.upload(file, far / file.relative_to(near).as_posix())
    shutil.rmtree(near, ignore_errors=True)
