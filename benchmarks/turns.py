"""Processes that take turns: each waits for the name of what it is to do, does it, and tells the seconds.

So all see the same machine, a drift of its clock or of its load falls on each alike, and none finds the memory or the
libraries of another in its process.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

PAUSE = 0.3  # seconds, after which the threads of the process before have stopped to spin


def serve(functions: Callable[[], dict[str, Callable[[], float | None]]]) -> None:
    """Answers each line of stdin, the name of a function, with the seconds it took, or those that it returns.

    `functions()` makes them, once stdout is out of the libraries' reach.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    made = functions()
    for line in sys.stdin:
        begun = time.perf_counter()
        told = made[line.strip()]()
        print(time.perf_counter() - begun if told is None else told, file=answers)


class Process:
    """The other end of `serve`."""

    def __init__(self, *command: str, **environment: str):
        self.process = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def seconds(self, what: str) -> float:
        """What the process tells of one call."""
        time.sleep(PAUSE)
        print(what, file=self.process.stdin)
        told = self.process.stdout.readline()
        if not told:
            raise SystemExit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return float(told)

    def close(self) -> None:
        """Ends it."""
        self.process.stdin.close()
        self.process.wait()


def medians(processes: dict[str, Callable[[], Process]], whats: tuple[str, ...], repeats: int, together: bool) -> dict:
    """{what: {name: median seconds}}; the first call of each is not measured. `together`: they take turns."""
    found = {what: {name: [] for name in processes} for what in whats}
    for names in [tuple(processes)] if together else [(name,) for name in processes]:
        running = {name: processes[name]() for name in names}
        try:
            for what in whats:
                for name in names:
                    running[name].seconds(what)
                for _ in range(repeats):
                    for name in names:
                        found[what][name].append(running[name].seconds(what))
        finally:
            for process in running.values():
                process.close()
    return {what: {name: float(np.median(s)) for name, s in by.items()} for what, by in found.items()}
