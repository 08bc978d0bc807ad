"""Adapter of the StyleGAN files of DatasetGAN, EditGAN and HandsOff: a state dict of `g_mapping.*`, `g_synthesis.*`.

The files store no noise maps, so the maps are zero, and no average latent, which is in a separate `.npy` file or is
estimated. Knows the names in these files. Does not know containers or arithmetic.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.files.budget import MAX_LAYERS, MAX_LEVELS, check_count
from handsoff_stream.files.weights import tensor
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.published.assemble import assemble, estimate_center
from handsoff_stream.generators.stylegan1 import StyleGAN1

SOURCE = "DatasetGAN's StyleGAN"


def build(content: Any) -> tuple[Generator, str] | None:
    """Content of a file => generator and its source; None if the content is of another format.

    Raises:
        CheckpointError: the tensors do not make a StyleGAN.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("g_synthesis.blocks.4x4.const"), Tensor):
        return None
    return convert(content), f"{SOURCE}, bare state dict"


def convert(state: Mapping[str, Tensor]) -> StyleGAN1:
    """State dict with DatasetGAN's names => generator with an estimated average latent.

    Raises:
        CheckpointError: the tensors do not make a StyleGAN.
    """
    config = geometry(state)
    renamed = {
        "constant": tensor(state, "g_synthesis.blocks.4x4.const", ndim=4)[0],
        "constant_bias": tensor(state, "g_synthesis.blocks.4x4.bias"),
        "to_rgb.weight": tensor(state, "g_synthesis.torgb.weight"),
        "to_rgb.bias": tensor(state, "g_synthesis.torgb.bias"),
        "w_avg": torch.zeros(config["w_dim"]),
    }
    for i in range(config["mapping_layers"]):
        for kind in ("weight", "bias"):
            renamed[f"mapping_network.{i}.{kind}"] = tensor(state, f"g_mapping.dense{i}.{kind}")
    for i in range(len(config["channels"])):
        renamed |= _block(state, f"blocks.{i}", i)
    generator = assemble(StyleGAN1, config, renamed)
    estimate_center(generator)
    return generator


def geometry(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of `StyleGAN1`, from the shapes of the tensors.

    Raises:
        CheckpointError: a tensor is missing or has another number of dimensions.
    """
    keys = [key for key in state if isinstance(key, str)]
    num_blocks = sum(re.fullmatch(r"g_synthesis\.blocks\.\d+x\d+\.conv1?\.bias", key) is not None for key in keys)
    mapping_layers = sum(re.fullmatch(r"g_mapping\.dense\d+\.weight", key) is not None for key in keys)
    check_count(num_blocks, MAX_LEVELS, "resolutions in its state dict")
    check_count(mapping_layers, MAX_LAYERS, "layers in its mapping network")
    return {
        "channels": [tensor(state, f"{_name(i)}.{_second(i)}.weight", ndim=4).shape[0] for i in range(num_blocks)],
        "z_dim": tensor(state, "g_mapping.dense0.weight", ndim=2).shape[1],
        "w_dim": tensor(state, f"{_name(0)}.epi1.style_mod.lin.weight", ndim=2).shape[1],
        "mapping_layers": mapping_layers,
        "image_channels": tensor(state, "g_synthesis.torgb.weight", ndim=4).shape[0],
    }


def _name(i: int) -> str:
    return f"g_synthesis.blocks.{4 << i}x{4 << i}"


def _second(i: int) -> str:
    """Name of the second convolution of a block; the block of the constant has no other."""
    return "conv1" if i else "conv"


def _block(state: Mapping[str, Tensor], ours: str, i: int) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        renamed[f"{ours}.conv.{kind}"] = tensor(state, f"{_name(i)}.{_second(i)}.{kind}")
        if i:
            renamed[f"{ours}.up.{kind}"] = tensor(state, f"{_name(i)}.conv0_up.{kind}")
        for j in (1, 2):
            renamed[f"{ours}.epilogue{j}.style.{kind}"] = tensor(state, f"{_name(i)}.epi{j}.style_mod.lin.{kind}")
    for j in (1, 2):
        renamed[f"{ours}.epilogue{j}.noise_strength"] = tensor(state, f"{_name(i)}.epi{j}.top_epi.noise.weight")
        renamed[f"{ours}.epilogue{j}.noise_const"] = torch.zeros(()).expand(1, 1, 4 << i, 4 << i)
    return renamed
