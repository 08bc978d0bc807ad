"""How well a checkpoint's labels fit its generated images, measured by a segmentation network (the teacher).

    python -m benchmarks.label_agreement --checkpoint faces other.safetensors

The teacher, a small DeepLabV3, is trained on many labelled renders and then labels the samples of each checkpoint. The
benchmark prints the IoU of the teacher's labels with the checkpoint's. The teacher makes errors too, more on samples
than on renders, so differences between checkpoints mean more than the numbers themselves. The teacher's IoU on test
renders is printed beside them. All checkpoints must be of rendered faces and of one size. The last line of the output
is the result as JSON.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import parser, result_name, settings, write_result
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import load_checkpoint, read_manifest
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import SegmentationScores, build_deeplab, evaluate, train_segmentation
from handsoff_stream.progress import progress_bar
from handsoff_stream.stream import HandsOffStream


def train_teacher(size: int, steps: int, device: torch.device) -> nn.Module:
    """A DeepLabV3 that has seen `8 * steps` fresh renders of the validation split, glasses and hats at one third."""
    torch.manual_seed(0)  # dropout of the teacher's head
    faces = RenderedFaces("validation", num_images=8 * steps, size=size, glasses=1 / 3, hat=1 / 3)
    teacher = build_deeplab(len(CLASS_NAMES), backbone="resnet18")
    with progress_bar("training the teacher", steps) as update:
        train_segmentation(
            teacher,
            DataLoader(faces, batch_size=8),
            steps=steps,
            lr=3e-3,
            schedule="cosine",
            warmup=20,
            device=device,
            dtype=torch.bfloat16,
            progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    return teacher.eval()


def agreement(teacher: nn.Module, checkpoint: str, psi: float, args: argparse.Namespace) -> SegmentationScores:
    """IoU of the teacher's labels with those of the samples that a stream delivers at truncation `psi`."""
    stream = HandsOffStream(checkpoint, seed=args.seed, epoch_size=args.samples, truncation=psi, device=args.device)
    return evaluate(teacher, stream, CLASS_NAMES, device=args.device)


def table(on_renders: SegmentationScores, found: list[tuple[str, float, SegmentationScores]]) -> Table:
    """IoU in percent, one column for renders and one per checkpoint and psi."""
    names = ["renders", *(f"{name}, psi {psi}" for name, psi, _ in found)]
    columns = [on_renders, *(scores for _, _, scores in found)]
    shown = Table("", *names, title="IoU with a teacher trained on labelled renders, %")
    shown.add_row("mIoU", *(f"{100 * scores.miou:.1f}" for scores in columns), end_section=True)
    for k, name in enumerate(CLASS_NAMES):
        shown.add_row(name, *(f"{100 * scores.iou_per_class[k]:.0f}" for scores in columns))
    return shown


def rows(result: Result) -> list[Row]:
    """The agreement of each checkpoint at each psi, beside the teacher's own score."""
    teacher = f"the teacher's own on renders: {result['judge_on_renders']['miou']:.1%}"
    return [
        Row(f"labels of {r['checkpoint']} at psi {r['psi']}, mIoU with a teacher's", f"{r['miou']:.1%}", teacher, None)
        for r in result["agreement"]
    ]


PRESENTATION = Presentation(rows)


def main() -> None:
    """Measure, print a table, and write the result."""
    options = parser(__doc__, name="label_agreement")
    options.add_argument("--checkpoint", nargs="+", default=["faces"], help="names or paths")
    options.add_argument("--psi", type=float, nargs="+", default=[0.7, 1.0])
    options.add_argument("--samples", type=int, default=200)
    options.add_argument("--teacher-steps", type=int, default=1000, help="training steps of the teacher")
    options.add_argument("--test-images", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    console = Console(stderr=True)
    size = load_checkpoint(args.checkpoint[0]).size[0]
    teacher = train_teacher(size, args.teacher_steps, torch.device(args.device))
    test = RenderedFaces("test", num_images=args.test_images, size=size)
    on_renders = evaluate(teacher, test, CLASS_NAMES, device=args.device)
    found = []
    for checkpoint in args.checkpoint:
        for psi in args.psi:
            with console.status(f"{checkpoint}, psi {psi}"):
                found.append((Path(checkpoint).stem, psi, agreement(teacher, checkpoint, psi, args)))
    Console().print(table(on_renders, found))
    fingerprints = {Path(c).stem: read_manifest(c)["fingerprint"] for c in args.checkpoint}
    result: dict[str, Any] = {
        "settings": {**settings(args), "checkpoint": list(fingerprints), "fingerprints": fingerprints},
        "judge_on_renders": on_renders.record(),
        "agreement": [{"checkpoint": name, "psi": psi, **scores.record()} for name, psi, scores in found],
    }
    write_result(result_name(args), result)


if __name__ == "__main__":
    main()
