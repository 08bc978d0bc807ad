"""A stream resumes exactly: its state is that of what was handed out, whatever devices, workers and copies do."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from conftest import assert_resumes_exactly, assert_same, take
from fake_streams import FakeSynthesizer, fake_stream
from late_cuda import POLICIES, LateCuda
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from handsoff_stream import precision as precision_module
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.errors import StreamError
from handsoff_stream.filters import BlockQuantile, RollingPercentile
from handsoff_stream.prefetch import CHUNKS_IN_FLIGHT
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream

# State ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", ["rolling", "block", "threshold", None])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_resuming_is_exact_at_every_step(checkpoint, filter, batch_size):
    choice = BlockQuantile(90, block=10) if filter == "block" else filter
    assert_resumes_exactly(
        lambda: HandsOffStream(checkpoint, device="cpu", filter=choice, batch_size=batch_size, seed=3),
        steps=10,
    )


@pytest.mark.parametrize("options", [{"shard": Shard(1, 2)}, {"epoch_size": 13}, {"chunk_size": 7}])
def test_resuming_is_exact_on_a_shard_in_an_epoch_and_with_odd_chunks(checkpoint, options):
    assert_resumes_exactly(lambda: HandsOffStream(checkpoint, device="cpu", **options), steps=12)


def test_resuming_keeps_the_epoch(checkpoint):
    def make():
        stream = fake_stream(checkpoint)
        stream.set_epoch(3)
        return stream

    stream = make()
    iterator = iter(stream)
    next(iterator)
    resumed = fake_stream(checkpoint)
    resumed.load_state_dict(stream.state_dict())
    assert_same(take(resumed, 3), list(itertools.islice(iterator, 3)))


def test_the_state_counts_what_was_handed_out(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", chunk_size=16)
    take(stream, 3)
    assert stream.accepted == 3
    walk = stream.state_dict()["walk"]
    assert walk["counts"]["accepted"] == 3 and walk["cursor"] == 3 + stream.rejected


def test_batch_size_may_change_on_resuming(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=6)
    iterator = iter(stream)
    take(iterator, 2)
    state = stream.state_dict()
    samples = HandsOffStream(checkpoint, device="cpu")
    samples.load_state_dict(state)
    images = torch.stack([image for image, _ in take(samples, 6)])
    assert torch.equal(images, next(iterator).images)


@pytest.mark.filterwarnings("ignore:this checkpoint has no calibration scores")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"truncation": 0.5}, "truncation"),
        ({"filter": "block"}, "filter"),
        ({"chunk_size": 8}, "chunk_size"),
        ({"noise": "none"}, "noise"),
        ({"score": "sum"}, "score"),
        ({"precision": "fast"}, "precision"),
        ({"epoch_size": 50}, "epoch_size"),
    ],
)
def test_a_state_that_cannot_be_honoured_is_refused_by_name(checkpoint, monkeypatch, change, named):
    monkeypatch.setattr(precision_module, "cpu_multiplies_bfloat16", lambda: True)
    state = HandsOffStream(checkpoint, device="cpu").state_dict()
    other = HandsOffStream(checkpoint, device="cpu", **change)
    with pytest.raises(ValueError, match=f"saved with {named}=.*repeat or skip"):
        other.load_state_dict(state)


def test_a_state_of_another_checkpoint_or_version_is_refused(checkpoint):
    from conftest import make_checkpoint

    state = HandsOffStream(make_checkpoint(seed=1), device="cpu").state_dict()
    stream = HandsOffStream(checkpoint, device="cpu")
    with pytest.raises(ValueError, match="saved with checkpoint="):
        stream.load_state_dict(state)
    for broken in ({}, {**stream.state_dict(), "version": 99}, None):
        with pytest.raises(ValueError, match="no stream state of version 2"):
            stream.load_state_dict(broken)


# On a device that works late -----------------------------------------------------------------------------------


def late_stream(checkpoint, cuda, **options) -> HandsOffStream:
    """The fake stream on a device that does its work late, see late_cuda.py."""

    def synthesize(indices):
        return FakeSynthesizer()(indices).map(lambda tensor: cuda.upload(tensor.contiguous()))

    return HandsOffStream(checkpoint, device="cuda", chunk_size=4, synthesize=synthesize, **options)


def on_host(item):
    """What has been computed by now of a sample or a batch."""
    if isinstance(item, LabelledBatch):
        return item.map(lambda tensor: tensor.memory)
    return tuple(tensor.memory for tensor in item)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("filter", [None, RollingPercentile(80, window=30), BlockQuantile(80, block=10)])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_samples_decisions_and_state_do_not_depend_on_when_the_device_works(
    checkpoint, monkeypatch, policy, filter, batch_size
):
    expected = fake_stream(checkpoint, filter=filter, batch_size=batch_size)
    cuda = LateCuda(POLICIES[policy]())
    cuda.patch(monkeypatch)
    stream = late_stream(checkpoint, cuda, filter=filter, batch_size=batch_size)
    items = []
    for item, right in itertools.islice(zip(stream, expected, strict=True), 12):
        items.append((item, right))
        assert stream.state_dict()["walk"] == expected.state_dict()["walk"]
    cuda.drain()
    for item, right in items:
        assert_same(on_host(item), right)


def test_chunks_go_back_to_the_ring_before_the_consumer_sets_to_work(checkpoint, monkeypatch):
    cuda = LateCuda()
    cuda.patch(monkeypatch)
    batches = take(late_stream(checkpoint, cuda, filter=None, batch_size=16), 10)  # four chunks a batch
    slots = cuda.allocated // len(batches[0].tensors())
    assert slots <= 4 + CHUNKS_IN_FLIGHT + 1


def test_one_sample_is_regenerated_on_a_device_that_works_late(checkpoint, monkeypatch):
    cuda = LateCuda()
    cuda.patch(monkeypatch)
    sample = late_stream(checkpoint, cuda)[42]
    cuda.drain()
    assert_same(on_host(sample), fake_stream(checkpoint)[42])


def test_samples_have_memory_of_their_own(checkpoint):
    for stream in (
        fake_stream(checkpoint),
        fake_stream(checkpoint, batch_size=3),
        fake_stream(checkpoint, batch_size=1),
    ):
        for item in take(stream, 3):
            for tensor in item:
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cpu", "output_device": "cuda"}])
def test_a_device_that_is_not_there_is_refused_wherever_it_is_asked_for(checkpoint, monkeypatch, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StreamError, match="pass device='cpu'"):
        next(iter(HandsOffStream(checkpoint, **options)))


def test_the_output_device_is_the_device_unless_another_is_named(checkpoint):
    def devices(**options):
        stream = HandsOffStream(checkpoint, **options)
        return str(stream.device), str(stream.output_device)

    assert devices(device="cpu") == ("cpu", "cpu")
    assert devices(device="cuda:1", output_device="cuda:0") == ("cuda:1", "cuda:0")
    assert devices(device="cuda", output_device="cpu") == ("cuda", "cpu")


def test_labels_are_exact_on_a_cpu_and_fast_on_cuda_unless_the_precision_is_named(checkpoint, monkeypatch):
    monkeypatch.setattr(precision_module, "cpu_multiplies_bfloat16", lambda: True)

    def precision(**options):
        return HandsOffStream(checkpoint, **options).options.precision

    assert precision(device="cpu") == "exact" and precision(device="cuda") == "fast"
    assert precision(device="cpu", precision="fast") == "fast"
    assert precision(device="cuda", precision="exact") == "exact"


def test_samples_go_to_the_output_device(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", output_device="meta", batch_size=2, filter=None)
    batch = next(iter(stream))
    assert batch.images.is_meta and batch.labels.is_meta and batch.indices.tolist() == [0, 1]


# Loaders, processes, pickling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes_exactly_with_the_same_workers(checkpoint_path, workers):
    def make():
        stream = HandsOffStream(checkpoint_path, device="cpu", batch_size=3)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    loader = make()
    iterator = iter(loader)
    take(iterator, 3)
    state = json.loads(json.dumps(loader.state_dict())) if workers == 0 else loader.state_dict()
    expected = take(iterator, 4)
    resumed = make()
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), expected)


def test_a_stream_pickles_small_and_a_copy_begins_where_the_stream_was_set_to_begin(checkpoint_path):
    stream = HandsOffStream(checkpoint_path, device="cpu")
    expected = take(stream, 3)
    data = pickle.dumps(stream)
    assert len(data) < 20_000
    for twin in (pickle.loads(data), copy.deepcopy(stream), copy.copy(stream)):
        assert_same(take(twin, 3), expected)


def test_spawned_workers_work_too(checkpoint_path):
    stream = HandsOffStream(checkpoint_path, device="cpu", filter=None, batch_size=4)
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert_same(take(loader, 2), take(stream, 2))


def test_cuda_inside_a_worker_process_is_refused_with_the_remedy(checkpoint_path):
    loader = DataLoader(HandsOffStream(checkpoint_path, device="cuda"), batch_size=2, num_workers=1)
    with pytest.raises(StreamError, match=r"num_workers=0"):
        next(iter(loader))


def test_cuda_without_a_device_is_refused_with_the_remedy(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StreamError, match="pass device='cpu'"):
        next(iter(HandsOffStream(checkpoint, device="cuda")))
