"""The latent of every labelled image: given with the image, or found by inversion.

An image that the generator made comes with its latent (`annotation.sample`), and an image inverted elsewhere may. A
given latent is used as it is. How well it makes its image is measured, because a mismatched latent, such as one of
another generator, would pass unnoticed otherwise.

Knows latents and images. Does not know labels.

Shape letters: N images, L number of style inputs, D latent size, H W image size.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.containers import read_content
from handsoff_stream.files.tensors import is_safetensors, read_tensors
from handsoff_stream.fitting.inversion.descent import InversionSettings
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.fitting.inversion.store import ImageList, invert_images
from handsoff_stream.generators import Generator

SPACES = ("w+", "w", "z")
Encode = Callable[[ImageList], Mapping[str, Tensor]]
"""Images => an encoder's latent of each, by name."""


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Which space given latents belong to, and so how they become w+.

    DatasetGAN annotated samples of z, truncated by 0.7 on the first 8 (cars, faces) or 7 (cats, bedrooms) style inputs
    (published code); HandsOff's and ReStyle's latents are w+ as they are.

    Raises:
        ValueError: an unknown space, or truncation of latents w+.
    """

    name: str = "w+"
    """"z", "w" or "w+"."""
    truncation: float = 1.0
    """psi that the images of z or w were made with."""
    cutoff: int | None = None
    """How many style inputs it was applied to; None: all."""

    def __post_init__(self) -> None:
        if self.name not in SPACES:
            raise ValueError(f"latent space {self.name!r} is unknown; pass one of {', '.join(SPACES)}")
        if self.cutoff is not None and self.cutoff < 0:
            raise ValueError(f"cutoff={self.cutoff} is not a number of style inputs; pass 0 or more, or None for all")
        if self.name == "w+" and (self.truncation != 1.0 or self.cutoff is not None):
            raise ValueError("latents w+ are used as they are; truncation and cutoff are for z and w")

    @torch.no_grad()
    def w_plus(self, generator: Generator, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name => latent [D], or [L, D] of w+, to name => w+ float32 [L, D].

        Raises:
            ValueError: a latent of another shape than this space has.
        """
        if self.name == "w+":
            vectors = sorted(name for name, latent in latents.items() if latent.ndim != 2)
            if vectors:
                raise ValueError(f"latents of {vectors} are single vectors, not w+ [L, D]; say whether they are z or w")
            return dict(latents)
        size = generator.z_dim if self.name == "z" else generator.w_dim
        found: dict[str, Tensor] = {}
        for name, latent in latents.items():
            if latent.numel() != size:
                raise ValueError(
                    f"latent {name!r} is {list(latent.shape)}, {self.name} of this generator has {size} numbers; "
                    "pass the space that the latents are of, and their generator"
                )
            latent_1D = latent.to(generator.w_avg).view(1, size)
            w_1D = generator.mapping(latent_1D) if self.name == "z" else latent_1D
            found[name] = generator.truncate(w_1D, self.truncation, self.cutoff)[0]
        return found


@dataclass(frozen=True)
class FoundLatents:
    """Latents of N images, and where they come from."""

    names: tuple[str, ...]
    """Of the images, in their order."""
    w_plus: Tensor
    """float32 [N, L, D] on the CPU."""
    provenance: dict[str, Any]
    """JSON-able: the perceptual distance and settings of the inversions, the PSNR of every image."""


def read_latent(path: str | Path) -> Tensor:
    """The latent of one image, float32 [L, D] (w+) or [D] (z, w), on the CPU.

    Args:
        path: `.safetensors` of `write_samples` or `invert_images`, or the array or tensor of a `.npy` or `.pt` file;
            [D], [L, D] or [1, L, D]. Nothing in a file is executed.

    Raises:
        CheckpointError: no such file, or one that holds anything else.
    """
    path = Path(path)
    try:
        w_plus = _stored_w_plus(path) if is_safetensors(path) else read_content(path).value
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: no readable latent ({error}); write w_plus to a safetensors file") from error
    if isinstance(w_plus, np.ndarray) and w_plus.dtype.kind == "f":
        w_plus = torch.from_numpy(np.array(w_plus, dtype=np.float32))
    if not isinstance(w_plus, Tensor) or w_plus.ndim not in (1, 2, 3) or w_plus.shape[:-2].numel() != 1:
        found = f"{w_plus.dtype} {list(w_plus.shape)}" if hasattr(w_plus, "shape") else type(w_plus).__name__
        raise CheckpointError(
            f"{path}: holds {found}, not the float latent [L, D] or [D] of one image; keep one latent per file"
        )
    latent = w_plus.float().reshape(w_plus.shape[-2:])
    if not latent.isfinite().all():
        raise CheckpointError(f"{path}: holds NaN or infinite values, which make no image; invert that image again")
    return latent


def _stored_w_plus(path: Path) -> Tensor:
    _, tensors = read_tensors(path, key=None, wanted=lambda name: name == "w_plus")
    if "w_plus" not in tensors:
        raise CheckpointError(f"{path}: holds no tensor named w_plus")
    return tensors["w_plus"]


