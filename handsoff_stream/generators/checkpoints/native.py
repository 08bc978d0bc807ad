"""Our own container: tensors in safetensors, everything else as one JSON manifest in its header.

Knows the container and the generator's part of it. Does not know heads: `checkpoint.py` reads those.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.checkpoints.assemble import assemble

FORMAT = "handsoff_stream"
FORMAT_VERSION = 1
MANIFEST_KEY = "handsoff_stream"
PREFIX = "generator."


def is_safetensors(path: Path) -> bool:
    """Eight bytes of header length, then a JSON object: the safetensors container, whole or truncated."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"


def read(path: Path, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and all tensors whose name begins with `prefix`.

    Raises:
        CheckpointError: damaged container, foreign manifest, newer format version, NaN or infinite weights.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or download it again") from error
    manifest = parse_manifest(path, metadata)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: tensor {name!r} holds NaN or infinite values, so every image would be garbage; "
                "use an earlier snapshot of the training that wrote it"
            )
    return manifest, tensors


def parse_manifest(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON manifest out of the container's metadata; see `read` for what is refused."""
    try:
        manifest = json.loads(metadata[MANIFEST_KEY])
        version = manifest["format_version"]
        generator = manifest["generator"]
        if not isinstance(version, int) or not isinstance(generator["config"], dict):
            raise TypeError("format_version or generator.config is of the wrong type")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: a safetensors file without a {FORMAT} manifest ({type(error).__name__}: {error}); "
            "checkpoints are written by `handsoff-stream fit` or save_checkpoint()"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this release reads up to {FORMAT_VERSION}; upgrade handsoff_stream"
        )
    return manifest


def build_generator(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Generator:
    """Generator from the manifest's geometry and the tensors named `generator.*`."""
    from handsoff_stream.generators import FAMILIES

    family = manifest["generator"].get("family")
    if family not in FAMILIES:
        raise CheckpointError(f"{path}: generator family {family!r} is unknown; this release has {sorted(FAMILIES)}")
    state = {name.removeprefix(PREFIX): t.float() for name, t in tensors.items() if name.startswith(PREFIX)}
    try:
        return assemble(FAMILIES[family], manifest["generator"]["config"], state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: the generator cannot be rebuilt ({error}); write the file again") from error


def load(path: Path) -> Generator:
    """Generator of a handsoff_stream checkpoint; its heads, if any, are left unread."""
    manifest, tensors = read(path, PREFIX)
    return build_generator(path, manifest, tensors)
