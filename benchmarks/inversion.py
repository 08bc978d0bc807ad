"""Inversion of held-out renders: reconstruction error and seconds per image, by an encoder, by descent, and by both.

    python -m benchmarks.inversion --images 16 --steps 500 --encoder encoder.safetensors

Six methods are compared:

- the average latent for every image;
- a ReStyle encoder;
- the encoder, then the descent that HandsOff describes, within its ball around the encoding (appendix A.2);
- the same without the bound of the ball;
- the descent alone, with as many steps, from the average latent;
- the descent alone, from the best of random candidates.

The encoder is read from `--encoder`; if the file does not exist, the encoder is trained first, on other renders, and
written there. HandsOff trains its encoder on the images that it inverts; this encoder has not seen them.

Errors are means over the images: the image distance (the default of `load_perceptual`; the result names it), the mean
squared error of pixels in [-1, 1], and PSNR. Seconds are per image at this batch size and include all stages of a
method, without the training of the encoder, which is given separately. The last line of the output is the result as
JSON.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import parser, result_name, settings, write_result
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.fitting.encoder.backbones import StyleEncoder
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode
from handsoff_stream.fitting.encoder.train import EncoderSettings, train_encoder
from handsoff_stream.fitting.inversion.descent import InversionSettings, invert_batch
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.generators import Generator

UNBOUNDED = 1e9


def open_encoder(args: argparse.Namespace, generator: Generator, perceptual: Perceptual) -> tuple[StyleEncoder, float]:
    """The encoder, and the seconds of its training; 0 if it was read from a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = args.encoder or Path(folder) / "encoder.safetensors"
        if file.is_file():
            return load_restyle(file).to(generator.w_avg.device), 0.0
        faces = RenderedFaces("generator", num_images=args.training_images, size=generator.resolution[0])
        renders = [(str(i), faces[i][0]) for i in range(len(faces))]
        training = EncoderSettings(steps=args.encoder_steps, iterations=args.encoder_iterations)
        started = time.perf_counter()
        encoder = train_encoder(generator, renders, perceptual, file, training, progress=True)
        return encoder, time.perf_counter() - started


def methods(
    generator: Generator, encoder: StyleEncoder, perceptual: Perceptual, images_BCHW: Tensor, steps: int
) -> dict[str, Callable[[], Tensor]]:
    """The function of each method, which finds w+ [B, L, D] on the CPU for images [B, 3, H, W] in [0, 1]."""

    def descend(encoding: Tensor | None, **options: Any) -> Tensor:
        chosen = InversionSettings(steps=steps, **options)
        return invert_batch(generator, images_BCHW, perceptual, chosen, encoding=encoding).w_plus

    def encoded() -> Tensor:
        return encode(encoder, generator, images_BCHW).cpu()

    return {
        "average latent": lambda: generator.truncate(generator.w_avg.expand(len(images_BCHW), -1)).cpu(),
        "encoder": encoded,
        "encoder + descent in the ball": lambda: descend(encoded()),
        "encoder + descent, no ball": lambda: descend(encoded(), radius=UNBOUNDED),
        "descent from the average": lambda: descend(None, candidates=0),
        "descent from candidates": lambda: descend(None),
    }


def measure(
    find: Callable[[], Tensor], generator: Generator, perceptual: Perceptual, images_BCHW: Tensor
) -> dict[str, float]:
    """Mean errors of one method, and its seconds per image."""
    started = time.perf_counter()
    w_plus_BLD = find()
    seconds = time.perf_counter() - started
    # With no steps, `invert_batch` reports the errors of the latents that it is given.
    found = invert_batch(generator, images_BCHW, perceptual, InversionSettings(steps=0), encoding=w_plus_BLD)
    return {
        "perceptual": found.perceptual.mean().item(),
        "mse": found.mse.mean().item(),
        "psnr_db": found.psnr.mean().item(),
        "seconds_per_image": seconds / len(images_BCHW),
    }


def rows(result: Result) -> list[Row]:
    """Every method against the first, the average latent."""
    first, *others = result["ways"].items()
    images = result["arguments"]["images"]
    return [
        Row(
            f"inversion of {images} held-out renders: {name}",
            f"{found['psnr_db']:.3g} dB, {found['seconds_per_image']:.3g} s per image",
            f"{first[0]}: {first[1]['psnr_db']:.3g} dB",
            None,
        )
        for name, found in others
    ]


def charts(result: Result) -> list[Chart]:
    """PSNR of each method."""
    return [Chart("PSNR of inversions, dB", [(name, found["psnr_db"]) for name, found in result["ways"].items()])]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    """Measure, print a table, and write the result."""
    options = parser(__doc__, name="inversion")
    options.add_argument("--checkpoint", default="faces", help="of rendered faces, or a generator trained on them")
    options.add_argument("--images", type=int, default=4, help="held-out renders, inverted in one batch")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--encoder", type=Path, help=".safetensors file; default: train one and throw it away")
    options.add_argument("--encoder-steps", type=int, default=60)
    options.add_argument("--encoder-iterations", type=int, default=2)
    options.add_argument("--training-images", type=int, default=300)
    args = options.parse_args()

    device = torch.device(args.device)
    generator = load_checkpoint(args.checkpoint).generator.to(device)
    perceptual = load_perceptual().to(device)
    faces = RenderedFaces("test", num_images=args.images, size=generator.resolution[0])
    images_BCHW = torch.stack([faces[i][0] for i in range(len(faces))])
    encoder, training_seconds = open_encoder(args, generator, perceptual)
    encode(encoder, generator, images_BCHW[:1])  # warm-up, not counted

    table = Table("", "image distance", "MSE", "PSNR (dB)", "s per image", title=f"descents of {args.steps} steps")
    found: dict[str, dict[str, float]] = {}
    for name, find in methods(generator, encoder, perceptual, images_BCHW, args.steps).items():
        found[name] = row = measure(find, generator, perceptual, images_BCHW)
        numbers = (f"{row[key]:.{digits}f}" for key, digits in (("perceptual", 4), ("mse", 4), ("psnr_db", 2)))
        table.add_row(name, *numbers, f"{row['seconds_per_image']:.2f}")
    Console().print(table)
    record = {"arguments": settings(args), "image_distance": perceptual.description, "ways": found}
    write_result(result_name(args), {**record, "encoder_training_s": training_seconds})


if __name__ == "__main__":
    main()
