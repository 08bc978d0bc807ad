"""Files on disk => inversions, checkpoints: what `handsoff-stream invert` and `handsoff-stream fit` do.

Everything that can be checked is checked before the first gradient step, and before a generator moves to its device.
Does not know how any step works.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from handsoff_stream.checkpoint import (
    ASSETS,
    Checkpoint,
    import_generator,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from handsoff_stream.config import load_class_map
from handsoff_stream.datasets.labelled_images import ImageFolder, LabelledImages, list_labelled
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap, distinct_colors
from handsoff_stream.datasets.labelled_images.geometry import Geometry, Size
from handsoff_stream.device import resolve_device
from handsoff_stream.features import Window
from handsoff_stream.files.tensors import is_safetensors
from handsoff_stream.fitting import (
    EncoderSettings,
    FitSettings,
    InversionSettings,
    LatentSpace,
    ViewSettings,
    calibrate,
    encode_images,
    fit_checkpoint,
    invert_images,
    load_restyle,
    read_latent,
    train_encoder,
    with_views,
)
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.fitting.presets import hidden_widths
from handsoff_stream.fitting.published import read_label_generator, read_latents
from handsoff_stream.generators import Generator, load_generator
from handsoff_stream.tasks import Segmentation

Encodings = dict[str, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """A user's labelled images, and how they become the generator's size and our classes."""

    images: Path
    """Folder of images, or a CSV or JSON manifest."""
    labels: Path | None = None
    """Folder of masks; None with a manifest."""
    class_map: ClassMap
    fit: str = "exact"
    label_height: int | None = None
    """Of the labels, whose shape is the generator's; None: the generator's."""
    crop_box: str | None = None
    """"TOP,LEFT,BOTTOM,RIGHT" in pixels."""
    smallest_region: int = 0
    """Connected regions of fewer pixels become unlabelled; see `LabelledImages`."""

    given_latents: Path | None = None
    """Published `.npy` of latents; see `read_latents`. None: those of the manifest, if it has any."""
    latent_space: LatentSpace = LatentSpace()
    """Of the given latents, or those of the manifest."""

    def latents(self, labelled: LabelledImages, generator: Generator) -> dict[str, Tensor]:
        """Name => w+ [L, D] of the images that need no inversion."""
        if self.given_latents is not None:
            found = read_latents(self.given_latents, labelled.names)
        else:
            found = {entry.name: read_latent(entry.latent) for entry in labelled.entries if entry.latent is not None}
        if self.latent_space.name != "w+" and not found:
            raise ValueError(
                f"latents {self.latent_space.name}, but none are given: pass their file, or a manifest that names them"
            )
        return self.latent_space.w_plus(generator, found)

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
    return load_generator(_generator_file(name_or_path))


def _generator_file(name_or_path: str) -> Path:
    shipped = ASSETS / f"{name_or_path}.safetensors"
    return shipped if shipped.is_file() else Path(name_or_path)


def _part_to_stream(generator: Path, labelled: LabelledImages) -> Window | None:
    """What the labelled images fill; if that is all, what the generator's file streams, where it is a checkpoint whose
    samples were labelled; None for whole images."""
    if labelled.covered is not None:
        top, left, bottom, right = map(int, labelled.covered)
        return Window(top, bottom, left, right)
    crop = read_manifest(generator).get("crop") if is_safetensors(generator) else None
    return None if crop is None else Window(**crop)


def open_perceptual(net: str | None, device: torch.device) -> Perceptual:
    """LPIPS on its device; warns if its backbone is a substitute."""
    return load_perceptual(net).to(device)


def inversion_settings(domain: str | None, steps: int | None, radius: float) -> InversionSettings:
    """The paper's for a domain, the defaults without one; `steps` overrides. An infinite radius is no bound."""
    # Full bodies were segmented with 8 and with 10 classes; images do not know.
    steps_of = None if domain is None else domain.removesuffix("-8").removesuffix("-10")
    settings = InversionSettings() if steps_of is None else InversionSettings.for_domain(steps_of)
    bound = None if radius == math.inf else radius
    return replace(settings, steps=settings.steps if steps is None else steps, radius=bound)


