"""LabelledBatch: what a synthesis step returns and a training step takes.

Knows tensors and their first axis. Does not know where they came from.

Shape letters: B batch, H W image size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

Labels = Tensor | dict[str, Tensor]
ONLY_HEAD = ""


@dataclass(frozen=True)
class LabelledBatch:
    """Images and labels of B samples; unpacks as `images, labels = batch`."""

    images: Tensor
    """float32 [B, 3, H, W] in [0, 1] on 8-bit levels, or uint8 in [0, 255] if the stream was asked for it."""
    labels: Labels
    """int64 [B, H, W] or float32 [B, K, H, W]; a dict by head if the checkpoint has several. Soft labels are float32
    class probabilities on the levels of float16, and all zero where a pixel is unlabelled."""
    uncertainty: Tensor
    """float32 [B], the image score that the filter judged."""
    indices: Tensor
    """int64 [B] on the CPU: `stream[i]` regenerates the sample of index i. In a mixture, -1 - n stands for image n of
    the labelled set, whose uncertainty is 0."""
    next_index: int
    """The first index of this shard that had not been handed out or dropped when the batch was handed out."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.labels))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        labels = {name: f"{_kind(label)} {list(label.shape)}" for name, label in _heads(self).items()}
        shown = labels.get(ONLY_HEAD) or ", ".join(f"{name} {label}" for name, label in labels.items())
        return (
            f"LabelledBatch({len(self)} samples on {self.images.device}: images {_kind(self.images)} "
            f"{list(self.images.shape)}, labels {shown}, next_index={self.next_index})"
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Images, uncertainty and the labels of each head: what lies on the device."""
        return (self.images, self.uncertainty, *_heads(self).values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "LabelledBatch":
        """The batch with each of `tensors()` replaced; indices stay on the CPU."""
        labels = self.labels
        mapped = {k: function(v) for k, v in labels.items()} if isinstance(labels, dict) else function(labels)
        return replace(self, images=function(self.images), labels=mapped, uncertainty=function(self.uncertainty))

    def to(self, *args: Any, **kwargs: Any) -> "LabelledBatch":
        """Images, labels and uncertainty moved as by `Tensor.to` with a device; indices stay on the CPU."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def pin_memory(self) -> "LabelledBatch":
        """Page-locked copy for asynchronous transfers, as a DataLoader with `pin_memory=True` asks for it; tensors that
        lie on a device already are left alone."""
        return self.map(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def record_stream(self, stream: "torch.cuda.Stream") -> None:
        """Tell the caching allocator that `stream` uses these tensors."""
        for tensor in self.tensors():
            tensor.record_stream(stream)

    def select(self, rows: Sequence[int]) -> "LabelledBatch":
        """The samples of these rows. Consecutive rows share memory with this batch; no device is asked or waited for.

        Raises:
            ValueError: no rows.
        """
        if not rows:
            raise ValueError("no rows were selected, and a batch of nothing trains nothing; pass at least one row")
        parts = [self._slice(slice(run.start, run.stop)) for run in consecutive(rows)]
        return parts[0] if len(parts) == 1 else LabelledBatch.concatenate(parts, next_index=self.next_index)

    def _slice(self, rows: slice) -> "LabelledBatch":
        return replace(self.map(itemgetter(rows)), indices=self.indices[rows])

    def packed(self) -> "LabelledBatch":
        """Images that lie on 8-bit levels, and labels of at most 256 classes, in a byte per value: a fourth and an
        eighth of the memory. `unpacked` gives the same bits back; labels of other kinds stay as they are."""
        images = self.images if self.images.dtype == torch.uint8 else self.images.mul(255).round_().byte()
        return self._with(images, lambda label: label.byte() if label.dtype == torch.int64 else label)

    def unpacked(self, *, images_too: bool = True) -> "LabelledBatch":
        """The inverse of `packed`; with `images_too=False` images stay uint8. Batches not packed stay as they are.

        Soft labels, which a synthesizer gives in float16, become float32.
        """
        images = self.images
        if images_too and images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        return self._with(images, _unpacked_label)

    def _with(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> "LabelledBatch":
        heads = {name: function(label) for name, label in _heads(self).items()}
        return replace(self, images=images, labels=heads if isinstance(self.labels, dict) else heads[ONLY_HEAD])

    @staticmethod
    def concatenate(batches: Sequence["LabelledBatch"], *, next_index: int) -> "LabelledBatch":
        """One batch out of one or several, in memory of its own; images must agree in size."""
        heads = {name: torch.cat([_heads(batch)[name] for batch in batches]) for name in _heads(batches[0])}
        return LabelledBatch(
            images=torch.cat([batch.images for batch in batches]),
            labels=heads if isinstance(batches[0].labels, dict) else heads[ONLY_HEAD],
            uncertainty=torch.cat([batch.uncertainty for batch in batches]),
            indices=torch.cat([batch.indices for batch in batches]),
            next_index=next_index,
        )


def _unpacked_label(label: Tensor) -> Tensor:
    wider = {torch.uint8: torch.int64, torch.float16: torch.float32}
    return label.to(wider.get(label.dtype, label.dtype))


def _heads(batch: LabelledBatch) -> dict[str, Tensor]:
    """Labels by head, also if there is only one."""
    return batch.labels if isinstance(batch.labels, dict) else {ONLY_HEAD: batch.labels}


def consecutive(rows: Sequence[int]) -> list[range]:
    """Rows => runs of consecutive ones, in their order."""
    runs: list[range] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_to_collate(batch: Any, *, collate_fn_map: Any = None) -> NoReturn:
    raise TypeError(
        "batches were to be batched again: batch_size was given to the stream and to the DataLoader; pass "
        "DataLoader(stream, batch_size=None), or build the stream without batch_size"
    )


default_collate_fn_map[LabelledBatch] = _refuse_to_collate
