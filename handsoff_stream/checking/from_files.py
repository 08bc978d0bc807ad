"""A generator and labelled files => a report in a folder: what the command `handsoff-stream check` runs.

    out/report.html           for people; holds its pictures
    out/report.json           all numbers
    out/pictures/<name>.png   image, reconstruction, mask, label, and where label and mask differ
    out/latents/              inversions in the form in which `fit` keeps them: `fit --latents out/latents` reuses them
    out/folds/                labels of each fold, from which an interrupted run continues

Everything that can be checked is checked before the first gradient step. Does not know how any step works.

Shape letters: N images.
"""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handsoff_stream.checking.cross_validation import HeldOutLabels, label_held_out
from handsoff_stream.checking.findings import find
from handsoff_stream.checking.folds import learnable_classes, stratified_folds
from handsoff_stream.checking.learners import (
    Material,
    network_size,
    reconstruct,
)
from handsoff_stream.checking.page import render_page
from handsoff_stream.checking.pictures import draw_panels
from handsoff_stream.checking.report import CheckReport
from handsoff_stream.checkpoint import resolve
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.datasets.labelled_images import LabelledImages
from handsoff_stream.device import usable_device
from handsoff_stream.errors import OutputError
from handsoff_stream.files.atomic import check_file, check_folder, locked_folder, write_file
from handsoff_stream.fitting.fit import FitSettings
from handsoff_stream.fitting.from_files import InversionOptions, with_widths_of
from handsoff_stream.fitting.inversion.latents import FoundLatents, invert
from handsoff_stream.fitting.labelled_files import LabelledFiles, examples
from handsoff_stream.fitting.teacher import Teacher, TeacherSettings
from handsoff_stream.generators import Generator, load_generator
from handsoff_stream.geometry import Size
from handsoff_stream.isolation import isolated
from handsoff_stream.provenance import sha256, versions
from handsoff_stream.tasks import Segmentation

MIN_IMAGES = 4
CHECK_MEMBERS = 3  # of each label generator; a majority needs three


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """How labelled files are checked: all options except the files."""

    inversion: InversionOptions = InversionOptions()
    """Of the images whose latents are not given; those of the fit to come."""
    latents_folder: Path | None = None
    """Where inversions are kept, such as those of an earlier fit; None: `latents` in the output folder."""
    fit: FitSettings = FitSettings(members=CHECK_MEMBERS)
    """How the label generators are fitted; fewer members than in a fit save time."""
    widths_of: str | None = None
    """Domain whose published hidden widths replace those of `fit`; see `presets`."""
    network: TeacherSettings | None = TeacherSettings(members=1)
    """The segmentation network for comparison, with the seed below; None: none is trained, no loss is attributed."""
    folds: int = 4
    """How many parts the images are divided into, from 2 to their number; at least 4 images are needed."""
    seed: int = 0
    """Of folds, network and standard errors."""
    device: str | None = None
    """Where to compute; None means CUDA if there is one."""


def check_files(
    generator: str | Path, files: LabelledFiles, out: Path, options: CheckOptions | None = None
) -> CheckReport:
    """Cross-validate the labels that a stream would have, and write a report.

    A run that was interrupted is continued, and ends with the same report.

    Args:
        generator: file of a generator or checkpoint, or the name of a checkpoint that ships.
        files: the labelled images.
        out: folder of the report; created if missing.
        options: how.

    Raises:
        LabelledImagesError: anything wrong with the images or masks, all of it at once.
        OutputError: the folder cannot be written, or is a folder of the input; this is found out before the work.
        CheckpointError: a generator, encoder or latent file that cannot be read.
        ValueError: fewer than 4 images, or fewer than folds; no class that two folds show.
        FileNotFoundError, ImportError: the ImageNet weights, or a package, of the segmentation network are missing.
    """
    options = options or CheckOptions()
    device = usable_device(options.device)
    source = resolve(generator)
    _check_out(out, [files.images, files.labels, options.latents_folder])
    network = load_generator(source)
    labelled = files.open(network.resolution)
    for name in labelled.names:
        check_file(out / "pictures" / f"{name}.png")
    given = files.latents(labelled, network)
    encode = options.inversion.encode(network)
    images, masks = examples(labelled, None, latents_given=bool(given))
    task = Segmentation(files.class_map.class_names, files.class_map.palette)
    shown_NK = _shown(masks, task.num_classes)
    _check_images(shown_NK, network.resolution, options)
    fit = with_widths_of(options.widths_of, options.fit, num_images=len(images))

    with locked_folder(out), isolated():
        latents = invert(
            network.to(device),
            images,
            options.latents_folder or out / "latents",
            options.inversion.settings,
            given=given,
            perceptual=options.inversion.net,
            encode=encode,
            progress=True,
        )
        material = _material(network, task, images, masks, latents)
        held_out = label_held_out(
            material,
            shown_NK,
            out / "folds",
            num_folds=options.folds,
            fit=fit,
            network=options.network,
            seed=options.seed,
            progress=True,
        )
        about = _about(source, files, labelled, options, fit, held_out, latents_given=bool(given))
        return _write(material, held_out, about, out, options.seed)


