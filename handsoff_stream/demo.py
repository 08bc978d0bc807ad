"""The demo on the included faces: what the stream adds to the 16 labelled images, in a table of a few minutes.

Three networks start from the same weights, are trained for the same number of batches of the same size with the same
augmentation, and are scored on the same held-out renders: on the labelled images with the backbone frozen, on them
with everything fine-tuned, and on batches of which half are samples of the stream. Neither the generator, nor the label
generator, nor the networks were trained on those renders.

Knows which functions of the other modules to call, and in which order. Does not know how they work.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.device import usable_device
from handsoff_stream.downstream import (
    RepeatedAugmented,
    SegmentationScores,
    build_deeplab,
    evaluate,
    ordinary_augmentation,
)
from handsoff_stream.downstream.deeplab import check_network, imagenet_weights
from handsoff_stream.downstream.on_stream import Budget, shown, train_with_bar
from handsoff_stream.errors import printable
from handsoff_stream.files.atomic import check_folder, write_file
from handsoff_stream.mixture import mix
from handsoff_stream.precision import fastest_precision
from handsoff_stream.preview import preview_sheet
from handsoff_stream.stream import HandsOffStream

NUM_LABELLED = 16
ARMS = {
    "transfer": f"the {NUM_LABELLED} labelled images, augmented; only the head is trained",
    "labelled": f"the {NUM_LABELLED} labelled images, augmented; the whole network is trained",
    "mixed": "half of each batch from the stream, half from the labelled images",
}


def default_budget(device: torch.device) -> Budget:
    """A budget with which two CPU cores finish the demo within six minutes.

    The budget for a GPU has not been timed yet.
    """
    if device.type == "cuda":
        return Budget(steps=2000, backbone="efficientnet-lite0", warmup=20)
    # Generating pairs takes most of the time, and twice as long on CPUs without 16-bit products.
    return Budget(steps=200 if fastest_precision(device) == "fast" else 100, backbone="efficientnet-lite0", warmup=20)


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
    """Draw a preview, train the three networks and compare them.

    Without ImageNet weights of the backbone, all networks start from random weights, and `transfer` is left out.

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
        ValueError: an unknown backbone; this is checked, too.
    """
    console = console or Console()
    started = time.perf_counter()
    chosen = usable_device(device)
    given = {name: value for name, value in {"steps": steps, "backbone": backbone}.items() if value is not None}
    budget = replace(default_budget(chosen), **given)  # type: ignore[arg-type]
    check_network(len(CLASS_NAMES), budget.backbone)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)

    checkpoint = load_checkpoint("faces")
    preview_sheet(checkpoint, out / "preview.png", num=16, seed=seed, device=chosen)
    console.print(f"[bold]faces[/bold]: fitted on {NUM_LABELLED} labelled images; see {shown(out)}/preview.png")
    arms = arms_of(budget.backbone)
    demo = _Demo(checkpoint, budget, "transfer" in arms, seed, chosen, console)
    test = RenderedFaces("test", num_images=test_images, size=checkpoint.size[0])
    scores: dict[str, SegmentationScores] = {}
    records: dict[str, Any] = {}
    for arm in arms:
        scores[arm], records[arm] = demo.train_and_score(arm, test)

    console.print(comparison(scores, f"IoU on {test_images} held-out renders, %, after {budget.steps} steps"))
    setting = {"seed": seed, "device": str(chosen), "precision": fastest_precision(chosen), "imagenet": demo.pretrained}
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"arms": records, "budget": vars(budget) | setting, "seconds": seconds}
    write_file(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    console.print(
        f"{seconds / 60:.1f} minutes; {shown(out)}/result.json holds all numbers of this run. One seed and "
        "few steps; benchmarks/results/ has longer runs"
    )
    return result


@dataclass(frozen=True)
class _Demo:
    """What the three trainings share."""

    checkpoint: Checkpoint
    budget: Budget
    pretrained: bool
    seed: int
    device: torch.device
    console: Console

    def train_and_score(self, arm: str, test: RenderedFaces) -> tuple[SegmentationScores, dict[str, Any]]:
        """Scores of the network that was trained on an arm's batches, and their record."""
        budget = self.budget
        self.console.print(f"\n[bold]{arm}[/bold]: {budget.steps} steps on {ARMS[arm]}")
        model = build_deeplab(
            len(CLASS_NAMES), backbone=budget.backbone, pretrained_backbone=self.pretrained, seed=self.seed
        )
        if arm == "transfer":
            model.freeze_backbone()
        mixture = self._mixture() if arm == "mixed" else None
        batches = self._labelled() if mixture is None else DataLoader(mixture, batch_size=None)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # dropout knows only the global generator
            report: dict[str, Any] = train_with_bar(model, batches, budget, self.device, self.console)
        if mixture is not None:
            report |= self._told(mixture, report["waiting_share"])
        scores = evaluate(model, test, CLASS_NAMES, device=self.device)
        return scores, scores.record() | report

    def _labelled(self) -> Iterable[Any]:
        faces = labelled_faces(NUM_LABELLED, size=self.checkpoint.size[0])
        length, augmentation = self.budget.steps * self.budget.batch_size, ordinary_augmentation(CLASS_NAMES)
        repeated = RepeatedAugmented(faces, length=length, seed=self.seed, transforms=augmentation)
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(repeated, batch_size=self.budget.batch_size, shuffle=True, generator=generator)

    def _mixture(self) -> HandsOffStream[LabelledBatch]:
        augmentation = ordinary_augmentation(CLASS_NAMES)
        stream = HandsOffStream(
            self.checkpoint,
            batch_size=self.budget.batch_size,
            seed=self.seed,
            device=self.device,
            precision=fastest_precision(self.device),
            transforms=augmentation,
        )
        return mix(stream, labelled_faces(NUM_LABELLED, size=self.checkpoint.size[0]), transforms=augmentation)

    def _told(self, stream: HandsOffStream[LabelledBatch], waiting_share: float) -> dict[str, Any]:
        rejected = stream.rejected / (stream.accepted + stream.rejected)
        self.console.print(
            f"    {stream.accepted} samples used once each, {rejected:.1%} rejected as too uncertain, "
            f"{waiting_share:.0%} of the time spent waiting for batches"
        )
        return {"rejected": rejected, "accepted": stream.accepted}


def arms_of(backbone: str) -> list[str]:
    """Names of the networks to train: without ImageNet weights of the backbone there is nothing to freeze."""
    try:
        imagenet_weights(backbone)
    except (FileNotFoundError, KeyError):  # an unknown backbone is refused by `build_deeplab`
        return [arm for arm in ARMS if arm != "transfer"]
    return list(ARMS)


def comparison(scores: dict[str, SegmentationScores], title: str) -> Table:
    """IoU of each network by class, and what the stream adds to the labelled images, in percent."""
    table = Table("class", *scores, "mixed - labelled", title=title, show_footer=True)
    mixed, labelled = scores["mixed"], scores["labelled"]
    for k, name in enumerate(labelled.class_names):
        ious = [of.iou_per_class[k] for of in scores.values()]
        table.add_row(Text(printable(name)), *_percentages(ious, mixed.iou_per_class[k] - labelled.iou_per_class[k]))
    footers = ["mean", *_percentages([of.miou for of in scores.values()], mixed.miou - labelled.miou)]
    for column, footer in zip(table.columns, footers, strict=True):
        column.footer = footer
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _percentages(values: list[float], difference: float) -> list[str]:
    return [*(f"{100 * value:.1f}" for value in values), f"{100 * difference:+.1f}"]