def fit_settings(*, hidden: tuple[int, int] | None, epochs: int | None, patience: int | None) -> FitSettings:
    """The defaults, but for what is given."""
    settings = FitSettings()
    return replace(settings, hidden=hidden or settings.hidden, epochs=epochs or settings.epochs, patience=patience)


def view_settings(class_map: ClassMap, *, views: int, flip: bool, any_color: str | None) -> ViewSettings | None:
    """None for no views. `any_color`: names of classes, separated by commas.

    Raises:
        ValueError: a name that the class map lacks, or settings of views without views.
    """
    names = [name.strip() for name in any_color.split(",")] if any_color else []
    unknown = [name for name in names if name not in class_map.class_names]
    if unknown:
        raise ValueError(f"no class is named {unknown[0]!r}; there are {', '.join(class_map.class_names)}")
    if views == 0 and (flip or names):
        raise ValueError("there are no views to mirror or recolour; pass --views N, or leave the rest out")
    ids = tuple(class_map.class_names.index(name) for name in names)
    return ViewSettings(per_image=views, flip=flip, any_color=ids) if views else None


def encodings(encoder: Path | None, generator: Generator, images: Sequence[tuple[str, Tensor]]) -> Encodings:
    """Name => w_e of an encoder's file; None without one."""
    if encoder is None:
        return None
    return encode_images(load_restyle(encoder), generator, images, progress=True)


def train_encoder_on_folder(
    generator: str,
    images: Path,
    out: Path,
    *,
    steps: int,
    architecture: str,
    fit: str,
    net: str | None,
    device: str | None,
) -> None:
    """Train a ReStyle encoder on a folder of images, or continue."""
    chosen = resolve_device(device)
    network = open_generator(generator)
    folder = ImageFolder(images, Geometry(network.resolution, fit=fit))
    settings = EncoderSettings(steps=steps, architecture=architecture)
    train_encoder(network.to(chosen), folder, open_perceptual(net, chosen), out, settings, progress=True)


def invert_folder(
    generator: str,
    images: Path,
    out: Path,
    settings: InversionSettings,
    *,
    encoder: Path | None,
    fit: str,
    net: str | None,
    device: str | None,
) -> list[tuple[str, float, float]]:
    """Invert every image of a folder; returns (name, LPIPS, PSNR in dB) of each."""
    chosen = resolve_device(device)
    network = open_generator(generator)
    folder = ImageFolder(images, Geometry(network.resolution, fit=fit))
    named = [folder[i] for i in range(len(folder))]
    network.to(chosen)
    start = encodings(encoder, network, named)
    perceptual = open_perceptual(net, chosen)
    found = invert_images(network, named, out, perceptual, settings, encodings=start, progress=True)
    return list(zip(folder.names, found.perceptual.tolist(), found.psnr.tolist(), strict=True))


