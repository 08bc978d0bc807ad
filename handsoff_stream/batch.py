"""LabelledBatch: what a synthesis step returns and a training step takes.

Knows tensors and their first axis. Does not know where they came from.

Shape letters: B batch, H W image size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Labels = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class LabelledBatch:
    """Images and labels of B samples; unpacks as `images, labels = batch`."""

    images: Tensor
    """float32 [B, 3, H, W] in [0, 1], on 8-bit levels."""
    labels: Labels
    """int64 [B, H, W] or float32 [B, K, H, W]; a dict by head if the checkpoint has several."""
    uncertainty: Tensor
    """float32 [B], the image score that the filter judged."""
    indices: Tensor
    """int64 [B] on the CPU: `stream[i]` regenerates the sample of index i."""
    next_index: int
    """The first index of this shard that was not consumed when the batch was handed out."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.labels))

    def __len__(self) -> int:
        return len(self.images)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LabelledBatch":
        labels = self.labels
        mapped = {k: function(v) for k, v in labels.items()} if isinstance(labels, dict) else function(labels)
        return replace(self, images=function(self.images), labels=mapped, uncertainty=function(self.uncertainty))

    def to(self, *args: Any, **kwargs: Any) -> "LabelledBatch":
        """Images, labels and uncertainty moved as by `Tensor.to` with a device; indices stay on the CPU."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def pin_memory(self) -> "LabelledBatch":
        """Page-locked copy for asynchronous transfers; tensors already on a device are left alone."""
        return self._map(lambda t: t if t.is_cuda else t.pin_memory())

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the caching allocator that `stream` uses these tensors."""
        labels = self.labels.values() if isinstance(self.labels, dict) else [self.labels]
        for tensor in (self.images, self.uncertainty, *labels):
            tensor.record_stream(stream)

    def select(self, rows: Sequence[int]) -> "LabelledBatch":
        """The samples of these rows; one row or a contiguous range shares memory with this batch."""
        if len(rows) == 1:
            keep: Any = slice(rows[0], rows[0] + 1)
        else:
            keep = torch.as_tensor(rows, device=self.images.device)
        chosen = self._map(lambda t: t[keep])
        return replace(chosen, indices=self.indices[keep if isinstance(keep, slice) else keep.cpu()])

    @staticmethod
    def concatenate(batches: Sequence["LabelledBatch"], *, next_index: int) -> "LabelledBatch":
        """One batch out of several; images must agree in size."""
        first = batches[0].labels
        labels: Labels
        if isinstance(first, dict):
            labels = {name: torch.cat([_head(b, name) for b in batches]) for name in first}
        else:
            labels = torch.cat([_tensor(b) for b in batches])
        names = [f.name for f in fields(LabelledBatch) if f.name not in ("labels", "next_index")]
        tensors = {name: torch.cat([getattr(b, name) for b in batches]) for name in names}
        return LabelledBatch(labels=labels, next_index=next_index, **tensors)


def _head(batch: LabelledBatch, name: str) -> Tensor:
    assert isinstance(batch.labels, dict)
    return batch.labels[name]


def _tensor(batch: LabelledBatch) -> Tensor:
    assert isinstance(batch.labels, Tensor)
    return batch.labels
