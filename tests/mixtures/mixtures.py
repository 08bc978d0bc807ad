"""A mixture of a fake stream and of labelled images that tell which they are; for the tests of this folder."""

import json
from fractions import Fraction
from math import ceil, floor

import torch

from handsoff_stream import mix
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.filters import BlockQuantile, RollingPercentile, Threshold
from handsoff_stream.seeding import Stream, permutation, transform_seed
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


KINDS = [
    {"batch_size": 4},
    {"batch_size": 8, "share": Fraction(1, 4)},
    {"batch_size": 6, "share": Fraction(2, 3)},
    {"batch_size": None},
    {"batch_size": None, "share": Fraction(3, 4)},
    {"batch_size": None, "share": Fraction(3, 5)},
    {"batch_size": None, "share": Fraction(1, 4)},
]
