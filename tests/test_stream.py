"""A sample is a function of (checkpoint, seed, index); everything else about a stream is arithmetic on indices."""

import copy
import dataclasses
import itertools
import json
import pickle

import pytest
import torch
from conftest import assert_resumes_exactly, assert_same, flatten, take
from late_cuda import POLICIES, LateCuda
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from handsoff_stream import precision as precision_module
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint, Head, save_checkpoint
from handsoff_stream.errors import CheckpointError, StreamError
from handsoff_stream.filters import BlockQuantile, RollingPercentile, Threshold
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.geometry import Rectangle
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.prefetch import CHUNKS_IN_FLIGHT
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation


class FakeSynthesizer:
    """Index i => image filled with i, label i % 3, score (i * 7919) % 1000."""

    def __init__(self):
        self.chunks = []

    def __call__(self, indices):
        self.chunks.append(indices)
        i = torch.tensor(indices, dtype=torch.int64)
        images = i.float()[:, None, None, None].expand(-1, 3, 2, 2)
        labels = (i % 3)[:, None, None].expand(-1, 2, 2)
        return LabelledBatch(images, labels, (i * 7919 % 1000).float(), i, indices[-1] + 1)


def fake_stream(checkpoint, **options) -> HandsOffStream:
    chosen = {"filter": Threshold(value=900), "synthesize": FakeSynthesizer(), **options}
    return HandsOffStream(checkpoint, device="cpu", **chosen)


def indices_of(stream, count: int) -> list[int]:
    return [int(image[0, 0, 0]) for image, _ in take(stream, count)]


def indices_in(items) -> list[int]:
    """Indices of samples or batches of the fake stream."""
    images = [item.images if isinstance(item, LabelledBatch) else item[0][None] for item in items]
    return [int(index) for index in torch.cat(images)[:, 0, 0, 0]]


def kept_indices(stop: int) -> list[int]:
    return [i for i in range(stop) if i * 7919 % 1000 <= 900]


# What comes out ------------------------------------------------------------------------------------------------


def test_samples_are_float_images_on_8_bit_levels_and_integer_masks(checkpoint):
    for image, mask in take(HandsOffStream(checkpoint, device="cpu"), 20):
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32
        assert mask.shape == (16, 16) and mask.dtype == torch.int64
        assert 0 <= image.min() and image.max() <= 1
        assert torch.equal((image * 255).round() / 255, image)
        assert mask.min() >= 0 and mask.max() < 3


def test_batches_unpack_and_carry_uncertainty_indices_and_the_next_index(checkpoint):
    stream = HandsOffStream(checkpoint, batch_size=6, device="cpu")
    for batch in itertools.islice(stream, 4):
        images, labels = batch
        assert images.shape == (6, 3, 16, 16) and labels.shape == (6, 16, 16)
        assert batch.uncertainty.shape == batch.indices.shape == (6,)
        assert batch.next_index == stream.state_dict()["walk"]["cursor"] == int(batch.indices[-1]) + 1
        for row, index in enumerate(batch.indices.tolist()):
            assert_same((images[row], labels[row]), stream[index])


def test_both_ways_through_a_dataloader_give_the_same_images(checkpoint):
    samples = DataLoader(HandsOffStream(checkpoint, device="cpu"), batch_size=8)
    batches = DataLoader(HandsOffStream(checkpoint, batch_size=8, device="cpu"), batch_size=None)
    for (images, labels), batch in zip(take(samples, 5), take(batches, 5), strict=True):
        assert isinstance(batch, LabelledBatch)
        assert_same((images, labels), (batch.images, batch.labels))


def test_a_checkpoint_with_several_heads_gives_a_dict_of_labels(checkpoint):
    heads = {"parts": checkpoint.heads["segmentation"], "again": checkpoint.heads["segmentation"]}
    stream = HandsOffStream(dataclasses.replace(checkpoint, heads=heads), device="cpu", batch_size=2)
    images, labels = next(iter(stream))
    assert set(labels) == {"parts", "again"}
    assert torch.equal(labels["parts"], labels["again"])
    _, label = stream[0]
    assert label["parts"].shape == (16, 16)


def test_any_rows_of_a_batch_can_be_selected_and_joined():
    batch = FakeSynthesizer()(range(8))
    batch = dataclasses.replace(batch, labels={"a": batch.labels, "b": batch.images[:, 0]})
    for rows in ([3], [2, 3, 4], range(1, 7), [0, 5, 6, 2], [4, 4]):
        part = batch.select(rows)
        assert part.indices.tolist() == list(rows)
        for tensor, whole in zip(flatten(part), flatten(batch), strict=True):
            assert torch.equal(tensor, whole[list(rows)])
    halves = LabelledBatch.concatenate([batch.select(range(3)), batch.select(range(3, 8))], next_index=8)
    assert_same(halves, batch)
    with pytest.raises(ValueError, match="no rows"):
        batch.select([])


