"""PyTorch's global settings, put aside while samples are made, so that a sample depends on none of them.

A training loop may run under autocast, allow TF32, benchmark convolutions, or change the default dtype and device.
Inside `isolated()` the settings are PyTorch's own, except that float32 products and convolutions are IEEE float32
(PyTorch allows TF32 in convolutions) and that cuDNN does not choose kernels by timing them. Knows PyTorch's switches.
Does not know what is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]


def _attribute(owner: Any, name: str, value: Any) -> _Switch:
    return (lambda: getattr(owner, name)), (lambda new: setattr(owner, name, new)), value


def _switches() -> list[_Switch]:
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    cuda = torch.backends.cuda.matmul
    found = [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _attribute(cudnn, "benchmark", False),
        _attribute(cudnn, "deterministic", True),
        _attribute(cuda, "allow_fp16_reduced_precision_reduction", True),
        _attribute(cuda, "allow_bf16_reduced_precision_reduction", True),
        (lambda: torch._C._get_mkldnn_enabled(), lambda new: torch._C._set_mkldnn_enabled(new), True),
    ]
    if hasattr(cudnn, "conv"):  # one switch for each kind of operation, from PyTorch 2.9 on
        found += [_attribute(part, "fp32_precision", "ieee") for part in (cudnn.conv, cuda, mkldnn.matmul, mkldnn.conv)]
    else:
        found.append(_attribute(cudnn, "allow_tf32", False))
        found.append((torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"))
    return found


@contextmanager
def isolated() -> Iterator[None]:
    """Inside, PyTorch computes the same whatever the caller has set; afterwards its settings are those of before."""
    changed: list[tuple[Callable[[Any], None], Any]] = []
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.empty(0).device.type != "cpu":  # `torch.get_default_device` fails in PyTorch 2.6 after a reset
            stack.enter_context(torch.device("cpu"))
        try:
            for get, put, wanted in _switches():
                before = get()
                if before != wanted:
                    changed.append((put, before))
                    put(wanted)
            yield
        finally:
            for put, before in reversed(changed):
                put(before)
