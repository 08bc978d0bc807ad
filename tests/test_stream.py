"""A sample is a function of (checkpoint, seed, index); everything else about a stream is arithmetic on indices."""

import dataclasses
import itertools

import pytest
import torch
from conftest import assert_same, flatten, take
from fake_streams import FakeSynthesizer, fake_stream, indices_in, indices_of, kept_indices
from torch.utils.data import DataLoader

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint, Head, save_checkpoint
from handsoff_stream.filters import BlockQuantile, RollingPercentile
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.geometry import Rectangle
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation

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
