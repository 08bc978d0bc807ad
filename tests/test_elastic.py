"""A run can stop with one number of shards and resume with another: no sample is repeated or omitted."""

import copy
import itertools
import json
import random

import pytest
import torch
from conftest import assert_resumes_exactly, take
from torch.utils.data import DataLoader

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.filters import BlockQuantile, RollingPercentile, Threshold
from handsoff_stream.position.dealing import EPOCH_STRIDE
from handsoff_stream.position.state import merge_states
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream

FILTERS = {
    "threshold": lambda: Threshold(value=700),
    "block": lambda: BlockQuantile(80, block=10),
    "none": lambda: None,
    "rolling": lambda: RollingPercentile(80, window=15, lanes=6),
}


def synthesize(indices) -> LabelledBatch:
    """Index i => score (i * 7919) % 1000."""
    i = torch.tensor(indices, dtype=torch.int64)
    return LabelledBatch(torch.zeros(len(i), 3, 1, 1), i[:, None, None], (i * 7919 % 1000).float(), i, indices[-1] + 1)


def stream(checkpoint, shard=None, filter="block", **options) -> HandsOffStream:
    choice = FILTERS[filter]() if filter in FILTERS else filter
    chosen = {"chunk_size": 4, **options}
    return HandsOffStream(
        checkpoint, device="cpu", filter=choice, shard=shard or Shard(), synthesize=synthesize, **chosen
    )


def indices(iterator, count: int) -> list[int]:
    return [int(label) for _, label in itertools.islice(iterator, count)]


def through_json(state):
    return json.loads(json.dumps(state))


def run(checkpoint, counts, state=None, **options):
    """A run of len(counts) shards, shard k until it has handed out counts[k] samples: (all of them, merged state)."""
    handed_out, states = [], []
    for number, count in enumerate(counts):
        shard = stream(checkpoint, Shard(number, len(counts)), **options)
        if state is not None:
            shard.load_state_dict(through_json(state))
        mine = indices(iter(shard), count)
        assert mine == sorted(mine)
        handed_out += mine
        states.append(through_json(shard.state_dict()))
    return handed_out, merge_states(random.Random(0).sample(states, len(states)))


def kept_below(checkpoint, stop, **options) -> list[int]:
    return list(itertools.takewhile(lambda i: i < stop, indices(iter(stream(checkpoint, **options)), stop)))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("before", "after"), list(itertools.product([(9,), (30, 1, 13)], [1, 2, 5])))
def test_another_number_of_shards_goes_on_without_repeating_or_skipping(checkpoint, filter, before, after):
    first, state = run(checkpoint, before, filter=filter)
    second, _ = run(checkpoint, [400] * after, state, filter=filter)
    stop = 300
    assert sorted(i for i in first + second if i < stop) == kept_below(checkpoint, stop, filter=filter)


@pytest.mark.parametrize("seed", range(8))
def test_a_run_may_change_its_number_of_shards_again_and_again(checkpoint, seed):
    dice = random.Random(seed)
    block, chunk_size = dice.choice([1, 6, 10]), dice.choice([1, 3, 4, 16])
    filter = dice.choice([BlockQuantile(80, block=block), RollingPercentile(70, window=9, lanes=5)])
    options = {"filter": filter, "chunk_size": chunk_size}
    seen, state = [], None
    for _ in range(6):
        counts = [dice.choice([0, 1, 5, 40]) for _ in range(dice.randint(1, 5))]
        handed_out, state = run(checkpoint, counts, state, **copy.deepcopy(options))
        seen += handed_out
    rest, _ = run(checkpoint, [600], state, **copy.deepcopy(options))
    seen += rest
    assert len(seen) == len(set(seen))
    assert [i for i in sorted(seen) if i < 500] == kept_below(checkpoint, 500, **copy.deepcopy(options))


def test_each_shard_of_the_new_run_resumes_exactly_at_every_step(checkpoint):
    _, merged = run(checkpoint, (5, 60))

    def make():
        shard = stream(checkpoint, Shard(1, 3))
        shard.load_state_dict(merged)
        assert shard.state_dict()["shard"] == [1, 3]
        return shard

    assert_resumes_exactly(make, steps=20)


def test_a_merged_state_stays_small_however_often_a_run_stops(checkpoint):
    state = None
    for _ in range(20):
        _, state = run(checkpoint, (10, 20, 50), state)
    _, state = run(checkpoint, (7, 8), state)
    assert len(json.dumps(state)) < 20 * 840  # a position per lane


