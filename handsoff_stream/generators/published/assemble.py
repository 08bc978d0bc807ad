"""Geometry and weights => generator: the last step of every adapter, and the one that allocates memory.

Sizes come from untrusted files. Shapes are therefore compared on the meta device, which allocates nothing, before the
generator is built. Knows what a family needs to be built. Does not know files or the names that other projects use.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import MAX_LAYERS, MAX_LEVELS, MAX_SIDE, check_count
from handsoff_stream.files.schema import arguments_of, validated
from handsoff_stream.files.weights import build
from handsoff_stream.generators.base import Generator

NUM_MEAN_LATENTS = 4096
"""Latents that are averaged for the center of truncation of a file that stores none, as published scripts do."""
MEAN_LATENT_SEED = 0

G = TypeVar("G", bound=Generator)


def assemble(family: type[G], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> G:
    """Build a generator, float32 on the CPU.

    Args:
        family: its class.
        config: keyword arguments of the class.
        state: weights under the names of the class.

    Raises:
        CheckpointError: the geometry cannot be built or is absurdly large; weights are missing, unknown, of another
            shape, NaN or infinite.
    """
    config = validated(arguments_of(family), dict(config), "its geometry").model_dump(exclude_unset=True)
    _check_sizes(config)
    try:
        with torch.device("meta"):
            expected = family(**config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"its geometry describes no {family.family} generator ({error}); use another copy of the file"
        ) from error
    if max(expected.resolution) > MAX_SIDE:
        raise CheckpointError(
            f"it makes images of {expected.resolution}, which are too large; use a generator with at most {MAX_SIDE} "
            "pixels per side"
        )
    return build(lambda: family(**config), expected, state)


def center_of_truncation(w_avg: Tensor, w_dim: int) -> Tensor:
    """The center of truncation, float32 [D], from an average latent as files store it.

    Args:
        w_avg: [D], or [L, D] or [1, L, D] with equal rows.
        w_dim: D.

    Raises:
        CheckpointError: another shape, or rows that differ.
    """
    rows = w_avg.reshape(-1, w_avg.shape[-1]).float()
    if not len(rows) or rows.shape[1] != w_dim or not rows.isfinite().all():
        raise CheckpointError(
            f"its average latent has shape {list(w_avg.shape)}, but the generator's w has {w_dim} finite numbers; use "
            "the average latent of this generator"
        )
    if (rows - rows[0]).abs().max() > 1e-3:
        raise CheckpointError(
            "its average latent differs between style inputs, but the mapping network gives one w for all; use a mean "
            "of w"
        )
    return rows[0]


def estimate_center(generator: Generator) -> None:
    """Set `w_avg` to the mean of `NUM_MEAN_LATENTS` mapped latents of a fixed seed, for files that store none."""
    random = torch.Generator().manual_seed(MEAN_LATENT_SEED)
    with torch.no_grad():
        z = torch.randn(NUM_MEAN_LATENTS, generator.z_dim, generator=random)
        generator.w_avg.copy_(generator.mapping(z).mean(dim=0))


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Numbers of modules, which take memory and time of their own even on the meta device."""
    for name, value in config.items():
        if isinstance(value, list):
            check_count(len(value), MAX_LEVELS, f"{name} in its geometry")
        elif name.endswith("layers"):
            check_count(value, MAX_LAYERS, f"{name} in its geometry")
