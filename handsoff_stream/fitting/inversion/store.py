"""Inversions on disk: one `<name>.safetensors` per image, so that an interrupted run continues where it stopped.

A file carries what it depends on: the image's pixels, the generator, the perceptual distance and the settings. A result
that depends on anything else than what is asked for is computed again, with a warning.

Knows file names and hashes. Does not know how latents are found (`descent`).

Shape letters: N images, L number of style inputs, D latent size, H W image size.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.atomic import MAX_FILE_NAME, locked_folder
from handsoff_stream.files.tensors import read_tensors, write_tensors
from handsoff_stream.fitting.inversion.descent import Inversion, InversionSettings, invert_batch
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.generators import Generator
from handsoff_stream.progress import progress_bar

MANIFEST_KEY = "handsoff_stream_inversion"
FIELDS = ("w_plus", "loss", "perceptual", "mse")
ImageList = Sequence[tuple[str, Tensor]]
"""(name, float32 [3, H, W] in [0, 1]) of each image."""


def invert_images(
    generator: Generator,
    images: ImageList,
    folder: str | Path,
    perceptual: Perceptual,
    settings: InversionSettings | None = None,
    *,
    encodings: Mapping[str, Tensor] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Inversion:
    """Invert the images that `folder` has no result of yet.

    Args:
        generator: as for `invert_batch`.
        images: (name, float32 [3, H, W] in [0, 1]); names are unique and become file names.
        folder: of the results; created if missing. A file is written when its batch is done, whole or not at all.
        perceptual: as for `invert_batch`.
        settings: as for `invert_batch`.
        encodings: name => w_e, float32 [L, D], of an encoder; for all images or none.
        batch_size: images inverted together. It decides memory, speed and the last bits of the results. A batch that
            lacks a result is inverted as a whole, so that interruptions do not change these bits.
        progress: show a bar.

    Returns:
        The inversions of all images, in their order.

    Raises:
        ValueError: names that are not unique file names; images of the wrong shape or range.
        OutputError: another process inverts into the folder, or it cannot be written.
    """
    settings = settings or InversionSettings()
    names = [name for name, _ in images]
    _check_names(names, encodings)
    manifests = _manifests(generator, images, perceptual, settings, encodings)
    with locked_folder(folder) as locked:
        return _invert(generator, images, locked, perceptual, settings, manifests, encodings, batch_size, progress)


def _invert(
    generator: Generator,
    images: ImageList,
    folder: Path,
    perceptual: Perceptual,
    settings: InversionSettings,
    manifests: dict[str, dict[str, Any]],
    encodings: Mapping[str, Tensor] | None,
    batch_size: int,
    progress: bool,
) -> Inversion:
    names = [name for name, _ in images]
    finished = {name: _read(_path(folder, name), manifests[name]) for name in names}
    groups = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    batches = [group for group in groups if any(finished[name] is None for name, _ in group)]
    with progress_bar("Inverting", len(batches) * settings.steps, show=progress) as update:
        for number, batch in enumerate(batches):
            found = invert_batch(
                generator,
                torch.stack([image for _, image in batch]),
                perceptual,
                settings,
                encoding=torch.stack([encodings[name] for name, _ in batch]) if encodings else None,
                progress=lambda done, _, number=number: update(number * settings.steps + done, ""),  # type: ignore[misc]
            )
            for i, (name, _) in enumerate(batch):
                if finished[name] is None:
                    finished[name] = one = _select(found, i)
                    _write(_path(folder, name), one, manifests[name])
    return _concatenate([result for name in names if (result := finished[name]) is not None])


def _check_names(names: Sequence[str], encodings: Mapping[str, Tensor] | None) -> None:
    bad = sorted({name for name in names if name in ("", ".", "..") or Path(name).name != name or _is_too_long(name)})
    twice = sorted({name for name in names if names.count(name) > 1})
    lost = sorted(set(names) - set(encodings)) if encodings is not None else []
    if not names or bad or twice or lost:
        raise ValueError(
            f"{len(names)} images to invert; no file names: {bad}; more than once: {twice}; without an encoding: "
            f"{lost}. Give at least one image, each a unique name without slashes, and encodings to all or none"
        )


def _is_too_long(name: str) -> bool:
    return len(os.fsencode(_path(Path(), name).name)) > MAX_FILE_NAME


def _manifests(
    generator: Generator,
    images: ImageList,
    perceptual: Perceptual,
    settings: InversionSettings,
    encodings: Mapping[str, Tensor] | None,
) -> dict[str, dict[str, Any]]:
    """Name => everything that the inversion of this image depends on, JSON-able."""
    common = {
        "generator": Checkpoint(generator).manifest()["fingerprint"],
        "perceptual": perceptual.description,
        "settings": settings.config(),
    }
    return {
        name: {**common, "image": _sha256(image), "encoding": _sha256(encodings[name]) if encodings else None}
        for name, image in images
    }


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _read(path: Path, manifest: dict[str, Any]) -> Inversion | None:
    """The result in the file. None if it has to be computed, after a warning if there is a file."""
    if not path.exists():
        return None
    try:
        stored, by_name = read_tensors(path, MANIFEST_KEY)
        tensors = [by_name[field] for field in FIELDS]
        if any(len(t) != 1 or not t.isfinite().all() for t in tensors) or tensors[0].ndim != 3:
            raise CheckpointError("tensors of another shape, or no numbers")
    except (CheckpointError, KeyError) as error:
        warnings.warn(f"{path} is not a readable inversion ({error}); it is computed again", stacklevel=3)
        return None
    differing = sorted(key for key in manifest if stored.get(key) != manifest[key])
    if differing:
        warnings.warn(f"{path} was computed with another {', '.join(differing)}; it is computed again", stacklevel=3)
        return None
    return Inversion(*tensors)


def _write(path: Path, inversion: Inversion, manifest: dict[str, Any]) -> None:
    tensors = {field: getattr(inversion, field) for field in FIELDS}
    write_tensors(path, tensors, key=MANIFEST_KEY, manifest=manifest)


def _select(inversion: Inversion, i: int) -> Inversion:
    return Inversion(*(getattr(inversion, field)[i : i + 1] for field in FIELDS))


def _concatenate(inversions: Sequence[Inversion]) -> Inversion:
    return Inversion(*(torch.cat([getattr(one, field) for one in inversions]) for field in FIELDS))
