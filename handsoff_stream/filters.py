"""Score => keep. A filter sees one uncertainty score a sample, in the order of the shard's indices, and says which
samples are worth training on (HandsOff, sections 3.3 and 4.1: the most uncertain 10 % are dropped).

`push(score)` returns the decisions that this score settles, oldest first: one at once for a rolling percentile or a
threshold, a block's worth at the end of each block for a block quantile. Knows floats. Does not know tasks, tensors or
networks. Which filters need history, and so cannot promise the same choice for another number of ranks, is the
attribute `index_only`.
"""

import math
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from handsoff_stream.errors import StreamError


class Filter(ABC):
    """Decides which samples are kept. Lifecycle: `start(calibration)` once, then `push` score by score."""

    name: ClassVar[str]
    index_only: ClassVar[bool]
    """True if a decision depends on the sample's index (or its block) alone, not on what this shard saw before."""
    span: int = 1
    """Consecutive, aligned indices that must be pushed by one shard, from the first to the last."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Options, JSON-able; part of the stream's fingerprint."""

    def start(self, calibration: Sequence[float]) -> None:
        """Forget all history; begin with the scores that the checkpoint was calibrated with (may be none)."""
        del calibration

    @abstractmethod
    def push(self, score: float) -> list[bool]:
        """Take the next score; return the decisions that are now settled, oldest sample first."""

    def state_dict(self) -> dict[str, Any]:
        """History, JSON-able."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a filter with the same options."""
        del state


class RollingPercentile(Filter):
    """Keep a sample whose score is at most a percentile of the last `window` scores, rejected ones included.

    Args:
        percentile: in (0, 100]; 90 drops the most uncertain tenth.
        window: scores remembered; the threshold's rank then has a standard deviation of
            sqrt(p (1 - p) / window), 0.7 % at the defaults.
    """

    name = "rolling"
    index_only = False

    def __init__(self, percentile: float = 90.0, *, window: int = 2000):
        self.percentile = _checked_percentile(percentile)
        if window < 1:
            raise ValueError(f"window={window} remembers no score; pass at least 1, 2000 is the default")
        self.window = window
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "percentile": self.percentile, "window": self.window}

    def start(self, calibration: Sequence[float]) -> None:
        self._recent = deque(float(score) for score in calibration[-self.window :])
        self._sorted = sorted(self._recent)

    def push(self, score: float) -> list[bool]:
        keep = not self._sorted or score <= self._sorted[self._rank(len(self._sorted))]
        if len(self._recent) == self.window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(score)
        insort(self._sorted, score)
        return [keep]

    def _rank(self, count: int) -> int:
        # The smallest score with at least `percentile` percent of the window at or below it.
        return max(math.ceil(count * self.percentile / 100) - 1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start(state["recent"])


class BlockQuantile(Filter):
    """In each block of `block` consecutive indices, drop the most uncertain ones.

    The streaming form of "generate, sort, drop the top 10 %": exactly that share of every block goes, ties broken by
    index, and membership depends on nothing but the index. A block is held until its last score is known.

    Args:
        percentile: in (0, 100]; the kept share of each block, rounded up to whole samples.
        block: indices a block.
    """

    name = "block"
    index_only = True

    def __init__(self, percentile: float = 90.0, *, block: int = 100):
        self.percentile = _checked_percentile(percentile)
        if block < 1:
            raise ValueError(f"block={block} holds no index; pass at least 1, 100 is the default")
        self.span = block
        self._scores: list[float] = []

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "percentile": self.percentile, "block": self.span}

    def start(self, calibration: Sequence[float]) -> None:
        self._scores = []

    def push(self, score: float) -> list[bool]:
        self._scores.append(score)
        if len(self._scores) < self.span:
            return []
        order = sorted(range(self.span), key=self._scores.__getitem__)
        kept = set(order[: math.ceil(self.span * self.percentile / 100)])
        self._scores = []
        return [i in kept for i in range(self.span)]


