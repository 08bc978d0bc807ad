"""Do inversions show what their images show? A network that had unlimited annotation labels both.

    python -m benchmarks.inversion_labels --images 16 --steps 150 --teacher-steps 1000 --encoder-steps 1000

PSNR does not say whether a nose is on the right side, so the measure is this: the teacher, a segmentation network
trained on fresh labelled renders, labels the labelled faces and their reconstructions. Both are compared with the true
masks, and the ratio of the IoUs says how much of what the teacher sees in an image it still sees in the inversion. All
inversions take the same number of steps:

    random distance         LPIPS's SqueezeNet, which has random weights unless torchvision's are in the cache
    ImageNet distance       ImageNet features of EfficientNet-Lite0; like the first, from the best of random latents
    ImageNet, encoder       the same distance, starting from the guess of an EfficientNet-Lite0 encoder, without a bound
    encoder alone           the guess itself

The encoder is trained on the generator's samples and on other renders than those that are inverted. For each inversion
the result also says what the invertibility mask leaves out (`handsoff_stream.fitting.invertibility`), and how often the
teacher is wrong on the rest and on what is left out, where it is right on the real image.

With `--folder`, teacher, encoder and inversions are kept there, and an interrupted run continues. `--sheet` writes a
picture: one row per face with the image, its reconstructions, and in red what each mask leaves out. The last line of
the output is the result as JSON.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.utils import save_image

from benchmarks.common import parser, result_name, settings, write_result
from benchmarks.downstream.batches import Experiment, labels_of, load_teacher
from benchmarks.downstream.teacher import experiment_of_teacher, train_teacher
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.datasets.rendered_faces import FINE_CLASS_NAMES, RenderedFaces, labelled_faces
from handsoff_stream.downstream import SegmentationMeter
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode_images
from handsoff_stream.fitting.encoder.train import EncoderSettings, train_encoder
from handsoff_stream.fitting.inversion.descent import Inversion, InversionSettings
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.fitting.inversion.store import ImageList, invert_images
from handsoff_stream.fitting.invertibility import DEFAULT_FACTOR, lost_pixels, without_lost_pixels
from handsoff_stream.generators import Generator

RANDOM, IMAGENET = "squeeze", "efficientnet-lite0"


@dataclass(frozen=True)
class Faces:
    """The labelled faces, and what the teacher sees in them."""

    images: ImageList
    masks_NHW: Tensor
    """The true classes."""
    seen_NHW: Tensor
    """The teacher's labels of the real images."""
    class_names: tuple[str, ...]


def labelled(experiment: Experiment, teacher: nn.Module) -> Faces:
    """The first labelled faces, with the teacher's labels."""
    faces = labelled_faces(experiment.labelled, size=experiment.size, fine=experiment.class_names == FINE_CLASS_NAMES)
    pairs = [faces[i] for i in range(len(faces))]
    images = [(f"train-{i:02d}", image) for i, (image, _) in enumerate(pairs)]
    seen_NHW = labels_of(teacher, torch.stack([image for image, _ in pairs]))
    return Faces(images, torch.stack([mask for _, mask in pairs]), seen_NHW, experiment.class_names)


def trained_encoder(args: argparse.Namespace, generator: Generator, perceptual: Perceptual, file: Path) -> None:
    """Train the encoder on renders that nobody labels, unless its file exists; an unfinished training continues."""
    if file.is_file():
        return
    renders = RenderedFaces("generator", num_images=args.training_images, size=generator.resolution[0])
    images = [(str(i), renders[i][0]) for i in range(len(renders))]
    chosen = EncoderSettings(architecture=IMAGENET, steps=args.encoder_steps)
    train_encoder(generator, images, perceptual, file, chosen, save_every=20, progress=True)


