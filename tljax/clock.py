"""Where a run's time goes."""

import contextlib
import time


class Clock:
    """`seconds` of each part; a moment belongs to one part alone."""

    def __init__(self, **seconds: float):
        self.seconds = seconds

    @contextlib.contextmanager
    def __call__(self, part: str):
        """Adds the time spent inside to the part's, but for what goes to parts within it."""
        begun = self.tick()
        try:
            yield
        finally:
            self.add(part, self.tick() - begun)

    def add(self, part: str, seconds: float) -> None:
        """Adds to a part's seconds."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def tick(self) -> float:
        """Seconds, of which those that a part has taken are none."""
        return time.perf_counter() - sum(self.seconds.values())
