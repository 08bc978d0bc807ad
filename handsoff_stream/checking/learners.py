"""Some labelled images => labels of other ones, by a label generator or by a segmentation network.

Both see the same images and masks. The label generator reads the generator's feature maps of an inversion, as it does
in a stream; the network reads pixels. Knows latents, images and masks. Does not know folds, or what is compared.

Shape letters: N images, T images to learn from, E images to label, L number of style inputs, D latent size, K classes,
H W image size, h w label size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.downstream import RepeatedAugmented, build_deeplab, ordinary_augmentation, train_segmentation
from handsoff_stream.downstream.deeplab import imagenet_weights
from handsoff_stream.fitting.feature_table import FeatureTable
from handsoff_stream.fitting.fit import FitSettings, fit_label_generator
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Size
from handsoff_stream.labeller import Labeller
from handsoff_stream.tasks import Segmentation

BACKBONE = "efficientnet-lite0"
STRIDE = 16  # of that backbone
LARGEST_SIDE = 256  # of the images that the network sees, in pixels


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """How the segmentation network is trained: DeepLabV3+ on EfficientNet-Lite0, fine-tuned with augmentation.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 300
    """Optimizer steps; on the embedded faces 300 reach most of what 900 do."""
    batch_size: int = 8
    learning_rate: float = 1e-3
    """Highest rate of Adam, which falls to zero along a half cosine."""
    warmup: int = 20
    """Steps over which the rate rises linearly at the start."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.warmup < 0 or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"steps={self.steps}, batch_size={self.batch_size}, warmup={self.warmup}, "
                f"learning_rate={self.learning_rate}: pass at least 1 step, batches of at least 2 images (BatchNorm), "
                "and a positive rate"
            )


@dataclass(frozen=True)
class Material:
    """All labelled images with their inversions; tensors lie on the CPU."""

    generator: Generator
    """Where it computes is where labels are made."""
    task: Segmentation
    names: tuple[str, ...]
    """Of the N images."""
    images: Tensor
    """float32 [N, 3, H, W] in [0, 1]."""
    masks: Tensor
    """int64 [N, h, w], 255 where unlabelled."""
    w_plus: Tensor
    """float32 [N, L, D]."""
    reconstructions: Tensor
    """float32 [N, 3, H, W] in [0, 1]: what the generator makes of the latents."""

    @property
    def label_size(self) -> Size:
        """(h, w)."""
        return self.masks.shape[1], self.masks.shape[2]


@torch.no_grad()
def reconstruct(generator: Generator, w_plus_NLD: Tensor) -> Tensor:
    """The generator's images of some latents, float32 [N, 3, H, W] in [0, 1] on the CPU; one at a time."""
    made = [generator.synthesis(w.to(generator.w_avg), "const").images for w in w_plus_NLD.split(1)]
    return torch.cat(made).float().add(1).div(2).clamp(0, 1).cpu()


def label_generator_labels(
    material: Material, train: Sequence[int], held_out: Sequence[int], settings: FitSettings, cache_dir: Path
) -> Tensor:
    """Labels of held-out inversions by a label generator that was fitted to the others, as a stream would label them.

    Args:
        material: all images.
        train: positions of the T images to fit to.
        held_out: positions of the E images to label.
        settings: how to fit.
        cache_dir: for features that do not fit into memory.

    Returns:
        uint8 [E, h, w], class ids.
    """
    generator, task = material.generator, material.task
    table = FeatureTable.collect(generator, material.w_plus[list(train)], material.label_size, cache_dir=cache_dir)
    fitted, _ = fit_label_generator(table, material.masks[list(train)], task, settings)
    device = generator.w_avg.device
    labeller = Labeller(Checkpoint(generator, {task.name: Head(task, fitted)}, material.label_size), device)
    labels = []
    with torch.no_grad():
        for w_plus_1LD in material.w_plus[list(held_out)].split(1):
            features = generator.synthesis(w_plus_1LD.to(device), "const").features
            labels.append(labeller(features)[task.name][0].byte().cpu())
    return torch.cat(labels)


def network_labels(
    material: Material, train: Sequence[int], held_out: Sequence[int], settings: NetworkSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Labels of held-out images, and of their reconstructions, by a network that was trained on the other images.

    Args:
        material: all images.
        train: positions of the T images to train on.
        held_out: positions of the E images to label.
        settings: how to train.
        seed: of the weights that are not pretrained, of augmentation, order and dropout.

    Returns:
        uint8 [E, h, w] for the images, and the same for their reconstructions.
    """
    names, device = material.task.class_names, material.generator.w_avg.device
    size = network_size((material.images.shape[2], material.images.shape[3]))
    images_T3HW = _resized(material.images[list(train)], size)
    masks_THW = F.interpolate(material.masks[list(train), None].float(), size, mode="nearest-exact")[:, 0].long()
    length = settings.steps * settings.batch_size
    repeated = RepeatedAugmented(
        TensorDataset(images_T3HW, masks_THW), length=length, seed=seed, transforms=ordinary_augmentation(names)
    )
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout
        network = build_network(len(names), seed)
        train_segmentation(
            network,
            DataLoader(repeated, batch_size=settings.batch_size, shuffle=True, generator=order),
            steps=settings.steps,
            lr=settings.learning_rate,
            schedule="cosine",
            warmup=settings.warmup,
            device=device,
        )
    network.eval()
    found = [
        _predict(network, _resized(images[list(held_out)], size), material.label_size, device)
        for images in (material.images, material.reconstructions)
    ]
    return found[0], found[1]


def build_network(num_classes: int, seed: int) -> nn.Module:
    """The network before training, with ImageNet weights where their package is installed.

    Raises:
        ImportError: segmentation-models-pytorch or timm is not installed.
    """
    return build_deeplab(num_classes, backbone=BACKBONE, pretrained_backbone=has_imagenet_weights(), seed=seed)


def has_imagenet_weights() -> bool:
    """Whether the package with the backbone's ImageNet weights is installed."""
    try:
        return imagenet_weights(BACKBONE).is_file()
    except FileNotFoundError:
        return False


def network_size(image: Size) -> Size:
    """(H, W) that images are resized to for the network: at most `LARGEST_SIDE`, multiples of its stride.

    Args:
        image: (H, W) of the images.
    """
    scale = min(1.0, LARGEST_SIDE / max(image))
    height, width = (max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in image)
    return height, width


def _resized(images_N3HW: Tensor, size: Size) -> Tensor:
    if tuple(images_N3HW.shape[2:]) == size:
        return images_N3HW
    return F.interpolate(images_N3HW, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


@torch.no_grad()
def _predict(network: nn.Module, images_E3HW: Tensor, label_size: Size, device: torch.device) -> Tensor:
    """uint8 [E, h, w]; one image at a time, so that no result depends on the other images."""
    labels = []
    for image_13HW in images_E3HW.split(1):
        logits_1KHW = network(image_13HW.to(device, memory_format=torch.channels_last)).float()
        logits_1Khw = F.interpolate(logits_1KHW, label_size, mode="bilinear", align_corners=False)
        labels.append(logits_1Khw.argmax(dim=1).byte().cpu())
    return torch.cat(labels)
