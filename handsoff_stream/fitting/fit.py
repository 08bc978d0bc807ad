"""Inverted images and their labels => a label generator (HandsOff, section 3.3).

All members learn at the same time, each from minibatches of its own, drawn from the pixels of all images.
Hypercolumns exist for the pixels of one step only.

Knows a table of features, targets and `Task.loss`. Does not know classes, images, or how latents were found.

Shape letters: N images, M members, P pixels of a minibatch, E pixels of an epoch, Q any number of pixels, C
feature channels, K outputs, H W label size.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.fitting.feature_table import FeatureTable
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.progress import progress_bar
from handsoff_stream.tasks import Task


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit. The defaults take about a minute for 16 images of 128 x 128 on two CPU cores.

    The published code: `batch_size=64`, `cosine=False`, and four passes over all pixels, which is `epochs=256` for
    labels of 512 x 512. On 16 renders of 32 x 32, minibatches of 256 pixels reached the same held-out loss (0.11) as
    of 64 with a quarter of the steps and half the time, and the falling rate took it from 0.12 to 0.11.
    """

    hidden: tuple[int, int] = (128, 32)
    """Widths of the hidden layers. HandsOff, appendix A.3: (256, 32) to (2048, 128); they matter little (Table 4)."""
    members: int = 10
    epochs: int = 16
    pixels_per_image: int = 4096
    """Pixels that a member sees in an epoch, times the number of images; drawn with replacement."""
    batch_size: int = 256
    """Pixels of a member's minibatch."""
    learning_rate: float = 1e-3
    cosine: bool = True
    """Let the rate fall to zero along a half cosine."""
    held_out: float = 0.01
    """Share of the labelled pixels that are never trained on and measure the accuracy."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("members", "epochs", "pixels_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} fits nothing; pass at least 1")
        if self.batch_size < 2 or not 0 <= self.held_out <= 0.5 or not self.learning_rate > 0:
            raise ValueError(
                f"batch_size={self.batch_size}, held_out={self.held_out}, learning_rate={self.learning_rate}: "
                "a batch is 2 pixels or more (BatchNorm), the held-out share in [0, 0.5], the rate positive"
            )

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class FitReport:
    """How a fit went."""

    losses: list[float]
    """Mean loss of an epoch, averaged over members."""
    held_out_loss: float
    """Mean over members; NaN without held-out pixels."""
    accuracy: float | None
    """Share of held-out pixels on which the ensemble is right; None for labels that are not ids, or without any.
    Their neighbours were trained on: this says how well labels were learnt, not how well they carry over."""
    seconds: float


class PixelSampler:
    """Which pixels each member sees: flat indices into [N, H, W] labels. The same seed gives the same pixels.

    Where targets are ids, an id outside [0, num_outputs) means unlabelled, and every pair of an image and an
    id in it is a region.
    """

    def __init__(self, targets: Tensor, num_outputs: int, settings: FitSettings) -> None:
        self.settings = settings
        self.random = torch.Generator().manual_seed(settings.seed)
        self.epoch_steps = math.ceil(len(targets) * settings.pixels_per_image / settings.batch_size)
        labelled, region = _regions(targets, num_outputs)
        if len(labelled) == 0:
            raise ValueError(f"no pixel has a label: all ids lie outside [0, {num_outputs}); check the masks")
        # The first pixel of a region is always trained on, however few there are.
        spare = 1 + torch.nonzero(region[1:] == region[:-1]).flatten()
        chosen = torch.randperm(len(spare), generator=self.random)[: int(settings.held_out * len(labelled))]
        kept = torch.ones(len(labelled), dtype=torch.bool)
        kept[spare[chosen]] = False
        self.held_out, self.pool = labelled[~kept], labelled[kept]
        self.region_sizes = torch.unique_consecutive(region[kept], return_counts=True)[1]
        self.region_starts = self.region_sizes.cumsum(0) - self.region_sizes
        drawn = self.epoch_steps * settings.batch_size
        if drawn < len(self.region_sizes):
            raise ValueError(
                f"{len(self.region_sizes)} labelled regions do not fit into the {drawn} pixels of an epoch; "
                "raise pixels_per_image"
            )

    def epoch(self) -> Iterator[Tensor]:
        """int64 [M, P] a step: independent for each member, every region at least once."""
        pixels_ME = torch.stack([self._member_epoch() for _ in range(self.settings.members)])
        yield from pixels_ME.split(self.settings.batch_size, dim=1)

    def _member_epoch(self) -> Tensor:
        random, regions = self.random, len(self.region_sizes)
        offset = (torch.rand(regions, generator=random, dtype=torch.float64) * self.region_sizes).long()
        rest = self.epoch_steps * self.settings.batch_size - regions
        anywhere = torch.randint(len(self.pool), (rest,), generator=random)
        chosen = self.pool[torch.cat([self.region_starts + offset, anywhere])]
        return chosen[torch.randperm(len(chosen), generator=random)]


def _regions(targets: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
    """(flat pixel, region) of all labelled pixels, int64, regions together and ascending."""
    pixels = targets.shape[1] * targets.shape[2]
    if targets.dtype != torch.int64:
        every = torch.arange(len(targets) * pixels)
        return every, every // pixels
    ids = targets.flatten().cpu()
    labelled = torch.nonzero((ids >= 0) & (ids < num_outputs)).flatten()
    region, order = torch.sort(labelled // pixels * num_outputs + ids[labelled], stable=True)
    return labelled[order], region


def fit_label_generator(
    table: FeatureTable,
    targets: Tensor,
    task: Task,
    settings: FitSettings | None = None,
    *,
    progress: bool = False,
) -> tuple[LabelGenerator, FitReport]:
    """Fit all members at once, on the device of the table.

    Args:
        table: features of the N images.
        targets: [N, H, W] or [N, H, W, K], of the table's size: whatever `task.loss` takes for a pixel. An
            int64 id outside [0, num_outputs) means unlabelled.
        task: gives the loss. The sum over members is minimised by Adam, so that members stay independent.
        settings: how to fit. The seed decides everything.
        progress: show a bar.

    Returns:
        The label generator in eval mode without gradients, and the report.

    Raises:
        ValueError: targets that do not fit the table, or without any label.
    """
    settings = settings or FitSettings()
    expected = (table.num_images, *table.size)
    if tuple(targets.shape[:3]) != expected:
        raise ValueError(f"targets are {list(targets.shape)}, the table's features need {list(expected)} and K or not")
    started = time.perf_counter()
    sampler = PixelSampler(targets, task.num_outputs, settings)
    label_generator = LabelGenerator(
        table.feature_channels,
        settings.hidden,
        task.num_outputs,
        settings.members,
        generator=torch.Generator().manual_seed(settings.seed),
    ).to(table.device)
    targets_Q = targets.flatten(0, 2).to(table.device)
    losses = _train(label_generator.train(), table, targets_Q, sampler, task, settings, progress)
    label_generator.eval().requires_grad_(False)
    held_out_loss, accuracy = evaluate(label_generator, table, targets_Q, sampler.held_out, task)
    return label_generator, FitReport(losses, held_out_loss, accuracy, time.perf_counter() - started)


def _train(
    label_generator: LabelGenerator,
    table: FeatureTable,
    targets_Q: Tensor,
    sampler: PixelSampler,
    task: Task,
    settings: FitSettings,
    progress: bool,
) -> list[float]:
    """Mean loss of each epoch."""
    optimizer = torch.optim.Adam(label_generator.parameters(), lr=settings.learning_rate)
    steps = settings.epochs * sampler.epoch_steps
    losses: list[float] = []
    done = 0
    with progress_bar("Fitting", steps, show=progress) as update:
        for _ in range(settings.epochs):
            total = torch.zeros((), device=table.device)
            for pixels_MP in sampler.epoch():
                if settings.cosine:
                    rate = settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done / steps))
                    optimizer.param_groups[0]["lr"] = rate
                total += _step(label_generator, optimizer, table, targets_Q, pixels_MP, task)
                done += 1
                update(done, "")
            losses.append(total.item() / sampler.epoch_steps)
            update(done, f"loss {losses[-1]:.4f}")
    return losses


def _step(
    label_generator: LabelGenerator,
    optimizer: torch.optim.Optimizer,
    table: FeatureTable,
    targets_Q: Tensor,
    pixels_MP: Tensor,
    task: Task,
) -> Tensor:
    """One update of every member; the mean of their losses."""
    rows_MPC = table.rows(pixels_MP.flatten()).unflatten(0, pixels_MP.shape)
    targets_MP = targets_Q[pixels_MP.to(table.device)]
    outputs_MPK = label_generator(rows_MPC)
    losses = [task.loss(outputs, target) for outputs, target in zip(outputs_MPK, targets_MP, strict=True)]
    loss = torch.stack(losses).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach() / len(losses)


@torch.no_grad()
def evaluate(
    label_generator: LabelGenerator, table: FeatureTable, targets_Q: Tensor, pixels: Tensor, task: Task
) -> tuple[float, float | None]:
    """(loss, mean over members; accuracy of the ensemble) on some labelled pixels; see `FitReport`.

    `targets_Q`: the targets of all pixels of the table. `pixels`: int64, flat indices into them.
    """
    if len(pixels) == 0:
        return math.nan, None
    are_ids = targets_Q.dtype == torch.int64
    loss, right = 0.0, 0
    for pixels_P in pixels.to(table.device).split(4096):
        target_P = targets_Q[pixels_P]
        outputs_MPK = label_generator(table.rows(pixels_P))
        members = torch.stack([task.loss(outputs, target_P) for outputs in outputs_MPK])
        loss += members.mean().item() * len(pixels_P)
        if are_ids:
            right += int((task.decide(outputs_MPK) == target_P).sum())
    return loss / len(pixels), right / len(pixels) if are_ids else None