def test_consecutive_rows_share_memory_with_their_batch():
    batch = FakeSynthesizer()(range(8))
    assert batch.select(range(2, 5)).images.data_ptr() == batch.images[2:].data_ptr()


# Determinism ---------------------------------------------------------------------------------------------------


def test_two_streams_with_the_same_seed_give_identical_samples(checkpoint, checkpoint_path):
    from_memory = HandsOffStream(checkpoint, seed=5, device="cpu")
    from_file = HandsOffStream(checkpoint_path, seed=5, device="cpu")
    assert_same(take(from_memory, 30), take(from_file, 30))


def test_another_seed_gives_other_samples(checkpoint):
    one, other = (take(HandsOffStream(checkpoint, seed=s, device="cpu"), 4) for s in (0, 1))
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.product(one, other))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 16])
def test_batch_size_does_not_change_samples(checkpoint, batch_size):
    samples = take(HandsOffStream(checkpoint, device="cpu"), 48)
    batches = take(HandsOffStream(checkpoint, device="cpu", batch_size=batch_size), 48 // batch_size)
    images = torch.cat([b.images for b in batches])
    assert torch.equal(images, torch.stack([image for image, _ in samples[: len(images)]]))


@pytest.mark.parametrize("filter", [None, "block", "threshold"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_simulated_ranks_give_the_same_samples_by_index(checkpoint, filter, count):
    def by_index(shard):
        stream = HandsOffStream(checkpoint, device="cpu", filter=filter, batch_size=1, shard=shard)
        below = itertools.takewhile(lambda b: int(b.indices[0]) < 300, stream)
        return {int(b.indices[0]): (b.images, b.labels) for b in below}

    whole = by_index(Shard(0, 1))
    parts = [by_index(Shard(i, count)) for i in range(count)]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        for index, sample in part.items():
            assert_same(sample, whole[index])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_give_the_same_samples_by_index(checkpoint_path, workers):
    stream = HandsOffStream(checkpoint_path, filter=None, batch_size=4, epoch_size=48, device="cpu")
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    batches = list(loader)
    seen = sorted(int(i) for b in batches for i in b.indices)
    assert seen == list(range(48))
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            assert_same((batch.images[row], batch.labels[row]), stream[index])


def test_a_rolling_filter_never_changes_a_sample_only_whether_it_is_kept(checkpoint):
    for shard in (Shard(0, 1), Shard(1, 3)):
        stream = HandsOffStream(checkpoint, device="cpu", batch_size=5, shard=shard)
        for batch in take(stream, 6):
            for row, index in enumerate(batch.indices.tolist()):
                assert_same((batch.images[row], batch.labels[row]), stream[index])


def test_any_sample_can_be_regenerated_whether_it_was_kept_or_not(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=1)
    kept = {int(b.indices[0]) for b in take(stream, 40)}
    rejected = set(range(max(kept))) - kept
    assert rejected, "a run of this length rejects something"
    for index in rejected:
        assert_same(stream[index], HandsOffStream(checkpoint, device="cpu", filter=None)[index])


def test_random_noise_belongs_to_the_index(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", noise="random", filter=None)
    assert_same(take(stream, 9)[7], stream[7])
    plain = HandsOffStream(checkpoint, device="cpu", filter=None)
    assert not torch.equal(stream[7][0], plain[7][0])


@pytest.mark.parametrize("part", [(2, 0, 14, 16), (0, 4, 16, 8), (3, 5, 10, 6)])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_cropped_checkpoint_streams_that_part_of_the_same_images_and_labels(checkpoint, part, scale, tmp_path):
    top, left, bottom, right = (edge * scale for edge in part)
    whole = dataclasses.replace(checkpoint, output_size=(16 * scale, 16 * scale))
    cropped = whole.cropped(Rectangle(*part))
    assert cropped.size == (bottom - top, right - left) and cropped.calibration is None
    save_checkpoint(tmp_path / "part.safetensors", cropped)
    options = {"device": "cpu", "filter": None, "noise": "random"}
    for (image, label), (all_image, all_label) in zip(
        take(HandsOffStream(tmp_path / "part.safetensors", **options), 3),
        take(HandsOffStream(whole, **options), 3),
        strict=True,
    ):
        assert torch.equal(image, all_image[:, top:bottom, left:right])
        assert torch.equal(label, all_label[top:bottom, left:right])


def test_a_crop_that_does_not_fit_is_refused(checkpoint):
    with pytest.raises(ValueError, match="rows 4:17, columns 0:16 do not fit into 16 x 16 pixels"):
        checkpoint.cropped(Rectangle(4, 0, 17, 16))
    half = dataclasses.replace(checkpoint, output_size=(8, 8))
    with pytest.raises(ValueError, match="would cut output pixels"):
        half.cropped(Rectangle(1, 0, 14, 16))
    fine = dataclasses.replace(checkpoint, output_size=(10, 10))
    with pytest.raises(ValueError, match="would cut output pixels of 10 x 10"):
        fine.cropped(Rectangle(0, 0, 4, 16))
    with pytest.raises(ValueError, match="would cut pixels"):
        dataclasses.replace(checkpoint, output_size=(7, 10), crop=Rectangle(2, 0, 14, 16))
    with pytest.raises(ValueError, match="already"):
        checkpoint.cropped(Rectangle(2, 0, 14, 16)).cropped(Rectangle(0, 0, 2, 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_has_one_thread_whatever_their_number(checkpoint_path, workers):
    """More would change the order of sums, and with it the bits, see the stream's docstring."""

    def threads(image, mask):
        return image, torch.full_like(mask, torch.get_num_threads())

    stream = HandsOffStream(checkpoint_path, device="cpu", filter=None, epoch_size=8, transforms=threads)
    masks = [mask for _, mask in DataLoader(stream, batch_size=None, num_workers=workers)]
    assert len(masks) == 8 and all((mask == 1).all() for mask in masks)


def test_one_thread_and_two_give_the_same_samples():
    """What one DataLoader worker computes, and a process of two threads without workers."""
    torch.manual_seed(0)
    generator = StyleGAN2(channels=(96, 96, 64, 48, 24), z_dim=32, w_dim=32, mapping_layers=3).eval()
    ensemble = LabelGenerator(generator.feature_channels, hidden=(64, 32), num_outputs=8, members=6).eval()
    head = Head(Segmentation([f"class {i}" for i in range(8)], [(i, i, i) for i in range(8)]), ensemble)
    synthesizer = Synthesizer(Checkpoint(generator, {"parts": head}), SynthesisOptions(), torch.device("cpu"))
    before = torch.get_num_threads()
    batches = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            batches.append(synthesizer(range(8, 12)))
    finally:
        torch.set_num_threads(before)
    assert_same(batches[0], batches[1])


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad])
def test_the_modes_of_the_training_loop_do_not_change_samples(checkpoint, mode):
    alone = take(HandsOffStream(checkpoint, device="cpu", batch_size=4), 3)
    with mode():
        assert_same(take(HandsOffStream(checkpoint, device="cpu", batch_size=4), 3), alone)


@pytest.mark.filterwarnings("ignore:this checkpoint has no calibration scores")
def test_the_global_random_state_is_left_alone(checkpoint):
    before = torch.get_rng_state()
    take(HandsOffStream(checkpoint, device="cpu", noise="random"), 10)
    assert torch.equal(torch.get_rng_state(), before)


# The walk ------------------------------------------------------------------------------------------------------


def test_the_walk_visits_every_index_once_in_order(checkpoint):
    assert indices_of(fake_stream(checkpoint), 500) == kept_indices(1000)[:500]


def test_whole_aligned_chunks_are_asked_for(checkpoint):
    fake = FakeSynthesizer()
    take(fake_stream(checkpoint, chunk_size=8, shard=Shard(1, 2), synthesize=fake), 30)
    for chunk in fake.chunks:
        assert len(chunk) == 8 and chunk[0] % 8 == 0 and chunk[0] // 8 % 2 == 1


def test_no_more_is_synthesized_than_is_asked_for(checkpoint):
    fake = FakeSynthesizer()
    take(fake_stream(checkpoint, chunk_size=4, filter=None, synthesize=fake), 9)
    assert len(fake.chunks) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_stay_whole_when_ranks_share_them(checkpoint, count):
    parts = [
        fake_stream(checkpoint, filter=BlockQuantile(80, block=10), chunk_size=4, shard=Shard(i, count))
        for i in range(count)
    ]
    kept = sorted(i for part in parts for i in indices_of(part, 160))
    expected = []
    for begin in range(0, 200, 10):
        block = sorted(range(begin, begin + 10), key=lambda i: i * 7919 % 1000)
        expected += sorted(block[:8])
    assert [i for i in kept if i < 200] == expected


@pytest.mark.parametrize("batch_size", [None, 8])
def test_an_epoch_of_given_length_is_shared_out_evenly_and_ends(checkpoint, batch_size):
    for count in (1, 2, 3):
        streams = [
            fake_stream(checkpoint, epoch_size=100, shard=Shard(i, count), batch_size=batch_size) for i in range(count)
        ]
        items = [list(stream) for stream in streams]
        assert {len(mine) for mine in items} == {len(stream) for stream in streams}
        seen = [index for mine in items for index in indices_in(mine)]
        assert len(seen) == len(set(seen)) == -(-100 // count) * count


def test_an_epoch_can_be_rounded_down_to_whole_batches_instead(checkpoint):
    for rank in range(3):
        stream = fake_stream(checkpoint, epoch_size=100, shard=Shard(rank, 3), batch_size=8, drop_last=True)
        assert [len(batch) for batch in stream] == [8] * 4 and len(stream) == 4


def test_an_endless_stream_has_no_length(checkpoint):
    with pytest.raises(TypeError, match="pass epoch_size"):
        len(fake_stream(checkpoint))


def test_two_iterations_of_one_stream_do_not_disturb_each_other(checkpoint):
    def passes():
        stream = fake_stream(checkpoint, filter=RollingPercentile(90, window=20), batch_size=1)
        return iter(stream), iter(stream)

    alone = [take(one, 40) for one in passes()]
    together = list(itertools.islice(zip(*passes(), strict=True), 40))
    assert_same([pair[0] for pair in together], alone[0])
    assert_same([pair[1] for pair in together], alone[1])


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


# Transforms ----------------------------------------------------------------------------------------------------


def test_transforms_move_image_and_mask_together_and_belong_to_the_index(checkpoint):
    from torchvision.transforms import v2

    transforms = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(12)])
    plain = HandsOffStream(checkpoint, device="cpu", filter=None)
    stream = HandsOffStream(checkpoint, device="cpu", filter=None, transforms=transforms)
    flipped = 0
    for index, (image, mask) in enumerate(take(stream, 20)):
        assert image.shape == (3, 12, 12) and mask.shape == (12, 12) and mask.dtype == torch.int64
        assert type(image) is type(mask) is torch.Tensor
        assert_same((image, mask), stream[index])
        whole, labels = plain[index]
        flips = [(whole, labels), (whole.flip(2), labels.flip(1))]
        matches = [
            (f, y, x)
            for f, (w, m) in enumerate(flips)
            for y, x in itertools.product(range(5), repeat=2)
            if torch.equal(w[:, y : y + 12, x : x + 12], image) and torch.equal(m[y : y + 12, x : x + 12], mask)
        ]
        assert matches
        flipped += matches[0][0]
    assert 0 < flipped < 20


# Bad input -----------------------------------------------------------------------------------------------------


def test_nan_weights_are_reported_by_index_instead_of_labelling_garbage(checkpoint):
    broken = copy.deepcopy(checkpoint)
    broken.heads["segmentation"].label_generator.linear1.weight.fill_(float("nan"))
    with pytest.raises(StreamError, match="sample 0 has the uncertainty nan"):
        next(iter(HandsOffStream(broken, device="cpu")))


def test_a_checkpoint_without_a_head_is_refused_when_the_stream_is_built(checkpoint):
    with pytest.raises(CheckpointError, match="no labelling head.*handsoff-stream fit"):
        HandsOffStream(Checkpoint(checkpoint.generator))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 yields nothing"),
        ({"epoch_size": -1}, "epoch_size=-1 yields nothing"),
        ({"chunk_size": 0}, "chunk_size=0 yields nothing"),
        ({"truncation": 3.0}, "truncation=3.0 is no psi"),
        ({"noise": "loud"}, "noise='loud' is unknown"),
        ({"score": "max"}, "score='max' is unknown"),
        ({"precision": "double"}, "precision='double' is unknown"),
        ({"filter": "sorted"}, "filter='sorted' is unknown"),
        ({"seed": -1}, "seed=-1 addresses no stream"),
    ],
)
def test_an_option_out_of_range_is_refused_when_the_stream_is_built(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        HandsOffStream(checkpoint, device="cpu", **options)


def test_an_unknown_option_is_refused(checkpoint):
    with pytest.raises(TypeError, match="trucation"):
        HandsOffStream(checkpoint, trucation=0.5)


@pytest.mark.parametrize("index", [-1, 2**63])
def test_an_index_without_a_sample_is_an_index_error(checkpoint, index):
    with pytest.raises(IndexError, match="addresses no sample"):
        HandsOffStream(checkpoint, device="cpu")[index]


# The default filter on a real ensemble -------------------------------------------------------------------------


def test_the_rolling_filter_agrees_with_dropping_the_top_tenth_of_5000_samples_offline(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", filter=None, batch_size=500, chunk_size=250, epoch_size=5000)
    scores = torch.cat([batch.uncertainty for batch in stream])
    offline = torch.zeros(5000, dtype=torch.bool)
    offline[scores.argsort()[:4500]] = True

    rolling = HandsOffStream(checkpoint, device="cpu", batch_size=1, chunk_size=250)
    below = itertools.takewhile(lambda b: int(b.indices[0]) < 5000, rolling)
    kept = torch.zeros(5000, dtype=torch.bool)
    kept[[int(b.indices[0]) for b in below]] = True
    assert abs(kept.float().mean() - 0.9) <= 0.02
    assert (kept == offline).float().mean() >= 0.95
