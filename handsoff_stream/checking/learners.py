"""Some labelled images => labels of other ones, by a label generator or by a segmentation network.

Both see the same images and masks. The label generator reads the generator's feature maps of an inversion, as it does
in a stream; the network reads pixels. Knows latents, images and masks. Does not know folds, or what is compared.

Shape letters: N images, T images to learn from, E images to label, L number of style inputs, D latent size, K classes,
H W image size, h w label size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.fitting.feature_table import FeatureTable
from handsoff_stream.fitting.fit import FitSettings, fit_label_generator
from handsoff_stream.fitting.labelled_samples import Predict, at_size
from handsoff_stream.fitting.teacher import TeacherSettings, mean_probabilities, train_teacher
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Size
from handsoff_stream.labeller import Labeller
from handsoff_stream.tasks import Segmentation

STRIDE = 16  # of the teacher's default backbone
LARGEST_SIDE = 256  # of the images that the network sees, in pixels


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
    material: Material, train: Sequence[int], held_out: Sequence[int], settings: TeacherSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Labels of held-out images, and of their reconstructions, by a network that was trained on the other images.

    Args:
        material: all images.
        train: positions of the T images to train on.
        held_out: positions of the E images to label.
        settings: how to train; several networks vote by their mean probabilities.
        seed: of the weights that are not pretrained, of augmentation, order and dropout; instead of that of `settings`.

    Returns:
        uint8 [E, h, w] for the images, and the same for their reconstructions.
    """
    names, device = material.task.class_names, material.generator.w_avg.device
    size = network_size((material.images.shape[2], material.images.shape[3]))
    images_T3HW = at_size(material.images[list(train)], size)
    masks_THW = F.interpolate(material.masks[list(train), None].float(), size, mode="nearest-exact")[:, 0].long()
    training = replace(settings, seed=seed)
    predict = mean_probabilities(train_teacher(list(images_T3HW), masks_THW, names, training, device=device))
    found = [
        _predict(predict, at_size(images[list(held_out)], size), material.label_size, device)
        for images in (material.images, material.reconstructions)
    ]
    return found[0], found[1]


def network_size(image: Size) -> Size:
    """(H, W) that images are resized to for the network: at most `LARGEST_SIDE`, multiples of its stride.

    Args:
        image: (H, W) of the images.
    """
    scale = min(1.0, LARGEST_SIDE / max(image))
    height, width = (max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in image)
    return height, width


@torch.no_grad()
def _predict(predict: Predict, images_E3HW: Tensor, label_size: Size, device: torch.device) -> Tensor:
    """uint8 [E, h, w]; one image at a time, so that no result depends on the other images."""
    labels = []
    for image_13HW in images_E3HW.split(1):
        probabilities_1KHW = predict(image_13HW.to(device, memory_format=torch.channels_last))
        probabilities_1Khw = F.interpolate(probabilities_1KHW, label_size, mode="bilinear", align_corners=False)
        labels.append(probabilities_1Khw.argmax(dim=1).byte().cpu())
    return torch.cat(labels)
