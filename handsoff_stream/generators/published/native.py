"""Reads the generator of a handsoff_stream checkpoint.

Knows the checkpoint's manifest, and the generator's part of it. Does not know heads, which `checkpoint` reads.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files import tensors as container
from handsoff_stream.files.schema import validated
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.families import FAMILIES
from handsoff_stream.generators.published.assemble import assemble
from handsoff_stream.manifest import FORMAT_VERSION, Manifest

MANIFEST_KEY = "handsoff_stream"
"""Under which the manifest is stored in the metadata of the safetensors file."""
PREFIX = "generator."
"""Of the names of the generator's tensors."""


def read(path: Path, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest, and all tensors whose names begin with `prefix`.

    Raises:
        CheckpointError: the container is damaged, or the manifest is of another program, of a newer format, or not as
            the schema has it.
    """
    manifest, tensors = container.read_tensors(path, MANIFEST_KEY, wanted=lambda name: name.startswith(prefix))
    _check(path, manifest)
    return manifest, tensors


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone.

    Raises:
        CheckpointError: as `read`.
    """
    manifest = container.read_manifest(path, MANIFEST_KEY)
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: dict[str, Any]) -> None:
    version, generator = manifest.get("format_version"), manifest.get("generator")
    if not isinstance(version, int) or not isinstance(generator, dict) or not isinstance(generator.get("config"), dict):
        raise CheckpointError(
            f"{path}: a safetensors file whose manifest describes no generator, so it is no checkpoint; pass one that "
            "`handsoff-stream fit` or save_checkpoint() has written"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, but this release reads up to {FORMAT_VERSION}; upgrade handsoff_stream"
        )
    validated(Manifest, manifest, f"{path}: its manifest")


def build_generator(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Generator:
    """The generator of a checkpoint, float32 on the CPU.

    Args:
        path: of the checkpoint, for error messages.
        manifest: see `read`.
        tensors: see `read`; those whose names begin with `PREFIX` are used.

    Raises:
        CheckpointError: an unknown family, or tensors that do not fit the geometry.
    """
    family = manifest["generator"].get("family")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{path}: generator family {family!r} is unknown, this release has {sorted(FAMILIES)}; upgrade "
            "handsoff_stream"
        )
    state = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    try:
        return assemble(FAMILIES[family], manifest["generator"]["config"], state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: the generator cannot be rebuilt ({error}); write the file again") from error


def load(path: Path) -> Generator:
    """The generator of a handsoff_stream checkpoint; its heads, if it has any, are not read.

    Raises:
        CheckpointError: see `read` and `build_generator`.
    """
    manifest, tensors = read(path, PREFIX)
    return build_generator(path, manifest, tensors)
