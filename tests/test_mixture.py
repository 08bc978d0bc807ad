"""A mixture is a stream: the labelled images beside a sample are functions of its index, and positions stay exact."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from conftest import CLASSES, assert_resumes_exactly, assert_same, take
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from handsoff_stream import companions as companions_module
from handsoff_stream import mix
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.errors import StreamError
from handsoff_stream.filters import BlockQuantile, RollingPercentile, Threshold
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.position.state import merge_states
from handsoff_stream.seeding import Stream, permutation, transform_seed
from handsoff_stream.shard import Shard
from handsoff_stream.stream import HandsOffStream

SIZE = 16  # of the checkpoint's images
FILTERS = {
    "none": lambda: None,
    "threshold": lambda: Threshold(value=700),
    "block": lambda: BlockQuantile(80, block=10),
    "rolling": lambda: RollingPercentile(80, window=15, lanes=6),
}
SHARES = [Fraction(1, 2), Fraction(1, 3), Fraction(2, 3), Fraction(3, 5), Fraction(1, 10), Fraction(7, 8)]


def synthesize(indices) -> LabelledBatch:
    """Index i => a black image, label i % 3, score (i * 7919) % 1000."""
    i = torch.tensor(indices, dtype=torch.int64)
    labels = (i % 3)[:, None, None].expand(-1, SIZE, SIZE)
    return LabelledBatch(torch.zeros(len(i), 3, SIZE, SIZE), labels, (i * 7919 % 1000).float(), i, indices[-1] + 1)


def labelled_set(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Image n is n / 255 everywhere, its label n % 3."""
    return [(torch.full((3, SIZE, SIZE), n / 255), torch.full((SIZE, SIZE), n % 3)) for n in range(count)]


def signed(image, label):
    """A transform that writes a random number into the first pixel."""
    image = image.clone()
    image[0, 0, 0] = torch.rand(())
    return image, label


def mixture(checkpoint, share=Fraction(1, 2), *, count=5, filter="block", labelled=None, **options):
    chosen = {"chunk_size": 4, "device": "cpu", "synthesize": synthesize, **options}
    stream = HandsOffStream(checkpoint, filter=FILTERS[filter](), **chosen)
    return mix(stream, labelled or labelled_set(count), share, transforms=signed)


def rows(items) -> list[tuple[int, float]]:
    """(index, random number of the transform) of everything in batches or in samples as dicts."""
    found = []
    for item in items:
        if isinstance(item, LabelledBatch):
            found += zip(item.indices.tolist(), item.images[:, 0, 0, 0].tolist(), strict=True)
        else:
            found.append((item["index"], float(item["image"][0, 0, 0])))
    return found


def expected_beside(index: int, place: int, share: Fraction, count: int, seed: int = 0) -> list[tuple[int, float]]:
    """What goes with a sample at a place of its batch, computed as plainly as it is described."""
    ratio = share / (1 - share)
    found = []
    for number in range(floor((place + 1) * ratio) - floor(place * ratio)):
        turn = floor(index * ratio) + number
        image = permutation(seed, turn // count, count)[turn % count]
        generator = torch.Generator().manual_seed(
            transform_seed(seed, index * ceil(ratio) + number, Stream.LABELLED_TRANSFORM)
        )
        found.append((-1 - image, float(torch.rand((), generator=generator))))
    return found


def through_json(state):
    return json.loads(json.dumps(state))


# What comes out ------------------------------------------------------------------------------------------------


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
    assert len(shown) == 4 and all(abs(times - mean) < 0.15 * mean for times in shown.values())


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
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=2, filter=None, synthesize=two_heads)
    stream._source._manifest = {**stream._source._manifest, "heads": {"parts": head(CLASSES), "depth": head(())}}
    label = {"depth": torch.rand(1, SIZE, SIZE), "parts": torch.full((SIZE, SIZE), 255)}
    batch = next(iter(mix(stream, [(torch.zeros(3, SIZE, SIZE), label)])))
    assert torch.equal(batch.labels["depth"][1], label["depth"])
    assert torch.equal(batch.labels["parts"][1], label["parts"])
    with pytest.raises(ValueError, match=r"labelled\[0\] is one tensor, the stream's labels are parts, depth"):
        mix(stream, labelled_set(1))
    label["depth"] = label["depth"][0]
    with pytest.raises(ValueError, match=r"for depth is \[16, 16\], the stream's are \[K, 16, 16\]"):
        mix(stream, [(torch.zeros(3, SIZE, SIZE), label)])


