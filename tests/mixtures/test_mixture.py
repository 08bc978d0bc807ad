"""What a mixture hands out: the labelled images beside a sample are functions of its index."""

import dataclasses
import itertools
from collections import Counter
from fractions import Fraction
from math import floor

import pytest
import torch
from conftest import assert_same, take
from mixtures import FILTERS, SHARES, SIZE, expected_beside, labelled_set, mixture, rows, signed, synthesize

from handsoff_stream import companions as companions_module
from handsoff_stream import mix
from handsoff_stream.checkpoint import Head
from handsoff_stream.filters import Threshold
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.tasks import Depth


@pytest.mark.parametrize(
    ("batch_size", "of_them_labelled"), [(2, 1), (3, 1), (3, 2), (8, 2), (8, 3), (8, 4), (8, 7), (12, 9)]
)
@pytest.mark.parametrize("filter", ["none", "rolling"])
def test_every_batch_holds_the_stream_and_then_the_share_of_labelled_images(
    checkpoint, filter, batch_size, of_them_labelled
):
    share = Fraction(of_them_labelled, batch_size)
    samples = batch_size - of_them_labelled
    alone = HandsOffStream(
        checkpoint, batch_size=samples, filter=FILTERS[filter](), chunk_size=4, device="cpu", synthesize=synthesize
    )
    mixed = mixture(checkpoint, share, filter=filter, batch_size=batch_size)
    for batch, own in itertools.islice(zip(mixed, alone, strict=False), 4):
        assert len(batch) == batch_size
        assert_same(batch.select(range(samples)), own)
        assert batch.next_index == own.next_index
        beside = rows([batch.select(range(samples, batch_size))])
        wanted = [expected_beside(i, place, share, 5) for place, i in enumerate(own.indices.tolist())]
        assert beside == list(itertools.chain(*wanted))
        assert torch.equal(batch.uncertainty[samples:], torch.zeros(of_them_labelled))
        assert batch.labels[samples:, 0, 0].tolist() == [(-1 - index) % 3 for index, _ in beside]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("filter", ["none", "rolling"])
def test_every_sample_is_followed_by_the_labelled_images_that_go_with_it(checkpoint, filter, share):
    alone = HandsOffStream(checkpoint, filter=FILTERS[filter](), chunk_size=4, device="cpu", synthesize=synthesize)
    alone.batch_size = 1
    wanted = []
    for batch in itertools.islice(alone, 25):
        index = int(batch.indices)
        wanted += [(index, 0.0), *expected_beside(index, index, share, 5)]
    assert rows(take(mixture(checkpoint, share, filter=filter, as_dict=True), len(wanted))) == wanted


@pytest.mark.parametrize("share", SHARES)
def test_the_first_samples_have_their_share_of_labelled_images(checkpoint, share):
    items = rows(take(mixture(checkpoint, share, filter="none", as_dict=True), 100))
    samples = labelled = 0
    for index, _ in items:
        if index >= 0:
            assert labelled == floor(samples * share / (1 - share))
            samples += 1
        else:
            labelled += 1


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_labelled_images_come_in_whole_random_orders(checkpoint, count, batch_size):
    options = {"as_dict": True} if batch_size is None else {"batch_size": batch_size}
    mixed = mixture(checkpoint, count=count, filter="none", **options)
    shown = [-1 - index for index, _ in rows(take(mixed, 12 * count)) if index < 0]
    orders = [tuple(shown[i : i + count]) for i in range(0, len(shown) // count * count, count)]
    assert len(orders) >= 6 and all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(orders)) > 4 or count == 1


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(1, 4), Fraction(3, 8)])
@pytest.mark.parametrize("filter", ["threshold", "rolling"])
def test_rejected_samples_hardly_change_how_often_an_image_is_shown(checkpoint, share, filter):
    mixed = mixture(checkpoint, share, count=4, filter=filter, batch_size=16)
    shown = Counter(index for index, _ in rows(take(mixed, 40)) if index < 0)
    mean = sum(shown.values()) / 4
    assert len(shown) == 4 and all(abs(times - mean) < 0.25 * mean for times in shown.values())


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(3, 8), Fraction(3, 4)])
def test_no_two_labelled_images_are_transformed_alike_nor_as_the_sample_beside_them(checkpoint, share):
    stream = HandsOffStream(checkpoint, batch_size=8, filter=Threshold(value=700), device="cpu", transforms=signed)
    numbers = [number for _, number in rows(take(mix(stream, labelled_set(2), share, transforms=signed), 12))]
    assert len(set(numbers)) == len(numbers) == 96


def test_another_seed_shows_other_images_transformed_otherwise(checkpoint):
    one, other = (rows(take(mixture(checkpoint, count=50, seed=seed, batch_size=8), 5)) for seed in (0, 1))
    for get in (lambda row: row[0], lambda row: row[1]):
        assert [get(row) for row in one if row[0] < 0] != [get(row) for row in other if row[0] < 0]


