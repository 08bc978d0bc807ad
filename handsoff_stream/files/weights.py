"""Named tensors of an untrusted file => a module, which is allocated only after all tensors were found to fit.

A small file can describe a large module by referring to the same numbers under many names. The size of the module is
therefore compared with the numbers that the file really contains.

Knows shapes and names. Does not know which file the tensors come from, nor what the module computes.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import EXPANSION, SLACK

N = TypeVar("N", bound=nn.Module)

IMPLIED = 2**24  # bytes that a file may express by one repeated number, such as the noise maps of a small generator


def build(make: Callable[[], N], expected: N, state: Mapping[str, Tensor]) -> N:
    """A new module with the given weights, converted to the module's dtypes.

    Args:
        make: builds the module; called only after all weights were found to fit.
        expected: the module that `make` builds, on the meta device.
        state: weights by name.

    Raises:
        CheckpointError: weights that are missing, superfluous, of another shape, NaN or infinite, or a module much
            larger than the numbers that it is filled with.
    """
    needed = expected.state_dict()
    wrong = differences(state, needed)
    if wrong:
        raise CheckpointError(f"tensors do not fit the geometry: {'; '.join(wrong[:4])}")
    _check_memory(state, needed)
    for name, values in state.items():
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{name} holds NaN or infinite values; use an earlier snapshot of that training")
    with torch.random.fork_rng(devices=[]):  # reading a file leaves the caller's random numbers alone
        network = make()
    network.load_state_dict({name: values.to(needed[name].dtype) for name, values in state.items()})
    return network


def _check_memory(state: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Refuse a module that is much larger than the stored numbers; tensors that repeat one number are counted apart."""
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    repeated = {name for name, t in state.items() if not any(t.stride()) and t.numel() > 1}
    held = sum(stored.values())
    filled = sum(t.nbytes for name, t in needed.items() if name not in repeated)
    implied = sum(needed[name].nbytes for name in repeated)
    if filled > EXPANSION * held + SLACK or implied > EXPANSION * held + IMPLIED:
        raise CheckpointError(
            f"{held} bytes of numbers for weights of {filled + implied} bytes: many share the same numbers, which no "
            "real file does; get it from its publisher again"
        )


def differences(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """One sentence for each tensor that is missing, superfluous or of another shape than expected."""
    shapes = [{name: list(t.shape) for name, t in tensors.items()} for tensors in (got, expected)]
    return [
        f"{name} is {shapes[0].get(name, 'missing')}, needed {shapes[1].get(name, 'absent')}"
        for name in sorted(got.keys() | expected.keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def tensor(state: Any, name: str, *, ndim: int | None = None) -> Tensor:
    """One tensor of an untrusted state dict; `ndim`: required number of dimensions, None for any.

    Raises:
        CheckpointError: the entry is missing, is not a tensor, or has another number of dimensions.
    """
    value = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(value, Tensor) or (ndim is not None and value.ndim != ndim):
        came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{name} is {came}, needed a tensor{'' if ndim is None else f' of {ndim} dimensions'}")
    return value