def head(names):
    return {"task": {"class_names": names}}


def two_heads(indices):
    batch = synthesize(indices)
    return dataclasses.replace(batch, labels={"parts": batch.labels, "depth": batch.images[:, :1]})


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


# Positions -----------------------------------------------------------------------------------------------------

KINDS = [
    {"batch_size": 4},
    {"batch_size": 8, "share": Fraction(1, 4)},
    {"batch_size": 6, "share": Fraction(2, 3)},
    {"batch_size": None},
    {"batch_size": None, "share": Fraction(3, 4)},
    {"batch_size": None, "share": Fraction(3, 5)},
    {"batch_size": None, "share": Fraction(1, 4)},
]


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("share") not in SHARES[3:4]], ids=str)
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


# Loaders and workers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_hand_out_the_same(checkpoint_path, context):
    options = {"filter": "none", "batch_size": 6, "share": Fraction(2, 3), "epoch_size": 24}
    alone = rows(mixture(checkpoint_path, **options))
    loader = DataLoader(
        mixture(checkpoint_path, **options), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    assert sorted(rows(loader)) == sorted(alone)


def test_a_dataloader_that_collates_sees_the_share(checkpoint):
    loader = DataLoader(mixture(checkpoint, Fraction(1, 4), as_dict=True, filter="none"), batch_size=8)
    for batch in take(loader, 3):
        assert batch["image"].shape == (8, 3, SIZE, SIZE) and int((batch["index"] < 0).sum()) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"share": Fraction(3, 4)}, {"share": Fraction(1, 4)}], ids=str)
@pytest.mark.parametrize("epoch_size", [None, 9])
def test_a_loader_resumes_exactly_with_as_many_workers(checkpoint_path, workers, kind, epoch_size):
    def make():
        mixed = mixture(checkpoint_path, filter="threshold", epoch_size=epoch_size, **kind)
        return HandsOffLoader(mixed, num_workers=workers, multiprocessing_context="fork" if workers else None)

    loader, items, states = make(), [], []
    for item in itertools.islice(loader, 9):
        items.append(item)
        states.append(through_json(loader.state_dict()))
    for step in range(2, len(items), 3):
        resumed = make()
        resumed.load_state_dict(states[step - 1])
        assert_same(take(resumed, len(items) - step), items[step:])


@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"share": Fraction(3, 4), "as_dict": True}], ids=str)
def test_another_number_of_workers_goes_on_without_repeating_or_skipping(checkpoint_path, kind):
    def make(workers):
        mixed = mixture(checkpoint_path, filter="threshold", epoch_size=30, **kind)
        return HandsOffLoader(mixed, num_workers=workers, multiprocessing_context="fork" if workers else None)

    found, state = [], None
    for workers, count in ((2, 3), (3, 5), (1, 4), (2, 1000)):
        loader = make(workers)
        if state is not None:
            loader.load_state_dict(state)
        found += rows(itertools.islice(loader, count))
        state = through_json(loader.state_dict())
    share = kind.get("share", Fraction(1, 2))
    samples = {row for row in found if row[0] >= 0}
    assert len(samples) == 30 and len(found) == len(set(found)) == 30 / (1 - share)
    beside = {row for index, _ in samples for row in expected_beside(index, index, share, 5)}
    assert set(found) - samples == beside


def test_the_state_after_a_batch_that_was_yielded_before_is_known(checkpoint):
    loader = HandsOffLoader(mixture(checkpoint, batch_size=4))
    batches = iter(loader)
    first, second = next(batches), next(batches)
    resumed = HandsOffLoader(mixture(checkpoint, batch_size=4))
    resumed.load_state_dict(loader.state_dict(after=first))
    assert_same(next(iter(resumed)), second)