def _to_learn_from(
    labelled: LabelledImages, views: ViewSettings | None, num_classes: int, *, given: bool
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """(name, float32 [3, H, W]) of the images and of their views, and the int64 masks [N, h, w] of both."""
    images, masks = [(name, image) for name, image, _ in labelled], torch.stack([mask for _, _, mask in labelled])
    if views is None:
        return images, masks
    if given:
        raise ValueError("views are inverted, images with given latents are not; leave out the views or the latents")
    if labelled.covered is not None:
        raise ValueError(
            "a view of a padded image would move the bars, which the generator never does; leave out the views, or "
            "crop the images instead"
        )
    return with_views(images, masks, num_classes, views)


def fit_files(
    generator: str,
    files: LabelledFiles,
    out: Path,
    *,
    latents: Path | None = None,
    inversion: InversionSettings,
    encoder: Path | None = None,
    settings: FitSettings,
    views: ViewSettings | None = None,
    widths_of: str | None = None,
    net: str | None = None,
    memory_gb: float | None = None,
    half: bool = False,
    device: str | None = None,
    calibration_samples: int = 2000,
) -> tuple[float | None, Sequence[str]]:
    """Invert, fit, calibrate and save.

    Args:
        generator: file or name.
        files: the labelled images.
        out: checkpoint to write.
        latents: folder of the inversions; None means beside `out`.
        inversion, settings: how to invert and fit.
        views: of the images, inverted and learnt from beside them; None for none.
        encoder: a ReStyle encoder's file, to start from and stay near.
        widths_of: domain whose published hidden widths replace those of `settings`.
        net: LPIPS backbone.
        memory_gb: for features; the rest goes to temporary files beside `out`.
        half: store float16.
        device: where to work.
        calibration_samples: as for `save_calibrated`.

    Returns:
        The accuracy on held-out labelled pixels, None if none were held out; and the classes that no image shows, which
        therefore cannot be predicted.

    Raises:
        LabelledImagesError: anything wrong with the images or masks, all of it at once.
        CheckpointError: a generator, encoder or latent file that cannot be read.
        ValueError: views of images with given latents, or of padded ones.
    """
    chosen = resolve_device(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    network = open_generator(generator)
    labelled = files.open(network.resolution)
    given = files.latents(labelled, network)
    if widths_of is not None:
        settings = replace(settings, hidden=hidden_widths(widths_of, num_images=len(labelled)))
    task = Segmentation(files.class_map.class_names, files.class_map.palette)
    images, masks = _to_learn_from(labelled, views, task.num_outputs, given=bool(given))
    network.to(chosen)
    checkpoint = fit_checkpoint(
        network,
        images,
        masks,
        task,
        latents or out.with_suffix(".latents"),
        inversion=inversion,
        fit=settings,
        perceptual=None if len(given) == len(labelled) else open_perceptual(net, chosen),
        encodings=encodings(encoder, network, images),
        latents=given,
        calibration_samples=0,
        memory_gb=memory_gb,
        cache_dir=out.parent,
        sources={f"{file.parent.name}/{file.name}": sha256(file) for pair in labelled.files for file in pair},
        progress=True,
    )
    provenance = {**checkpoint.provenance, "class_map": files.class_map.config()}
    if views is not None:
        provenance["views"] = views.config()
    if given:
        provenance["latent_space"] = asdict(files.latent_space)
    checkpoint = replace(checkpoint, provenance=provenance)
    part = _part_to_stream(_generator_file(generator), labelled)
    if part is not None:
        checkpoint = checkpoint.cropped(part)
    save_calibrated(checkpoint, out, chosen, calibration_samples, half=half)
    accuracy: float | None = checkpoint.provenance["fit"]["accuracy"]
    unseen = [n for n, count in zip(task.class_names, labelled.pixels_per_class, strict=True) if count == 0]
    return accuracy, unseen


def import_label_generator(
    generator: Path,
    experiment: Path,
    out: Path,
    *,
    members: Path | None = None,
    class_names: Sequence[str] | None = None,
    average_latent: Path | None = None,
    half: bool = False,
    device: str | None = None,
    calibration_samples: int = 2000,
) -> None:
    """Published generator, experiment JSON and `model_<i>.pth` files => a calibrated checkpoint.

    Raises:
        CheckpointError: a file that cannot be read, or does not fit the generator.
        ValueError: another number of class names than the label generator has outputs.
    """
    chosen = resolve_device(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    base = import_generator(generator, average_latent=average_latent)
    read = read_label_generator(experiment, base.generator.feature_channels, folder=members)
    names = tuple(class_names or (f"class {i}" for i in range(read.label_generator.num_outputs)))
    checkpoint = read.attach_to(base, Segmentation(names, distinct_colors(len(names))))
    save_calibrated(checkpoint, out, chosen, calibration_samples, half=half)


def save_calibrated(checkpoint: Checkpoint, out: Path, device: torch.device, num_samples: int, *, half: bool) -> None:
    """Save, calibrate what was written, since rounding to float16 moves scores a little, and save that.

    With `num_samples=0` there is no calibration.
    """
    save_checkpoint(out, checkpoint, half=half)
    if num_samples == 0:
        return
    written = load_checkpoint(out)
    on_device = replace(written, generator=written.generator.to(device))
    save_checkpoint(out, calibrate(on_device, num_samples=num_samples, progress=True), half=half)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
