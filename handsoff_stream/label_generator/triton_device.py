"""Whether a device can run the fused kernel, and which device a launch goes to. Importing this module imports Triton.

Knows devices. Does not know what the kernel computes.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton

SHARED_MEMORY = 224 << 10  # bytes per block; the most that a compiled variant takes on sm_90a


def unsuitable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, as text; None if it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the device is {device}, not CUDA"
    shared = shared_memory(device)
    if shared < SHARED_MEMORY:
        return f"it takes {SHARED_MEMORY >> 10} KiB of shared memory (Hopper has it), the device has {shared >> 10}"
    return None


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block of a kernel may take on a CUDA device.

    Triton knows the number in all versions and refuses a kernel that takes more. PyTorch 2.6 does not give it, and the
    type stubs of no version name it.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, kernels are launched on this CUDA device; on a CPU nothing changes.

    Triton launches on the current device of the process, wherever the operands lie.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
