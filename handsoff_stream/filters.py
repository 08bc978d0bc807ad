"""Score => keep. A filter sees one uncertainty score per sample, in the order of a lane's indices, and says which
samples are worth training on (HandsOff, sections 3.3 and 4.1: the most uncertain 10 % are dropped).

`push(score)` returns the decisions that this score settles, oldest first: one at once for a rolling percentile or a
threshold, a block's worth at the end of each block for a block quantile. Every lane of the index line is judged by a
filter of its own, which sees all scores of its lane and no others. So a decision is a function of the index, whatever
the number of ranks and workers. Knows floats. Does not know tasks, tensors or networks.
"""

import base64
import copy
import math
import warnings
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

from handsoff_stream.errors import StreamError

MANY_LANES = 840  # divisible by 1 to 8: shards of nearly equal size for every usual number of them
LANES_WITH_HISTORY = 24  # each has a window to save; divisible by 1, 2, 3, 4, 6, 8 and 12


class Filter(ABC):
    """Decides which samples are kept. Lifecycle: `start(calibration)` once, then `push` score by score."""

    name: ClassVar[str]
    span: int = 1
    """Consecutive, aligned indices that must be pushed together, from the first to the last."""
    lanes: int = LANES_WITH_HISTORY
    """Parts of the index line that are judged separately; also the largest number of ranks x workers."""
    needs_scores: bool = True
    """False if every sample is kept whatever its score, so that nobody has to wait for it."""
    expected_share: float = 1.0
    """The share of samples that should be kept, in (0, 1]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Options, JSON-able; part of the stream's identity."""

    def start(self, calibration: Sequence[float]) -> None:
        """Forget all history; begin with the scores that the checkpoint was calibrated with (may be none)."""
        del calibration

    @abstractmethod
    def push(self, score: float) -> list[bool]:
        """Take the next score of the lane; return the decisions that are now settled, oldest sample first."""

    def state_dict(self) -> dict[str, Any]:
        """What was seen since `start`, JSON-able; empty if nothing needs to be remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a filter with the same options, started with the same calibration."""
        del state