def inversions(
    args: argparse.Namespace, generator: Generator, images: ImageList, folder: Path
) -> dict[str, tuple[Inversion, Perceptual, float]]:
    """Way => the inversions, their distance, and the seconds that they took; near 0 if they were there already."""
    random, imagenet = load_perceptual(RANDOM), load_perceptual(IMAGENET)
    file = folder / "encoder.safetensors"
    ways = {
        "random distance": (random, args.steps, False),
        "ImageNet distance": (imagenet, args.steps, False),
        "ImageNet, encoder": (imagenet, args.steps, True),
        "encoder alone": (imagenet, 0, True),
    }
    found = {}
    for name, (perceptual, steps, encoded) in ways.items():
        if encoded:
            trained_encoder(args, generator, imagenet, file)
        start = encode_images(load_restyle(file), generator, images) if encoded else None
        chosen = InversionSettings(steps=steps, radius=None)
        started = time.perf_counter()
        here = folder / name.replace(" ", "_")
        inverted = invert_images(
            generator, images, here, perceptual, chosen, encodings=start, batch_size=args.batch, progress=True
        )
        found[name] = inverted, perceptual, time.perf_counter() - started
    return found


@torch.no_grad()
def reconstructions(generator: Generator, w_plus_NLD: Tensor) -> Tensor:
    """What the generator makes of latents, float32 [N, 3, H, W] in [0, 1], on the CPU."""
    latents = w_plus_NLD.to(generator.w_avg)
    made = [generator.synthesis(w_plus, "const").images for w_plus in latents.split(1)]
    return torch.cat(made).add(1).div(2).clamp(0, 1).cpu()


def score(faces: Faces, seen_NHW: Tensor, masks_NHW: Tensor | None = None) -> dict[str, Any]:
    """IoU of labels with the true masks, or with others, by class and on average."""
    meter = SegmentationMeter(faces.class_names)
    meter.update(seen_NHW, faces.masks_NHW if masks_NHW is None else masks_NHW)
    scores = meter.compute().record()
    return {"miou": scores["miou"], "iou_per_class": scores["iou_per_class"]}


def ratios(reconstructed: dict[str, Any], real: dict[str, Any]) -> dict[str, float | None]:
    """Class => IoU of the reconstructions over that of the images; None for a class that the teacher never sees."""
    of_real = real["iou_per_class"]
    return {
        name: (iou or 0.0) / of_real[name] if of_real[name] else None
        for name, iou in reconstructed["iou_per_class"].items()
    }


def measure(
    faces: Faces, teacher: nn.Module, made_N3HW: Tensor, lost_NHW: Tensor, real: dict[str, Any]
) -> dict[str, Any]:
    """Scores of one way, without and with the invertibility mask."""
    seen_NHW = labels_of(teacher, made_N3HW)
    kept_NHW, report = without_lost_pixels(
        faces.masks_NHW, lost_NHW, [name for name, _ in faces.images], faces.class_names, DEFAULT_FACTOR
    )
    whole, kept = score(faces, seen_NHW), score(faces, seen_NHW, kept_NHW)
    # What the teacher recognizes in the image, but not in the reconstruction.
    recognized_NHW = faces.seen_NHW == faces.masks_NHW
    wrong_NHW = recognized_NHW & (seen_NHW != faces.masks_NHW)
    images_N3HW = torch.stack([image for _, image in faces.images])
    mse_N = (made_N3HW - images_N3HW).square().mean(dim=(1, 2, 3))
    return {
        "psnr_db": float(-10 * mse_N.log10().mean()),
        **whole,
        "miou_ratio": whole["miou"] / real["miou"],
        "ratio_per_class": ratios(whole, real),
        "mask": {
            **report.config(),
            "miou_of_kept_pixels": kept["miou"],
            "wrong_of_kept": _share(wrong_NHW, recognized_NHW & ~lost_NHW),
            "wrong_of_left_out": _share(wrong_NHW, recognized_NHW & lost_NHW),
            "wrong_that_is_left_out": _share(lost_NHW, wrong_NHW),
        },
    }


def _share(part_NHW: Tensor, of_NHW: Tensor) -> float:
    """How much of one set of pixels is in another; 0 of no pixels."""
    return int((part_NHW & of_NHW).sum()) / max(1, int(of_NHW.sum()))


