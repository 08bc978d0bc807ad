"""Memory and pairs per second of a run, in equal windows. Does not know what is streamed."""

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.memory import MIN_POINTS, fit_slope
from benchmarks.processes import resident_mb


@dataclass(frozen=True)
class Window:
    """An equal part of a run."""

    seconds: float
    pairs: int
    resident_mb: float
    """At the end of the window."""
    load_average: float
    """Of the machine over the last minute: processes that compute or wait for the disk."""


class Windows:
    """The windows of a run so far.

    Args:
        of_pairs, of_seconds: length of a window; the one that is not None counts.
    """

    def __init__(self, *, of_pairs: int | None = None, of_seconds: float | None = None) -> None:
        self._of_pairs, self._of_seconds = of_pairs, of_seconds
        self._pairs, self._opened = 0, time.perf_counter()
        self.finished: list[Window] = []

    def update(self, pairs: int) -> bool:
        """Say how many pairs there are by now; whether a window has ended."""
        now = time.perf_counter()
        by_pairs = self._of_pairs is not None and pairs - self._pairs >= self._of_pairs
        by_time = self._of_seconds is not None and now - self._opened >= self._of_seconds
        if not by_pairs and not by_time:
            return False
        measured = (now - self._opened, pairs - self._pairs, resident_mb(), round(os.getloadavg()[0], 2))
        self.finished.append(Window(*measured))
        self._pairs, self._opened = pairs, now
        return True

    def summary(self) -> dict[str, Any]:
        """Growth over the windows after the first, which warms up, and all windows."""
        later = [window.resident_mb for window in self.finished[1:]]
        pairs = sum(window.pairs for window in self.finished)
        growth = None
        if len(later) >= MIN_POINTS:
            growth = fit_slope(later).scaled(1000 * len(self.finished) / pairs)
        seconds = sum(window.seconds for window in self.finished)
        return {
            "seconds": seconds,
            "pairs": pairs,
            "pairs_per_s": pairs / seconds,
            "resident_mb_per_1000_pairs": growth,
            "windows": [asdict(window) for window in self.finished],
        }
