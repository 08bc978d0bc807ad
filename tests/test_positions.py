"""A state counts the samples that were handed out: after an exception none is lost and none is repeated."""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from processes import FILTERS, fake_stream, indices_of, synthesize

from handsoff_stream.errors import StreamError
from handsoff_stream.filters import BlockQuantile, RollingPercentile, Threshold
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.position.dealing import EPOCH_STRIDE
from handsoff_stream.position.state import merge_states
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream

DATA = Path(__file__).parent / "data"


class FailsOnce:
    """Raises once, at its n-th call."""

    def __init__(self, at):
        self.calls, self.at = 0, at

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            raise OSError("no more space")
        return arguments


def handed_out(iterator):
    """Indices until an exception, and whether one came."""
    seen = []
    try:
        for batch in itertools.islice(iterator, 12):
            seen += indices_of([batch])
    except OSError:
        return seen, True
    return seen, False


def until_twelve(make, fail_at):
    """Indices of a run of 12 batches that fails somewhere and is resumed from its state."""
    stream = make(FailsOnce(fail_at))
    seen, failed = handed_out(iter(stream))
    assert failed
    resumed = make(FailsOnce(0))
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    return seen + indices_of(itertools.islice(resumed, 12 - len(seen) // 5))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("fail_at", [1, 7, 23])
def test_what_a_failing_transform_swallowed_comes_again(checkpoint, filter, fail_at):
    def make(transforms=None):
        return fake_stream(checkpoint, filter, batch_size=5, transforms=transforms)

    assert until_twelve(make, fail_at) == indices_of(itertools.islice(make(), 12))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("fail_at", [1, 4, 9])
def test_what_a_failing_chunk_swallowed_comes_again(checkpoint, filter, fail_at):
    def make(fails):
        return fake_stream(checkpoint, filter, batch_size=5, synthesize=lambda i: synthesize(*fails(i)))

    assert until_twelve(make, fail_at) == indices_of(itertools.islice(make(FailsOnce(0)), 12))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("bad", [0, 6, 41])
def test_a_sample_that_is_not_finite_is_refused_or_skipped_and_counted(checkpoint, filter, bad):
    def broken(indices):
        batch = synthesize(indices)
        batch.uncertainty[batch.indices == bad] = torch.nan
        return batch

    stream = fake_stream(checkpoint, filter, batch_size=5, synthesize=broken)
    seen = []
    with pytest.raises(StreamError, match=rf"sample {bad} has the uncertainty nan.*on_bad_sample"):
        seen += [indices_of([batch]) for batch in itertools.islice(stream, 40)]
    state = stream.state_dict()
    assert state["walk"]["cursor"] <= bad
    lenient = fake_stream(checkpoint, filter, batch_size=5, synthesize=broken, on_bad_sample="skip")
    lenient.load_state_dict(state)
    rest = indices_of(itertools.islice(lenient, 40))
    assert bad not in rest and lenient.skipped == 1
    assert lenient.state_dict()["walk"]["counts"]["skipped"] == 1


def test_without_a_filter_nobody_waits_for_scores(checkpoint, monkeypatch):
    from late_cuda import LateCuda

    cuda = LateCuda()
    cuda.patch(monkeypatch)

    def late(indices):
        return synthesize(indices).map(lambda tensor: cuda.upload(tensor.contiguous()))

    stream = HandsOffStream(checkpoint, filter=None, device="cuda", chunk_size=4, batch_size=4, synthesize=late)
    iterator = iter(stream)
    monkeypatch.setattr(cuda, "force", lambda event: pytest.fail("the host waited"))
    next(iterator)


# Passes ----------------------------------------------------------------------------------------------------------


def first(stream, count):
    return indices_of(itertools.islice(stream, count))


def test_every_pass_goes_on_with_other_samples_and_another_epoch_can_be_set(checkpoint):
    stream = fake_stream(checkpoint, batch_size=1)
    assert [first(stream, 2) for _ in range(3)] == [[e * EPOCH_STRIDE, e * EPOCH_STRIDE + 1] for e in range(3)]
    stream.set_epoch(7)
    assert first(stream, 1) == [7 * EPOCH_STRIDE]
    assert first(stream, 1) == [8 * EPOCH_STRIDE]
    for epoch in (-1, 2**23):
        with pytest.raises(ValueError, match=f"epoch={epoch}"):
            stream.set_epoch(epoch)


def test_the_loop_that_everyone_writes_repeats_nothing(checkpoint):
    stream = fake_stream(checkpoint, batch_size=3, epoch_size=10)
    seen = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        seen += indices_of(stream)
        stream.set_epoch(epoch)  # some frameworks say it twice
    assert len(set(seen)) == 30 and [index // EPOCH_STRIDE for index in seen] == [0] * 10 + [1] * 10 + [2] * 10


# Ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", FILTERS)
def test_training_and_validation_are_disjoint_parts_of_the_index_line(checkpoint, filter):
    stream = fake_stream(checkpoint, filter, batch_size=5)
    validation, training = stream.take(103), stream.skip(103)
    first, again = (indices_of(validation) for _ in range(2))
    assert first == again and max(first) < 103
    later = indices_of(itertools.islice(training, 12))
    assert min(later) >= 103
    assert indices_of(itertools.islice(training, 2))[0] >= 2**40, "training goes on"
    if filter in ("none", "threshold", "block"):
        assert first + later == indices_of(itertools.islice(stream, 40))[: len(first + later)]


def test_a_range_is_walked_at_every_pass(checkpoint):
    stream = fake_stream(checkpoint, batch_size=5, indices=range(6, 21))
    for _ in range(2):
        assert indices_of(stream) == list(range(6, 21))
    assert indices_of(stream.skip(3).take(4)) == [9, 10, 11, 12]
    for wrong in (range(5, 5), range(0, 10, 2), range(-1, 3)):
        with pytest.raises(ValueError, match="no part of the index line"):
            fake_stream(checkpoint, indices=wrong)
    with pytest.raises(ValueError, match=r"skip\(15\) leaves none"):
        stream.skip(15)


def test_a_range_too_short_for_the_epoch_says_so_instead_of_ending_early(checkpoint):
    stream = fake_stream(checkpoint, batch_size=5, indices=range(20), epoch_size=30)
    with pytest.raises(StreamError, match="10 samples of epoch_size are missing"):
        list(stream)


def test_a_range_without_a_size_is_refused_on_several_ranks(checkpoint, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StreamError, match="wait forever.*epoch_size"):
        next(iter(fake_stream(checkpoint, "threshold", indices=range(100))))


def test_slices_are_batches_of_these_indices(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu")
    batch = stream[3:9]
    assert batch.indices.tolist() == list(range(3, 9))
    for row, index in enumerate(range(3, 9)):
        assert torch.equal(batch.images[row], stream[index][0])
    assert stream[10:2:-3].indices.tolist() == [10, 7, 4]
    for wrong in (slice(3, None), slice(4, 4), slice(-2, 3)):
        with pytest.raises(IndexError):
            stream[wrong]


# Refusals ----------------------------------------------------------------------------------------------------------


def test_a_state_of_the_first_release_is_refused_with_the_reason():
    state = json.loads((DATA / "state_version_1.json").read_text())
    with pytest.raises(ValueError, match=r"version=1\): its filter kept one window per shard.*release that wrote it"):
        HandsOffStream("faces", device="cpu", precision="exact").load_state_dict(state)


def set_back(state):
    """The state as if nothing had been handed out, but for what it says comes next."""
    return {**state, "walk": {**state["walk"], "cursor": 0, "lanes": {}}}


def test_a_resumed_walk_is_compared_with_what_the_state_says_comes_next(checkpoint):
    stream = fake_stream(checkpoint, batch_size=5)
    next(iter(stream))
    state = stream.state_dict()
    assert state["walk"]["next"] == [4, 8, 12]
    resumed = fake_stream(checkpoint, batch_size=5)
    resumed.load_state_dict(set_back(state))
    with pytest.raises(StreamError, match=r"begin at \[4, 8, 12\], this stream would with \[0, 4, 8\]"):
        iter(resumed)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_merged_state_is_compared_too_on_any_number_of_ranks(checkpoint, filter, ranks):
    streams = [fake_stream(checkpoint, filter, batch_size=5, shard=Shard(rank, 2)) for rank in range(2)]
    for stream, batches in zip(streams, (9, 13), strict=True):
        indices_of(itertools.islice(stream, batches))
    state = merge_states([stream.state_dict() for stream in streams])
    assert len(state["walk"]["next"]) == 3
    for rank in range(ranks):
        resumed = fake_stream(checkpoint, filter, batch_size=5, shard=Shard(rank, ranks))
        resumed.load_state_dict(state)
        iter(resumed)
        resumed.load_state_dict(set_back(state))
        with pytest.raises(StreamError, match="samples would be repeated or skipped"):
            iter(resumed)


def test_a_range_that_only_some_ranks_have_walked_is_not_complete(checkpoint):
    whole, waiting = (
        fake_stream(checkpoint, batch_size=5, indices=range(24), epoch_size=24, shard=Shard(rank, 2)) for rank in (0, 1)
    )
    first = indices_of(whole)
    resumed = fake_stream(checkpoint, batch_size=5, indices=range(24), epoch_size=24)
    resumed.load_state_dict(merge_states([whole.state_dict(), waiting.state_dict()]))
    assert sorted(first + indices_of(resumed)) == list(range(24))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_are_compared_with_the_state_of_their_loader(checkpoint, workers):
    loader = HandsOffLoader(fake_stream(checkpoint, "rolling", batch_size=5), num_workers=workers)
    indices_of(itertools.islice(loader, 7))
    resumed = HandsOffLoader(fake_stream(checkpoint, "rolling", batch_size=5), num_workers=workers)
    resumed.load_state_dict(set_back(loader.state_dict()))
    with pytest.raises(StreamError, match="samples would be repeated or skipped"):
        next(iter(resumed))


def test_more_shards_than_lanes_are_refused_with_the_remedy(checkpoint, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "13")
    with pytest.raises(StreamError, match=r"13 ranks x workers cannot share the 12 lanes.*lanes=13"):
        iter(fake_stream(checkpoint, "rolling"))


def test_filters_that_need_calibration_speak_when_the_stream_is_built(checkpoint):
    with pytest.warns(UserWarning, match="no calibration scores.*start empty"):
        HandsOffStream(checkpoint, truncation=0.5)
    with pytest.raises(ValueError, match=r"no calibration scores.*Threshold\(value="):
        HandsOffStream(checkpoint, truncation=0.5, filter="threshold")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HandsOffStream(checkpoint)
        HandsOffStream(checkpoint, truncation=0.5, filter="block")


@pytest.mark.parametrize("filter", [BlockQuantile(1), BlockQuantile(100, block=7), RollingPercentile(1, lanes=1)])
def test_a_filter_that_is_meant_to_keep_little_may(checkpoint, filter):
    stream = HandsOffStream(
        checkpoint, filter=filter, device="cpu", batch_size=10, synthesize=synthesize, chunk_size=100
    )
    assert len(indices_of(itertools.islice(stream, 3))) == 30


def test_a_threshold_below_all_scores_still_speaks_up(checkpoint):
    with pytest.raises(StreamError, match="100.0% of the last 1000"):
        next(iter(HandsOffStream(checkpoint, filter=Threshold(value=-1.0), device="cpu", synthesize=synthesize)))


# What comes out ----------------------------------------------------------------------------------------------------


def test_samples_as_dicts_carry_uncertainty_and_index(checkpoint):
    sample = HandsOffStream(checkpoint, device="cpu", as_dict=True)[6]
    batch = HandsOffStream(checkpoint, device="cpu")[6:7]
    assert sample["index"] == 6 and torch.equal(sample["uncertainty"], batch.uncertainty[0])
    assert torch.equal(sample["image"], batch.images[0]) and torch.equal(sample["label"], batch.labels[0])
    with pytest.raises(ValueError, match="as_dict=True is for samples"):
        HandsOffStream(checkpoint, as_dict=True, batch_size=3)


def test_images_come_as_bytes_on_request(checkpoint):
    floats = next(iter(HandsOffStream(checkpoint, device="cpu", batch_size=5)))
    levels = next(iter(HandsOffStream(checkpoint, device="cpu", batch_size=5, image_dtype=torch.uint8)))
    assert levels.images.dtype == torch.uint8 and levels.labels.dtype == torch.int64
    assert torch.equal(levels.images.float() / 255, floats.images)
    with pytest.raises(ValueError, match="image_dtype=torch.float64"):
        HandsOffStream(checkpoint, image_dtype=torch.float64)


def test_a_batch_size_inside_and_outside_is_answered_by_one_sentence(checkpoint):
    loader = torch.utils.data.DataLoader(fake_stream(checkpoint, batch_size=4), batch_size=2)
    with pytest.raises(TypeError, match=r"batches were to be batched again.*DataLoader\(stream, batch_size=None\)"):
        next(iter(loader))


def test_streams_and_batches_show_themselves_briefly(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=5)
    assert stream.class_names == ("background", "skin", "hair")
    assert repr(stream) == (
        "HandsOffStream('a checkpoint in memory', batch_size=5, seed=0, filter='rolling', epoch_size=None, "
        "device='cpu')"
    )
    assert repr(stream[0:2]) == (
        "LabelledBatch(2 samples on cpu: images float32 [2, 3, 16, 16], labels int64 [2, 16, 16], next_index=4)"
    )