def sheet(faces: Faces, ways: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """One row per face: the image, then for each way the reconstruction and the image with its lost pixels in red."""
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    cells = []
    for i, (_, image) in enumerate(faces.images):
        cells.append(image)
        for made_N3HW, lost_NHW in ways:
            cells += [made_N3HW[i], torch.where(lost_NHW[i], 0.4 * image + 0.6 * red, image)]
    save_image(cells, path, nrow=1 + 2 * len(ways))


def table(real: dict[str, Any], ways: dict[str, dict[str, Any]]) -> Table:
    """IoU of the real images, and for each way the share of it that is left."""
    shown = Table("", "real: IoU", *ways, title="IoU of reconstructions over IoU of the images, %")
    shown.add_row("mIoU", f"{100 * real['miou']:.1f}", *(f"{100 * way['miou_ratio']:.0f}" for way in ways.values()))
    for name, iou in real["iou_per_class"].items():
        left = (way["ratio_per_class"][name] for way in ways.values())
        cells = ("" if ratio is None else f"{100 * ratio:.0f}" for ratio in left)
        shown.add_row(name, "" if iou is None else f"{100 * iou:.1f}", *cells)
    shown.add_row("PSNR, dB", "", *(f"{way['psnr_db']:.1f}" for way in ways.values()))
    shown.add_row("left out, %", "", *(f"{100 * way['mask']['left_out']:.1f}" for way in ways.values()))
    return shown


def rows(result: Result) -> list[Row]:
    """Every way, beside the score of the real images."""
    real, steps = result["real"]["miou"], result["settings"]["steps"]
    what = f"what a network with {result['settings']['teacher_steps']} steps of unlimited annotation sees in inversions"
    return [
        Row(
            f"{what} of {result['settings']['images']} faces, {steps} steps: {name}",
            f"{way['miou_ratio']:.0%} of the images' mIoU, {way['psnr_db']:.1f} dB",
            f"the images: mIoU {real:.1%}",
            None,
        )
        for name, way in result["ways"].items()
    ]


def charts(result: Result) -> list[Chart]:
    """The share of the real images' mIoU that each way keeps."""
    return [Chart("mIoU kept, %", [(name, 100 * way["miou_ratio"]) for name, way in result["ways"].items()])]


PRESENTATION = Presentation(rows, charts)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train what is missing, invert, and measure every way."""
    experiment = experiment_of_teacher(
        args.checkpoint, folder / "teacher.pt", labelled=args.images, validation_images=args.validation_images
    )
    record: dict[str, Any] = {"settings": settings(args)}
    if not Path(experiment.teacher).is_file():
        record["teacher_on_validation_renders"] = train_teacher(experiment, args.teacher_steps).record()
    teacher = load_teacher(experiment)
    generator = load_checkpoint(args.checkpoint).generator.to(args.device)
    faces = labelled(experiment, teacher)
    real = score(faces, faces.seen_NHW)
    if real["miou"] == 0:
        raise ValueError(
            f"after {args.teacher_steps} steps the teacher recognizes nothing in the images, so there is nothing to "
            "compare inversions with; raise --teacher-steps, and delete the teacher in --folder"
        )
    ways, pictures = {}, []
    for name, (found, perceptual, seconds) in inversions(args, generator, faces.images, folder).items():
        made = reconstructions(generator, found.w_plus)
        lost = lost_pixels(generator, faces.images, found.w_plus, perceptual, faces.masks_NHW, len(faces.class_names))
        ways[name] = {"image_distance": perceptual.description, "seconds": seconds}
        ways[name] |= measure(faces, teacher, made, lost, real)
        pictures.append((made, lost))
    if args.sheet is not None:
        sheet(faces, pictures, args.sheet)
    Console().print(table(real, ways))
    return {**record, "real": real, "ways": ways}


def main() -> None:
    """Measure, print a table, and write the result."""
    options = parser(__doc__, name="inversion_labels")
    options.add_argument("--checkpoint", default="faces", help="of rendered faces")
    options.add_argument("--images", type=int, default=16, help="labelled faces, at most 50")
    options.add_argument("--steps", type=int, default=150, help="gradient steps of each inversion")
    options.add_argument("--batch", type=int, default=16, help="images that are inverted together")
    options.add_argument("--teacher-steps", type=int, default=1000)
    options.add_argument("--validation-images", type=int, default=100)
    options.add_argument("--encoder-steps", type=int, default=1000)
    options.add_argument("--training-images", type=int, default=500, help="renders that the encoder sees")
    options.add_argument("--folder", type=Path, help="keeps teacher, encoder and inversions; default: thrown away")
    options.add_argument("--sheet", type=Path, help="PNG file of images, reconstructions and masks")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_result(result_name(args), run(args, folder))


if __name__ == "__main__":
    main()
