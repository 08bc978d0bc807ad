"""Train a segmentation network on batches of (images, labels), and score it on images that it was not trained on.

Knows modules, batches and optimizers. Does not know where batches come from: from a `DataLoader` over a
`HandsOffStream`, from the stream itself with `batch_size=n`, or from a loader over a few labelled images. The budget is
a number of steps, so an endless stream and sixteen images can get the same budget.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.device import resolve_device
from handsoff_stream.downstream.metrics import SegmentationMeter, SegmentationScores
from handsoff_stream.precision import cpu_multiplies_bfloat16

Batches = Iterable[Any]
"""Yields pairs: images float32 [B, 3, H, W] in [0, 1], labels int64 [B, H, W] or class probabilities float32
[B, K, H, W]; a `LabelledBatch` is one."""
SUM_TOLERANCE = 0.01  # of probabilities that a stream has rounded to float16
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class TrainingReport:
    """Losses of a training, and where its time went."""

    losses: tuple[float, ...]
    """Cross-entropy of each step, in nats."""
    num_images: int
    """Number of images in all batches together."""
    seconds: float
    """Wall-clock time of the training."""
    seconds_waiting: float
    """The part of `seconds` in which the host waited for the next batch."""

    @property
    def images_per_second(self) -> float:
        """Images per second, including the time spent waiting for data."""
        return self.num_images / self.seconds


def train_segmentation(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-3,
    schedule: str = "constant",
    warmup: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    progress: Callable[[int, float], None] | None = None,
) -> TrainingReport:
    """Train `model` in place with Adam and cross-entropy; the defaults are those of HandsOff's code at batch size 8.

    Soft labels are class probabilities; a pixel whose probabilities do not sum to 1 is unlabelled.

    Args:
        model: images [B, 3, H, W] => logits [B, K, H, W].
        batches: pairs of images float32 [B, 3, H, W] in [0, 1] and labels, int64 [B, H, W] or soft ones, float32
            [B, K, H, W]; iterated again if they end before `steps`. Batches smaller than the first one are dropped,
            because they disturb BatchNorm.
        steps: optimizer steps.
        lr: highest learning rate.
        schedule: "constant", or "cosine", which falls to zero at the end.
        warmup: steps over which the learning rate rises linearly at the start.
        device: where to train; None means CUDA if there is one.
        dtype: of the forward pass under autocast; None means bfloat16 where the device has it, float32 elsewhere.
        ignore_index: label of pixels that do not count.
        progress: called as `progress(step, loss)` after each step, for which the host then waits.

    Raises:
        ValueError: fewer than 1 step, an unknown schedule, batches of one image, or batches that end before `steps` and
            cannot be iterated again.
    """
    if steps < 1 or schedule not in SCHEDULES:
        raise ValueError(f"steps={steps}, schedule={schedule!r}: pass at least 1 step and one of {list(SCHEDULES)}")
    device = resolve_device(device)
    dtype = _dtype(dtype, device)
    model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(steps, schedule, warmup))
    losses: list[Tensor] = []
    source = full_batches(batches)
    num_images, waiting, start = 0, 0.0, time.perf_counter()
    for step in range(steps):
        asked = time.perf_counter()
        images, labels = _next(source, step, steps)
        waiting += time.perf_counter() - asked
        loss = _loss(model, images, labels, device, dtype, ignore_index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        num_images += len(images)
        if progress is not None:
            progress(step + 1, loss.item())
    values = tuple(torch.stack(losses).tolist())  # waits for the device
    return TrainingReport(values, num_images, time.perf_counter() - start, waiting)


def _loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    ignore_index: int,
) -> Tensor:
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    labels = labels.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits_BKHW = model(images)
    # Channels-last logits have the classes last in memory. On a CPU a softmax over them takes half the time of a
    # strided one.
    logits_PK = logits_BKHW.float().movedim(1, -1).flatten(0, 2)
    if labels.is_floating_point():
        target_PK = labels.movedim(1, -1).flatten(0, 2)
        counted_P = (target_PK.sum(dim=1) - 1).abs() < SUM_TOLERANCE
        total = F.cross_entropy(logits_PK, target_PK * counted_P[:, None], reduction="sum")
    else:
        counted_P = labels.flatten() != ignore_index
        total = F.cross_entropy(logits_PK, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / counted_P.sum().clamp(min=1)  # 0 instead of NaN if no pixel is labelled


def _rate(steps: int, schedule: str, warmup: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        rising = min(1.0, (step + 1) / (warmup + 1))
        return rising * (0.5 + 0.5 * math.cos(math.pi * step / steps) if schedule == "cosine" else 1.0)

    return rate


def full_batches(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The (images, labels) pairs of `batches`, iterated repeatedly, without batches smaller than the first one.

    Raises:
        ValueError: batches of one image.
    """
    size = 0
    while True:
        found = False
        for images, labels in batches:
            size = size or len(images)
            if size < 2:
                raise ValueError(
                    "batches of one image cannot train BatchNorm, which needs statistics over several images; pass "
                    "DataLoader(..., batch_size=8)"
                )
            if len(images) >= size:
                found = True
                yield images, labels
        if not found:
            return


def _next(source: Iterator[tuple[Tensor, Tensor]], step: int, steps: int) -> tuple[Tensor, Tensor]:
    pair = next(source, None)
    if pair is None:
        raise ValueError(
            f"the batches ended after {step} of {steps} steps and cannot be iterated again; pass a DataLoader or "
            "a dataset instead of an iterator, or ask for fewer steps"
        )
    return pair


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Dataset[Any] | Batches,
    class_names: Sequence[str],
    *,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> SegmentationScores:
    """Score `model` on a whole set of images; pixels are counted over all images before any division.

    Args:
        model: images [B, 3, H, W] => logits [B, K, H, W]; its mode is restored afterwards.
        data: a dataset of (image float32 [3, H, W] in [0, 1], label int64 [H, W]) samples, or a finite iterable of
            batches of them.
        class_names: name of each class; the position is the id.
        batch_size: images per batch; used if `data` is a dataset.
        device: where to evaluate; None means CUDA if there is one.
        dtype: as in `train_segmentation`.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: no pixel is labelled.
    """
    device = resolve_device(device)
    dtype = _dtype(dtype, device)
    training = model.training
    model.to(device).eval()
    meter = SegmentationMeter(class_names, device=device, ignore_index=ignore_index)
    batches: Batches = DataLoader(data, batch_size=batch_size) if isinstance(data, Dataset) else data
    for images, labels in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits_BKHW = model(images.to(device, memory_format=torch.channels_last))
        meter.update(logits_BKHW.argmax(dim=1), labels.to(device))
    model.train(training)
    return meter.compute()


def _dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if device.type == "cpu" and not cpu_multiplies_bfloat16() else torch.bfloat16
