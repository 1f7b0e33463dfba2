"""The input wait: how long the device has nothing to do because the next batch is not there.

Steps run asynchronously: while one computes, the loop fetches the next batch and puts it on the device. Time spent on a
batch is therefore lost only from the moment at which the device has finished all that it was given. A thread of its own
notes that moment, so that the loop itself never waits for a step.
"""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class InputWait:
    """`seconds` in which the device was idle between the asking for a batch and its step.

    `finished` is called, in a thread, whenever the device has finished a step.
    """

    def __init__(self, finished: Callable[[], None] = lambda: None):
        self.seconds, self.finished = 0.0, finished
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="input-wait")
        self._last = None  # a future: when the device had finished the last step that was given to it

    def __enter__(self) -> "InputWait":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(wait=False)

    def given(self, result: Any) -> None:
        """A step with such a result (arrays that are not donated) has been given to the device."""
        self._last = self._thread.submit(self._finish, result)

    def arrived(self, asked: float, busy: float = 0.0) -> None:
        """The next step's batch is on its way to the device; `asked`: when the loop asked for it (`time.perf_counter`).

        busy: seconds since then in which the device has worked for the batch.
        """
        if self._last is not None and self._last.done():
            self.seconds += max(0.0, time.perf_counter() - max(asked, self._last.result()) - busy)

    def _finish(self, result: Any) -> float:
        with contextlib.suppress(Exception):  # raised where the result is read
            jax.block_until_ready(result)
            self.finished()
        return time.perf_counter()
