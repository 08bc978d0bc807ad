"""What a saved position is: JSON-able, checked before it is used, merged from those of all shards.

    version    2
    stream     options that decide samples, and the identity of the checkpoint
    shard      [index, count], or None: of all shards
    epoch      of the pass
    before     samples of this epoch that all shards handed out before they were dealt out as they are
    handed     samples of this epoch that this shard has handed out since
    walk       positions and histories, see walk.py; None before the first pass
    turn       [which worker is next, number of workers], in the state of a rank that has several
    lefts      samples that each of them has to hand out, in the order of their turns from the next one on; they cannot
               be told from the sum if a sample is followed by labelled images
    pending    [index, number] of each sample that was handed out without all of the labelled images that go with it,
               of which `number` is the next; only in states of mixtures, where there are such samples

Knows dictionaries. Does not know streams, samples or devices.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from handsoff_stream.filters import KeepAll, RejectionMonitor
from handsoff_stream.position.walk import NEXT_CHUNKS, Walk, decode_positions, encode_positions
from handsoff_stream.shard import Shard, Worker

STATE_VERSION = 2
KEYS = {"version", "stream", "shard", "epoch", "before", "handed", "walk"}
OLDER = {
    1: "its filter kept one window per shard, and its fingerprint left out the calibration and the order of heads",
}

State = dict[str, Any]


def check_version(state: Any) -> None:
    """Refuse what is no stream state of this version.

    Raises:
        ValueError: with what came instead.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if version == STATE_VERSION and state.keys() >= KEYS:
        return
    why = OLDER.get(version, "so the position is unknown") if isinstance(version, int) else "so the position is unknown"
    raise ValueError(
        f"this is no stream state of version {STATE_VERSION} (version={version!r}): {why}. Load it with the release "
        "that wrote it, or start a new stream with another seed"
    )


