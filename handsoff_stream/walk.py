"""Where a stream is on the index line: one iteration of one shard, and what several shards have done together.

The state of a walk is a position, what earlier runs with other numbers of shards had done, and the filter's history. A
filter without history decides by the index alone, so the positions of all shards of a run can be merged, and any
number of new shards can go on from there (`merge_states`). Knows indices, scores and shards. Does not know tensors,
networks or devices.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from handsoff_stream.errors import StreamError
from handsoff_stream.filters import Filter, KeepAll, RejectionMonitor
from handsoff_stream.shard import Shard

STATE_VERSION = 1
EPOCH_STRIDE = 2**40  # indices between the starts of two epochs: far more than one epoch can walk

C = TypeVar("C", bound="Scored")


class Scored(Protocol):
    """What a walk sees of a chunk."""

    @property
    def indices(self) -> Sequence[int]: ...

    def scores(self) -> list[float]: ...


@dataclass(frozen=True)
class Taken:
    """What earlier runs of this epoch handed out or dropped, each with a number of shards of its own."""

    runs: tuple[tuple[int, ...], ...] = ()
    """For each run the cursors of all its shards: shard k of n took its spans k, k + n, ... up to cursor k."""
    samples: int = 0
    """Handed out by all of them together."""

    def until(self, span_number: int) -> int:
        """An index: of this span everything below it is taken, and nothing from it on."""
        return max((cursors[span_number % len(cursors)] for cursors in self.runs), default=0)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"runs": [list(cursors) for cursors in self.runs], "samples": self.samples}


class Walk:
    """One iteration: index by index through the shard's spans, score by score through the filter.

    Invariant: of the shard's indices all below `cursor` have been handed out or dropped, and from it on only those that
    are `taken`.

    Args:
        filter: started, owned by this walk.
        shard: whose spans to walk.
        chunk_size: indices a chunk.
        num_samples: accepted samples an epoch over all shards; None means endless.
        start: first index of the epoch.
    """

    def __init__(self, filter: Filter, shard: Shard, chunk_size: int, num_samples: int | None, *, start: int):
        self.filter = filter
        self.shard = shard
        self.chunk_size = chunk_size
        self.num_samples = num_samples
        self.cursor = start
        self.monitor = RejectionMonitor(filter)
        self.taken = Taken()
        self._span = math.lcm(chunk_size, filter.span)

    def select(self, chunks: Iterable[C]) -> Iterator[tuple[C, int]]:
        """(chunk, row) of every sample that is kept, until this shard's part of `num_samples` is handed out.

        `chunks`: those of `chunks()`, synthesized, in their order.
        """
        quota = None if self.num_samples is None else self.shard.share(self.num_samples - self.taken.samples)
        undecided: deque[tuple[int, C, int]] = deque()
        if self.monitor.accepted == quota:
            return
        for chunk in chunks:
            begin = self._begin(chunk.indices[0])
            pushed = self._block(begin)
            for row, (index, score) in enumerate(zip(chunk.indices, chunk.scores(), strict=True)):
                if index < pushed:
                    continue
                _check_finite(score, index)
                undecided.append((index, chunk, row))
                for keep in self.filter.push(score):
                    decided, its_chunk, its_row = undecided.popleft()
                    if decided < begin:
                        continue
                    self.cursor = decided + 1
                    self.monitor.count(keep)
                    if keep:
                        yield its_chunk, its_row
                    if self.monitor.accepted == quota:
                        return

    def chunks(self) -> Iterator[range]:
        """The chunks to synthesise: whole, aligned, increasing."""
        for span in self.shard.spans(self.cursor, self._span):
            pushed = self._block(self._begin(span.start))
            for first in range(span.start, span.stop, self.chunk_size):
                if first + self.chunk_size > pushed:
                    yield range(first, first + self.chunk_size)

    def _begin(self, index: int) -> int:
        """The first index that is still to be decided in the span of `index`, or one after the span."""
        number = index // self._span
        return max(number * self._span, self.cursor, self.taken.until(number))

    def _block(self, index: int) -> int:
        # A block filter decides blocks as a whole: a block's first scores are pushed again, its decisions not repeated.
        return index // self.filter.span * self.filter.span

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; constant in size but for the filter's history."""
        return {
            "cursor": self.cursor,
            "filter": self.filter.state_dict(),
            "counts": self.monitor.state_dict(),
            "taken": self.taken.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state_dict()` was taken, or after the states that were merged into this one."""
        self.cursor = state["cursor"]
        self.filter.load_state_dict(state["filter"])
        self.monitor.load_state_dict(state["counts"])
        self.taken = _taken(state)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """States of all shards of one run => one state that any number of shards continues from, nothing twice or left out.

    For filters that decide by the index alone: "block", "threshold", None. Save `stream.state_dict()` on every rank,
    and load the merged state on every rank of the new run, or in the main process of a DataLoader with workers. Shards
    count `accepted` and `rejected` anew; what is left of `num_samples` is dealt out anew.

    Args:
        states: one state of each shard, in any order.

    Returns:
        A state for `HandsOffStream.load_state_dict`, JSON-able.

    Raises:
        ValueError: a shard is missing or there twice, the shards differ in an option or in the epoch, or the filter
            has a history.
    """
    _check_same_run(states)
    epoch, options = states[0]["epoch"], states[0]["stream"]
    fresh = Walk(KeepAll(), Shard(), 1, None, start=epoch * EPOCH_STRIDE).state_dict()
    ordered = sorted(states, key=lambda state: state["stream"]["shard"])
    walks = [state["walk"] or fresh for state in ordered]
    if any(walk["filter"] for walk in walks):
        raise ValueError(
            f"filter {options['filter']} decides by the scores that its own shard has seen, and {len(states)} "
            "histories cannot become one: go on with the same number of ranks and workers, or begin a run with "
            "filter='block', 'threshold' or None, whose states can be merged"
        )
    earlier = {_taken(walk) for walk in walks}
    if len(earlier) > 1:
        raise ValueError(
            "some of these shards went on from a merged state and some did not, or from another one, so they are no "
            "part of the same run; load the same state on every rank"
        )
    (before,) = earlier
    cursors = tuple(walk["cursor"] for walk in walks)
    taken = Taken(_union((*before.runs, cursors)), before.samples + sum(walk["counts"]["accepted"] for walk in walks))
    walk = {**fresh, "cursor": min(cursors), "taken": taken.state_dict()}
    return {"version": STATE_VERSION, "stream": {**options, "shard": None}, "epoch": epoch, "walk": walk}


def check_version(state: Any) -> None:
    """Refuse what is no stream state of this version.

    Raises:
        ValueError: with what came instead.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION or not state.keys() >= {"stream", "epoch", "walk"}:
        raise ValueError(
            f"this is no stream state of version {STATE_VERSION} (version={version!r}), so the position is "
            "unknown; load it with the release that wrote it, or start a new stream with another seed"
        )


def _check_same_run(states: Sequence[dict[str, Any]]) -> None:
    """One state of each shard, all with the same options, in the same epoch."""
    for state in states:
        check_version(state)
    shards = [state["stream"]["shard"] for state in states]
    if not states or any([number, len(states)] not in shards for number in range(len(states))):
        raise ValueError(
            f"states of the shards {shards} are not one of each shard of a run, so samples would be repeated or "
            "skipped; pass what `state_dict()` returned on every rank (and worker), once each"
        )
    options = [{**state["stream"], "epoch": state["epoch"]} for state in states]
    for shard, other in zip(shards, options, strict=True):
        for name in options_that_differ(options[0], other):
            raise ValueError(
                f"the shards {shards[0]} and {shard} differ in {name}, so they are no part of the same run; pass "
                "states that were saved together"
            )


def options_that_differ(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the options that two streams do not share, their shards aside."""
    names = (left.keys() | right.keys()) - {"shard"}
    return sorted(name for name in names if left.get(name) != right.get(name))


def _union(runs: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """As few runs as take the same indices: of each number of shards one, and none that the last has overtaken."""
    union: dict[int, tuple[int, ...]] = {}
    for cursors in runs:
        union[len(cursors)] = tuple(map(max, cursors, union.get(len(cursors), cursors)))
    return tuple(cursors for cursors in union.values() if max(cursors) > min(runs[-1]))


def _taken(walk: dict[str, Any]) -> Taken:
    """The inverse of `Taken.state_dict`, found in a walk's state."""
    state = walk.get("taken", Taken().state_dict())
    return Taken(tuple(tuple(cursors) for cursors in state["runs"]), state["samples"])


def _check_finite(score: float, index: int) -> None:
    if not math.isfinite(score):
        raise StreamError(
            f"sample {index} has the uncertainty {score}: the generator or a label generator computes NaN or infinite "
            "values there, and its label would be garbage; check the checkpoint with `handsoff-stream inspect`"
        )