class Threshold(Filter):
    """Keep a sample whose score is at most a fixed value, by default a percentile of the calibration scores.

    Args:
        percentile: in (0, 100], of the calibration scores; unused if `value` is given.
        value: the threshold itself, in the unit of the score.
    """

    name = "threshold"
    index_only = True

    def __init__(self, percentile: float = 90.0, *, value: float | None = None):
        self.percentile = _checked_percentile(percentile)
        self.value = value
        self._threshold = value

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "percentile": self.percentile, "value": self.value}

    def start(self, calibration: Sequence[float]) -> None:
        if self.value is not None:
            return
        if not calibration:
            raise ValueError(
                "this checkpoint has no calibration scores for these options, so Threshold has nothing to take a "
                "percentile of; pass Threshold(value=...) or use filter='rolling'"
            )
        rank = math.ceil(len(calibration) * self.percentile / 100) - 1
        self._threshold = sorted(calibration)[max(rank, 0)]

    def push(self, score: float) -> list[bool]:
        assert self._threshold is not None, "start() sets the threshold"
        return [score <= self._threshold]


class KeepAll(Filter):
    """Keep everything; `filter=None`."""

    name = "none"
    index_only = True

    def config(self) -> dict[str, Any]:
        return {"name": self.name}

    def push(self, score: float) -> list[bool]:
        return [True]


FILTERS: dict[str, type[Filter]] = {f.name: f for f in (RollingPercentile, BlockQuantile, Threshold)}


def make_filter(choice: "str | Filter | None") -> Filter:
    """`"rolling"`, `"block"`, `"threshold"`, None, or a filter of your own => the filter.

    Raises:
        ValueError: unknown name.
    """
    if choice is None:
        return KeepAll()
    if isinstance(choice, Filter):
        return choice
    if choice not in FILTERS:
        raise ValueError(f"filter={choice!r} is unknown; pass one of {sorted(FILTERS)}, None or a Filter object")
    return FILTERS[choice]()


class RejectionMonitor:
    """Counts what a filter does and speaks up when it rejects nearly everything.

    Attributes:
        accepted, rejected: samples so far.

    Raises:
        StreamError: from `count`, when more than `RAISE_SHARE` of the last `WINDOW` samples were rejected.
    """

    WINDOW = 1000
    WARN_SHARE = 0.5
    RAISE_SHARE = 0.99

    def __init__(self, filter: Filter):
        self._filter = filter.config()
        self.accepted = 0
        self.rejected = 0
        self._window_rejected = 0
        self._window_seen = 0
        self._warned = False

    def count(self, kept: bool) -> None:
        """Note one decision."""
        self.accepted += kept
        self.rejected += not kept
        self._window_seen += 1
        self._window_rejected += not kept
        if self._window_seen == self.WINDOW:
            share, self._window_seen, self._window_rejected = self._window_rejected / self.WINDOW, 0, 0
            self._judge(share)

    def _judge(self, share: float) -> None:
        message = (
            f"{share:.1%} of the last {self.WINDOW} samples were rejected by {self._filter}: training data comes at "
            "a trickle. Look at them with `handsoff-stream preview`; raise the percentile or the threshold, lower "
            "the truncation, or pass filter=None"
        )
        if share >= self.RAISE_SHARE:
            raise StreamError(message)
        if share > self.WARN_SHARE and not self._warned:
            warnings.warn(message, stacklevel=2)
            self._warned = True

    def state_dict(self) -> dict[str, int]:
        return {
            "accepted": self.accepted,
            "rejected": self.rejected,
            "window_seen": self._window_seen,
            "window_rejected": self._window_rejected,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.accepted, self.rejected = state["accepted"], state["rejected"]
        self._window_seen, self._window_rejected = state["window_seen"], state["window_rejected"]


def _checked_percentile(percentile: float) -> float:
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} keeps nothing or more than everything; pass a value in (0, 100]")
    return float(percentile)
