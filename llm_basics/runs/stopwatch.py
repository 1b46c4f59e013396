"""A stopwatch that can be paused."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Measures laps and the total time since its creation."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start, without pauses."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def total(self) -> float:
        """Seconds since the start, including pauses."""
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within the context from the lap."""
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began