def test_real_samples_and_labelled_images_have_one_form(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=4)
    batch = next(iter(mix(stream, labelled_set(3))))
    assert batch.images.shape == (4, 3, SIZE, SIZE) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (4, SIZE, SIZE) and batch.labels.dtype == torch.int64
    assert_same((batch.images[0], batch.labels[0]), stream[0])
    number = -1 - int(batch.indices[2])
    assert_same((batch.images[2], batch.labels[2]), labelled_set(3)[number])
    (image, label), (other_image, other_label) = take(mix(HandsOffStream(checkpoint, device="cpu"), labelled_set(3)), 2)
    assert (image.shape, label.shape) == (other_image.shape, other_label.shape)
    assert (image.dtype, label.dtype) == (other_image.dtype, other_label.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("given", [torch.float32, torch.uint8])
def test_labelled_images_of_either_type_become_what_the_stream_yields(checkpoint, dtype, given):
    images = torch.arange(256, dtype=torch.uint8).view(1, SIZE, SIZE).expand(3, -1, -1)
    image = images / 255 if given == torch.float32 else images
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=2, image_dtype=dtype)
    for batch in take(mix(stream, [(image, torch.zeros(SIZE, SIZE, dtype=torch.uint8))]), 2):
        assert torch.equal(batch.images[1], images if dtype == torch.uint8 else images / 255)
        assert batch.labels.dtype == torch.int64


def test_several_heads_and_heads_without_classes_take_labels_of_their_form(checkpoint):
    depth = LabelGenerator(checkpoint.generator.feature_channels, hidden=(7, 5), num_outputs=1, members=2).eval()
    heads = {"parts": checkpoint.heads["segmentation"], "depth": Head(Depth(), depth.requires_grad_(False))}
    stream = HandsOffStream(dataclasses.replace(checkpoint, heads=heads), device="cpu", batch_size=2)
    label = {"depth": torch.rand(1, SIZE, SIZE), "parts": torch.full((SIZE, SIZE), 255)}
    batch = next(iter(mix(stream, [(torch.zeros(3, SIZE, SIZE), label)])))
    assert torch.equal(batch.labels["depth"][1], label["depth"])
    assert torch.equal(batch.labels["parts"][1], label["parts"])
    with pytest.raises(ValueError, match=r"labelled\[0\] is one tensor, the stream's labels are parts, depth"):
        mix(stream, labelled_set(1))
    label["depth"] = label["depth"][0]
    with pytest.raises(ValueError, match=r"for depth is \[16, 16\], the stream's are \[K, 16, 16\]"):
        mix(stream, [(torch.zeros(3, SIZE, SIZE), label)])


def test_labelled_images_go_where_the_samples_go(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", output_device="meta", batch_size=2, filter=None)
    batch = next(iter(mix(stream, labelled_set(1))))
    assert batch.images.is_meta and batch.labels.is_meta and batch.indices.tolist() == [0, -1]


def test_the_modes_of_the_training_loop_do_not_change_labelled_images(checkpoint):
    labelled = labelled_set(5)
    expected = take(mixture(checkpoint, labelled=labelled, batch_size=4), 3)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(take(mixture(checkpoint, labelled=labelled, batch_size=4), 3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Reads(list):
    """Samples that count how often each is asked for."""

    def __init__(self, items):
        super().__init__(items)
        self.asked = Counter()

    def __getitem__(self, index):
        self.asked[index] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("most_kept", [None, 0])
def test_images_are_read_once_as_long_as_they_fit_into_memory(checkpoint, monkeypatch, most_kept):
    if most_kept is not None:
        monkeypatch.setattr(companions_module, "MOST_KEPT", most_kept)
    reads = Reads(labelled_set(4))
    got = take(mixture(checkpoint, labelled=reads, batch_size=4), 8)
    assert set(reads.asked.values()) == {1} if most_kept is None else min(reads.asked.values()) > 2
    assert_same(got, take(mixture(checkpoint, count=4, batch_size=4), 8))


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.uint8])
def test_a_transform_that_works_in_place_leaves_the_labelled_images_as_they_are(checkpoint, image_dtype):
    def in_place(image, label):
        seen.append((int(image.max() * (1 if image_dtype == torch.uint8 else 255)), int(label.max())))
        return image.zero_(), label.zero_()

    seen: list[tuple[int, int]] = []
    stream = HandsOffStream(
        checkpoint, batch_size=4, device="cpu", synthesize=synthesize, filter=None, image_dtype=image_dtype
    )
    take(mix(stream, labelled_set(3)[1:], transforms=in_place), 20)
    assert set(seen) == {(1, 1), (2, 2)} and len(seen) == 40
