"""A few labelled images repeated with ordinary augmentation: what one does without a generator, the baseline.

Knows datasets and torchvision's v2 transforms. Does not know networks or streams.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.transforms import JointTransform

GREY = 0.5


def ordinary_augmentation() -> Callable[..., Any]:
    """Flip, rotation up to 10 degrees, translation up to 10 %, scale 0.8 to 1.25, and colour jitter.

    Joint on image and label; what lies outside the image becomes grey in the image and unlabelled in the label.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(
                degrees=10,
                translate=(0.1, 0.1),
                scale=(0.8, 1.25),
                interpolation=InterpolationMode.BILINEAR,
                fill={tv_tensors.Image: GREY, tv_tensors.Mask: IGNORE_INDEX},
            ),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
        ]
    )


class RepeatedAugmented(Dataset[tuple[Tensor, Tensor]]):
    """`length` augmented views of a small dataset: view i is image `i % len(dataset)`, transformed by (seed, i).

    Args:
        dataset: (image float32 [3, H, W] in [0, 1], label int64 [H, W]) samples; each is read once and kept.
        length: views.
        seed: in [0, 2**64).
        transforms: joint transform of image and label; None means `ordinary_augmentation()`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        length: int,
        seed: int = 0,
        transforms: Callable[..., Any] | None = None,
    ):
        self._samples = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
        self._transform = JointTransform(transforms or ordinary_augmentation(), seed)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"view {index} does not exist; there are {self._length}")
        image, label = self._samples[index % len(self._samples)]
        images, labels = self._transform(
            LabelledBatch(
                images=image[None],
                labels=label[None],
                uncertainty=torch.zeros(1),
                indices=torch.tensor([index]),
                next_index=index + 1,
            )
        )
        return images[0], labels[0]
