"""Geometry and weights => generator: the last step of every adapter, and the one that allocates.

Knows what a generator needs in order to be built. Does not know files or anybody's names. Sizes come from untrusted
files, so shapes are compared on the meta device, which allocates nothing, before the generator is made.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators.base import Generator

MAX_SIDE = 4096  # pixels; the largest published generator has 1024
MAX_WIDTH = 8192  # of anything in a geometry; published ones have at most 512, and some thousand classes
# Latents averaged for the truncation centre when the file stores none, as the published sampling scripts do.
NUM_MEAN_LATENTS = 4096
MEAN_LATENT_SEED = 0

G = TypeVar("G", bound=Generator)
N = TypeVar("N", bound=nn.Module)


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


def build(make: Callable[[], N], expected: N, state: Mapping[str, Tensor]) -> N:
    """`make()` with these weights, in its own dtypes; called only once every tensor is known to fit.

    `expected`: what `make` gives, on the meta device.

    Raises:
        CheckpointError: weights that are missing, superfluous, of another shape, NaN or infinite.
    """
    needed = expected.state_dict()
    wrong = differences(state, needed)
    if wrong:
        raise CheckpointError(f"tensors do not fit the geometry: {'; '.join(wrong[:4])}")
    for name, values in state.items():
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{name} holds NaN or infinite values; use an earlier snapshot of that training")
    with torch.random.fork_rng(devices=[]):  # reading a file leaves the caller's random numbers alone
        network = make()
    network.load_state_dict({name: values.to(needed[name].dtype) for name, values in state.items()})
    return network


def differences(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """One sentence for each tensor whose shape is not the expected one."""
    shapes = [{name: list(t.shape) for name, t in tensors.items()} for tensors in (got, expected)]
    return [
        f"{name} is {shapes[0].get(name, 'missing')}, needed {shapes[1].get(name, 'absent')}"
        for name in sorted(got.keys() | expected.keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def tensor(state: Any, name: str, *, ndim: int | None = None) -> Tensor:
    """One tensor of a foreign state dict, of the right number of dimensions."""
    value = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(value, Tensor) or (ndim is not None and value.ndim != ndim):
        came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{name} is {came}, needed a tensor{'' if ndim is None else f' of {ndim} dimensions'}")
    return value


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
