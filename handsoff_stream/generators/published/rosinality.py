"""Adapter of rosinality/stylegan2-pytorch files: `{"g_ema": state dict, "latent_avg": [D]}`.

It also reads training snapshots (`g`, `d`, `g_ema`, `args`), bare state dicts, names with the `module.` prefix of
DataParallel, and the `decoder.` of ReStyle, pSp and e4e encoders. The geometry follows from the shapes, because the
files do not record it. Every parameter corresponds to one of this package, and none is flipped.

Knows the names in these files. Does not know containers or arithmetic.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.budget import MAX_LAYERS, MAX_LEVELS, check_count
from handsoff_stream.files.weights import tensor
from handsoff_stream.generators.base import Generator
from handsoff_stream.generators.layers import fir_kernel
from handsoff_stream.generators.published.assemble import assemble, center_of_truncation, estimate_center
from handsoff_stream.generators.stylegan2 import StyleGAN2

SOURCE = "rosinality/stylegan2-pytorch"
WRAPPERS = ("g_ema", "g", "state_dict")
PREFIXES = ("module.", "decoder.")


def build(content: Any) -> tuple[Generator, str] | None:
    """Content of a file => generator and its source; None if the content is of another format.

    Raises:
        CheckpointError: the file holds a SWAGAN, or its tensors do not make a StyleGAN2.
    """
    if not isinstance(content, Mapping):
        return None
    for key in (*WRAPPERS, None):
        state = _unprefixed(content.get(key)) if key else _unprefixed(content)
        if "input.input" in state:
            latent_avg = content.get("latent_avg")
            generator = convert(state, latent_avg if isinstance(latent_avg, Tensor) else None)
            return generator, f"{SOURCE}, {key or 'bare state dict'}"
    return None


def convert(state: Mapping[str, Tensor], latent_avg: Tensor | None) -> StyleGAN2:
    """State dict with rosinality's names => generator; noise maps that are not stored become zero.

    Args:
        state: parameters by name, without prefixes.
        latent_avg: the center of truncation; None: it is estimated.

    Raises:
        CheckpointError: a SWAGAN, or tensors that do not make a StyleGAN2.
    """
    if tensor(state, "to_rgb1.bias", ndim=4).shape[1] == 12:
        raise CheckpointError("a SWAGAN (wavelet) generator, which is not supported; use a StyleGAN2")
    _check_filter(state)
    config = geometry(state)
    renamed = {"constant": tensor(state, "input.input", ndim=4)[0]}
    for i in range(config["mapping_layers"]):
        for kind in ("weight", "bias"):
            renamed[f"mapping_network.{i}.{kind}"] = tensor(state, f"style.{i + 1}.{kind}")
    for i in range(len(config["channels"])):
        size = [side << i for side in config["constant_size"]]
        if i == 0:
            renamed |= _style_layer(state, "blocks.0.conv", "conv1", 0, size)
            renamed |= _to_rgb(state, "blocks.0.to_rgb", "to_rgb1")
        else:
            renamed |= _style_layer(state, f"blocks.{i}.up", f"convs.{2 * i - 2}", 2 * i - 1, size)
            renamed |= _style_layer(state, f"blocks.{i}.conv", f"convs.{2 * i - 1}", 2 * i, size)
            renamed |= _to_rgb(state, f"blocks.{i}.to_rgb", f"to_rgbs.{i - 1}")
    w_dim = config["w_dim"]
    renamed["w_avg"] = torch.zeros(w_dim) if latent_avg is None else center_of_truncation(latent_avg, w_dim)
    generator = assemble(StyleGAN2, config, renamed)
    if latent_avg is None:
        estimate_center(generator)
    return generator


def geometry(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of `StyleGAN2`, from the shapes of the tensors.

    Raises:
        CheckpointError: a tensor is missing or has another number of dimensions.
    """
    num_blocks = 1 + sum(re.fullmatch(r"to_rgbs\.\d+\.bias", key) is not None for key in state)
    mapping_layers = sum(re.fullmatch(r"style\.\d+\.weight", key) is not None for key in state)
    check_count(num_blocks, MAX_LEVELS, "resolutions in its state dict")
    check_count(mapping_layers, MAX_LAYERS, "layers in its mapping network")
    constant = tensor(state, "input.input", ndim=4)
    wide = [tensor(state, f"convs.{2 * k + 1}.conv.weight", ndim=5).shape[1] for k in range(num_blocks - 1)]
    return {
        "channels": [constant.shape[1], *wide],
        "constant_size": list(constant.shape[2:]),
        "z_dim": tensor(state, "style.1.weight", ndim=2).shape[1],
        "w_dim": tensor(state, "conv1.conv.modulation.weight", ndim=2).shape[1],
        "mapping_layers": mapping_layers,
        "image_channels": tensor(state, "to_rgb1.bias", ndim=4).shape[1],
    }


def _unprefixed(value: Any) -> dict[str, Any]:
    """A state dict without the prefixes of its wrappers; empty if `value` is no state dict."""
    if not isinstance(value, Mapping):
        return {}
    state = {key: item for key, item in value.items() if isinstance(key, str)}
    for prefix in PREFIXES:
        if any(key.startswith(f"{prefix}input.input") or key.startswith(f"{prefix}decoder.") for key in state):
            state = {key.removeprefix(prefix): item for key, item in state.items() if key.startswith(prefix)}
    return state


def _check_filter(state: Mapping[str, Tensor]) -> None:
    for key in state:
        if key.endswith((".blur.kernel", ".upsample.kernel")):
            kernel = tensor(state, key).float()
            if kernel.shape != (4, 4) or not torch.allclose(kernel, fir_kernel(gain=4.0), atol=1e-3):
                raise CheckpointError(
                    f"{key} is not the filter [1, 3, 3, 1], and others are not supported; use another StyleGAN2"
                )


def _modulated_conv(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": tensor(state, f"{theirs}.weight", ndim=5)[0],
        f"{ours}.affine.weight": tensor(state, f"{theirs}.modulation.weight"),
        f"{ours}.affine.bias": tensor(state, f"{theirs}.modulation.bias"),
    }


def _style_layer(
    state: Mapping[str, Tensor], ours: str, theirs: str, noise_index: int, size: list[int]
) -> dict[str, Tensor]:
    noise = f"noises.noise_{noise_index}"
    return {
        **_modulated_conv(state, f"{ours}.conv", f"{theirs}.conv"),
        f"{ours}.noise_strength": tensor(state, f"{theirs}.noise.weight").reshape([]),
        f"{ours}.bias": tensor(state, f"{theirs}.activate.bias"),
        # Files that were converted before 2020 store no noise maps. The zeros are views of one number.
        f"{ours}.noise_const": tensor(state, noise) if noise in state else torch.zeros(()).expand(1, 1, *size),
    }


def _to_rgb(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {
        **_modulated_conv(state, f"{ours}.conv", f"{theirs}.conv"),
        f"{ours}.bias": tensor(state, f"{theirs}.bias").reshape(-1),
    }
