"""Reads and writes safetensors files with one JSON manifest.

Checkpoints, inversions, encoders, latents and the states of unfinished trainings are such files. They cannot contain
code. Knows the container. Does not know what the tensors are, nor what a manifest says.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.atomic import whole_file
from handsoff_stream.files.budget import MAX_HEADER_BYTES, MAX_TENSORS, check_count
from handsoff_stream.files.schema import parse_json

DTYPES = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"))


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like this container, with eight bytes of header length and a JSON object.

    Raises:
        CheckpointError: it does, but claims a header of more than `MAX_HEADER_BYTES` bytes.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) < 9 or head[8:9] != b"{":
        return False
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: claims a safetensors header of {length} bytes, more than the {MAX_HEADER_BYTES} that are read; "
            "copy or download it again"
        )
    return True


def read_manifest(path: Path, key: str) -> dict[str, Any]:
    """The JSON object under `key` in the header; no tensor is read.

    Raises:
        CheckpointError: a damaged file, or one without this manifest.
    """
    return read_tensors(path, key, wanted=lambda name: False)[0]


def read_tensors(
    path: Path, key: str | None, *, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a file, on the CPU.

    Args:
        path: the file.
        key: key of the manifest in the header; None if no manifest is needed.
        wanted: name of a tensor => whether to read it.

    Returns:
        The manifest, empty if `key` is None, and the tensors by name.

    Raises:
        CheckpointError: a damaged file, a tensor of an unsupported number format, or a file without this manifest.
    """
    try:
        if not is_safetensors(path):
            raise CheckpointError(f"{path}: damaged safetensors file (no header); copy or download it again")
        with safe_open(path, framework="pt", device="cpu") as file:
            manifest = {} if key is None else _manifest(path, key, file.metadata() or {})
            names = [name for name in file.keys() if wanted(name)]
            check_count(len(names), MAX_TENSORS, f"tensors in {path}")
            for name in names:
                dtype = str(file.get_slice(name).get_dtype())
                if dtype not in DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is of {dtype}; only numbers of 8 to 64 bits are read"
                    )
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or download it again") from error
    return manifest, tensors


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    key: str,
    manifest: Mapping[str, Any],
    inputs: Sequence[str | Path] = (),
) -> None:
    """Write a file of tensors with a manifest, whole or not at all; an existing file is replaced.

    Args:
        path: the file; it must not be one of `inputs`.
        tensors: by name, on any device.
        key: key of the manifest in the header.
        manifest: JSON-able; NaN and infinity are written as null.
        inputs: files that the content was made from.

    Raises:
        OutputError: the file cannot be written.
    """
    copied = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path, inputs=inputs) as partial:
        save_file(copied, partial, metadata={key: json.dumps(_finite(manifest), allow_nan=False)})


def _manifest(path: Path, key: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        manifest = parse_json(metadata.get(key, ""), f"the manifest {key}")
        if not isinstance(manifest, dict):
            raise CheckpointError(f"it is a {type(manifest).__name__} instead of an object")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: a safetensors file without a readable {key} manifest ({error}); pass a file that "
            "handsoff_stream wrote for this purpose"
        ) from error
    return manifest


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
