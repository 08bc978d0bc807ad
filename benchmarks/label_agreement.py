"""How right a checkpoint's labels are on what it generates, where nobody has labelled it.

    python benchmarks/label_agreement.py --checkpoint faces other.safetensors

A judge, the DeepLabV3 of `generator.py`, trained on many rendered and labelled faces, labels the samples of each
checkpoint too; the IoU of the two is what this prints. The judge errs, more on samples than on renders: read
differences between checkpoints, not the numbers. Its own score on test renders stands beside them. Only for checkpoints
of rendered faces, all of one size.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import write_result
from generator import train_judge
from rich.console import Console
from rich.table import Table
from torch import nn

from handsoff_stream.checkpoint import load_checkpoint, read_manifest
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import SegmentationScores, evaluate
from handsoff_stream.stream import HandsOffStream


def agreement(judge: nn.Module, checkpoint: str, psi: float, args: argparse.Namespace) -> SegmentationScores:
    """IoU of the judge's labels with those of the samples that a stream would deliver."""
    stream = HandsOffStream(checkpoint, seed=args.seed, epoch_size=args.samples, truncation=psi, device=args.device)
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
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="label_agreement", help="of the result file")
    args = parser.parse_args()
    console = Console(stderr=True)
    size = load_checkpoint(args.checkpoint[0]).size[0]
    judge = train_judge(size, args.judge_steps, torch.device(args.device))
    test = RenderedFaces("test", num_images=args.test_images, size=size)
    on_truth = evaluate(judge, test, CLASS_NAMES, device=args.device)
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
