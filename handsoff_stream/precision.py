"""The names of the precisions of synthesis and labelling, and the number format that each of them means on a device.

"exact" is float32, as in the published code. "fast" is 16-bit operands with float32 sums inside every product: float16
on accelerators, which changes about seven times fewer labels than bfloat16, and bfloat16 on CPUs with instructions for
it. Knows devices. Does not know networks.
"""

from __future__ import annotations

import platform
from typing import Literal, get_args

import torch

Precision = Literal["exact", "fast"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def default_precision(device: torch.device) -> Precision:
    """The precision that a stream uses by default: "fast" on CUDA, "exact" elsewhere."""
    return "fast" if device.type == "cuda" else "exact"


def fastest_precision(device: torch.device) -> Precision:
    """The fastest precision of a device: "fast" if it has instructions for 16-bit products, else "exact"."""
    return "exact" if device.type == "cpu" and not cpu_multiplies_bfloat16() else "fast"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations.

    Raises:
        ValueError: an unknown precision, or one that this device has no instructions for.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; pass one of {list(PRECISIONS)}")
    if precision == "exact":
        return torch.float32
    if device.type != "cpu":
        return torch.float16
    if not cpu_multiplies_bfloat16():
        raise ValueError(
            'precision="fast" needs bfloat16 instructions (AVX512-BF16, AMX or Arm BF16), which this CPU does not '
            'have: emulated, it would be slower than float32; pass precision="exact", or a CUDA device'
        )
    return torch.bfloat16


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products, so that PyTorch need not emulate them."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
