"""Tensors and one JSON manifest in a file: the safetensors container, read and written in one place.

Checkpoints, inversions, encoders, latents and the states of unfinished trainings are such files. Nothing in them can
execute. Knows the container. Does not know what the tensors are, nor what a manifest says.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.atomic import whole_file


def is_safetensors(path: Path) -> bool:
    """Whether a file begins with eight bytes of header length and a JSON object, as this container does.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"


def read_manifest(path: Path, key: str) -> dict[str, Any]:
    """The JSON object stored under `key` in the header, without reading any tensor.

    Raises:
        CheckpointError: a damaged container, or one without this manifest.
    """
    return read_tensors(path, key, wanted=lambda name: False)[0]


def read_tensors(
    path: Path, key: str | None, *, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a file, on the CPU.

    Args:
        path: the file.
        key: where the header keeps the manifest; None for a file that needs none.
        wanted: name of a tensor => whether to read it.

    Returns:
        The manifest, empty if `key` is None, and the tensors by name.

    Raises:
        CheckpointError: a damaged container, or one without this manifest.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or download it again") from error
    return {} if key is None else _manifest(path, key, metadata), tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str, manifest: Mapping[str, Any]) -> None:
    """Write tensors and manifest, whole or not at all; an existing file is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    copied = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(copied, partial, metadata={key: json.dumps(manifest)})


def _manifest(path: Path, key: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        manifest = json.loads(metadata[key])
        if not isinstance(manifest, dict):
            raise TypeError(f"{key} is {type(manifest).__name__}, not an object")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: a safetensors file without a readable {key} manifest ({type(error).__name__}: {error}); "
            "pass a file that handsoff_stream wrote for this purpose"
        ) from error
    return manifest
