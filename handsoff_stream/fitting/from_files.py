"""Files on disk => inversions, encoders, checkpoints: what the command line does, as functions.

Fitting is three calls, `invert` => `fit_checkpoint` => `calibrate`, composed in `fit_files`. Everything that can be
checked is checked before the first gradient step, and before a generator moves to its device. Does not know how any
step works, or how options are written on a command line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from handsoff_stream.checkpoint import (
    Checkpoint,
    import_generator,
    load_checkpoint,
    read_manifest,
    resolve,
    save_checkpoint,
)
from handsoff_stream.datasets.labelled_images import Geometry, LabelledImages, UnlabelledImages
from handsoff_stream.datasets.labelled_images.class_maps import distinct_colors
from handsoff_stream.device import usable_device
from handsoff_stream.files.atomic import check_file, check_folder
from handsoff_stream.files.tensors import is_safetensors
from handsoff_stream.fitting.augment import AugmentationSettings
from handsoff_stream.fitting.calibration import calibrate
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode_images
from handsoff_stream.fitting.encoder.train import EncoderSettings, train_encoder
from handsoff_stream.fitting.fit import FitSettings, fit_checkpoint
from handsoff_stream.fitting.inversion.descent import InversionSettings
from handsoff_stream.fitting.inversion.latents import Encode, invert
from handsoff_stream.fitting.inversion.perceptual import load_perceptual
from handsoff_stream.fitting.inversion.store import invert_images
from handsoff_stream.fitting.invertibility import LostPixels, check_factor, leave_out_lost
from handsoff_stream.fitting.labelled_files import LabelledFiles, examples
from handsoff_stream.fitting.presets import hidden_widths
from handsoff_stream.fitting.published import read_label_generator
from handsoff_stream.fitting.teacher import Teacher
from handsoff_stream.generators import Generator, load_generator
from handsoff_stream.geometry import Rectangle
from handsoff_stream.tasks import Segmentation

MAX_CALIBRATION_SAMPLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """How images get their latents."""

    settings: InversionSettings = InversionSettings()
    """How to descend."""
    encoder: Path | None = None
    """An encoder's file, whose latents inversion starts from and stays near; None: see `invert`."""
    net: str | None = None
    """Network in whose features images are compared, see `load_perceptual`."""

    def encode(self, generator: Generator) -> Encode | None:
        """The encoder, read and bound to a generator; None without one.

        Raises:
            CheckpointError: an encoder's file that cannot be read.
        """
        if self.encoder is None:
            return None
        return partial(encode_images, load_restyle(self.encoder), generator, progress=True)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How labelled files become a checkpoint: all options except the files.

    Raises:
        ValueError: `invertibility`, `memory_gb` or `calibration_samples` out of range.
    """

    inversion: InversionOptions = InversionOptions()
    """Of the images whose latents are not given."""
    latents_folder: Path | None = None
    """Where inversions are kept; None: beside the checkpoint, as `<checkpoint>.latents/`."""
    fit: FitSettings = FitSettings()
    """How the label generator is fitted."""
    widths_of: str | None = None
    """Domain whose published hidden widths replace those of `fit`; see `presets`."""
    augmentation: AugmentationSettings | None = None
    """Augmentations of the images, inverted and learned from as well; None for none."""
    teacher: Teacher | None = None
    """Labels samples of the generator, which are learned from beside the labelled images; None for no samples."""
    invertibility: float | None = None
    """Pixels whose inversion differs from the image by more than so many medians are not learned from, see the module
    `invertibility`; None: all are. Images with given latents are not affected."""
    memory_gb: float | None = None
    """Gigabytes for features on the device; the rest goes to temporary files beside the checkpoint."""
    half: bool = False
    """Store weights as float16."""
    calibration_samples: int = 2000
    """Samples whose image scores are stored, see `calibrate`; 0: no calibration."""
    device: str | None = None
    """Where to compute; None means CUDA if there is one."""

    def __post_init__(self) -> None:
        if self.invertibility is not None:
            check_factor(self.invertibility)
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ValueError(f"memory_gb={self.memory_gb} holds no features; pass a positive number, or None")
        if not 0 <= self.calibration_samples <= MAX_CALIBRATION_SAMPLES:
            raise ValueError(
                f"calibration_samples={self.calibration_samples}; pass 0 for no calibration, or up to "
                f"{MAX_CALIBRATION_SAMPLES}"
            )


@dataclass(frozen=True)
class FitSummary:
    """The result of a fit, in short."""

    accuracy: float | None
    """Share of held-out labelled pixels that are labelled right; None if none were held out."""
    unseen_classes: Sequence[str]
    """Classes that no labelled image shows, which therefore are never predicted."""
    image_distance: str | None
    """What compared images in inversion; None if all latents were given."""
    lost: LostPixels | None
    """Pixels that were left out because inversions lack them; None if that is off or all latents were given."""


def fit_files(generator: str | Path, files: LabelledFiles, out: Path, options: FitOptions | None = None) -> FitSummary:
    """Invert, fit, calibrate and save.

    Args:
        generator: file of a generator or checkpoint, or the name of a checkpoint that ships.
        files: the labelled images.
        out: checkpoint to write; its folder is created.
        options: how.

    Raises:
        LabelledImagesError: anything wrong with the images or masks, all of it at once.
        OutputError: the checkpoint or the inversions cannot be written; this is found out before the work.
        CheckpointError: a generator, encoder or latent file that cannot be read.
        ValueError: augmentations of images with given latents, or of padded ones.
    """
    options = options or FitOptions()
    device, source = usable_device(options.device), resolve(generator)
    folder = options.latents_folder or out.with_suffix(".latents")
    check_file(out, inputs=_inputs(source, files, options), needed=2 * source.stat().st_size)
    check_folder(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    network = load_generator(source)
    labelled = files.open(network.resolution)
    given = files.latents(labelled, network)
    names = files.class_map.class_names
    images, masks = examples(labelled, options.augmentation, latents_given=bool(given))
    settings = with_widths_of(options.widths_of, options.fit, num_images=len(labelled))
    distance = None if len(given) == len(images) else load_perceptual(options.inversion.net)
    if options.teacher is not None:
        options.teacher.check(len(names), (masks.shape[1], masks.shape[2]))
    latents = invert(
        network.to(device),
        images,
        folder,
        options.inversion.settings,
        given=given,
        perceptual=distance,
        encode=options.inversion.encode(network),
        progress=True,
    )
    factor, lost = options.invertibility, None
    if distance is not None and factor is not None:
        masks, lost = leave_out_lost(network, images, latents.w_plus, masks, distance, names, factor, trusted=given)
    checkpoint = fit_checkpoint(
        network,
        latents,
        masks,
        Segmentation(names, files.class_map.palette),
        settings,
        memory_gb=options.memory_gb,
        cache_dir=out.parent,
        about=_about(files, labelled, options, lost, latents_given=bool(given)),
        samples=None if options.teacher is None else options.teacher.label_for(network, labelled),
        progress=True,
    )
    if (part := _part_to_stream(source, labelled)) is not None:
        checkpoint = checkpoint.cropped(part)
    save_calibrated(checkpoint, out, device, options.calibration_samples, half=options.half)
    unseen = [name for name, pixels in zip(names, labelled.pixels_per_class, strict=True) if pixels == 0]
    return FitSummary(checkpoint.provenance["fit"]["accuracy"], unseen, latents.provenance.get("perceptual"), lost)


def _inputs(source: Path, files: LabelledFiles, options: FitOptions) -> list[Path]:
    """The files that a fit reads; a network of the user's own may be a function instead."""
    network = None if options.teacher is None else options.teacher.network
    paths = source, files.images, options.inversion.encoder, files.given_latents, network
    return [path for path in paths if isinstance(path, Path)]


