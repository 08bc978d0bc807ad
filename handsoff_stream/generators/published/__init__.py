"""Reads generators from the files of other projects, with one adapter per published format.

Formats are recognized by the content of a file, never by its name. An adapter maps names and geometry; `assemble`
builds the generator. Knows which formats exist. Does not know containers or pickles (`files` reads those), nor
arithmetic.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.budget import MAX_LEVELS, MAX_WIDTH, check_count
from handsoff_stream.files.containers import read_content
from handsoff_stream.files.strict_pickle import shown
from handsoff_stream.files.tensors import is_safetensors
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.published import datasetgan, native, nvlabs, rosinality
from handsoff_stream.generators.published.assemble import center_of_truncation

ADAPTERS = (nvlabs, rosinality, datasetgan)
"""Modules whose `build` turns the content of a file into a generator and its source, or None for another format."""


@dataclass(frozen=True)
class GeneratorFile:
    """A generator, and what it was read from."""

    generator: Generator
    source: str
    """Code base, place in the file, and container, as text."""


def load_generator(path: str | Path, *, average_latent: str | Path | None = None) -> Generator:
    """Read a generator from a file of any supported format; nothing in the file is executed.

    Supported are

    - handsoff_stream checkpoints (`.safetensors`), with or without heads;
    - files of rosinality/stylegan2-pytorch (`.pt`): old and new containers, converted files, training snapshots, bare
      state dicts, and the decoders of ReStyle, pSp and e4e encoders;
    - StyleGAN2 pickles (`.pkl`) of NVlabs/stylegan2-ada-pytorch, NVlabs/stylegan3 and StyleGAN-Human;
    - StyleGAN files of DatasetGAN (`.pt`).

    Args:
        path: the file.
        average_latent: `.npy` file with the center of truncation, float [D], or [L, D] with equal rows, for files that
            store none, as DatasetGAN's. None: the stored one, or else the mean of 4096 mapped latents of a fixed seed.

    Returns:
        The generator on the CPU, float32, in eval mode, without gradients.

    Raises:
        CheckpointError: a file is missing, damaged, hostile, or of an unsupported format.
    """
    return read_generator(path, average_latent=average_latent).generator


def read_generator(path: str | Path, *, average_latent: str | Path | None = None) -> GeneratorFile:
    """As `load_generator`, and what the generator was read from.

    Raises:
        CheckpointError: as `load_generator`.
    """
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
        except Exception as error:  # where an adapter expects a tensor, a damaged file may hold anything
            raise CheckpointError(
                f"{path}: damaged generator ({type(error).__name__}: {printable(str(error), 100)}); "
                "copy or download it again"
            ) from error
        read = GeneratorFile(generator, f"{source}, {content.container}")
    if average_latent is not None:
        _set_center(read.generator, Path(average_latent))
    read.generator.eval().requires_grad_(False)
    return read


def _build(value: Any) -> tuple[Generator, str]:
    for adapter in ADAPTERS:
        built = adapter.build(value)
        if built is not None:
            return built
    held = f"the keys {', '.join(map(shown, list(value)[:6]))}" if isinstance(value, dict) else type(value).__name__
    raise CheckpointError(
        f"no StyleGAN2 generator of a known kind, but {held}; pass a file that has G_ema (NVlabs), g_ema or "
        "input.input (rosinality), or g_synthesis.* (DatasetGAN)"
    )


def _set_center(generator: Generator, path: Path) -> None:
    array = read_content(path).value
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 1:
        raise CheckpointError(
            f"{path}: no array of real numbers, so no average latent; pass a .npy file with an array [D] or [L, D]"
        )
    check_count(array.size, MAX_WIDTH * 2 * MAX_LEVELS, f"numbers in the average latent {path}")
    try:
        w_avg = center_of_truncation(torch.from_numpy(array.astype(np.float32)), generator.w_dim)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    generator.w_avg.copy_(w_avg)