def test_what_is_left_of_an_epoch_is_dealt_out_anew(checkpoint):
    options = {"filter": "threshold", "epoch_size": 100}
    first, state = run(checkpoint, (10, 3, 7), **options)
    assert len(first) == 20
    second, state = run(checkpoint, (25, 25), state, **options)
    third, state = run(checkpoint, [1000] * 4, state, **options)
    assert len(third) == 32  # the last 30, rounded up so that four shards have the same number
    assert len(set(first + second + third)) == 102
    after = run(checkpoint, [1000] * 2, state, **options)[0]
    assert len(after) == 100 and min(after) >= EPOCH_STRIDE, "what is done is followed by the next epoch"


def test_the_epoch_is_kept(checkpoint):
    whole, ahead = stream(checkpoint), stream(checkpoint)
    whole.set_epoch(2)
    ahead.set_epoch(2)
    expected = indices(iter(whole), 20)
    first = indices(iter(ahead), 8)
    resumed = stream(checkpoint)
    resumed.load_state_dict(merge_states([ahead.state_dict()]))
    assert first + indices(iter(resumed), 12) == expected


def test_shards_that_have_not_begun_merge_to_the_beginning(checkpoint):
    state = merge_states([stream(checkpoint, Shard(i, 2)).state_dict() for i in range(2)])
    assert sorted(run(checkpoint, (50, 50, 50), state)[0])[:40] == kept_below(checkpoint, 400)[:40]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_merged_state_positions_the_workers_of_a_dataloader(checkpoint, workers):
    options = {"filter": "threshold", "epoch_size": 90}
    first, state = run(checkpoint, (30, 17), **options)
    resumed = stream(checkpoint, **options)
    resumed.load_state_dict(state)
    loader = DataLoader(PlainLabels(resumed), batch_size=None, num_workers=workers)
    second = list(loader)
    assert len(second) == 43 and len(set(first + second)) == 90
    assert min(loader) >= EPOCH_STRIDE, "the state is not applied again"


class PlainLabels(torch.utils.data.IterableDataset):
    """The stream's labels as integers."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return (int(label) for _, label in self.inner)


# Refusals ------------------------------------------------------------------------------------------------------


def states(checkpoint, count=2, **options):
    made = [stream(checkpoint, Shard(i, count), **options) for i in range(count)]
    for one in made:
        take(one, 3)
    return [one.state_dict() for one in made]


def test_one_state_of_each_shard_is_asked_for(checkpoint):
    both = states(checkpoint)
    for wrong in ([], both[:1], [both[0], both[0]], [*both, both[1]]):
        with pytest.raises(ValueError, match="not one of each shard"):
            merge_states(wrong)
    with pytest.raises(ValueError, match="no stream state of version 2"):
        merge_states([both[0], {"version": 0}])


@pytest.mark.parametrize("change", [{"seed": 1}, {"chunk_size": 8}, {"epoch_size": 50}])
def test_states_of_different_runs_are_refused_by_name(checkpoint, change):
    with pytest.raises(ValueError, match=f"differ in {next(iter(change))}"):
        merge_states([states(checkpoint)[0], states(checkpoint, **change)[1]])


def test_states_of_different_epochs_or_beginnings_are_refused(checkpoint):
    later = stream(checkpoint, Shard(1, 2))
    later.set_epoch(1)
    with pytest.raises(ValueError, match="differ in epoch"):
        merge_states([states(checkpoint)[0], later.state_dict()])
    _, merged = run(checkpoint, (10, 60))
    resumed = stream(checkpoint, Shard(1, 2))
    resumed.load_state_dict(merged)
    with pytest.raises(ValueError, match="load the same state on every rank"):
        merge_states([states(checkpoint)[0], resumed.state_dict()])


def test_a_merged_state_of_other_options_is_refused_by_name(checkpoint):
    with pytest.raises(ValueError, match="saved with seed=0, this stream has seed=1"):
        stream(checkpoint, seed=1).load_state_dict(merge_states(states(checkpoint)))


def test_a_state_of_one_shard_for_another_number_of_shards_names_the_remedy(checkpoint):
    with pytest.raises(ValueError, match=r"belongs to shard 0 of 2, this process is shard 0 of 1.*merge_states"):
        stream(checkpoint).load_state_dict(states(checkpoint)[0])
