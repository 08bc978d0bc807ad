"""What a file holds, as one number. Knows bytes."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Digest of a file's bytes, hexadecimal; the file is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
