"""Where a stream is on the index line: one pass of one shard, lane by lane.

The index line is cut into spans, whole chunks that hold whole blocks of the filter, and span s lies on lane
s % lanes. A lane is walked in order, judged by a filter of its own, and described by one number: below its position
everything has been handed out or dropped, from it on nothing has. So the state of any number of shards is a position
for each of their lanes and the history of each lane's filter, and any other number of shards can go on from there.
Knows indices, scores and shards. Does not know tensors, networks or devices.
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

from handsoff_stream.errors import StreamError
from handsoff_stream.filters import Filter, RejectionMonitor
from handsoff_stream.shard import Shard

BadSample = Literal["raise", "skip"]
NEXT_CHUNKS = 3  # chunks that a state names, to be compared with what a resumed walk sets out to do

C = TypeVar("C", bound="Scored")


class Scored(Protocol):
    """What a walk sees of a chunk."""

    @property
    def indices(self) -> Sequence[int]:
        """The index of each sample."""
        ...

    def finished(self) -> bool:
        """Whether `scores` would not wait."""
        ...

    def scores(self) -> list[float]:
        """Uncertainty of each sample."""
        ...


class Walk:
    """One pass: span by span through the shard's lanes, score by score through their filters.

    Decisions run ahead of what is handed out. `commit()` says that all samples yielded by `select` have been handed
    out; `state_dict()` and the counts are those of the last commit, so what an exception swallowed comes again.

    Args:
        filter: started with the calibration scores; every lane gets a copy.
        shard: whose lanes to walk.
        chunk_size: indices per chunk.
        indices: the indices of this pass.
        left: samples to hand out; None means all there are.
        on_bad_sample: what to do about a score that is not finite.

    Raises:
        StreamError: the filter has fewer lanes than there are shards.
    """

    def __init__(
        self,
        filter: Filter,
        shard: Shard,
        chunk_size: int,
        *,
        indices: range,
        left: int | None = None,
        on_bad_sample: BadSample = "raise",
    ):
        if shard.count > filter.lanes:
            raise StreamError(
                f"{shard.count} ranks x workers cannot share the {filter.lanes} lanes of the filter {filter.config()}: "
                "each needs one of its own; use fewer workers, or begin a run with "
                f"RollingPercentile(lanes={shard.count}), whose choice differs"
            )
        self.shard, self.chunk_size, self.indices, self.left = shard, chunk_size, indices, left
        self.on_bad_sample = on_bad_sample
        self.monitor = RejectionMonitor(filter)
        self._filter = filter
        self._lanes = filter.lanes
        self._span = math.lcm(chunk_size, filter.span)
        self._filters: dict[int, Filter] = {}
        self._begin = {lane: self._implied(lane, indices.start) for lane in shard.lanes(self._lanes)}
        """Where each lane was when this walk set out."""
        self._position = dict(self._begin)
        self._uncommitted: dict[int, tuple[int, dict[str, Any]]] = {}
        """Position and filter state, as committed, of the lanes that went on since."""
        self._pending = 0
        self._committed = self.monitor.state_dict()

    # The way -----------------------------------------------------------------------------------------------------

    def chunks(self) -> Iterator[range]:
        """The chunks to synthesize: whole, aligned, increasing."""
        return self._plan(self._begin)

    def _next(self, positions: dict[int, int]) -> list[int]:
        """Where the first chunks begin that are still to be synthesized."""
        return [chunk.start for chunk in islice(self._plan(positions), NEXT_CHUNKS)]

    def _plan(self, positions: dict[int, int]) -> Iterator[range]:
        """Chunks that hold an index from its lane's position on, or that the filter needs to judge one."""
        waiting = [(position // self._span, lane) for lane, position in positions.items()]
        heapify(waiting)
        while waiting:
            number, lane = heappop(waiting)
            span = range(number * self._span, (number + 1) * self._span)
            needed = self._pushed(max(span.start, positions[lane]), span)
            if not needed:
                continue  # this lane has reached the end
            for first in range(span.start, span.stop, self.chunk_size):
                if first + self.chunk_size > needed.start and first < needed.stop:
                    yield range(first, first + self.chunk_size)
            heappush(waiting, (number + self._lanes, lane))

    def _pushed(self, begin: int, span: range) -> range:
        """The indices of a span that the filter sees so that it can decide those from `begin` on: whole blocks."""
        block, end = self._filter.span, min(span.stop, self.indices.stop)
        if begin >= end:
            return range(0)
        return range(begin // block * block, -(-end // block) * block)

    def owns(self, index: int) -> bool:
        """Whether an index lies on a lane of this shard."""
        return index // self._span % self._lanes in self.shard.lanes(self._lanes)

    def _implied(self, lane: int, index: int) -> int:
        return _first_on(lane, index, self._lanes, self._span)

    def select(self, chunks: Iterable[C]) -> Iterator[tuple[C, int]]:
        """(chunk, row) of every sample that is kept, until `left` of them have been yielded.

        `chunks`: those of `chunks()`, synthesized, in their order.
        """
        selected, quota = 0, self.left
        undecided: deque[tuple[int, C, int, bool]] = deque()
        for chunk in chunks if quota != 0 else ():
            number = chunk.indices[0] // self._span
            lane = number % self._lanes
            begin = max(number * self._span, self._begin[lane])
            pushed = self._pushed(begin, range(number * self._span, (number + 1) * self._span))
            known = self._filter.needs_scores or self.on_bad_sample == "skip" or chunk.finished()
            scores = chunk.scores() if known else [0.0] * len(chunk.indices)
            for row, (index, score) in enumerate(zip(chunk.indices, scores, strict=True)):
                if index not in pushed:
                    continue
                finite = self._is_finite(score, index)
                undecided.append((index, chunk, row, finite))
                for keep in self._push(lane, score if finite else math.inf):
                    decided, its_chunk, its_row, finite = undecided.popleft()
                    if not begin <= decided < self.indices.stop:
                        continue
                    self._touch(lane)
                    self._position[lane] = decided + 1
                    self.monitor.count(keep and finite, finite=finite)
                    if keep and finite:
                        selected += 1
                        self._pending += 1
                        yield its_chunk, its_row
                    if selected == quota:
                        return self._check_late(chunk, known)
            self._check_late(chunk, known)
            del chunk, scores  # what is held longer cannot be written again

    def commit(self) -> None:
        """All samples that `select` yielded have been handed out."""
        self._uncommitted.clear()
        self._committed = self.monitor.state_dict()
        if self.left is not None:
            self.left -= self._pending
        self._pending = 0

    def _push(self, lane: int, score: float) -> list[bool]:
        """The decisions that a score settles."""
        self._touch(lane)
        return self._filter_of(lane).push(score)

    def _touch(self, lane: int) -> None:
        """Remember, until the next commit, where the lane was at the last one."""
        if lane not in self._uncommitted:
            self._uncommitted[lane] = self._position[lane], self._filter_of(lane).state_dict()

    def _filter_of(self, lane: int) -> Filter:
        if lane not in self._filters:
            self._filters[lane] = copy.deepcopy(self._filter)
        return self._filters[lane]

    def _is_finite(self, score: float, index: int) -> bool:
        if math.isfinite(score):
            return True
        if self.on_bad_sample == "raise":
            raise StreamError(
                f"sample {index} has the uncertainty {score}: the generator or a label generator computes NaN or "
                "infinite values there, and its label would be garbage; check the checkpoint with `handsoff-stream "
                'inspect`, or pass on_bad_sample="skip" to go on without such samples'
            )
        return False

    def _check_late(self, chunk: C, known: bool) -> None:
        # Scores that nobody waited for are looked at when the chunk has been used.
        if not known:
            for index, score in zip(chunk.indices, chunk.scores(), strict=True):
                self._is_finite(score, index)

    # State -------------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        """`RejectionMonitor.state_dict` as of the last commit."""
        return dict(self._committed)

    @property
    def cursor(self) -> int:
        """The first index of the shard that had not been handed out or dropped at the last commit."""
        return min(self._positions().values())

    def _positions(self) -> dict[int, int]:
        changed = {lane: position for lane, (position, _) in self._uncommitted.items()}
        return {lane: self._implied(lane, position) for lane, position in (self._position | changed).items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. Lanes are listed where they are not simply the next to come after `cursor`."""
        positions = self._positions()
        histories = {lane: filter.state_dict() for lane, filter in self._filters.items()}
        histories |= {lane: history for lane, (_, history) in self._uncommitted.items()}
        return {
            **encode_positions(positions, self._lanes, self._span),
            "start": self.indices.start,
            "filters": {str(lane): history for lane, history in sorted(histories.items()) if history},
            "counts": self.counts,
            "left": self.left,
            "next": self._next(positions),
        }

    def load_state_dict(self, state: dict[str, Any], *, saved: Shard, same_shard: bool) -> None:
        """Go on after `state_dict()` of a shard that owned all lanes of this one, or of several merged.

        Counts, and what is left to hand out, are taken over from the same shard only.

        Args:
            state: to go on from.
            saved: the shard whose positions it holds.
            same_shard: whether it is the state of this very walk.

        Raises:
            StreamError: what would come next is not what the state says.
        """
        positions = decode_positions(state, self.shard.lanes(self._lanes))
        self._begin = {lane: max(position, self._begin[lane]) for lane, position in positions.items()}
        self._position = dict(self._begin)
        for lane in positions:
            if str(lane) in state["filters"]:
                self._filter_of(lane).load_state_dict(state["filters"][str(lane)])
        if same_shard:
            self.monitor.load_state_dict(state["counts"])
            self._committed = self.monitor.state_dict()
            self.left = state["left"]
        self._check_next(state["next"], decode_positions(state, saved.lanes(self._lanes)) | self._begin)

    def _check_next(self, expected: list[int] | None, positions: dict[int, int]) -> None:
        found = self._next(positions)
        if expected not in (None, found):
            raise StreamError(
                f"the saved state goes on with the chunks that begin at {expected}, this stream would with {found}: "
                "samples would be repeated or skipped. Resume with the release that wrote the state"
            )


def encode_positions(positions: dict[int, int], lanes: int, span: int) -> dict[str, Any]:
    """Position of each lane => JSON-able; lanes that come next after the smallest position are left out."""
    cursor = min(positions.values())
    apart = {lane: place for lane, place in positions.items() if place != _first_on(lane, cursor, lanes, span)}
    return {
        "geometry": [lanes, span],
        "cursor": cursor,
        "lanes": {str(lane): place for lane, place in sorted(apart.items())},
    }


def decode_positions(state: dict[str, Any], wanted: Iterable[int]) -> dict[int, int]:
    """The inverse of `encode_positions`, for some lanes."""
    lanes, span = state["geometry"]
    return {lane: state["lanes"].get(str(lane), _first_on(lane, state["cursor"], lanes, span)) for lane in wanted}


def _first_on(lane: int, index: int, lanes: int, span: int) -> int:
    """The first index of a lane that is not below `index`."""
    number = index // span
    ahead = (lane - number) % lanes
    return (number + ahead) * span if ahead else index
