"""The demo on the included faces: one network is trained on the stream, another one on the 16 labelled images.

Both networks start from the same random weights, are trained on the same number of batches of the same size with the
same augmentation, and are scored on the same held-out renders. Neither the generator, nor the label generator, nor the
networks were trained on those renders.

Knows which functions of the other modules to call, and in which order. Does not know how they work.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader

from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, resolve
from handsoff_stream.datasets.labelled_images import LabelledImages, list_labelled
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.device import usable_device
from handsoff_stream.downstream import (
    RepeatedAugmented,
    SegmentationScores,
    build_deeplab,
    evaluate,
    ordinary_augmentation,
    train_segmentation,
)
from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.atomic import check_file, check_folder, whole_file, write_file
from handsoff_stream.precision import Precision, fastest_precision
from handsoff_stream.preview import preview_sheet
from handsoff_stream.progress import progress_bar
from handsoff_stream.stream import HandsOffStream

NUM_LABELLED = 16


@dataclass(frozen=True)
class Budget:
    """What both trainings are given."""

    steps: int
    backbone: str
    batch_size: int = 8
    lr: float = 1e-3
    """Highest learning rate of Adam; it falls to zero along a half cosine."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly at the start."""


def default_budget(device: torch.device) -> Budget:
    """A budget with which two CPU cores finish the demo within six minutes.

    On a GPU the budget is meant for the published network, and has not been timed yet.
    """
    if device.type == "cuda":
        return Budget(steps=4000, backbone="resnet101", warmup=100)
    # Generating pairs takes most of the time, and twice as long on CPUs without 16-bit products.
    steps = 300 if fastest_precision(device) == "fast" else 150
    return Budget(steps=steps, backbone="resnet18", lr=3e-3, warmup=20)


def run_demo(
    out: Path,
    *,
    steps: int | None = None,
    backbone: str | None = None,
    test_images: int = 200,
    seed: int = 0,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw a preview, train both networks and compare them.

    Args:
        out: folder for preview.png and result.json; created if missing.
        steps: optimizer steps of each training; None means `default_budget`.
        backbone: name for `build_deeplab`; None means `default_budget`.
        test_images: number of held-out renders.
        seed: of the stream, the augmentation and the initial weights.
        device: where to compute; None means CUDA if available.
        console: where to print.

    Returns:
        The content of result.json.

    Raises:
        OutputError: `out` cannot be written; this is checked before the training.
        ValueError: an unknown backbone.
    """
    console = console or Console()
    started = time.perf_counter()
    chosen = usable_device(device)
    given = {name: value for name, value in {"steps": steps, "backbone": backbone}.items() if value is not None}
    budget = replace(default_budget(chosen), **given)  # type: ignore[arg-type]
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)

    checkpoint = load_checkpoint("faces")
    size = checkpoint.size[0]
    preview_sheet(checkpoint, out / "preview.png", num=16, seed=seed, device=chosen)
    console.print(f"[bold]faces[/bold]: fitted on {NUM_LABELLED} labelled images; see {_shown(out)}/preview.png")

    test = RenderedFaces("test", num_images=test_images, size=size)
    on_stream, stream_record = _train_on_pairs(checkpoint, budget, test, seed, chosen, console)
    console.print(f"\n[bold]2.[/bold] {budget.steps} steps on the {NUM_LABELLED} labelled images, augmented")
    repeated = RepeatedAugmented(
        labelled_faces(NUM_LABELLED, size=size), length=budget.steps * budget.batch_size, seed=seed
    )
    on_labelled, labelled_report = _train_and_score(budget, repeated, test, seed, chosen, console)

    console.print(comparison(on_stream, on_labelled, f"IoU on {test_images} held-out renders"))
    setting = {"seed": seed, "device": str(chosen), "precision": fastest_precision(chosen)}
    result: dict[str, Any] = {
        "stream": stream_record,
        "labelled_images": {**on_labelled.record(), **labelled_report},
        "budget": vars(budget) | setting,
        "seconds": time.perf_counter() - started,
    }
    write_file(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    console.print(f"{result['seconds'] / 60:.1f} minutes; {_shown(out)}/result.json holds all numbers of this run")
    return result


def _train_on_pairs(
    checkpoint: Checkpoint, budget: Budget, test: RenderedFaces, seed: int, device: torch.device, console: Console
) -> tuple[SegmentationScores, dict[str, Any]]:
    """Scores of the network trained on the stream, and their record."""
    stream = HandsOffStream(
        checkpoint,
        seed=seed,
        device=device,
        precision=fastest_precision(device),
        transforms=ordinary_augmentation(),
    )
    console.print(f"\n[bold]1.[/bold] {budget.steps} steps on pairs synthesized and labelled while the network trains")
    scores, report = _train_and_score(budget, stream, test, seed, device, console)
    rejected = stream.rejected / (stream.accepted + stream.rejected)
    console.print(
        f"    {stream.accepted} pairs used once each, {rejected:.1%} rejected as too uncertain, "
        f"{report['waiting_share']:.0%} of the time spent waiting for pairs"
    )
    return scores, {**scores.record(), **report, "rejected": rejected, "accepted": stream.accepted}


def _train_and_score(
    budget: Budget, data: Any, test: RenderedFaces, seed: int, device: torch.device, console: Console
) -> tuple[SegmentationScores, dict[str, float]]:
    model = build_deeplab(len(CLASS_NAMES), backbone=budget.backbone, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout knows only the global generator
        report = train_with_bar(model, DataLoader(data, batch_size=budget.batch_size), budget, device, console)
    return evaluate(model, test, CLASS_NAMES, device=device), report


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


def comparison(on_stream: SegmentationScores, on_labelled: SegmentationScores, title: str) -> Table:
    """IoU of both networks per class and their difference, in percent."""
    table = Table("class", "stream", f"{NUM_LABELLED} images", "difference", title=title, show_footer=True)
    rows = zip(on_stream.class_names, on_stream.iou_per_class, on_labelled.iou_per_class, strict=True)
    for name, *values in rows:
        table.add_row(Text(printable(name)), *_percentages(*values))
    footers = ["mean", *_percentages(on_stream.miou, on_labelled.miou)]
    for column, footer in zip(table.columns, footers, strict=True):
        column.footer = footer
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _shown(path: Path) -> str:
    return escape(printable(str(path)))


def _percentages(stream: float, labelled: float) -> list[str]:
    return [f"{100 * stream:.1f}", f"{100 * labelled:.1f}", f"{100 * (stream - labelled):+.1f}"]


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
    console.print(
        f"wrote {_shown(out)}; {stream.rejected} of {stream.accepted + stream.rejected} samples were rejected"
    )
    if test is not None:
        console.print(evaluate(model, test, names, device=chosen).table("IoU on test images"))


def _test_images(folders: tuple[Path, Path] | None, class_names: Sequence[str], faces_size: int | None) -> Any:
    """Batches from the folders of images and masks, else held-out renders of `faces_size` pixels, else None."""
    if folders is not None:
        samples = LabelledImages(list_labelled(*folders), ClassMap.of_ids(class_names))
        return DataLoader([(image, mask) for _, image, mask in samples], batch_size=1)  # type: ignore[arg-type]
    return None if faces_size is None else RenderedFaces("test", num_images=200, size=faces_size)
