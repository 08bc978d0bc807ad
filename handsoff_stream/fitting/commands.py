"""Files on disk => inversions, checkpoints: what `handsoff-stream invert` and `handsoff-stream fit` do.

Everything that can be checked is checked before the first gradient step, and before a generator moves to its device.
Does not know how any step works.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from handsoff_stream.checkpoint import ASSETS, load_checkpoint, save_checkpoint
from handsoff_stream.config import load_class_map
from handsoff_stream.datasets.class_maps import ClassMap
from handsoff_stream.datasets.geometry import Fit, Geometry, Size
from handsoff_stream.datasets.labelled_images import ImageFolder, LabelledImages, list_labelled
from handsoff_stream.device import resolve_device
from handsoff_stream.fitting import FitSettings, InversionSettings, calibrate, fit_checkpoint, invert_images
from handsoff_stream.fitting.latents import read_latent
from handsoff_stream.fitting.perceptual import Perceptual, load_perceptual
from handsoff_stream.generators import Generator, load_generator
from handsoff_stream.tasks import Segmentation


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """A user's labelled images, and how they become the generator's size and our classes."""

    images: Path
    """Folder of images, or a CSV or JSON manifest."""
    labels: Path | None = None
    """Folder of masks; None with a manifest."""
    class_map: ClassMap
    fit: Fit = "exact"
    label_height: int | None = None
    """Of the labels, whose shape is the generator's; None: the generator's."""
    crop_box: str | None = None
    """"TOP,LEFT,BOTTOM,RIGHT" in pixels."""
    smallest_region: int = 0
    """Connected regions of fewer pixels become unlabelled; see `LabelledImages`."""

    def open(self, resolution: Size) -> LabelledImages:
        """The set, read and checked.

        Raises:
            LabelledImagesError: all that is wrong with it.
        """
        height, width = resolution
        label_size = None if self.label_height is None else (self.label_height, self.label_height * width // height)
        geometry = Geometry(resolution, label_size, self.fit, _crop_box(self.crop_box))
        listing = list_labelled(self.images, self.labels)
        return LabelledImages(listing, self.class_map, geometry, smallest_region=self.smallest_region)


def _crop_box(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    try:
        top, left, bottom, right = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"crop box {text!r} is not TOP,LEFT,BOTTOM,RIGHT: four whole numbers of pixels") from None
    return top, left, bottom, right


def open_class_map(name_or_path: str | None, class_names: str | None) -> ClassMap:
    """The class map of a name or YAML file, or, for masks that hold class ids, of names separated by commas."""
    if (name_or_path is None) == (class_names is None):
        raise ValueError("what masks mean is said once: pass --class-map NAME|FILE, or --classes a,b,c for plain ids")
    if name_or_path is not None:
        return load_class_map(name_or_path)
    assert class_names is not None
    return ClassMap.of_ids(name.strip() for name in class_names.split(","))


def open_generator(name_or_path: str) -> Generator:
    """A generator file, or the generator of a checkpoint that ships; on the CPU."""
    shipped = ASSETS / f"{name_or_path}.safetensors"
    return load_generator(shipped if shipped.is_file() else name_or_path)


def open_perceptual(net: str | None, device: torch.device) -> Perceptual:
    """LPIPS on its device; warns if its backbone is a substitute."""
    return load_perceptual(net).to(device)


def invert_folder(
    generator: str,
    images: Path,
    out: Path,
    *,
    steps: int,
    net: str | None,
    device: str | None,
    fit: Fit = "exact",
) -> list[tuple[str, float, float]]:
    """Invert every image of a folder; returns (name, LPIPS, PSNR in dB) of each."""
    chosen = resolve_device(device)
    network = open_generator(generator)
    folder = ImageFolder(images, Geometry(network.resolution, fit=fit))
    named = [folder[i] for i in range(len(folder))]
    network.to(chosen)
    found = invert_images(
        network, named, out, open_perceptual(net, chosen), InversionSettings(steps=steps), progress=True
    )
    return list(zip(folder.names, found.perceptual.tolist(), found.psnr.tolist(), strict=True))


def fit_folder(
    generator: str,
    files: LabelledFiles,
    out: Path,
    *,
    latents: Path | None,
    steps: int,
    net: str | None,
    settings: FitSettings,
    half: bool,
    device: str | None,
    calibration_samples: int = 2000,
) -> tuple[float | None, Sequence[str]]:
    """Invert, fit, calibrate and save.

    Returns:
        The accuracy on held-out labelled pixels, None if none were held out; and the classes that no image shows, which
        therefore cannot be predicted.

    Raises:
        LabelledImagesError: anything wrong with the images or masks, all of it at once.
        CheckpointError: a generator file that cannot be read.
    """
    chosen = resolve_device(device)
    network = open_generator(generator)
    labelled = files.open(network.resolution)
    task = Segmentation(files.class_map.class_names, files.class_map.palette)
    given = {entry.name: read_latent(entry.latent) for entry in labelled.entries if entry.latent is not None}
    network.to(chosen)
    checkpoint = fit_checkpoint(
        network,
        [(name, image) for name, image, _ in labelled],
        torch.stack([mask for _, _, mask in labelled]),
        task,
        latents or out.with_suffix(".latents"),
        inversion=InversionSettings(steps=steps),
        fit=settings,
        perceptual=None if len(given) == len(labelled) else open_perceptual(net, chosen),
        latents=given,
        calibration_samples=0,
        sources={f"{file.parent.name}/{file.name}": sha256(file) for pair in labelled.files for file in pair},
        progress=True,
    )
    provenance = {**checkpoint.provenance, "class_map": files.class_map.config()}
    save_checkpoint(out, replace(checkpoint, provenance=provenance), half=half)
    # What is calibrated is what was written: rounding to float16 moves scores a little.
    written = load_checkpoint(out)
    calibrated = calibrate(
        replace(written, generator=written.generator.to(chosen)), num_samples=calibration_samples, progress=True
    )
    save_checkpoint(out, calibrated, half=half)
    accuracy: float | None = checkpoint.provenance["fit"]["accuracy"]
    unseen = [n for n, count in zip(task.class_names, labelled.pixels_per_class, strict=True) if count == 0]
    return accuracy, unseen


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
