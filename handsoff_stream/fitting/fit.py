"""Latents of images and their labels => a label generator (HandsOff, section 3.3), and the checkpoint that holds it.

All members learn at the same time, each from minibatches of its own, drawn from the pixels of all images.
Hypercolumns exist for the pixels of one step only.

Knows a table of features, targets and `Task.loss`. Does not know classes, images, or how latents were found.

Shape letters: N images, M members, P pixels of a minibatch, Q all pixels of the table, C feature channels, K
outputs, H W label size.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.files.budget import MAX_MEMBERS, MAX_WIDTH
from handsoff_stream.fitting.feature_table import FeatureTable
from handsoff_stream.fitting.inversion.latents import FoundLatents
from handsoff_stream.fitting.labelled_samples import LabelledSamples
from handsoff_stream.fitting.pixel_sampler import PixelSampler
from handsoff_stream.generators import Generator
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.progress import progress_bar
from handsoff_stream.provenance import versions
from handsoff_stream.tasks import Task


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit. The defaults take about a minute for 16 images of 128 x 128 on two CPU cores.

    The published code: `batch_size=64`, `cosine=False`, and four passes over all pixels, which is `epochs=256` for
    labels of 512 x 512. On 16 renders of 32 x 32, minibatches of 256 pixels reached the same held-out loss (0.11) as
    minibatches of 64, with a quarter of the steps and in half the time; the falling rate took it from 0.12 to 0.11.

    Raises:
        ValueError: a setting out of its range.
    """

    hidden: tuple[int, int] = (128, 32)
    """Widths of the hidden layers, see `presets.hidden_widths`; they matter little (HandsOff, Table 4)."""
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
    """Share of the labelled pixels, but at most 16,384, that are never trained on and measure the accuracy."""
    patience: int | None = None
    """Stop after so many epochs without a lower held-out loss, and keep the weights of the epoch that had the lowest.
    None: train all epochs and keep the last. Either way the rate falls as if all epochs were trained."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("members", "epochs", "pixels_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} fits nothing; pass at least 1")
        if len(self.hidden) != 2 or not all(1 <= width <= MAX_WIDTH for width in self.hidden):
            raise ValueError(f"hidden={self.hidden} are no two widths; pass numbers from 1 to {MAX_WIDTH}")
        if self.members > MAX_MEMBERS:
            raise ValueError(f"members={self.members}; a checkpoint has up to {MAX_MEMBERS}")
        if self.batch_size < 2 or not 0 <= self.held_out <= 0.5 or not self.learning_rate > 0:
            raise ValueError(
                f"batch_size={self.batch_size}, held_out={self.held_out}, learning_rate={self.learning_rate}: "
                "a batch is 2 pixels or more (BatchNorm), the held-out share in [0, 0.5], the rate positive"
            )
        if self.patience is not None and (self.patience < 1 or self.held_out == 0):
            raise ValueError(
                f"patience={self.patience} with held_out={self.held_out} cannot tell when to stop; pass a patience of "
                "at least 1 epoch, and hold some pixels out"
            )

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class FitReport:
    """Losses, accuracy and duration of a fit."""

    losses: list[float]
    """Mean loss of each epoch trained, averaged over members."""
    held_out_losses: list[float]
    """Held-out loss after each epoch; empty without `patience`."""
    epoch: int
    """The one whose weights were kept, counted from 1."""
    held_out_loss: float
    """Mean over members; NaN without held-out pixels."""
    accuracy: float | None
    """Share of held-out pixels on which the ensemble is right; None for labels that are not ids, or without held-out
    pixels. Neighbors of these pixels were trained on, so this says how well the labelled images were learned, not how
    well labels carry over to new ones."""
    seconds: float

    def summary(self) -> dict[str, Any]:
        """What a checkpoint's provenance says of the fit, JSON-able."""
        return {"epoch": self.epoch, "accuracy": self.accuracy, "held_out_loss": self.held_out_loss}


