"""LPIPS as a squared distance of embeddings; the only importer of `lpips`, and only when it is called.

LPIPS (Zhang et al., CVPR 2018, equation 1) is sum_l mean_hw sum_c v_lc (a_lchw - b_lchw)^2 over
unit-normalized activations. With sqrt(v / hw) multiplied in it is |embed(a) - embed(b)|^2, so that an image that is
compared many times is embedded once.

Knows where torchvision keeps backbone weights, and never downloads them: without weights it takes a random
backbone, warns, and says so in `description`. Does not know generators or latents.

Shape letters: B batch, N size of an embedding, C channels, H W map size.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.provenance import sha256

WEIGHTS = {
    "vgg": "VGG16_Weights",
    "alex": "AlexNet_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
}
"""LPIPS's name of a backbone => torchvision's enumeration of its weights."""
SUBSTITUTE_NET = "squeeze"
SUBSTITUTE_SEED = 0
MIN_SIZE = 64  # LPIPS was calibrated on patches of 64 pixels, and the backbones run out of pixels below 32
MAX_SIZE = 256  # the size at which StyleGAN2's own projection compares images (Karras et al. 2020, appendix D)


class Perceptual(nn.Module):
    """LPIPS of images in [-1, 1]; without gradients to its own weights.

    `description` says which backbone and weights it is, for provenance.
    """

    def __init__(self, network: nn.Module, description: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.description = description

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """float32 [B, N]; the squared Euclidean distance of two embeddings of equal image size is LPIPS.

        Images whose shorter side is below 64 pixels are enlarged to it, those above 256 reduced, both
        bilinearly and with antialiasing.
        """
        network: Any = self.network
        scaled_BCHW = network.scaling_layer(_to_working_size(images_BCHW))
        parts = []
        for layer, map_BCHW in enumerate(network.net(scaled_BCHW)):
            unit_BCHW = F.normalize(map_BCHW, dim=1, eps=1e-10)
            weight_1C11 = network.lins[layer].model[-1].weight
            area = map_BCHW.shape[2] * map_BCHW.shape[3]
            parts.append((unit_BCHW * (weight_1C11 / area).sqrt()).flatten(1))
        return torch.cat(parts, dim=1)

    def distance(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """float32 [B], at least 0."""
        return (self.embed(a_BCHW) - self.embed(b_BCHW)).square().sum(dim=1)


def load_perceptual(net: str | None = None) -> Perceptual:
    """LPIPS with a backbone of torchvision's cache, `torch.hub.get_dir()`/checkpoints; on the CPU.

    Without backbone weights there, a backbone of random weights and a fixed seed stands in, with a warning. It sees
    edges and colors at all scales, but not what they belong to. Of the random ones "squeeze" inverts best in a given
    time: on 16 renders of 32 x 32, 60 steps with "vgg" gave 21.8 dB in 80 s, 200 steps with "squeeze" 23.2 dB in 56 s.

    Args:
        net: "vgg" (what the paper uses), "alex" or "squeeze". None: "vgg" where its weights are, else
            "squeeze".

    Raises:
        ValueError: an unknown backbone, or a damaged weight file.
        ModuleNotFoundError: lpips is not installed.
    """
    if net is not None and net not in WEIGHTS:
        raise ValueError(f"net={net!r} is no LPIPS backbone; choose one of {sorted(WEIGHTS)}, or None")
    file = weight_file(net or "vgg")
    if file.is_file():
        chosen = net or "vgg"
        network = _network(chosen)
        _load_backbone(network.net, file)
        return Perceptual(network, f"lpips 0.1, net={chosen}, backbone {file.name}")
    chosen = net or SUBSTITUTE_NET
    warnings.warn(
        f"LPIPS has no trained backbone: {file} does not exist and nothing is downloaded here. A random "
        f"backbone (net={chosen}, seed {SUBSTITUTE_SEED}) stands in; inversions follow edges and colors only. "
        "Put torchvision's file there for the published loss.",
        stacklevel=2,
    )
    return Perceptual(_network(chosen), f"lpips 0.1, net={chosen}, RANDOM backbone, seed {SUBSTITUTE_SEED}")


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
