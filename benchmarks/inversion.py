"""How near a generator comes to real images, and how long that takes: with an encoder, by descent, with both.

    python benchmarks/inversion.py --images 16 --steps 500 --encoder encoder.safetensors

Held-out renders are inverted in six ways: the average latent for all; a ReStyle encoder; the encoder, then the descent
that HandsOff describes (inside its ball, appendix A.2); the same with a ball that bounds nothing; and, with as many
steps, the descent alone, from the average latent and from the best of random candidates. The encoder is read from
`--encoder`; a file that does not exist yet is trained first on other renders and written there. HandsOff trains on the
images that it inverts; here the encoder has not seen them.

Errors are means over images: the image distance (LPIPS, whose backbone the result names: without its weights a random
one stands in), the mean squared error of pixels in [-1, 1], and PSNR. Seconds are per image, all stages of a row
included, at this batch size; training is given apart. Last line of stdout: the result as JSON.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.fitting.encoder.backbones import StyleEncoder
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode
from handsoff_stream.fitting.encoder.train import EncoderSettings, train_encoder
from handsoff_stream.fitting.inversion.descent import InversionSettings, invert
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.generators import Generator

UNBOUNDED = 1e9


def open_encoder(args: argparse.Namespace, generator: Generator, perceptual: Perceptual) -> tuple[StyleEncoder, float]:
    """The encoder, and the seconds that its training took now; 0 for one that was read."""
    with tempfile.TemporaryDirectory() as folder:
        file = args.encoder or Path(folder) / "encoder.safetensors"
        if file.is_file():
            return load_restyle(file).to(generator.w_avg.device), 0.0
        faces = RenderedFaces("generator", num_images=args.training_images, size=generator.resolution[0])
        renders = [(str(i), faces[i][0]) for i in range(len(faces))]
        settings = EncoderSettings(steps=args.encoder_steps, iterations=args.encoder_iterations)
        started = time.perf_counter()
        encoder = train_encoder(generator, renders, perceptual, file, settings, progress=True)
        return encoder, time.perf_counter() - started


def ways(
    generator: Generator, encoder: StyleEncoder, perceptual: Perceptual, images_BCHW: Tensor, steps: int
) -> dict[str, Callable[[], Tensor]]:
    """Name => function that finds w+ [B, L, D] on the CPU."""

    def descend(encoding: Tensor | None, **settings: Any) -> Tensor:
        chosen = InversionSettings(steps=steps, **settings)
        return invert(generator, images_BCHW, perceptual, chosen, encoding=encoding).w_plus

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
    started = time.perf_counter()
    w_plus_BLD = find()
    seconds = time.perf_counter() - started
    # No steps: the errors of these very latents.
    found = invert(generator, images_BCHW, perceptual, InversionSettings(steps=0), encoding=w_plus_BLD)
    return {
        "perceptual": found.perceptual.mean().item(),
        "mse": found.mse.mean().item(),
        "psnr_db": found.psnr.mean().item(),
        "seconds_per_image": seconds / len(images_BCHW),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="faces", help="of rendered faces, or a generator trained on them")
    parser.add_argument("--images", type=int, default=4, help="held-out renders, inverted in one batch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--encoder", type=Path, help=".safetensors file; default: train one and throw it away")
    parser.add_argument("--encoder-steps", type=int, default=60)
    parser.add_argument("--encoder-iterations", type=int, default=2)
    parser.add_argument("--training-images", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    device = torch.device(args.device)
    generator = load_checkpoint(args.checkpoint).generator.to(device)
    perceptual = load_perceptual().to(device)
    faces = RenderedFaces("test", num_images=args.images, size=generator.resolution[0])
    images_BCHW = torch.stack([faces[i][0] for i in range(len(faces))])
    encoder, training_seconds = open_encoder(args, generator, perceptual)
    encode(encoder, generator, images_BCHW[:1])  # warm-up, not counted

    table = Table("", "image distance", "MSE", "PSNR (dB)", "s per image", title=f"descents of {args.steps} steps")
    rows: dict[str, Any] = {}
    for name, find in ways(generator, encoder, perceptual, images_BCHW, args.steps).items():
        rows[name] = row = measure(find, generator, perceptual, images_BCHW)
        numbers = (f"{row[key]:.{digits}f}" for key, digits in (("perceptual", 4), ("mse", 4), ("psnr_db", 2)))
        table.add_row(name, *numbers, f"{row['seconds_per_image']:.2f}")
    Console().print(table)
    arguments = {**vars(args), "encoder": args.encoder.name if args.encoder else None}
    record = {"arguments": arguments, "image_distance": perceptual.description, "ways": rows}
    write_result("inversion", {**record, "encoder_training_s": training_seconds})


if __name__ == "__main__":
    main()