def with_widths_of(domain: str | None, settings: FitSettings, *, num_images: int) -> FitSettings:
    """The settings with the published hidden widths of a domain; as they are without a domain.

    Raises:
        ValueError: as `hidden_widths`.
    """
    return settings if domain is None else replace(settings, hidden=hidden_widths(domain, num_images=num_images))


def _about(
    files: LabelledFiles, labelled: LabelledImages, options: FitOptions, lost: LostPixels | None, *, latents_given: bool
) -> dict[str, Any]:
    """What provenance says of the images and labels."""
    about = files.describe(labelled, latents_given=latents_given)
    if options.augmentation is not None:
        about["augmentation"] = options.augmentation.config()
    if lost is not None:
        about["invertibility"] = lost.config()
    return about


def _part_to_stream(generator: Path, labelled: LabelledImages) -> Rectangle | None:
    """The part of the generator's image to stream; None for all of it.

    It is what the labelled images fill. If they fill everything, it is what the generator's file streams, where that
    is a checkpoint: its samples may have been labelled.
    """
    if labelled.covered is not None:
        return labelled.covered
    crop = read_manifest(generator).get("crop") if is_safetensors(generator) else None
    return None if crop is None else Rectangle(**crop)


def save_calibrated(checkpoint: Checkpoint, out: Path, device: torch.device, num_samples: int, *, half: bool) -> None:
    """Save, calibrate what was written, since rounding to float16 moves scores slightly, and save that.

    With `num_samples=0` there is no calibration.

    Raises:
        CheckpointError: weights that cannot be stored, see `save_checkpoint`.
    """
    save_checkpoint(out, checkpoint, half=half)
    if num_samples == 0:
        return
    written = load_checkpoint(out)
    on_device = replace(written, generator=written.generator.to(device))
    save_checkpoint(out, calibrate(on_device, num_samples=num_samples, progress=True), half=half)


