"""rosinality/stylegan2-pytorch `.pt` files: `{"g_ema": state dict, "latent_avg": [D]}` and close relatives.

The geometry is read off the shapes, since the file records none. Parameters map one to one, without flips.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators.stylegan2 import StyleGAN2

# Latents averaged for the truncation centre when the file stores none, as the published sampling script does.
NUM_MEAN_LATENTS = 4096
MEAN_LATENT_SEED = 0


def load(path: Path) -> StyleGAN2:
    """`.pt` file => generator.

    Raises:
        CheckpointError: damaged archive, blocked pickle, no StyleGAN2 inside, or SWAGAN.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and for blocked files
        raise CheckpointError(
            f"{path}: cannot be read without executing code from it ({error}); only plain tensors are accepted"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    state = content.get("g_ema", content.get("g", content))
    if "input.input" not in state or not any(key.startswith("style.") for key in state):
        raise CheckpointError(
            f"{path}: no StyleGAN2 generator (no 'input.input' and 'style.*') among the keys "
            f"{sorted(map(str, content))[:6]}; a file that holds one has 'g_ema'"
        )
    if state["to_rgb1.bias"].shape[1] == 12:
        raise CheckpointError(f"{path}: a SWAGAN (wavelet) generator, which is not supported; use a StyleGAN2")
    latent_avg = content.get("latent_avg")
    return convert(state, latent_avg if isinstance(latent_avg, Tensor) else None)


def geometry(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `StyleGAN2`, from the shapes alone."""
    num_blocks = 1 + sum(re.fullmatch(r"to_rgbs\.\d+\.bias", key) is not None for key in state)
    constant = state["input.input"]
    wide = [state[f"convs.{2 * k + 1}.conv.weight"].shape[1] for k in range(num_blocks - 1)]
    return {
        "channels": [constant.shape[1], *wide],
        "constant_size": list(constant.shape[2:]),
        "z_dim": state["style.1.weight"].shape[1],
        "w_dim": state["conv1.conv.modulation.weight"].shape[1],
        "mapping_layers": sum(re.fullmatch(r"style\.\d+\.weight", key) is not None for key in state),
        "image_channels": state["to_rgb1.bias"].shape[1],
    }


def convert(state: Mapping[str, Tensor], latent_avg: Tensor | None) -> StyleGAN2:
    """State dict in rosinality's names => generator.

    Without `latent_avg` the truncation centre is the mean of `NUM_MEAN_LATENTS` mapped latents of a fixed seed;
    without stored noise maps the noise strengths act on zero maps.
    """
    generator = StyleGAN2(**geometry(state))
    renamed = {"constant": state["input.input"][0]}
    for i in range(len(generator.mapping_network)):
        for kind in ("weight", "bias"):
            renamed[f"mapping_network.{i}.{kind}"] = state[f"style.{i + 1}.{kind}"]
    for i in range(len(generator.blocks)):
        layers = (
            {"conv": ("conv1", 0)}
            if i == 0
            else {
                "up": (f"convs.{2 * i - 2}", 2 * i - 1),
                "conv": (f"convs.{2 * i - 1}", 2 * i),
            }
        )
        for ours, (theirs, noise_index) in layers.items():
            renamed |= _style_layer(state, f"blocks.{i}.{ours}", theirs, noise_index)
        renamed |= _to_rgb(state, f"blocks.{i}.to_rgb", "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}")
    for name, tensor in generator.state_dict().items():
        if name.endswith("noise_const") and name not in renamed:
            renamed[name] = torch.zeros_like(tensor)
    renamed["w_avg"] = torch.zeros(generator.w_dim) if latent_avg is None else latent_avg.reshape(-1)
    generator.load_state_dict({name: tensor.float() for name, tensor in renamed.items()})
    if latent_avg is None:
        rng = torch.Generator().manual_seed(MEAN_LATENT_SEED)
        with torch.no_grad():
            z = torch.randn(NUM_MEAN_LATENTS, generator.z_dim, generator=rng)
            generator.w_avg.copy_(generator.mapping(z).mean(dim=0))
    return generator


def _modulated_conv(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": state[f"{theirs}.weight"][0],
        f"{ours}.affine.weight": state[f"{theirs}.modulation.weight"],
        f"{ours}.affine.bias": state[f"{theirs}.modulation.bias"],
    }


def _style_layer(state: Mapping[str, Tensor], ours: str, theirs: str, noise_index: int) -> dict[str, Tensor]:
    layer = _modulated_conv(state, f"{ours}.conv", f"{theirs}.conv")
    layer[f"{ours}.noise_strength"] = state[f"{theirs}.noise.weight"].reshape([])
    layer[f"{ours}.bias"] = state[f"{theirs}.activate.bias"]
    if f"noises.noise_{noise_index}" in state:
        layer[f"{ours}.noise_const"] = state[f"noises.noise_{noise_index}"]
    return layer


def _to_rgb(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {
        **_modulated_conv(state, f"{ours}.conv", f"{theirs}.conv"),
        f"{ours}.bias": state[f"{theirs}.bias"].reshape(-1),
    }