@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"share": Fraction(3, 5)}], ids=str)
def test_a_stateful_dataloader_resumes_exactly(checkpoint_path, kind):
    def make():
        mixed = mixture(checkpoint_path, **kind)
        return StatefulDataLoader(mixed, batch_size=None if "batch_size" in kind else 4, num_workers=2)

    loader = make()
    iterator = iter(loader)
    take(iterator, 3)
    state = loader.state_dict()
    expected = take(iterator, 4)
    resumed = make()
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), expected)


# Refusals ------------------------------------------------------------------------------------------------------


def image(*shape, value=0.5):
    return torch.full(shape or (3, SIZE, SIZE), value)


LABEL = torch.zeros(SIZE, SIZE, dtype=torch.int64)


@pytest.mark.parametrize(
    ("labelled", "error", "message"),
    [
        ([], ValueError, "labelled is empty"),
        (iter(labelled_set(2)), TypeError, "labelled=list_iterator cannot be asked for its length"),
        ([image()], TypeError, r"labelled\[0\] is of type Tensor, and an image and its label are needed"),
        ([(image().numpy(), LABEL)], TypeError, r"the image of labelled\[0\] is ndarray"),
        ([(image().double(), LABEL)], TypeError, r"is torch\.float64, and the stream's are tensors in \[0, 1\]"),
        ([(image(3, 8, 8), LABEL)], ValueError, r"is \[3, 8, 8\], the stream's are \[3, 16, 16\].*resize it"),
        ([(image(1, SIZE, SIZE), LABEL)], ValueError, r"is \[1, 16, 16\], the stream's are \[3, 16, 16\]"),
        ([(image(value=-1.5), LABEL)], ValueError, "has values from -1.5 to -1.5, the stream's are in"),
        ([(image(), LABEL[:8])], ValueError, r"label of labelled\[0\] is \[8, 16\], the stream's are \[16, 16\]"),
        ([(image(), LABEL.float())], TypeError, "is torch.float32, the stream's are the ids of 3 classes"),
        ([(image(), {"a": LABEL})], ValueError, "is a, the stream's labels are one tensor"),
        ([(image(), LABEL), (image(), LABEL + 3)], ValueError, r"labelled\[1\] has the id 3, the stream has the cl"),
        ([(image(), LABEL - 1)], ValueError, "has the id -1, the stream has the classes 0 to 2, and 255 marks"),
    ],
)
def test_a_labelled_set_that_does_not_fit_the_stream_is_refused_when_it_is_mixed(checkpoint, labelled, error, message):
    stream = HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None)
    with pytest.raises(error, match=message):
        mix(stream, labelled)


def test_an_image_beyond_the_first_ones_is_refused_when_it_is_needed(checkpoint):
    many = labelled_set(3) * 50
    many[1] = (image(3, 8, 8), LABEL)  # of 150, every second or third is read at once
    mixed = mix(HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None, batch_size=8), many)
    with pytest.raises(ValueError, match=r"labelled\[1\] is \[3, 8, 8\]"):
        take(mixed, 100)


def test_transforms_that_end_in_different_sizes_are_refused_with_the_remedy(checkpoint):
    stream = HandsOffStream(checkpoint, device="cpu", synthesize=synthesize, filter=None, batch_size=2)
    mixed = mix(stream, labelled_set(1), transforms=lambda image, label: (image[:, :8], label[:8]))
    with pytest.raises(ValueError, match=r"labelled image 0 has the shape \[3, 8, 16\] where a sample.*\[3, 16, 16\]"):
        next(iter(mixed))


