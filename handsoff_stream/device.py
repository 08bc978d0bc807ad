"""Which device a stream works on, and what cannot work, said early. Does not know streams, networks or memory."""

import torch

from handsoff_stream.errors import StreamError

CHUNK_SIZE_CUDA = 16  # fills the low resolutions of a generator, whose layers are bound by launches and weights
CHUNK_SIZE_CPU = 4


def resolve_device(device: str | torch.device | None, *, computes: bool = True) -> torch.device:
    """The device itself; None means CUDA if there is one, else the CPU.

    Args:
        device: name, device or None.
        computes: whether samples are made there, which a CPU and CUDA can do; otherwise they are only copied there.

    Raises:
        ValueError: no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {str(device)!r} is unknown; pass cpu, cuda, or cuda:1 for the second one") from None
    if computes and chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported; pass cpu, cuda, or cuda:1 for the second one")
    return chosen


def usable_device(device: str | torch.device | None) -> torch.device:
    """As `resolve_device`, for work that begins at once in this process.

    Raises:
        ValueError: no such device.
        StreamError: CUDA on a machine that has none.
    """
    chosen = resolve_device(device)
    check_device(chosen, in_worker=False)
    return chosen


def default_chunk_size(device: torch.device) -> int:
    """Indices synthesized at once if the user does not say."""
    return CHUNK_SIZE_CUDA if device.type == "cuda" else CHUNK_SIZE_CPU


def check_device(device: torch.device, *, in_worker: bool) -> None:
    """Refuse what would fail later and less clearly.

    Raises:
        StreamError: CUDA inside a DataLoader worker, or CUDA on a machine that has none.
    """
    if device.type != "cuda":
        return
    if in_worker:
        raise StreamError(
            "this stream works on CUDA, which a DataLoader worker process cannot use (each would need a CUDA context "
            "and a copy of the networks); use DataLoader(..., num_workers=0), the stream runs ahead on its "
            'own CUDA stream, or HandsOffStream(..., device="cpu")'
        )
    if not torch.cuda.is_available():
        raise StreamError(
            f"device {str(device)!r} was asked for, but this process sees no CUDA device; pass device='cpu' or "
            "check the driver with `nvidia-smi`"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise StreamError(
            f"device {str(device)!r} was asked for, but this process sees {torch.cuda.device_count()} CUDA devices, "
            "counted from 0; pass one of them"
        )
