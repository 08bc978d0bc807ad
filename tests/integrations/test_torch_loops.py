"""Loops of torch and torchdata, by the scripts of examples/integrations, and what a loop may get wrong."""

import gc
import itertools

import pytest
import torch
from frameworks import make_stream, uninterrupted
from processes import run_ranks
from torch.utils.data import DataLoader, random_split

from handsoff_stream.errors import StreamError
from handsoff_stream.filters import BlockQuantile
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.meter import StreamMeter
from handsoff_stream.position.dealing import EPOCH_STRIDE

pytestmark = pytest.mark.filterwarnings("default")  # of the frameworks themselves


def ddp(checkpoint: str, workers: int) -> list[list[int]]:
    import torch_ddp

    return torch_ddp.train(make_stream(checkpoint, batch_size=4, epoch_size=33), epochs=2, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_ddp_ends_on_both_ranks_and_its_epochs_differ(checkpoint_path, workers):
    ranks = run_ranks(ddp, 2, checkpoint=str(checkpoint_path), workers=workers)
    for epoch in range(2):
        seen = sorted(ranks[0][epoch] + ranks[1][epoch])
        assert [index // EPOCH_STRIDE for index in seen] == [epoch] * 34
        assert len(set(seen)) == 34 and len(ranks[0][epoch]) == len(ranks[1][epoch])


@pytest.fixture
def collected_by_this_thread():
    """torchdata 0.11 joins the thread of a prefetcher that is collected, and fails in this very thread."""
    gc.disable()
    yield
    gc.collect()
    gc.enable()


@pytest.mark.usefixtures("collected_by_this_thread")
@pytest.mark.parametrize(("kind", "workers"), [("loader", 0), ("loader", 2), ("nodes", 0)])
def test_torchdata_resumes_exactly(checkpoint, kind, workers):
    import torchdata_loaders

    def make():
        return make_stream(checkpoint, filter=BlockQuantile(75, block=8), batch_size=3)

    whole, _ = torchdata_loaders.train(make(), kind, 7, workers=workers)
    first, saved = torchdata_loaders.train(make(), kind, 3, workers=workers)
    rest, _ = torchdata_loaders.train(make(), kind, 4, saved, workers=workers)
    assert first + rest == whole


def test_take_and_skip_are_disjoint_and_filtered(checkpoint):
    import train_and_validation

    stream = make_stream(checkpoint, filter=BlockQuantile(75, block=8), batch_size=4)
    train, validation = train_and_validation.split(stream, 16)
    held_out = [int(i) for batch in validation for i in batch.indices]
    assert held_out == [int(i) for batch in validation for i in batch.indices]
    trained = [int(i) for batch in itertools.islice(train, 4) for i in batch.indices]
    assert held_out + trained == uninterrupted(checkpoint, 28, filter=BlockQuantile(75, block=8))


def test_subsets_hold_rejected_samples_too(checkpoint):
    import train_and_validation

    stream = make_stream(checkpoint, filter=BlockQuantile(25, block=8), batch_size=4)
    labels = torch.cat([labels for _, labels in train_and_validation.unfiltered(stream, 8)])
    assert labels[:, 0, 0].tolist() == [i % 3 for i in range(8)]


def test_random_split_needs_a_stream_with_a_length(checkpoint):
    with pytest.raises(TypeError, match="pass epoch_size"):
        random_split(make_stream(checkpoint), [0.5, 0.5])


@pytest.mark.parametrize("size", [1, 4])
def test_batches_are_not_batched_again(checkpoint, size):
    with pytest.raises(TypeError, match=r"pass DataLoader\(stream, batch_size=None\)"):
        next(iter(DataLoader(make_stream(checkpoint, batch_size=4), batch_size=size)))


def test_the_position_of_a_plain_loaders_workers_is_refused(checkpoint):
    stream = make_stream(checkpoint, batch_size=4)
    next(iter(DataLoader(stream, batch_size=None, num_workers=1)))
    with pytest.raises(StreamError, match="HandsOffLoader"):
        stream.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_meter_says_what_the_stream_delivered(checkpoint, workers):
    stream = make_stream(checkpoint, filter=BlockQuantile(50, block=8), batch_size=4)
    loader = HandsOffLoader(stream, num_workers=workers)
    meter, batches = StreamMeter(loader), list(itertools.islice(loader, 0))
    for batch in itertools.islice(loader, 6):
        meter.update(batch)
        batches.append(batch)
    values = meter.values()
    assert values["stream/pairs_per_second"] > 0
    assert values["stream/acceptance"] == pytest.approx(0.5, abs=0.1)
    assert values["stream/largest_uncertainty"] == max(float(batch.uncertainty.max()) for batch in batches)
    labels = torch.cat([batch.labels for batch in batches])
    for number, name in enumerate(stream.class_names):
        assert values[f"stream/share/{name}"] == pytest.approx(float((labels == number).float().mean()))
    assert "stream/largest_uncertainty" not in meter.values()
