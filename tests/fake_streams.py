"""Streams of a synthesizer whose images show their index."""

import torch
from conftest import take

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.filters import Threshold
from handsoff_stream.stream import HandsOffStream


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
