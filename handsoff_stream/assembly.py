"""Rows of finished chunks => samples or batches in memory of their own, transformed, with what goes beside them.

Knows chunks, rows, transforms and labelled images that go with samples. Does not know which rows are wanted, nor
positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.batch import LabelledBatch, Labels, consecutive
from handsoff_stream.companions import Companions, check_same_size
from handsoff_stream.prefetch import Chunk
from handsoff_stream.transforms import JointTransform

Row = tuple[Chunk, int]
Sample = tuple[Tensor, Labels]


@dataclass(frozen=True)
class Assembly:
    """How rows become what the consumer asked for."""

    transform: JointTransform | None = None
    image_dtype: torch.dtype = torch.float32
    as_dict: bool = False
    companions: Companions | None = None

    @property
    def ratio(self) -> Fraction:
        """Labelled images that go with each sample, on average."""
        return Fraction(0) if self.companions is None else self.companions.ratio

    def items(self, rows: Iterator[Row], batch_size: int | None, pending: dict[int, int]) -> Iterator[Any]:
        """Samples if `batch_size` is None, else batches of as many samples, of which the last one may be short.

        Args:
            rows: of the samples.
            batch_size: samples in a batch, not counting the labelled images beside them.
            pending: index of a sample that was handed out => number of the first labelled image that goes with it and
                was not. Kept up to date while samples are handed out; empty if batches are.
        """
        if batch_size is not None:
            return self._batches(rows, batch_size)
        if self.companions is None:
            return (self.sample(row) for row in rows)
        return self._mixed_samples(rows, self.companions, pending)

    def _batches(self, rows: Iterator[Row], size: int) -> Iterator[LabelledBatch]:
        while taken := list(islice(rows, size)):
            yield self.batch(taken, self.companions)

    def _mixed_samples(self, rows: Iterator[Row], companions: Companions, pending: dict[int, int]) -> Iterator[Any]:
        for index in sorted(pending):
            yield from self._pending_samples(index, companions, pending)
        for row in rows:
            sample, index = self.sample(row), row[0].indices[row[1]]
            del row  # what is held longer cannot be written again
            if companions.count(index):
                pending[index] = 0
            yield sample
            yield from self._pending_samples(index, companions, pending)

    def _pending_samples(self, index: int, companions: Companions, pending: dict[int, int]) -> Iterator[Any]:
        for number in range(pending.get(index, companions.count(index)), companions.count(index)):
            sample = self._as_sample(companions.one(index, number))
            pending[index] = number + 1
            if pending[index] == companions.count(index):
                del pending[index]
            yield sample

    def sample(self, row: Row) -> Sample | dict[str, Any]:
        """One sample: (image, label), or a dict that also has its uncertainty and index."""
        chunk, number = row
        with chunk.reading() as batch:
            return self._as_sample(*self._pieces(batch, [number]))

    def _as_sample(self, one: LabelledBatch) -> Sample | dict[str, Any]:
        index = int(one.indices[0])
        one = one.map(lambda tensor: tensor[0].clone())
        if self.as_dict:
            return {"image": one.images, "label": one.labels, "uncertainty": one.uncertainty, "index": index}
        return one.images, one.labels

    def batch(self, rows: list[Row], companions: Companions | None = None) -> LabelledBatch:
        """Samples of one or several chunks as one batch, then the labelled images that go with them.

        Empties `rows`, which lets the chunks go before the consumer sets to work.
        """
        beside = [] if companions is None else companions.of_batch([chunk.indices[number] for chunk, number in rows])
        pieces: list[LabelledBatch] = []
        with ExitStack() as stack:
            for _, group in groupby(rows, key=lambda row: id(row[0])):
                chunks, numbers = zip(*group, strict=True)
                pieces += self._pieces(stack.enter_context(chunks[0].reading()), numbers)
            rows.clear()
            check_same_size(pieces[0], beside)
            return LabelledBatch.concatenate([*pieces, *beside], next_index=pieces[-1].next_index)

    def _pieces(self, batch: LabelledBatch, rows: Sequence[int]) -> list[LabelledBatch]:
        as_float = self.image_dtype != torch.uint8
        if self.transform is None:
            return [batch.select(run).unpacked(images_too=as_float) for run in consecutive(rows)]
        return [self.transform(batch.select([row]).unpacked(images_too=as_float)) for row in rows]
