"""DeepLabV3+ on EfficientNet-Lite0, for images of about 128 pixels on a CPU, with ImageNet weights from a package.

The network is built from segmentation-models-pytorch's decoder and timm's encoder. `handsoff_stream.imagenet` knows
where the weights are. Does not know losses, data or labels.

The encoder ends after its fifth stage, with 112 channels at stride 16: 8 x 8 positions for a 128-pixel image. The two
omitted stages hold two thirds of the weights; on ImageNet's 224-pixel images they worked on 7 x 7 positions. Dilated
convolutions are slow on a CPU. Instead, the map at stride 16 is enlarged, concatenated with the map at stride 8, and
passed to the atrous pyramid. The decoder combines the result with 24 channels at stride 4, so logits are predicted at
32 x 32 positions and interpolated to the size of the image.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.imagenet import CHANNELS, timm_names

ATROUS_RATES = (2, 4, 6)  # for a 16 x 16 map; the usual 12, 24 and 36 would only reach its padding
DECODER_CHANNELS = 128
DROPOUT = 0.1


class EfficientNetDeepLab(nn.Module):
    """DeepLabV3+ with torchvision's names: `backbone`, `classifier`, and logits under "out"."""

    def __init__(self, num_classes: int):
        super().__init__()
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
        from segmentation_models_pytorch.encoders import get_encoder

        self.backbone: nn.Module = get_encoder("tu-efficientnet_lite0", depth=4, weights=None)
        self.decoder: nn.Module = DeepLabV3PlusDecoder(
            encoder_channels=(3, CHANNELS[2], CHANNELS[4], CHANNELS[8] + CHANNELS[16]),
            encoder_depth=3,
            out_channels=DECODER_CHANNELS,
            atrous_rates=ATROUS_RATES,
            output_stride=8,
            aspp_separable=True,
            aspp_dropout=DROPOUT,
        )
        self.classifier: nn.Module = SegmentationHead(DECODER_CHANNELS, num_classes, kernel_size=1, upsampling=4)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalized images float32 [B, 3, H, W], H and W multiples of 16 => {"out": logits [B, K, H, W]}.

        Raises:
            ValueError: a height or width that is no multiple of 16.
        """
        height, width = images_BCHW.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(
                f"images of {height} x {width} pixels are not multiples of the stride of 16 that efficientnet-lite0 "
                "ends with; pad or crop them to multiples of 16, or choose another backbone"
            )
        image, stride2, stride4, stride8, stride16 = self.backbone(images_BCHW)
        larger = F.interpolate(stride16, size=stride8.shape[-2:], mode="bilinear")
        joined = torch.cat([stride8, larger], dim=1)
        return {"out": self.classifier(self.decoder([image, stride2, stride4, joined]))}


def encoder_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of EfficientNet-Lite0, in the package's or timm's names, under the names of the encoder."""
    return {f"model.{name}": tensor for name, tensor in timm_names(state).items()}
