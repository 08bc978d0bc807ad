"""Where a file comes from: hashes of its sources, and the versions that made it.

Knows files and packages. Does not know what is in them.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; the file is read piece by piece.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of PyTorch, by name."""
    return {"handsoff_stream": version("handsoff_stream"), "torch": torch.__version__}