@pytest.mark.parametrize(
    ("batch_size", "share", "message"),
    [
        (None, 0, "share=0 is no mixture of both"),
        (None, 1.0, "share=1.0 is no mixture of both"),
        (None, "half", "share='half' is no mixture"),
        (None, 1e-9, "share=1e-09 is too close to 0"),
        (8, 0.3, r"share=0.3 of batch_size=8 would be 2.4 labelled.*k/8 with k from 1 to 7, the nearest is 2/8 = 0.25"),
        (4, 0.99, r"the nearest is 3/4 = 0.75"),
        (1, 0.5, "batch_size=1 has no row for both"),
    ],
)
def test_a_share_that_is_none_is_refused_with_those_that_are_possible(checkpoint, batch_size, share, message):
    stream = HandsOffStream(checkpoint, device="cpu", batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        mix(stream, labelled_set(2), share)


def test_decimal_shares_mean_what_they_say(checkpoint):
    for batch_size, share, labelled in ((10, 0.3, 3), (9, 1 / 3, 3), (10, 0.7, 7), (100, 0.29, 29)):
        batch = next(iter(mixture(checkpoint, share, batch_size=batch_size)))
        assert int((batch.indices < 0).sum()) == labelled


def test_what_is_no_stream_or_a_mixture_already_is_refused(checkpoint):
    with pytest.raises(TypeError, match="stream=TensorDataset has no samples by index; pass a HandsOffStream"):
        mix(TensorDataset(torch.zeros(2)), labelled_set(2))
    with pytest.raises(ValueError, match=r"Companions\(5 labelled images, share=1/2\) already.*ConcatDataset"):
        mix(mixture(checkpoint), labelled_set(2))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"labelled": labelled_set(6)[1:]}, "saved with labelled='5 images, sha256"),
        ({"labelled": labelled_set(6)}, "saved with labelled='5 images, sha256"),
        ({"share": Fraction(1, 4)}, "saved with share='1/2', this stream has share='1/4'"),
        ({"seed": 1}, "saved with seed=0"),
    ],
)
def test_a_state_of_another_mixture_is_refused_by_name(checkpoint, other, named):
    mixed = mixture(checkpoint, batch_size=4)
    take(mixed, 2)
    with pytest.raises(ValueError, match=named):
        mixture(checkpoint, batch_size=4, **other).load_state_dict(through_json(mixed.state_dict()))
    same = mixture(checkpoint, batch_size=4, labelled=Subset(labelled_set(9), range(5)))
    same.load_state_dict(mixed.state_dict())


def test_a_state_of_the_stream_alone_is_refused_and_one_of_a_mixture_by_the_stream(checkpoint):
    alone = HandsOffStream(checkpoint, device="cpu", filter=FILTERS["block"](), synthesize=synthesize, chunk_size=4)
    with pytest.raises(ValueError, match="saved with labelled=None, this stream has labelled='5 images"):
        mixture(checkpoint).load_state_dict(alone.state_dict())
    with pytest.raises(ValueError, match="this stream has labelled=None"):
        alone.load_state_dict(mixture(checkpoint).state_dict())
    with pytest.raises(ValueError, match="differ in labelled"):
        merge_states(
            [
                mixture(checkpoint, shard=Shard(0, 2)).state_dict(),
                mixture(checkpoint, shard=Shard(1, 2), count=4).state_dict(),
            ]
        )


def test_batches_do_not_resume_between_a_sample_and_its_labelled_images(checkpoint):
    mixed = mixture(checkpoint)
    take(mixed, 3)
    with pytest.raises(ValueError, match=r"saved between a sample and the labelled images.*mixture of samples"):
        mixture(checkpoint, batch_size=4).load_state_dict(mixed.state_dict())
    next(iter(mixed))
    whole = mixture(checkpoint)
    take(whole, 4)
    resumed = mixture(checkpoint, batch_size=4)
    resumed.load_state_dict(whole.state_dict())
    assert [index for index, _ in rows(take(resumed, 1))][0] >= 2


def test_ranks_do_not_share_what_one_of_them_would_hand_out_alone(checkpoint):
    mixed = mixture(checkpoint, epoch_size=20)
    take(mixed, 3)
    state = mixed.state_dict()
    with pytest.raises(ValueError, match=r"which one rank would hand out more than the others of 2"):
        mixture(checkpoint, epoch_size=20, shard=Shard(0, 2)).load_state_dict(merge_states([state]))
    resumed = mixture(checkpoint, epoch_size=20)
    resumed.load_state_dict(merge_states([state]))
    assert len(list(resumed)) == 40 - 3
