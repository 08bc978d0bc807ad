"""Generator files, one adapter per published format, told apart by their content, never by their name.

Knows which formats there are. Does not know containers (`containers`), pickles (`strict_pickle`, `torch_pickle`) or
arithmetic: an adapter maps names and geometry, `assemble` builds, the family's file computes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.containers import read_content
from handsoff_stream.files.strict_pickle import shown
from handsoff_stream.files.tensors import is_safetensors
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.published import datasetgan, native, nvlabs, rosinality
from handsoff_stream.generators.published.assemble import centre

ADAPTERS = (nvlabs, rosinality, datasetgan)


@dataclass(frozen=True)
class GeneratorFile:
    """A generator and what it was read from."""

    generator: Generator
    source: str
    """Code base, place in the file and container, in words."""


def load_generator(path: str | Path, *, average_latent: str | Path | None = None) -> Generator:
    """Read a generator from a file of any supported format; nothing in the file is executed.

    Args:
        path: one of
            - a handsoff_stream checkpoint (`.safetensors`), with or without heads;
            - rosinality/stylegan2-pytorch `.pt`, old and new containers, converted files and training snapshots,
              bare state dicts, or the decoder of a ReStyle, pSp or e4e encoder;
            - StyleGAN2 `.pkl` of NVlabs/stylegan2-ada-pytorch, NVlabs/stylegan3 and StyleGAN-Human;
            - StyleGAN `.pt` of DatasetGAN.
        average_latent: `.npy` file with the centre of truncation, [D] or [L, D] with equal rows, for files that
            store none (DatasetGAN's). Default: the stored one, or the mean of 4096 mapped latents of a fixed seed.

    Returns:
        The generator on the CPU, float32, in eval mode, without gradients.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or of a format that is not supported.
    """
    return read_generator(path, average_latent=average_latent).generator


def read_generator(path: str | Path, *, average_latent: str | Path | None = None) -> GeneratorFile:
    """As `load_generator`, with the name of the format."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, so there is no generator to load; check the path")
    if is_safetensors(path):
        read = GeneratorFile(native.load(path), "handsoff_stream checkpoint")
    else:
        content = read_content(path)
        try:
            generator, source = _build(content.value)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # a damaged file may hold anything where an adapter expects a tensor
            raise CheckpointError(
                f"{path}: damaged generator ({type(error).__name__}: {str(error)[:200]}); copy or download it again"
            ) from error
        read = GeneratorFile(generator, f"{source}, {content.container}")
    if average_latent is not None:
        _set_centre(read.generator, Path(average_latent))
    read.generator.eval().requires_grad_(False)
    return read


def _build(value: Any) -> tuple[Generator, str]:
    for adapter in ADAPTERS:
        built = adapter.build(value)
        if built is not None:
            return built
    held = f"the keys {', '.join(map(shown, list(value)[:6]))}" if isinstance(value, dict) else type(value).__name__
    raise CheckpointError(
        f"no StyleGAN2 generator of a known kind, but {held}; files that hold one have G_ema (NVlabs), g_ema or "
        "input.input (rosinality) or g_synthesis.* (DatasetGAN)"
    )


def _set_centre(generator: Generator, path: Path) -> None:
    array = read_content(path).value
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 1:
        raise CheckpointError(f"{path}: no array of real numbers; an average latent is a .npy file of [D] or [L, D]")
    try:
        w_avg = centre(torch.from_numpy(array.astype(np.float32)), generator.w_dim)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    generator.w_avg.copy_(w_avg)