def invert(
    generator: Generator,
    images: ImageList,
    folder: str | Path,
    settings: InversionSettings | None = None,
    *,
    given: Mapping[str, Tensor] | None = None,
    perceptual: Perceptual | str | None = None,
    encode: Encode | None = None,
    progress: bool = False,
) -> FoundLatents:
    """Latents of all images, in their order: the given ones as they are, the others by inversion.

    Args:
        generator: its device does the work.
        images: (name, float32 [3, H, W] in [0, 1]) of the generator's resolution.
        folder: where inversions are kept, see `invert_images`; not used if all latents are given.
        settings: how to descend.
        given: name => w+ [L, D] of the images that need no inversion, because this generator made them or because they
            were inverted elsewhere.
        perceptual: image distance of the inversion, or the name of its backbone, see `load_perceptual`; not loaded if
            all latents are given.
        encode: the images to be inverted => name => w_e [L, D], to start from and stay near, such as `encode_images`
            of an encoder. None: each descent starts at the best of random candidates.
        progress: show bars.

    Raises:
        ValueError: a given latent without an image, of another shape or not finite; whatever `invert_images` refuses.
    """
    given, settings = given or {}, settings or InversionSettings()
    _check(generator, images, given)
    psnr = _fidelity(generator, images, given)
    latents = {name: w_plus_LD.float().cpu() for name, w_plus_LD in given.items()}
    provenance: dict[str, Any] = {"given_latents": {"psnr": psnr}} if given else {}
    pending = [(name, image) for name, image in images if name not in given]
    if pending:
        distance = perceptual if isinstance(perceptual, Perceptual) else load_perceptual(perceptual)
        encodings = None if encode is None else encode(pending)
        found = invert_images(generator, pending, folder, distance, settings, encodings=encodings, progress=progress)
        latents |= {name: found.w_plus[i] for i, (name, _) in enumerate(pending)}
        provenance["perceptual"] = distance.description
        provenance["inversion"] = {
            **settings.config(),
            "images": [name for name, _ in pending],
            "psnr": found.psnr.tolist(),
            "distance": found.perceptual.tolist(),
        }
    names = tuple(name for name, _ in images)
    return FoundLatents(names, torch.stack([latents[name] for name in names]), provenance)


def _check(generator: Generator, images: ImageList, given: Mapping[str, Tensor]) -> None:
    names = [name for name, _ in images]
    stray, twice = sorted(set(given) - set(names)), sorted({name for name in names if names.count(name) > 1})
    if not names or stray or twice:
        raise ValueError(
            f"{len(names)} images; more than once: {twice}; latents without an image: {stray}. Give at least one "
            "image, each a unique name, and latents the names of their images"
        )
    latent_shape, image_shape = (generator.num_ws, generator.w_dim), (3, *generator.resolution)
    for name, image in images:
        if name not in given:
            continue
        if tuple(given[name].shape) != latent_shape or not given[name].isfinite().all():
            raise ValueError(
                f"latent {name!r} is {list(given[name].shape)}, this generator takes finite numbers "
                f"{list(latent_shape)}; pass the generator that the latent belongs to"
            )
        if tuple(image.shape) != image_shape:
            raise ValueError(
                f"image {name!r} is {list(image.shape)}, its latent makes {list(image_shape)}; pass it as it was made"
            )


def _fidelity(generator: Generator, images: ImageList, given: Mapping[str, Tensor]) -> dict[str, float]:
    """Name => PSNR in dB of the image that the given latent makes; warns of latents that do not match their images."""
    average_LD = generator.w_avg.expand(generator.num_ws, -1)
    psnr: dict[str, float] = {}
    mismatched: list[str] = []
    for name, image in images:
        if name in given:
            psnr[name], average = _psnr(generator, given[name], image), _psnr(generator, average_LD, image)
            # No threshold in dB separates inversions from mismatched latents in every domain. The average latent does:
            # an inversion comes closer to its image than the average image does, a mismatched latent usually does not.
            if psnr[name] < average:
                mismatched.append(f"{name} ({psnr[name]:.1f} dB, the average latent {average:.1f} dB)")
    if mismatched:
        warnings.warn(
            f"latents that make their images worse than the average latent does: {', '.join(mismatched)}. Labels would "
            "be learned at the wrong places; check that the latents belong to these images and to this generator",
            stacklevel=3,
        )
    return psnr


@torch.no_grad()
def _psnr(generator: Generator, w_plus_LD: Tensor, image_3HW: Tensor) -> float:
    """In dB, of the image that the latent makes; at most 100."""
    w_plus_1LD = w_plus_LD[None].to(generator.w_avg)
    made_3HW = generator.synthesis(w_plus_1LD, "const").images[0].add(1).div(2).clamp(0, 1)
    mse = (made_3HW.cpu() - image_3HW.cpu()).square().mean().clamp(min=1e-10)
    return float(-10 * mse.log10())
