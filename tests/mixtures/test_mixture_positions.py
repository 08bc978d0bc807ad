"""A mixture is a stream: it resumes exactly, on any number of ranks, and its epochs end together."""

import itertools
import random
from fractions import Fraction
from math import floor

import pytest
from conftest import assert_resumes_exactly, assert_same, take
from mixtures import KINDS, expected_beside, labelled_set, mixture, rows, signed, synthesize, through_json

from handsoff_stream import mix
from handsoff_stream.errors import StreamError
from handsoff_stream.position.state import merge_states
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("filter", ["threshold", "rolling"])
def test_resuming_is_exact_at_every_step(checkpoint, kind, filter):
    assert_resumes_exactly(lambda: mixture(checkpoint, filter=filter, **kind), steps=8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_resuming_is_exact_up_to_the_end_of_an_epoch(checkpoint, kind):
    def make():
        return mixture(checkpoint, filter="threshold", epoch_size=9, **kind)

    done, resumed = make(), make()
    assert_resumes_exactly(make, steps=len(list(done)) - 1)
    resumed.load_state_dict(through_json(done.state_dict()))
    assert_same(take(resumed, 1), take(done, 1))  # of the next epoch


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_resuming_is_exact_on_a_shard(checkpoint, kind):
    assert_resumes_exactly(lambda: mixture(checkpoint, shard=Shard(1, 3), **kind), steps=8)


def test_what_an_exception_swallowed_comes_again_after_resuming(checkpoint):
    def broken(image, label):
        if failing and random.random() < 0.3:
            raise RuntimeError("a broken transform")
        return signed(image, label)

    def make():
        stream = HandsOffStream(
            checkpoint, device="cpu", synthesize=synthesize, filter=None, chunk_size=4, as_dict=True
        )
        return mix(stream, labelled_set(5), Fraction(2, 3), transforms=broken)

    failing = False
    expected = rows(take(make(), 60))
    failing, got, state = True, [], None
    for attempt in range(60):
        mixed = make()
        if state is not None:
            mixed.load_state_dict(state)
        try:
            for item in mixed:
                got += rows([item])
                failing = len(got) % 7 == attempt % 7
        except RuntimeError:
            state, failing = through_json(mixed.state_dict()), False
        if len(got) >= 60:
            break
    assert got[:60] == expected


def run(checkpoint, steps, state=None, **options):
    """A run of len(steps) ranks, rank k for steps[k] items: (all rows, merged state)."""
    found, states = [], []
    for rank, count in enumerate(steps):
        mixed = mixture(checkpoint, shard=Shard(rank, len(steps)), **options)
        if state is not None:
            mixed.load_state_dict(through_json(state))
        found += rows(itertools.islice(mixed, count))
        states.append(through_json(mixed.state_dict()))
    return found, merge_states(random.Random(0).sample(states, len(states)))


def below(found, stop: int) -> list[tuple[int, float]]:
    return sorted(row for row in found if 0 <= row[0] < stop)


@pytest.mark.parametrize("filter", ["none", "block", "rolling"])
@pytest.mark.parametrize(
    "kind",
    [
        {"as_dict": True},
        {"as_dict": True, "share": Fraction(3, 4)},
        {"as_dict": True, "share": Fraction(3, 5)},
        {"as_dict": True, "share": Fraction(1, 4)},
        {"batch_size": 4},
        {"batch_size": 6, "share": Fraction(2, 3)},
    ],
    ids=str,
)
def test_one_two_four_and_one_rank_hand_out_what_one_rank_would(checkpoint, filter, kind):
    found, state, stop = [], None, 40
    enough = 200 if "as_dict" in kind else 30
    for steps in ([7], [9, 4], [3, 0, 5, 10], [enough]):
        more, state = run(checkpoint, steps, state, filter=filter, **kind)
        found += more
    share = kind.get("share", Fraction(1, 2))
    samples = [row for row in found if row[0] >= 0]
    beside = [row for row in found if row[0] < 0]
    assert len(set(samples)) == len(samples) and len(set(beside)) == len(beside)
    alone, _ = run(checkpoint, [enough], filter=filter, **kind)
    assert below(found, stop) == below(alone, stop)
    # In batches of a whole number of labelled images per sample, the place in the batch does not matter.
    wanted = {row for index, _ in below(found, stop) for row in expected_beside(index, index, share, 5)}
    assert wanted <= set(beside)
    every = {row for index, _ in samples for row in expected_beside(index, index, share, 5)}
    assert set(beside) <= every


@pytest.mark.parametrize("epoch_size", [1, 13, 24])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["batch_size"]] + KINDS[3:5], ids=str)
def test_every_rank_yields_the_same_number_which_is_its_length(checkpoint, kind, ranks, epoch_size):
    lengths, shown = set(), 0
    for rank in range(ranks):
        mixed = mixture(checkpoint, filter="rolling", shard=Shard(rank, ranks), epoch_size=epoch_size, **kind)
        items = list(mixed)
        assert len(items) == len(mixed)
        lengths.add(tuple(len(item) for item in items))
        shown += sum(len(item) if kind["batch_size"] else 1 for item in items)
    assert len(lengths) == 1
    share = kind.get("share", Fraction(1, 2))
    whole = -(-epoch_size // ranks)
    samples = shown // ranks - whole
    if kind["batch_size"]:
        size = int(kind["batch_size"] * (1 - share))
        batches, rest = divmod(whole, size)
        assert samples == batches * int(kind["batch_size"] * share) + floor(rest * share / (1 - share))
    else:
        assert samples == whole * share / (1 - share)


def test_an_epoch_of_an_unknown_number_of_labelled_images_has_no_length_and_is_not_shared_by_ranks(checkpoint):
    options = {"share": Fraction(1, 4), "epoch_size": 20}
    with pytest.raises(TypeError, match=r"has no length, since each sample has 1/3 labelled images on average"):
        len(mixture(checkpoint, **options))
    with pytest.raises(StreamError, match=r"2 ranks would wait.*build the stream with batch_size"):
        iter(mixture(checkpoint, shard=Shard(0, 2), **options))
    assert len(list(mixture(checkpoint, filter="none", **options))) == 20 + 6
    with pytest.raises(TypeError, match="an endless stream has no length"):
        len(mixture(checkpoint))


def test_every_epoch_has_labelled_images_of_its_own_and_parts_of_the_line_do_not_share_any(checkpoint):
    mixed = mixture(checkpoint, epoch_size=20, batch_size=4)
    passes = [rows(mixed) for _ in range(3)]
    again = mixture(checkpoint, epoch_size=20, batch_size=4)
    again.set_epoch(2)
    assert rows(again) == passes[2]
    whole = mixture(checkpoint, batch_size=4)
    held_out, training = whole.take(12), whole.skip(12)
    parts = [rows(held_out), rows(itertools.islice(training, 9))]
    assert parts[0] == rows(held_out), "what has an end is the same at every pass"
    for left, right in [*itertools.combinations(passes, 2), parts]:
        assert not set(left) & set(right)


def test_the_stream_is_left_as_it_is_and_the_mixture_begins_where_it_was_set_to_begin(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None, batch_size=4)
    stream.set_epoch(3)
    mixed = mix(stream, labelled_set(2))
    first = next(iter(mixed))
    assert (stream.batch_size, len(next(iter(stream)))) == (4, 4)
    assert first.indices[0] == 3 * 2**40
    assert_same(mixed[:4], stream[:4])