def invert_folder(
    generator: str | Path,
    images: Path,
    out: Path,
    options: InversionOptions | None = None,
    *,
    resize: str = "exact",
    device: str | None = None,
) -> tuple[list[tuple[str, float, float]], str]:
    """Invert every image of a folder, into one file each in the folder `out`; finished ones are kept.

    Returns:
        (name, perceptual distance, PSNR in dB) of each image, by name; and what the distance is.

    Raises:
        LabelledImagesError: anything wrong with the images.
        CheckpointError: a generator or encoder file that cannot be read.
    """
    options = options or InversionOptions()
    chosen = usable_device(device)
    check_folder(out)
    network = load_generator(resolve(generator))
    folder = list(UnlabelledImages(images, Geometry(network.resolution, resize=resize)))
    encode = options.encode(network)
    network.to(chosen)
    encodings = None if encode is None else encode(folder)
    distance = load_perceptual(options.net)
    found = invert_images(network, folder, out, distance, options.settings, encodings=encodings, progress=True)
    names = [name for name, _ in folder]
    return list(zip(names, found.perceptual.tolist(), found.psnr.tolist(), strict=True)), distance.description


def train_encoder_on_folder(
    generator: str | Path,
    images: Path,
    out: Path,
    settings: EncoderSettings | None = None,
    *,
    resize: str = "exact",
    net: str | None = None,
    device: str | None = None,
) -> None:
    """Train an encoder on a folder of images, or continue an unfinished training.

    Raises:
        LabelledImagesError: anything wrong with the images.
        CheckpointError: a generator file that cannot be read, or the state of a training with other arguments.
    """
    chosen = usable_device(device)
    source = resolve(generator)
    check_file(out, inputs=[source])
    out.parent.mkdir(parents=True, exist_ok=True)
    network = load_generator(source)
    folder = UnlabelledImages(images, Geometry(network.resolution, resize=resize))
    train_encoder(network.to(chosen), folder, load_perceptual(net), out, settings, progress=True)


@dataclass(frozen=True, kw_only=True)
class PublishedFiles:
    """A label generator as HandsOff's or DatasetGAN's code left it on disk."""

    generator: Path
    """The StyleGAN's file."""
    experiment: Path
    """The experiment's JSON."""
    members: Path | None = None
    """Folder of `model_0.pth`, `model_1.pth`, ...; None: that of the JSON."""
    average_latent: Path | None = None
    """`.npy` file, where the generator's file stores no average latent; see `load_generator`."""


def import_label_generator(
    files: PublishedFiles,
    out: Path,
    *,
    class_names: Sequence[str] | None = None,
    half: bool = False,
    calibration_samples: int = 2000,
    device: str | None = None,
) -> None:
    """Published generator, experiment JSON and `model_<i>.pth` files => a calibrated checkpoint.

    Raises:
        CheckpointError: a file that cannot be read, or does not fit the generator.
        ValueError: another number of class names than the label generator has outputs.
    """
    chosen = usable_device(device)
    check_file(out, inputs=[files.generator, files.experiment])
    out.parent.mkdir(parents=True, exist_ok=True)
    base = import_generator(files.generator, average_latent=files.average_latent)
    read = read_label_generator(files.experiment, base.generator.feature_channels, folder=files.members)
    names = tuple(class_names or (f"class {i}" for i in range(read.label_generator.num_outputs)))
    checkpoint = read.attach_to(base, Segmentation(names, distinct_colors(len(names))))
    save_calibrated(checkpoint, out, chosen, calibration_samples, half=half)