def _check_out(out: Path, others: list[Path | None]) -> None:
    check_folder(out)
    if out.resolve() in [folder.resolve() for folder in others if folder is not None]:
        raise OutputError(
            f"{out}: holds images, masks or inversions, where a report does not belong; pass another folder"
        )
    for name in ("report.html", "report.json"):
        check_file(out / name)
    for name in ("folds", "pictures"):
        check_folder(out / name)


def _shown(masks_Nhw: Tensor, num_classes: int) -> NDArray[np.bool_]:
    """Whether each image shows each class, bool [N, K]."""
    counts = [torch.bincount(mask[mask != IGNORE_INDEX].flatten(), minlength=num_classes) for mask in masks_Nhw]
    shown_NK: NDArray[np.bool_] = (torch.stack(counts) > 0).numpy()
    return shown_NK


def _check_images(shown_NK: NDArray[np.bool_], size: Size, options: CheckOptions) -> None:
    """Refuse images that cannot be divided, and a network that cannot be built for their size (H, W)."""
    (num_images, num_classes), folds = shown_NK.shape, options.folds
    if folds < 2:
        raise ValueError(f"{folds} folds hold nothing out; pass at least 2")
    if num_images < max(folds, MIN_IMAGES):
        raise ValueError(
            f"{num_images} labelled image(s) are too few for {folds} folds, of which one is held out at a time; label "
            f"at least {max(folds, MIN_IMAGES)}"
        )
    if not learnable_classes(shown_NK, stratified_folds(shown_NK, folds, options.seed)).any():
        raise ValueError(
            "every class is shown by images of one fold only, so none can be learned while that fold is held out; "
            "label more images of the same classes"
        )
    if options.network is not None:
        Teacher(training=options.network).check(num_classes, network_size(size))


def _material(
    generator: Generator,
    task: Segmentation,
    images: list[tuple[str, Tensor]],
    masks: Tensor,
    latents: FoundLatents,
) -> Material:
    return Material(
        generator=generator,
        task=task,
        names=latents.names,
        images=torch.stack([image for _, image in images]),
        masks=masks,
        w_plus=latents.w_plus,
        reconstructions=reconstruct(generator, latents.w_plus),
    )


def _about(
    source: Path,
    files: LabelledFiles,
    labelled: LabelledImages,
    options: CheckOptions,
    fit: FitSettings,
    held_out: HeldOutLabels,
    *,
    latents_given: bool,
) -> dict[str, Any]:
    """What was checked, and how; no path but file names."""
    network = None if options.network is None else asdict(options.network)
    encoder = options.inversion.encoder
    names = labelled.names
    return {
        "generator": source.name,
        "folds": [[names[i] for i in fold] for fold in held_out.folds],
        "halves": [[names[i] for i in half] for half in held_out.halves],
        "settings": {
            "folds": options.folds,
            "seed": options.seed,
            "inversion": options.inversion.settings.config(),
            "encoder": None if encoder is None else encoder.name,
            "label_generator": fit.config(),
            "network": network,
        },
        "versions": versions(),
        "generator_sha256": sha256(source),
        **files.describe(labelled, latents_given=latents_given),
    }


def _write(material: Material, held_out: HeldOutLabels, about: dict[str, Any], out: Path, seed: int) -> CheckReport:
    """Draw the pictures and write everything; the page and the numbers come last."""
    names, palette, masks = material.names, material.task.palette, material.masks.numpy()
    error_N = (material.images - material.reconstructions).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    psnr = (-10 * error_N.log10()).tolist()
    findings = find(held_out, masks, names, material.task.class_names, psnr, seed=seed)
    report = CheckReport(findings, about)
    pictures: dict[str, bytes] = {}
    (out / "pictures").mkdir(exist_ok=True)
    for i, name in enumerate(names):
        drawn = draw_panels(
            material.images[i], material.reconstructions[i], masks[i], held_out.labels[i], list(palette)
        )
        content = io.BytesIO()
        drawn.save(content, format="PNG")
        pictures[name] = content.getvalue()
        write_file(out / "pictures" / f"{name}.png", pictures[name])
    record = json.dumps(report.record(), indent=1, allow_nan=False) + "\n"
    write_file(out / "report.json", record.encode())
    write_file(out / "report.html", render_page(report, palette, pictures).encode())
    return report