class RollingPercentile(Filter):
    """Keep a sample whose score is at most a percentile of the last `window` scores, rejected ones included.

    Each lane has a window of its own, which starts from the calibration scores: chunk k of the index line belongs to
    lane k % lanes. So the choice does not depend on the number of ranks and workers.

    Args:
        percentile: in (0, 100]; 90 drops the most uncertain tenth.
        window: scores remembered per lane; the threshold's rank then has a standard deviation of
            sqrt(p (1 - p) / window), 0.7 % at the defaults.
        lanes: at least the largest number of ranks x workers that will ever share the stream. Another number makes
            another choice, and a saved state needs up to 8 bytes for each score of each window.

    Raises:
        ValueError: any of them out of range.
    """

    name = "rolling"

    def __init__(self, percentile: float = 90.0, *, window: int = 2000, lanes: int = LANES_WITH_HISTORY):
        self.percentile = _checked_percentile(percentile)
        if window < 1:
            raise ValueError(f"window={window} remembers no score; pass at least 1, 2000 is the default")
        if lanes < 1:
            raise ValueError(f"lanes={lanes} leave no chunk to judge; pass at least 1, {LANES_WITH_HISTORY} is usual")
        self.window = window
        self.lanes = lanes
        self.expected_share = self.percentile / 100
        self.start([])

    def config(self) -> dict[str, Any]:
        """See `Filter.config`."""
        return {"name": self.name, "percentile": self.percentile, "window": self.window, "lanes": self.lanes}

    def start(self, calibration: Sequence[float]) -> None:
        """Fill the window with the last of the calibration scores."""
        self._recent = deque(float(score) for score in calibration[-self.window :])
        self._sorted = sorted(self._recent)
        self._pushed = 0
        self._encoded: tuple[int, dict[str, Any]] = 0, {}  # a state is asked for more often than it changes

    def push(self, score: float) -> list[bool]:
        """Decide at once; with an empty window the sample is kept."""
        keep = not self._sorted or score <= self._sorted[self._rank(len(self._sorted))]
        self._remember(score)
        return [keep]

    def _remember(self, score: float) -> None:
        if len(self._recent) == self.window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(score)
        insort(self._sorted, score)
        self._pushed += 1

    def _rank(self, count: int) -> int:
        # The smallest score with at least `percentile` percent of the window at or below it.
        return max(math.ceil(count * self.percentile / 100) - 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """The scores pushed since `start` that are still in the window: base64 of float64, oldest first."""
        if self._encoded[0] != self._pushed:
            own = list(self._recent)[-min(self._pushed, self.window) :]
            self._encoded = self._pushed, {"recent": base64.b64encode(array("d", own).tobytes()).decode("ascii")}
        return dict(self._encoded[1])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Push those scores into the window again."""
        for score in array("d", base64.b64decode(state["recent"])) if state else ():
            self._remember(score)


class BlockQuantile(Filter):
    """In each block of `block` consecutive indices, drop the most uncertain ones.

    The streaming form of "generate, sort, drop the top 10 %": exactly that share of every block goes, ties broken by
    index. A block is held until its last score is known.

    Args:
        percentile: in (0, 100]; the kept share of each block, rounded up to whole samples.
        block: indices per block.

    Raises:
        ValueError: either of them out of range.
    """

    name = "block"
    lanes = MANY_LANES

    def __init__(self, percentile: float = 90.0, *, block: int = 100):
        self.percentile = _checked_percentile(percentile)
        if block < 1:
            raise ValueError(f"block={block} holds no index; pass at least 1, 100 is the default")
        self.span = block
        self._kept = math.ceil(block * self.percentile / 100)
        self.expected_share = self._kept / block
        self._scores: list[float] = []

    def config(self) -> dict[str, Any]:
        """See `Filter.config`."""
        return {"name": self.name, "percentile": self.percentile, "block": self.span}

    def start(self, calibration: Sequence[float]) -> None:
        """Begin a block; the calibration scores are not needed."""
        self._scores = []

    def push(self, score: float) -> list[bool]:
        """No decision until the block is complete, then those of the whole block."""
        self._scores.append(score)
        if len(self._scores) < self.span:
            return []
        order = sorted(range(self.span), key=self._scores.__getitem__)
        kept = set(order[: self._kept])
        self._scores = []
        return [i in kept for i in range(self.span)]


class Threshold(Filter):
    """Keep a sample whose score is at most a fixed value, by default a percentile of the calibration scores.

    Args:
        percentile: in (0, 100], of the calibration scores; unused if `value` is given.
        value: the threshold itself, in the unit of the score.

    Raises:
        ValueError: `percentile` out of range.
    """

    name = "threshold"
    lanes = MANY_LANES

    def __init__(self, percentile: float = 90.0, *, value: float | None = None):
        self.percentile = _checked_percentile(percentile)
        self.value = value
        self.expected_share = 1.0 if value is not None else self.percentile / 100
        self._threshold = value

    def config(self) -> dict[str, Any]:
        """See `Filter.config`."""
        return {"name": self.name, "percentile": self.percentile, "value": self.value}

    def start(self, calibration: Sequence[float]) -> None:
        """Take the percentile of the calibration scores, unless the threshold was given.

        Raises:
            ValueError: there are no calibration scores and no threshold was given.
        """
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
        """Decide at once."""
        assert self._threshold is not None, "start() sets the threshold"
        return [score <= self._threshold]


class KeepAll(Filter):
    """Keep everything; `filter=None`."""

    name = "none"
    lanes = MANY_LANES
    needs_scores = False

    def config(self) -> dict[str, Any]:
        """See `Filter.config`."""
        return {"name": self.name}

    def push(self, score: float) -> list[bool]:
        """Keep the sample."""
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


def started_filter(choice: "str | Filter | None", calibration: Sequence[float]) -> Filter:
    """The chosen filter, a copy of its own, started with the calibration scores.

    Raises:
        ValueError: unknown name, or a filter that needs calibration scores where there are none.
    """
    filter = copy.deepcopy(make_filter(choice))
    filter.start(calibration)
    if isinstance(filter, RollingPercentile) and not calibration:
        warnings.warn(
            "this checkpoint has no calibration scores for these options, so the windows of the rolling filter start "
            f"empty: it keeps too much or too little until each of its {filter.lanes} lanes has seen some hundred "
            "scores; calibrate the checkpoint, or pass filter='block' or Threshold(value=...)",
            stacklevel=3,
        )
    return filter


class RejectionMonitor:
    """Counts what a filter does and speaks up when it rejects far more than it should.

    Attributes:
        accepted, rejected: samples so far.
        skipped: those of the rejected whose score was not finite.

    Raises:
        StreamError: from `count`, when of the last `WINDOW` samples at most `RAISE_SHARE` of those were kept that
            should be.
    """

    WINDOW = 1000
    WARN_SHARE = 0.5
    RAISE_SHARE = 0.01

    def __init__(self, filter: Filter):
        self._filter = filter.config()
        self._expected = filter.expected_share * self.WINDOW
        self.accepted = 0
        self.rejected = 0
        self.skipped = 0
        self._window_rejected = 0
        self._window_seen = 0
        self._warned = False

    def count(self, kept: bool, *, finite: bool = True) -> None:
        """Note one decision."""
        self.accepted += kept
        self.rejected += not kept
        self.skipped += not finite
        self._window_seen += 1
        self._window_rejected += not kept
        if self._window_seen == self.WINDOW:
            kept_of_window = self.WINDOW - self._window_rejected
            self._window_seen = self._window_rejected = 0
            self._judge(kept_of_window)

    def _judge(self, kept: int) -> None:
        message = (
            f"{1 - kept / self.WINDOW:.1%} of the last {self.WINDOW} samples were rejected by {self._filter}: "
            "training data comes at a trickle. Look at them with `handsoff-stream preview`; raise the percentile or "
            "the threshold, lower the truncation, or pass filter=None"
        )
        if kept <= self.RAISE_SHARE * self._expected:
            raise StreamError(message)
        chance = 3 * math.sqrt(self._expected)  # three standard deviations of what a working filter keeps
        if kept < self.WARN_SHARE * self._expected - chance and not self._warned:
            warnings.warn(message, stacklevel=2)
            self._warned = True

    def state_dict(self) -> dict[str, int]:
        """All counts, JSON-able."""
        return {
            "accepted": self.accepted,
            "rejected": self.rejected,
            "skipped": self.skipped,
            "window_seen": self._window_seen,
            "window_rejected": self._window_rejected,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict()`."""
        self.accepted, self.rejected, self.skipped = state["accepted"], state["rejected"], state["skipped"]
        self._window_seen, self._window_rejected = state["window_seen"], state["window_rejected"]


def _checked_percentile(percentile: float) -> float:
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} keeps nothing or more than everything; pass a value in (0, 100]")
    return float(percentile)
