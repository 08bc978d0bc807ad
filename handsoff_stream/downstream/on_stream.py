"""Training DeepLabV3 on a checkpoint's stream with a progress bar: what `handsoff-stream train` runs.

Knows which functions of the other modules to call, and in which order. Does not know how they work.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn
from torch.utils.data import DataLoader

from handsoff_stream.checkpoint import load_checkpoint, resolve
from handsoff_stream.datasets.labelled_images import LabelledImages, list_labelled
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.device import usable_device
from handsoff_stream.downstream.deeplab import build_deeplab
from handsoff_stream.downstream.training import evaluate, train_segmentation
from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.atomic import check_file, whole_file
from handsoff_stream.precision import Precision
from handsoff_stream.progress import progress_bar
from handsoff_stream.stream import HandsOffStream


@dataclass(frozen=True)
class Budget:
    """How long a network is trained, and how fast."""

    steps: int
    backbone: str
    batch_size: int = 8
    lr: float = 1e-3
    """Highest learning rate of Adam; it falls to zero along a half cosine."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly at the start."""


def train_with_bar(
    model: nn.Module, batches: Iterable[Any], budget: Budget, device: torch.device, console: Console
) -> dict[str, float]:
    """`train_segmentation` with a progress bar.

    Returns:
        train_seconds, images_per_s, waiting_share (of the time, in [0, 1]) and final_loss (in nats).

    Raises:
        ValueError: as `train_segmentation`.
    """
    with progress_bar("    training", budget.steps, console=console) as update:
        report = train_segmentation(
            model,
            batches,
            steps=budget.steps,
            lr=budget.lr,
            schedule="cosine",
            warmup=budget.warmup,
            device=device,
            progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    return {
        "train_seconds": report.seconds,
        "images_per_s": report.images_per_second,
        "waiting_share": report.seconds_waiting / report.seconds,
        "final_loss": report.losses[-1],
    }


def train_on_stream(
    checkpoint: str,
    out: Path,
    *,
    steps: int,
    batch_size: int,
    backbone: str,
    lr: float,
    test_folders: tuple[Path, Path] | None,
    seed: int,
    device: str | None,
    precision: Precision | None = None,
    console: Console,
) -> None:
    """Train DeepLabV3 on a checkpoint's stream, save its state dict, and score it if there are test images.

    Args:
        checkpoint: name or path; `faces` is scored on held-out renders if no test folders are given.
        out: file of the state dict.
        steps: optimizer steps, at least 1.
        batch_size: samples per step, at least 2.
        backbone: name for `build_deeplab`.
        lr: highest learning rate of Adam.
        test_folders: folders of test images and of their masks, or None.
        seed: of the stream and the initial weights.
        device: where to compute; None means CUDA if available.
        precision: of the stream; None means the device's default.
        console: where to print.

    Raises:
        CheckpointError: the checkpoint has no segmentation head.
        LabelledImagesError: test folders whose images and masks do not match.
        OutputError: the state dict cannot be written; this is checked before the training.
        ValueError: steps, batch size or learning rate out of range, or an unknown backbone.
    """
    chosen = usable_device(device)
    check_file(out, inputs=[resolve(checkpoint)])
    out.parent.mkdir(parents=True, exist_ok=True)
    if not (steps >= 1 and batch_size >= 2 and 0 < lr < math.inf):
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, lr={lr}: pass at least 1 step of at least 2 samples (BatchNorm), "
            "and a positive learning rate"
        )
    loaded = load_checkpoint(checkpoint)
    names = next((h.task.class_names for h in loaded.heads.values() if hasattr(h.task, "class_names")), None)
    if names is None:
        raise CheckpointError(f"{checkpoint}: no segmentation head, so there are no masks to train DeepLabV3 on")
    test = _test_images(test_folders, names, loaded.size[0] if checkpoint == "faces" else None)
    stream = HandsOffStream(loaded, seed=seed, device=chosen, precision=precision)
    model = build_deeplab(len(names), backbone=backbone, seed=seed)
    budget = Budget(steps, backbone, batch_size, lr, warmup=min(100, steps // 10))
    train_with_bar(model, DataLoader(stream, batch_size=batch_size), budget, chosen, console)
    with whole_file(out) as partial:
        torch.save(model.state_dict(), partial)
    console.print(f"wrote {shown(out)}; {stream.rejected} of {stream.accepted + stream.rejected} samples were rejected")
    if test is not None:
        console.print(evaluate(model, test, names, device=chosen).table("IoU on test images"))


def _test_images(folders: tuple[Path, Path] | None, class_names: Sequence[str], faces_size: int | None) -> Any:
    """Batches from the folders of images and masks, else held-out renders of `faces_size` pixels, else None."""
    if folders is not None:
        samples = LabelledImages(list_labelled(*folders), ClassMap.of_ids(class_names))
        return DataLoader([(image, mask) for _, image, mask in samples], batch_size=1)  # type: ignore[arg-type]
    return None if faces_size is None else RenderedFaces("test", num_images=200, size=faces_size)


def shown(path: Path) -> str:
    """A path as rich prints it: unprintable characters and markup are escaped."""
    return escape(printable(str(path)))
