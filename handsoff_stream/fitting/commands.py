"""Folders on disk => inversions, checkpoints: what `handsoff-stream invert` and `handsoff-stream fit` do.

Everything that can be checked is checked before the first gradient step. Does not know how any step works.
"""

import colorsys
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from handsoff_stream.checkpoint import ASSETS, load_checkpoint, save_checkpoint
from handsoff_stream.datasets.labelled_folder import ImageFolder, LabelledFolder
from handsoff_stream.device import resolve_device
from handsoff_stream.fitting import FitSettings, InversionSettings, calibrate, fit_checkpoint, invert_images
from handsoff_stream.fitting.perceptual import Perceptual, load_perceptual
from handsoff_stream.generators import Generator, load_generator
from handsoff_stream.tasks import Segmentation

PALETTE_HUE_STEP = 0.618034  # golden ratio: neighbouring ids get distant hues


def open_generator(name_or_path: str, device: str | None) -> tuple[Generator, torch.device]:
    """A generator file, or the generator of a checkpoint that ships, on its device."""
    shipped = ASSETS / f"{name_or_path}.safetensors"
    chosen = resolve_device(device)
    return load_generator(shipped if shipped.is_file() else name_or_path).to(chosen), chosen


def open_perceptual(net: str | None, device: torch.device) -> Perceptual:
    """LPIPS on its device; warns if its backbone is a substitute."""
    return load_perceptual(net).to(device)


def invert_folder(
    generator: str, images: Path, out: Path, *, steps: int, net: str | None, device: str | None
) -> list[tuple[str, float, float]]:
    """Invert every image of a folder; returns (name, LPIPS, PSNR in dB) of each."""
    network, chosen = open_generator(generator, device)
    folder = ImageFolder(images, size=network.resolution)
    named = [folder[i] for i in range(len(folder))]
    settings = InversionSettings(steps=steps)
    found = invert_images(network, named, out, open_perceptual(net, chosen), settings, progress=True)
    return list(zip(folder.names, found.perceptual.tolist(), found.psnr.tolist(), strict=True))


def fit_folder(
    generator: str,
    images: Path,
    labels: Path,
    *,
    class_names: Sequence[str],
    out: Path,
    latents: Path | None,
    steps: int,
    net: str | None,
    epochs: int | None,
    half: bool,
    device: str | None,
    calibration_samples: int = 2000,
) -> float | None:
    """Invert, fit, calibrate and save; returns the accuracy on held-out labelled pixels, None if none were held out.

    Raises:
        LabelledImagesError: anything wrong with the images or masks, all of it at once.
        CheckpointError: a generator file that cannot be read.
    """
    task = Segmentation(tuple(class_names), distinct_colors(len(class_names)))
    network, chosen = open_generator(generator, device)
    folder = LabelledFolder(images, labels, num_classes=task.num_classes, size=network.resolution)
    named = [(name, image) for name, image, _ in folder]
    targets = torch.stack([mask for _, _, mask in folder])
    checkpoint = fit_checkpoint(
        network,
        named,
        targets,
        task,
        latents or out.with_suffix(".latents"),
        inversion=InversionSettings(steps=steps),
        fit=FitSettings() if epochs is None else FitSettings(epochs=epochs),
        perceptual=open_perceptual(net, chosen),
        calibration_samples=0,
        sources={f"{file.parent.name}/{file.name}": sha256(file) for pair in folder.files for file in pair},
        progress=True,
    )
    save_checkpoint(out, checkpoint, half=half)
    # What is calibrated is what was written: rounding to float16 moves scores a little.
    written = load_checkpoint(out)
    calibrated = calibrate(
        replace(written, generator=written.generator.to(chosen)), num_samples=calibration_samples, progress=True
    )
    save_checkpoint(out, calibrated, half=half)
    accuracy: float | None = checkpoint.provenance["fit"]["accuracy"]
    return accuracy


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Display colours of so many classes: black, then hues far apart."""
    colors = [colorsys.hsv_to_rgb(i * PALETTE_HUE_STEP % 1.0, 0.65, 0.95) for i in range(count - 1)]
    return [(0, 0, 0), *((round(r * 255), round(g * 255), round(b * 255)) for r, g, b in colors)]


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
