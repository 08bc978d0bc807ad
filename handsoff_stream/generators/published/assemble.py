"""Geometry and weights => generator: the last step of every adapter, and the one that allocates.

Knows what a generator needs in order to be built. Does not know files or anybody's names. Sizes come from untrusted
files, so shapes are compared on the meta device, which allocates nothing, before the generator is made.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.weights import build
from handsoff_stream.generators.base import Generator

MAX_SIDE = 4096  # pixels; the largest published generator has 1024
MAX_WIDTH = 8192  # of anything in a geometry; published ones have at most 512, and some thousand classes
# Latents averaged for the truncation centre when the file stores none, as the published sampling scripts do.
NUM_MEAN_LATENTS = 4096
MEAN_LATENT_SEED = 0

G = TypeVar("G", bound=Generator)


def assemble(family: type[G], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> G:
    """A generator of this geometry with these weights (in the family's names), float32 on the CPU.

    Raises:
        CheckpointError: a geometry that cannot be built or is absurdly large; weights that are missing, superfluous,
            of another shape, NaN or infinite.
    """
    _check_sizes(config)
    try:
        with torch.device("meta"):
            expected = family(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"its geometry describes no {family.family} generator ({error})") from error
    if max(expected.resolution) > MAX_SIDE:
        raise CheckpointError(f"images of {expected.resolution}; up to {MAX_SIDE} pixels a side are supported")
    return build(lambda: family(**config), expected, state)


def centre(w_avg: Tensor, w_dim: int) -> Tensor:
    """Average latent as files store it, [D], [L, D] or [1, L, D] with equal rows => [D]."""
    rows = w_avg.reshape(-1, w_avg.shape[-1]).float()
    if not len(rows) or rows.shape[1] != w_dim:
        raise CheckpointError(f"an average latent {list(w_avg.shape)} for a generator whose w has {w_dim} numbers")
    if (rows - rows[0]).abs().max() > 1e-3:
        raise CheckpointError("an average latent that differs between style inputs, but the mapping gives one for all")
    return rows[0]


def estimate_centre(generator: Generator) -> None:
    """Set w_avg to the mean of `NUM_MEAN_LATENTS` mapped latents of a fixed seed, for files that store none."""
    random = torch.Generator().manual_seed(MEAN_LATENT_SEED)
    with torch.no_grad():
        z = torch.randn(NUM_MEAN_LATENTS, generator.z_dim, generator=random)
        generator.w_avg.copy_(generator.mapping(z).mean(dim=0))


def _check_sizes(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if len(values) > MAX_WIDTH or any(isinstance(v, int) and abs(v) > MAX_WIDTH for v in values):
            raise CheckpointError(f"its geometry has {name} beyond {MAX_WIDTH}, which no StyleGAN has")
