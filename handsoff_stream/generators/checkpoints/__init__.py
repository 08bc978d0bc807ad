"""Generator files, one adapter per published format, told apart by their content, never by their name.

Knows the containers. Does not know arithmetic: an adapter maps keys and geometry, the family's file computes.
"""

import zipfile
from pathlib import Path

from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.checkpoints import native, rosinality


def load_generator(path: str | Path) -> Generator:
    """Read a generator from a checkpoint file; nothing in the file is executed.

    Args:
        path: one of
            - a handsoff_stream checkpoint (`.safetensors`), with or without heads;
            - a rosinality/stylegan2-pytorch `.pt` (zip container) with `g_ema`, `g` or a bare state dict.

    Returns:
        The generator on the CPU, float32, in eval mode, without gradients.

    Raises:
        CheckpointError: the file is missing, damaged, or of a format that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, so there is no generator to load; check the path")
    if native.is_safetensors(path):
        generator = native.load(path)
    elif zipfile.is_zipfile(path):
        generator = rosinality.load(path)
    else:
        raise CheckpointError(
            f"{path}: neither a safetensors file nor a PyTorch zip archive (truncated, or another format); "
            "supported are handsoff_stream .safetensors and rosinality/stylegan2-pytorch .pt files"
        )
    return generator.eval().requires_grad_(False)
