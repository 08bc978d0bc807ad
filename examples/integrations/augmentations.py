"""Augmentations of torchvision, albumentations and kornia: image and label together, a function of seed and index.

python examples/integrations/augmentations.py
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from handsoff_stream import HandsOffStream

Pair = tuple[Tensor, Tensor]


def of_torchvision() -> Callable[[Tensor, Tensor], Pair]:
    """v2 transforms are passed as they are."""
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomAffine(15)])


class OfAlbumentations:
    """albumentations works on NumPy images [H, W, 3]; `set_random_seed` lets the stream seed it for each sample."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.set_random_seed = transform.set_random_seed

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        done = self.transform(image=image.permute(1, 2, 0).numpy(), mask=label.int().numpy())
        return torch.from_numpy(done["image"]).permute(2, 0, 1).contiguous(), torch.from_numpy(done["mask"])


class OfKornia:
    """kornia draws from PyTorch's generator and works on batches; masks are floats [B, 1, H, W]."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform  # AugmentationSequential(..., data_keys=["input", "mask"])

    def __call__(self, image: Tensor, label: Tensor) -> Pair:
        images, masks = self.transform(image[None].as_subclass(Tensor), label[None, None].as_subclass(Tensor).float())
        return images[0], masks[0, 0].round().long()


if __name__ == "__main__":
    stream = HandsOffStream("faces", transforms=of_torchvision())
    image, label = stream[5]
    print(image.shape, label.dtype, torch.equal(image, stream[5][0]))
