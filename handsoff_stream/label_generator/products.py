"""Matrix products by the fastest library that PyTorch includes for the device and the dtype.

PyTorch computes float32 products on CPUs with MKL, which uses half of the vector units of AMD processors (Zen 5, one
thread: 100 GFLOP/s; oneDNN: 220 GFLOP/s). For other devices and dtypes, PyTorch already chooses the fastest library.
The functions are for inference and not differentiable. Knows no network.

Shape letters: M independent products, P rows, I summed over, O columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _by_onednn(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    # The operator that torch.compile emits for a Linear on a CPU; every build with oneDNN has it.
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x_PI: Tensor, weight_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    # For operands that are not contiguous oneDNN falls back to loops, which are a thousand times slower.
    weight_OI = weight_IO.contiguous().t()
    # The operator's own ReLU would save a pass over memory, but it turns NaN into 0 and so hides errors.
    return torch.ops.mkldnn._linear_pointwise(x_PI.contiguous(), weight_OI, bias_O, "none", [], "")


def product(x_PI: Tensor, weight_IO: Tensor) -> Tensor:
    """`x @ weight`, [P, O]; both operands have one floating-point dtype."""
    return _linear(x_PI, weight_IO) if _by_onednn(x_PI) else x_PI @ weight_IO


def add_product_(out_PO: Tensor, x_PI: Tensor, weight_IO: Tensor) -> None:
    """`out += x @ weight`, in place; all operands have one floating-point dtype."""
    if _by_onednn(x_PI):
        out_PO.add_(product(x_PI, weight_IO))
    else:
        out_PO.addmm_(x_PI, weight_IO)


def products(x_MPI: Tensor, weight_MIO: Tensor) -> Tensor:
    """`x[m] @ weight[m]` for all m, [M, P, O]."""
    if _by_onednn(x_MPI):
        pairs = zip(x_MPI.unbind(), weight_MIO.unbind(), strict=True)
        return torch.stack([product(x_PI, weight_IO) for x_PI, weight_IO in pairs])
    return torch.bmm(x_MPI, weight_MIO)


def linears(x_MPI: Tensor, weight_MIO: Tensor, bias_M1O: Tensor) -> Tensor:
    """`x[m] @ weight[m] + bias[m]` for all m, [M, P, O]."""
    if _by_onednn(x_MPI):
        layers = zip(x_MPI.unbind(), weight_MIO.unbind(), bias_M1O.flatten(1).unbind(), strict=True)
        return torch.stack([_linear(x_PI, weight_IO, bias_O) for x_PI, weight_IO, bias_O in layers])
    return torch.baddbmm(bias_M1O, x_MPI, weight_MIO)
