"""How good the images of generators of faces are: distance to renders, precision and recall, glasses and hats.

    python -m benchmarks.generator --checkpoints faces other.safetensors --images 1000 --teacher teacher.safetensors

The measures are those of `recipes/faces/quality.py`, computed on features of its teacher, a segmentation network
trained on renders: kernel distance (Binkowski et al., ICLR 2018), improved precision and recall (Kynkäänniemi et al.,
NeurIPS 2019), and the shares of images on which the teacher sees glasses and a hat. All are also computed for other
renders: their distance is the lowest to be expected, and since their true shares are known, the shares seen show the
teacher's error. Teacher and reference use the validation split, the other renders the test split; generators are
trained on neither. Without `--varied` and `--rare`, renders are the plain ones, with glasses and hats at their natural
rate. `--sheet` also draws 8 x 8 samples of every generator from the same latents.

Files may be checkpoints with heads or generators alone, of rendered faces. The last line of the output is the result as
JSON.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.common import write_result
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.downstream import evaluate
from recipes.faces.gate import samples
from recipes.faces.quality import LONG_TAIL, TEACHER_SIZE, Quality, Teacher, look_at, measure, open_teacher
from recipes.faces.train_generator import save_sheet

TRUNCATIONS = (1.0, 0.7)


def rendered(split: str, size: int, args: argparse.Namespace) -> DataLoader[Any]:
    """Batches of renders, float32 [16, 3, H, W] in [0, 1]."""
    faces = RenderedFaces(
        split, num_images=args.images, size=size, glasses=args.rare, hat=args.rare, varied=args.varied
    )
    return DataLoader(faces, batch_size=16, collate_fn=lambda pairs: torch.stack([image for image, _ in pairs]))


def teacher_miou(teacher: Teacher, args: argparse.Namespace) -> float:
    """mIoU of the teacher on test renders of its own size."""
    faces = RenderedFaces("test", num_images=100, size=TEACHER_SIZE, varied=args.varied)
    return evaluate(teacher, faces, CLASS_NAMES, device=args.device).miou


def true_shares(split: str, args: argparse.Namespace) -> dict[str, float]:
    """Attribute => share of the renders that wear it."""
    faces = RenderedFaces(split, num_images=args.images, size=1, glasses=args.rare, hat=args.rare, varied=args.varied)
    worn = [faces.scene(i).attributes for i in range(args.images)]
    return {name: sum(getattr(attributes, name) for attributes in worn) / len(worn) for name in LONG_TAIL}


def table(sets: dict[str, Quality], truth: dict[str, float]) -> Table:
    """One row per set of images; the caption gives the true shares of the renders."""
    shown = Table("images", "kernel distance", "precision", "recall", *(f"{name} seen" for name in LONG_TAIL))
    for name, quality in sets.items():
        shares = [f"{quality.shares[attribute]:.1%}" for attribute in LONG_TAIL]
        shown.add_row(name, f"{quality.distance:.4f}", f"{quality.precision:.1%}", f"{quality.recall:.1%}", *shares)
    shown.caption = "worn on renders: " + ", ".join(f"{name} {share:.1%}" for name, share in truth.items())
    return shown


def rows(result: Result) -> list[Row]:
    """Distance, precision and recall of every set of generated images, beside those of other renders."""
    sets, floor = result["sets"], "other renders"
    return [
        Row(
            f"{name}: kernel distance to renders, precision, recall; {result['arguments']['images']} images",
            _in_words(found),
            f"{floor}: {_in_words(sets[floor])}",
            None,
        )
        for name, found in sets.items()
        if name != floor
    ]


def _in_words(found: dict[str, Any]) -> str:
    shown = f"{found['distance']:.3g}"
    if "precision" not in found:  # a result from before 2026-11-25
        return shown
    return f"{shown}, {found['precision']:.1%}, {found['recall']:.1%}"


def charts(result: Result) -> list[Chart]:
    """The distance of every set of images."""
    return [Chart("kernel distance to renders", [(name, found["distance"]) for name, found in result["sets"].items()])]


PRESENTATION = Presentation(rows, charts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", default=["faces"], help="generators or checkpoints of one size")
    parser.add_argument("--images", type=int, default=1000, help="number of generated images, and of renders")
    parser.add_argument("--varied", action="store_true", help="use the varied renders")
    parser.add_argument("--rare", type=float, help="share of renders with glasses, and with hats; default: natural")
    parser.add_argument("--teacher", type=Path, help="file of the teacher, written if absent; default: none is kept")
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--sheet", type=Path, metavar="FOLDER", help="where to draw samples of every generator")
    parser.add_argument("--name", default="generator", help="name of the result file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def open_checkpoints(files: list[str]) -> dict[str, Checkpoint]:
    """The checkpoints under their files' names without suffix.

    Raises:
        SystemExit: two files of one name, of which the result could show only one.
    """
    names = [Path(file).stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise SystemExit(
                f"two of the files are named {name!r}, and the result tells them apart by name; rename one"
            )
    return {name: load_checkpoint(file) for name, file in zip(names, files, strict=True)}


def main() -> None:
    """Measure every generator at every truncation, print a table, and write the result."""
    args = arguments()
    device = torch.device(args.device)
    checkpoints = open_checkpoints(args.checkpoints)
    size = next(iter(checkpoints.values())).generator.resolution[0]
    teacher = open_teacher(args.teacher, args.teacher_steps, device, varied=args.varied)
    reference, _ = look_at((images.to(device) for images in rendered("validation", size, args)), teacher)
    sets = {
        "other renders": measure((images.to(device) for images in rendered("test", size, args)), teacher, reference)
    }
    for name, checkpoint in checkpoints.items():
        generator = checkpoint.generator.to(device)
        for psi in TRUNCATIONS:
            sets[f"{name}, psi {psi}"] = measure(samples(generator, args.images, psi=psi), teacher, reference)
        if args.sheet is not None:
            save_sheet(generator, args.sheet / f"{name}.png")
    truth = true_shares("test", args)
    Console().print(table(sets, truth))
    record = {
        "arguments": {key: value for key, value in vars(args).items() if key not in ("teacher", "sheet", "name")}
        | {"checkpoints": list(checkpoints)},
        "judge_miou": teacher_miou(teacher, args),
        "true_shares": truth,
        "sets": {name: vars(quality) for name, quality in sets.items()},
        "training": {
            name: checkpoint.provenance.get("generator_training", checkpoint.provenance)
            for name, checkpoint in checkpoints.items()
        },
    }
    write_result(args.name, record)


if __name__ == "__main__":
    main()
