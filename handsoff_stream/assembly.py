"""Rows of finished chunks => samples or batches in memory of their own, transformed.

Knows chunks, rows and transforms. Does not know which rows are wanted, nor positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.batch import LabelledBatch, Labels, consecutive
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

    def items(self, rows: Iterator[Row], batch_size: int | None) -> Iterator[Any]:
        """Samples if `batch_size` is None, else batches; the last one may be short."""
        if batch_size is None:
            return (self.sample(row) for row in rows)
        return self._batches(rows, batch_size)

    def _batches(self, rows: Iterator[Row], size: int) -> Iterator[LabelledBatch]:
        while taken := list(islice(rows, size)):
            yield self.batch(taken)

    def sample(self, row: Row) -> Sample | dict[str, Any]:
        """One sample: (image, label), or a dict that also has its uncertainty and index."""
        chunk, number = row
        with chunk.reading() as batch:
            (one,) = self._pieces(batch, [number])
            one = one.map(lambda tensor: tensor[0].clone())
        if self.as_dict:
            index = int(one.indices[0])
            return {"image": one.images, "label": one.labels, "uncertainty": one.uncertainty, "index": index}
        return one.images, one.labels

    def batch(self, rows: list[Row]) -> LabelledBatch:
        """Samples of one or several chunks as one batch. Empties `rows`, which lets the chunks go before the consumer
        sets to work."""
        pieces: list[LabelledBatch] = []
        with ExitStack() as stack:
            for _, group in groupby(rows, key=lambda row: id(row[0])):
                chunks, numbers = zip(*group, strict=True)
                pieces += self._pieces(stack.enter_context(chunks[0].reading()), numbers)
            rows.clear()
            return LabelledBatch.concatenate(pieces, next_index=pieces[-1].next_index)

    def _pieces(self, batch: LabelledBatch, rows: Sequence[int]) -> list[LabelledBatch]:
        as_float = self.image_dtype != torch.uint8
        if self.transform is None:
            return [batch.select(run).unpacked(images_too=as_float) for run in consecutive(rows)]
        return [self.transform(batch.select([row]).unpacked(images_too=as_float)) for row in rows]