def check_same_stream(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a state of a stream with other options.

    Raises:
        ValueError: which option differs, and what to do.
    """
    for name in options_that_differ(mine, saved):
        raise ValueError(
            f"the state was saved with {name}={saved.get(name)!r}, this stream has {name}={mine.get(name)!r}: "
            "resuming would repeat or skip samples without a word. Build the stream as it was, or start a new one "
            "with another seed"
        )


def options_that_differ(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of the options that two streams do not share."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def beginning(options: dict[str, Any], shard: Shard, epoch: int, before: int) -> State:
    """The state of a shard before its first pass."""
    return {
        "version": STATE_VERSION,
        "stream": options,
        "shard": [shard.index, shard.count],
        "epoch": epoch,
        "before": before,
        "handed": 0,
        "walk": None,
    }


def is_complete(state: State) -> bool:
    """Whether nothing of the epoch is left."""
    walk = state["walk"]
    return walk is not None and (walk["left"] == 0 or walk["next"] == []) and not state.get("pending")


def pending_in(state: State | None, walk: Walk) -> dict[int, int]:
    """Index => number of the entries of `pending` in a state that lie on the lanes of a walk."""
    return {} if state is None else {index: number for index, number in state.get("pending", []) if walk.owns(index)}


def pending_entry(pending: Mapping[int, int]) -> State:
    """`pending` as an entry of a state, which is there only if there is any."""
    return {"pending": [list(item) for item in sorted(pending.items())]} if pending else {}


def _all_pending(states: Iterable[State]) -> State:
    return pending_entry({index: number for state in states for index, number in state.get("pending", [])})


def turned(worker: Worker | None, rank: Shard, state: State | None) -> Worker | None:
    """The worker in the order in which its rank goes on after a state: as many workers in the order of before, others
    so that the first one begins where the rank was."""
    if worker is None or state is None or state["walk"] is None:
        return worker
    if state["shard"] is not None and not Shard(*state["shard"]).contains(rank):
        return worker  # the state is of this very worker
    if state.get("turn", [0, 0])[1] == worker.count and state["shard"] == [rank.index, rank.count]:
        return replace(worker, shift=state["turn"][0])
    lanes, span = state["walk"]["geometry"]
    ahead = state["walk"]["cursor"] // span % lanes - rank.index
    return worker if ahead % rank.count else replace(worker, shift=ahead // rank.count % worker.count)


def merge_workers(states: Mapping[int, State], *, after: int) -> State:
    """States of all workers of a rank, by their turn => the state of the rank.

    Args:
        states: of one pass.
        after: the turn that was the last.
    """
    ordered = [states[turn] for turn in sorted(states)]
    first, count = ordered[0], len(ordered)
    if count == 1:
        return first
    shards = [Shard(*state["shard"]) for state in ordered]
    ranks = shards[0].count // count
    lefts = [state["walk"]["left"] for state in ordered]
    walk = _merged_walk(ordered)
    counts = [state["walk"]["counts"] for state in ordered]
    walk["counts"] = {name: sum(one[name] for one in counts) for name in counts[0]}
    walk["left"] = None if lefts[0] is None else sum(lefts)
    return {
        **first,
        "shard": [shards[0].index % ranks, ranks],
        "handed": sum(state["handed"] for state in ordered),
        "walk": walk,
        "turn": [shards[(after + 1) % count].index // ranks, count],
        "lefts": [lefts[(after + 1 + turn) % count] for turn in range(count)],
        **_all_pending(ordered),
    }


def merge_states(states: Sequence[State]) -> State:
    """States of all shards of one run => one state that any number of shards continues from, nothing twice or left out.

    Save `stream.state_dict()` on every rank (or the state of every rank's loader, see Args), and load the merged state
    on every rank of the new run, or in the main process of a DataLoader with workers. Shards count `accepted` and
    `rejected` anew; what is left of `epoch_size` is dealt out anew.

    Args:
        states: of a stream or a `HandsOffLoader`, one for each rank; or of torchdata's StatefulDataLoader, one for each
            rank, which hold one for each worker. In any order.

    Returns:
        A state for `load_state_dict` of a stream or a `HandsOffLoader`, JSON-able.

    Raises:
        ValueError: a shard is missing or there twice, or the shards differ in an option or in the epoch.
    """
    found = [inner for state in states for inner in _of_workers(state)]
    _check_same_run(found)
    if len({state["before"] for state in found}) > 1:
        raise ValueError(
            "some of these shards went on from a merged state and some did not, or from another one, so they are no "
            "part of the same run; load the same state on every rank"
        )
    begun = [state for state in found if state["walk"] is not None]
    before = found[0]["before"] + sum(state["handed"] for state in found)
    merged = {name: found[0][name] for name in KEYS} | {"shard": None, "before": before, "handed": 0, "walk": None}
    merged |= _all_pending(found)
    if not begun:
        return merged
    epoch_size = merged["stream"]["epoch_size"]
    walk = _merged_walk(begun)
    lanes, span = walk["geometry"]
    positions = decode_positions({**walk, "cursor": walk["start"], "lanes": {}}, range(lanes))  # of who has not begun
    for state in begun:
        positions |= decode_positions(state["walk"], _lanes_of(state))
    walk |= encode_positions(positions, lanes, span)
    walk["left"] = None if epoch_size is None else max(epoch_size - before, 0)
    if len(begun) < len(found):
        walk["next"] = None
    return {**merged, "walk": walk}


def _lanes_of(state: State) -> range:
    index, count = state["shard"] or (0, 1)
    return range(index, state["walk"]["geometry"][0], count)


def _merged_walk(states: Sequence[State]) -> dict[str, Any]:
    walks = [state["walk"] for state in states]
    lanes, span = walks[0]["geometry"]
    positions: dict[int, int] = {}
    for state in states:
        positions |= decode_positions(state["walk"], _lanes_of(state))
    filters = {lane: history for walk in walks for lane, history in walk["filters"].items()}
    return {
        **encode_positions(positions, lanes, span),
        "start": walks[0]["start"],
        "filters": dict(sorted(filters.items(), key=lambda item: int(item[0]))),
        "counts": RejectionMonitor(KeepAll()).state_dict(),
        "left": None,
        "next": _merged_next([walk["next"] for walk in walks]),
    }


def _merged_next(of_shards: Sequence[list[int] | None]) -> list[int] | None:
    """The chunks that come next on all shards together; None if those of a shard are not known."""
    if any(chunks is None for chunks in of_shards):
        return None
    return sorted({chunk for chunks in of_shards for chunk in chunks or ()})[:NEXT_CHUNKS]


def _of_workers(state: Any) -> Iterator[State]:
    """The state itself, or those of the workers that a StatefulDataLoader's state holds."""
    if isinstance(state, dict) and "stream" not in state:
        if _value_of(state, "_steps_since_snapshot"):
            raise ValueError(
                "this state of a StatefulDataLoader is older than the batches that were yielded since, which would "
                "come again; build it with snapshot_every_n_steps=1"
            )
        inner = list(_inner_states(state))
        if inner:
            yield from inner
            return
    check_version(state)
    yield state


def _inner_states(value: Any) -> Iterator[State]:
    if isinstance(value, dict):
        if value.keys() >= KEYS:
            check_version(value)
            yield value
            return
        for child in value.values():
            yield from _inner_states(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _inner_states(child)


def _value_of(value: Any, key: str) -> Any:
    """The value of a key at any depth, None if there is none."""
    if not isinstance(value, dict):
        return None
    found = [value.get(key), *(_value_of(child, key) for child in value.values())]
    return next((item for item in found if item is not None), None)


def _check_same_run(states: Sequence[State]) -> None:
    """One state of each shard, all with the same options, in the same epoch."""
    shards = [state["shard"] or [0, 1] for state in states]
    counts = {count for _, count in shards}
    if len(counts) != 1 or sorted(index for index, _ in shards) != list(range(counts.pop())):
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
