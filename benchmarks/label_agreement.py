"""How right a checkpoint's labels are on what it generates, where nobody has labelled it.

    python benchmarks/label_agreement.py --checkpoint faces other.safetensors

A judge, DeepLabV3 trained on many rendered and labelled faces, labels the samples of each checkpoint too; the IoU of
the two is what this prints. The judge errs, more on samples than on renders: read differences between checkpoints, not
the numbers. Its own score on test renders stands beside them. Only for checkpoints of rendered faces.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Subset

from handsoff_stream.checkpoint import read_manifest
from handsoff_stream.datasets.labelled_faces import labelled_faces
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import SegmentationScores, build_deeplab, evaluate, train_segmentation
from handsoff_stream.stream import HandsOffStream

FIRST_RENDER = 100_000
"""Of the judge's: far from the labelled images, which count from 0."""


def train_judge(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A network that has seen `--judge-steps` batches of renders, each face once."""
    count = args.judge_steps * args.batch
    faces = Subset(labelled_faces(FIRST_RENDER + count), range(FIRST_RENDER, FIRST_RENDER + count))
    judge = build_deeplab(len(CLASS_NAMES), backbone="resnet18", seed=args.seed)
    torch.manual_seed(args.seed)
    train_segmentation(
        judge,
        DataLoader(faces, batch_size=args.batch),
        steps=args.judge_steps,
        lr=3e-3,
        schedule="cosine",
        warmup=20,
        device=device,
    )
    return judge


def agreement(judge: nn.Module, checkpoint: str, psi: float, args: argparse.Namespace) -> SegmentationScores:
    """IoU of the judge's labels with those of the samples that a stream would deliver."""
    stream = HandsOffStream(
        checkpoint, seed=args.seed, num_samples=args.samples, truncation=psi, device=args.device, filter="rolling"
    )
    return evaluate(judge, stream, CLASS_NAMES, device=args.device)


def table(judge: SegmentationScores, rows: list[tuple[str, float, SegmentationScores]]) -> Table:
    """One column a checkpoint and psi, in percent."""
    names = ["renders", *(f"{name}, psi {psi}" for name, psi, _ in rows)]
    columns = [judge, *(scores for _, _, scores in rows)]
    shown = Table("", *names, title="IoU with a judge trained on labelled renders, %")
    shown.add_row("mIoU", *(f"{100 * scores.miou:.1f}" for scores in columns), end_section=True)
    for k, name in enumerate(CLASS_NAMES):
        shown.add_row(name, *(f"{100 * scores.iou_per_class[k]:.0f}" for scores in columns))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=["faces"], help="names or paths")
    parser.add_argument("--psi", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--judge-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="label_agreement", help="of the result file")
    args = parser.parse_args()
    console = Console(stderr=True)
    with console.status(f"judge: {args.judge_steps} steps"):
        judge = train_judge(args, torch.device(args.device))
        on_truth = evaluate(judge, RenderedFaces("test", num_images=args.test_images), CLASS_NAMES, device=args.device)
    rows = []
    for checkpoint in args.checkpoint:
        for psi in args.psi:
            with console.status(f"{checkpoint}, psi {psi}"):
                rows.append((Path(checkpoint).stem, psi, agreement(judge, checkpoint, psi, args)))
    Console().print(table(on_truth, rows))
    fingerprints = {Path(c).stem: read_manifest(c)["fingerprint"] for c in args.checkpoint}
    result: dict[str, Any] = {
        "settings": {**vars(args), "checkpoint": list(fingerprints), "fingerprints": fingerprints},
        "judge_on_renders": on_truth.record(),
        "agreement": [{"checkpoint": name, "psi": psi, **scores.record()} for name, psi, scores in rows],
    }
    write_result(args.name, result)


if __name__ == "__main__":
    main()
