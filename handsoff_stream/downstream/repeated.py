"""A few labelled images, repeated with ordinary augmentation: the baseline without a generator.

Knows datasets and torchvision's v2 transforms. Does not know networks or streams.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.transforms import JointTransform

GRAY = 0.5
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


class RandomMirror(v2.Transform):
    """Mirror image and label together with probability 1/2; classes of the left and right side swap their labels.

    Args:
        class_names: name of each class. Two names that differ only in the word for the side, such as "brow_left" and
            "brow_right" or "l_ear" and "r_ear", swap their ids in a mirrored image.
    """

    def __init__(self, class_names: Sequence[str] = ()):
        super().__init__()
        self.num_classes = len(class_names)
        self.other_side = mirrored_ids(class_names)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Called by torchvision once for an image and its label."""
        return {"mirror": bool(torch.rand(1) < 0.5)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Called by torchvision for the image [3, H, W] and for the label: ids int64 [H, W], or float [K, H, W]."""
        if not params["mirror"]:
            return inpt
        mirrored = v2.functional.horizontal_flip(inpt)
        if not isinstance(inpt, tv_tensors.Mask):
            return mirrored
        if not inpt.is_floating_point():
            return tv_tensors.wrap(self.other_side[mirrored.as_subclass(Tensor).long()].to(inpt.dtype), like=inpt)
        if len(inpt) != self.num_classes:  # depth, heatmaps
            return mirrored
        return tv_tensors.wrap(mirrored.as_subclass(Tensor)[self.other_side[: len(inpt)]], like=inpt)


class RandomUnlabellingAffine(v2.RandomAffine):
    """`RandomAffine` that fills what comes into view: gray in images, unlabelled in masks of class ids, 0 elsewhere.

    Zeros are no probabilities, so those pixels of a soft label do not count in the loss. Masks are never interpolated:
    each pixel takes the label of the nearest one.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Called by torchvision for the image and for the label."""
        if isinstance(inpt, tv_tensors.Mask) and inpt.is_floating_point():
            return v2.functional.affine(
                inpt, **params, interpolation=InterpolationMode.NEAREST, fill=0, center=self.center
            )
        return super().transform(inpt, params)


def mirrored_ids(class_names: Sequence[str]) -> Tensor:
    """The class that each class id becomes in a mirrored image, int64 [256]; see `RandomMirror`."""
    words = [re.split(r"[\W_]+", name.lower()) for name in class_names]
    ids = torch.arange(256)
    for i, name in enumerate(words):
        other = [OTHER_SIDE.get(word, word) for word in name]
        if other in words:
            ids[i] = words.index(other)
    return ids


def ordinary_augmentation(class_names: Sequence[str] = ()) -> Callable[..., Any]:
    """Flip, rotation up to 10 degrees, translation up to 10 %, scale 0.8 to 1.25, and color jitter.

    The geometric transforms treat image and label in the same way. Pixels from outside the image become gray in the
    image and unlabelled in the label.

    Args:
        class_names: name of each class, so that left and right classes are swapped; see `RandomMirror`.

    Returns:
        A transform of (image float32 [3, H, W] in [0, 1], `tv_tensors.Mask` [H, W] of ids or float [K, H, W]).
    """
    return v2.Compose(
        [
            RandomMirror(class_names),
            RandomUnlabellingAffine(
                degrees=10,
                translate=(0.1, 0.1),
                scale=(0.8, 1.25),
                interpolation=InterpolationMode.BILINEAR,
                fill={tv_tensors.Image: GRAY, tv_tensors.Mask: IGNORE_INDEX},
            ),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
        ]
    )


class RepeatedAugmented(Dataset[tuple[Tensor, Tensor]]):
    """A small dataset repeated to `length` samples, each augmented with random numbers of its own.

    Sample i is image `i % len(dataset)` of `dataset`; its augmentation depends on (seed, i).

    Args:
        dataset: samples (image float32 [3, H, W] in [0, 1], label int64 [H, W]).
        length: number of samples.
        seed: in [0, 2**64).
        transforms: joint transform of image and label; None means `ordinary_augmentation()`.
        keep: whether to read each image once and keep it in memory, instead of reading it for each sample.

    Raises:
        IndexError: by indexing, for an index outside [0, length).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        length: int,
        seed: int = 0,
        transforms: Callable[..., Any] | None = None,
        keep: bool = True,
    ):
        self._samples: Any = [dataset[i] for i in range(len(dataset))] if keep else dataset  # type: ignore[arg-type]
        self._transform = JointTransform(transforms or ordinary_augmentation(), seed)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} does not exist; pass an index in [0, {self._length})")
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
