"""Inversions on disk: one `<name>.safetensors` an image, so that an interrupted run goes on where it stopped.

A file carries what it depends on: the image's pixels, the generator, the perceptual distance and the
settings. A result that depends on something else than what is asked for is done again, with a warning.

Knows file names and hashes. Does not know how latents are found (`inversion`).

Shape letters: N images, L number of style inputs, D latent size, H W image size.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.tensors import read_tensors, write_tensors
from handsoff_stream.fitting.inversion.descent import Inversion, InversionSettings, invert
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.generators import Generator
from handsoff_stream.progress import progress_bar

MANIFEST_KEY = "handsoff_stream_inversion"
FIELDS = ("w_plus", "loss", "perceptual", "mse")


def invert_images(
    generator: Generator,
    images: Sequence[tuple[str, Tensor]],
    out_dir: str | Path,
    perceptual: Perceptual,
    settings: InversionSettings | None = None,
    *,
    encodings: Mapping[str, Tensor] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Inversion:
    """Invert the images that `out_dir` has no result of yet.

    Args:
        generator, perceptual, settings: as for `invert`.
        images: (name, float32 [3, H, W] in [0, 1]); names are unique and become file names.
        out_dir: folder of the results; created if missing. A file is written when its batch is done, whole or
            not at all.
        encodings: name => w_e, float32 [L, D], of an encoder; for all images or none.
        batch_size: images inverted together. It decides memory, speed and the last bits of the results; lest these
            depend on interruptions, a batch that lacks a result is inverted as a whole.
        progress: show a bar.

    Returns:
        The inversions of all images, in their order.

    Raises:
        ValueError: names that are no file names, or not unique; images of the wrong shape or range.
    """
    settings = settings or InversionSettings()
    names = [name for name, _ in images]
    _check_names(names, encodings)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "generator": Checkpoint(generator).manifest()["fingerprint"],
        "perceptual": perceptual.description,
        "settings": settings.config(),
    }
    manifests = {
        name: {**common, "image": _sha256(image), "encoding": _sha256(encodings[name]) if encodings else None}
        for name, image in images
    }
    finished = {name: _read(_path(folder, name), manifests[name]) for name in names}
    # The same neighbours as in an uninterrupted run: the last bits of an inversion depend on its batch.
    groups = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    batches = [group for group in groups if any(finished[name] is None for name, _ in group)]
    with progress_bar("Inverting", len(batches) * settings.steps, show=progress) as update:
        for number, batch in enumerate(batches):
            found = invert(
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
    bad = sorted({name for name in names if name in ("", ".", "..") or Path(name).name != name})
    twice = sorted({name for name in names if names.count(name) > 1})
    lost = sorted(set(names) - set(encodings)) if encodings is not None else []
    if not names or bad or twice or lost:
        raise ValueError(
            f"{len(names)} images to invert; no file names: {bad}; more than once: {twice}; without an encoding: "
            f"{lost}. Give at least one image, each a unique name without slashes, and encodings to all or none"
        )


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _read(path: Path, manifest: dict[str, Any]) -> Inversion | None:
    """The result in the file; None, after a warning if there is a file, where it has to be computed."""
    if not path.exists():
        return None
    try:
        stored, by_name = read_tensors(path, MANIFEST_KEY)
        tensors = [by_name[field] for field in FIELDS]
    except (CheckpointError, KeyError) as error:
        warnings.warn(f"{path} is no readable inversion ({error}); it is computed again", stacklevel=3)
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
