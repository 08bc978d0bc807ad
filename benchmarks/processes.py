"""Peak memory, and fresh processes, so that a measurement starts from nothing. Linux only: memory is read from /proc.

Knows processes and memory in MB (10^6 bytes). Does not know what is measured.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def peak_mb() -> float:
    """Highest resident memory of this process since the last `reset_peak`, in MB."""
    return _status_mb("VmHWM")


def resident_mb() -> float:
    """Resident memory of this process now, in MB."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")) * 1024 / 1e6


def reset_peak() -> None:
    """Set the peak of `peak_mb` to the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def device_peak_mb(device: torch.device) -> float:
    """Highest memory of the CUDA allocator since the last call, in MB; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 1e6
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `function(*args)` returns in a new process; function, arguments and result must be picklable.

    The process is a fork of one that has imported the function's module and done nothing else: further ones start fast.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
