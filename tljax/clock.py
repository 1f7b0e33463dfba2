"""Where a run's time goes."""

import contextlib
import time


class Clock:
    """`seconds` of each part; a moment belongs to one part alone. `part` is the one it is in, `since` then."""

    def __init__(self, **seconds: float):
        self.seconds = seconds
        self.enter("start")

    def enter(self, part: str) -> None:
        """From now on it is in that part, as one may ask from other threads."""
        self.part, self.since = part, time.monotonic()

    @contextlib.contextmanager
    def __call__(self, part: str):
        """Adds the time spent inside to the part's, but for what goes to parts within it."""
        begun, around = self.tick(), self.part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(around)
            self.add(part, self.tick() - begun)

    def add(self, part: str, seconds: float) -> None:
        """Adds to a part's seconds."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def tick(self) -> float:
        """Seconds, of which those that a part has taken are none."""
        return time.perf_counter() - sum(self.seconds.values())