def fit_checkpoint(
    generator: Generator,
    latents: FoundLatents,
    targets: Tensor,
    task: Task,
    settings: FitSettings | None = None,
    *,
    memory_gb: float | None = None,
    cache_dir: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    samples: LabelledSamples | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Fit a label generator, and put it into a checkpoint with one head, which `calibrate` completes.

    Args:
        generator: what the latents belong to, and what will be streamed from; its device does the work.
        latents: of the N images, as `invert` returns them.
        targets: [N, H, W] or [N, H, W, K], one per image: whatever `task.loss` takes for a pixel.
        task: becomes the head named `task.name`.
        settings: how to fit.
        memory_gb: for the features of the images; see `FeatureTable.collect`.
        cache_dir: for features that do not fit; see `FeatureTable.collect`.
        about: JSON-able; what the caller knows of the images and labels, for the checkpoint's provenance.
        samples: samples of the generator to learn from as well; see `label_samples`.
        progress: show a bar.

    Raises:
        ValueError: as `fit_label_generator` and `FeatureTable.collect`.
    """
    settings = settings or FitSettings()
    size = (targets.shape[1], targets.shape[2])
    w_plus, labelled_share, num_samples = latents.w_plus, 1.0, 0
    if samples is not None:
        w_plus, targets = torch.cat([w_plus, samples.w_plus]), torch.cat([targets, samples.targets])
        labelled_share, num_samples = samples.labelled_share, len(samples.w_plus)
        about = {**(about or {}), "samples": samples.provenance}
    table = FeatureTable.collect(generator, w_plus, size, memory_gb=memory_gb, cache_dir=cache_dir)
    label_generator, report = fit_label_generator(
        table, targets, task, settings, num_samples=num_samples, labelled_share=labelled_share, progress=progress
    )
    provenance = {
        **(about or {}),
        "images": list(latents.names),
        **latents.provenance,
        "fit": {**settings.config(), **report.summary()},
        "versions": versions(),
    }
    heads = {task.name: Head(task, label_generator)}
    return Checkpoint(generator, heads, size, provenance=provenance)


def fit_label_generator(
    table: FeatureTable,
    targets: Tensor,
    task: Task,
    settings: FitSettings | None = None,
    *,
    num_samples: int = 0,
    labelled_share: float = 1.0,
    progress: bool = False,
) -> tuple[LabelGenerator, FitReport]:
    """Fit all members at once, on the device of the table.

    Args:
        table: features of the N images.
        targets: [N, H, W] or [N, H, W, K], of the table's size: whatever `task.loss` takes for a pixel. An
            int64 id outside [0, num_outputs) means unlabelled.
        task: gives the loss. The sum over members is minimized by Adam, so that members stay independent.
        settings: how to fit. The seed decides everything.
        num_samples: how many of the images, at the end, are samples labelled by a network; see `PixelSampler`.
        labelled_share: share of the drawn pixels that come from the other images; see `PixelSampler`.
        progress: show a bar.

    Returns:
        The label generator in eval mode without gradients, and the report.

    Raises:
        ValueError: targets that do not fit the table, or without any label; `patience`, but too few labelled pixels to
            hold one out.
    """
    settings = settings or FitSettings()
    expected = (table.num_images, *table.size)
    if tuple(targets.shape[:3]) != expected:
        raise ValueError(
            f"targets are {list(targets.shape)}, the table's features need {list(expected)}, or that and K "
            "numbers per pixel"
        )
    started = time.perf_counter()
    sampler = _sampler(targets, task, settings, num_samples, labelled_share)
    label_generator = LabelGenerator(
        table.feature_channels,
        settings.hidden,
        task.num_outputs,
        settings.members,
        generator=torch.Generator().manual_seed(settings.seed),
    ).to(table.device)
    training = _Training(label_generator, table, targets.flatten(0, 2).to(table.device), sampler, task, settings)
    epoch = training.run(progress)
    label_generator.requires_grad_(False)
    held_out_loss, accuracy = training.held_out()
    seconds = time.perf_counter() - started
    return label_generator, FitReport(
        training.losses, training.held_out_losses, epoch, held_out_loss, accuracy, seconds
    )


def _sampler(
    targets: Tensor, task: Task, settings: FitSettings, num_samples: int, labelled_share: float
) -> PixelSampler:
    """Which pixels are drawn and held out; some must be, if `patience` is to measure a loss on them."""
    sampler = PixelSampler(
        targets,
        task.num_outputs,
        members=settings.members,
        pixels_per_image=settings.pixels_per_image,
        batch_size=settings.batch_size,
        held_out=settings.held_out,
        seed=settings.seed,
        num_samples=num_samples,
        labelled_share=labelled_share,
    )
    if settings.patience is not None and len(sampler.held_out) == 0:
        raise ValueError(
            f"held_out={settings.held_out} of {len(sampler.pool)} labelled pixels leaves none to measure the loss on, "
            "which patience needs; raise held_out, or leave patience out"
        )
    return sampler


class _Training:
    """One fit: epochs, steps, and the losses seen so far."""

    def __init__(
        self,
        label_generator: LabelGenerator,
        table: FeatureTable,
        targets_Q: Tensor,
        sampler: PixelSampler,
        task: Task,
        settings: FitSettings,
    ) -> None:
        self.label_generator, self.table, self.targets_Q = label_generator, table, targets_Q
        self.sampler, self.task, self.settings = sampler, task, settings
        # Fused: one pass over the weights per step, and no temporaries of their size.
        self.optimizer = torch.optim.Adam(label_generator.parameters(), lr=settings.learning_rate, fused=True)
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []

    def run(self, progress: bool) -> int:
        """Train; returns the epoch whose weights are left, counted from 1."""
        patience, steps = self.settings.patience, self.sampler.epoch_steps
        best, best_loss, best_state = 0, math.inf, {}
        with progress_bar("Fitting", self.settings.epochs * steps, show=progress) as update:
            for epoch in range(1, self.settings.epochs + 1):
                self.losses.append(self._epoch((epoch - 1) * steps, lambda done: update(done, "")))
                update(epoch * steps, f"loss {self.losses[-1]:.4f}")
                if patience is None:
                    continue
                self.held_out_losses.append(self.held_out()[0])
                if self.held_out_losses[-1] < best_loss:
                    best, best_loss = epoch, self.held_out_losses[-1]
                    best_state = {name: value.clone() for name, value in self.label_generator.state_dict().items()}
                elif epoch - best >= patience:
                    break
        if not best_state:
            return len(self.losses)
        self.label_generator.load_state_dict(best_state)
        return best

    def _epoch(self, done: int, update: Callable[[int], None]) -> float:
        """Mean loss of the epoch that starts after `done` steps."""
        total = torch.zeros((), device=self.table.device)
        self.label_generator.train()
        for step, pixels_MP in enumerate(self.sampler.epoch(), start=done):
            if self.settings.cosine:
                progress = step / (self.settings.epochs * self.sampler.epoch_steps)
                rate = self.settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress))
                self.optimizer.param_groups[0]["lr"] = rate
            total += self._step(pixels_MP)
            update(step + 1)
        return total.item() / self.sampler.epoch_steps

    def _step(self, pixels_MP: Tensor) -> Tensor:
        """One update of every member; the mean of their losses."""
        rows_MPC = self.table.rows(pixels_MP.flatten()).unflatten(0, pixels_MP.shape)
        targets_MP = self.targets_Q[pixels_MP.to(self.table.device)]
        outputs_MPK = self.label_generator(rows_MPC)
        losses = [self.task.loss(outputs, target) for outputs, target in zip(outputs_MPK, targets_MP, strict=True)]
        loss = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach() / len(losses)

    def held_out(self) -> tuple[float, float | None]:
        """Loss and accuracy on the held-out pixels; leaves the label generator in eval mode."""
        return evaluate_label_generator(
            self.label_generator.eval(), self.table, self.targets_Q, self.sampler.held_out, self.task
        )


@torch.no_grad()
def evaluate_label_generator(
    label_generator: LabelGenerator, table: FeatureTable, targets_Q: Tensor, pixels: Tensor, task: Task
) -> tuple[float, float | None]:
    """How well a label generator reproduces the labels of some pixels.

    Args:
        label_generator: in eval mode, on the device of the table.
        table: features of the N images.
        targets_Q: [Q] or [Q, K], the targets of all pixels of the table.
        pixels: int64 [P], flat indices into the targets, of labelled pixels.
        task: gives the loss and the decision of the ensemble.

    Returns:
        Loss, the mean over members, NaN without pixels; and the share of pixels on which the ensemble is right, None
        for labels that are not ids.
    """
    if len(pixels) == 0:
        return math.nan, None
    are_ids = targets_Q.dtype == torch.int64
    loss, right = 0.0, 0
    for pixels_P in pixels.split(2048):
        target_P = targets_Q[pixels_P.to(table.device)]
        outputs_MPK = label_generator(table.rows(pixels_P))
        members = torch.stack([task.loss(outputs, target_P) for outputs in outputs_MPK])
        loss += members.mean().item() * len(pixels_P)
        if are_ids:
            right += int((task.decide(outputs_MPK) == target_P).sum())
    return loss / len(pixels), right / len(pixels) if are_ids else None
