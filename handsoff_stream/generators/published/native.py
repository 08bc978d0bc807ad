"""The generator in a handsoff_stream checkpoint.

Knows the checkpoint's manifest and the generator's part of it. Does not know heads: `checkpoint.py` reads those.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files import tensors as container
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.families import FAMILIES
from handsoff_stream.generators.published.assemble import assemble

FORMAT_VERSION = 1
MANIFEST_KEY = "handsoff_stream"
PREFIX = "generator."


def read(path: Path, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and all tensors whose name begins with `prefix`.

    Raises:
        CheckpointError: damaged container, foreign manifest, newer format version, NaN or infinite weights.
    """
    manifest, tensors = container.read_tensors(path, MANIFEST_KEY, wanted=lambda name: name.startswith(prefix))
    _check(path, manifest)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: tensor {name!r} holds NaN or infinite values, so every image would be garbage; "
                "use an earlier snapshot of the training that wrote it"
            )
    return manifest, tensors


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone; see `read` for what is refused."""
    manifest = container.read_manifest(path, MANIFEST_KEY)
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: dict[str, Any]) -> None:
    version, generator = manifest.get("format_version"), manifest.get("generator")
    if not isinstance(version, int) or not isinstance(generator, dict) or not isinstance(generator.get("config"), dict):
        raise CheckpointError(
            f"{path}: a safetensors file whose manifest describes no generator; checkpoints are written by "
            "`handsoff-stream fit` or save_checkpoint()"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this release reads up to {FORMAT_VERSION}; upgrade handsoff_stream"
        )


def build_generator(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Generator:
    """Generator from the manifest's geometry and the tensors named `generator.*`."""
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
