"""User transforms of image and label together, with randomness that belongs to the sample.

Knows torchvision's tv_tensors, imported on first use, because they tell v2 transforms which tensor is an image and
which a label (so that a label is never interpolated between class ids). Does not know where samples come from.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.seeding import transform_seed


class JointTransform:
    """Apply `transforms(image, label)` to one sample at a time.

    Args:
        transforms: torchvision v2 transforms, or any callable of (image float32 [3, H, W] in [0, 1], label) that
            returns both. It may draw from torch's global CPU generator, which is seeded from (seed, index) around
            the call and restored after it.
        seed: seed of the stream.
    """

    def __init__(self, transforms: Callable[..., Any], seed: int):
        self.transforms = transforms
        self.seed = seed

    def __call__(self, one: LabelledBatch) -> LabelledBatch:
        """A batch of one sample => the same sample transformed."""
        from torchvision import tv_tensors

        wrapped: Any
        if isinstance(one.labels, dict):
            wrapped = {name: tv_tensors.Mask(label[0]) for name, label in one.labels.items()}
        else:
            wrapped = tv_tensors.Mask(one.labels[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(transform_seed(self.seed, int(one.indices[0])))
            image, label = self.transforms(tv_tensors.Image(one.images[0]), wrapped)
        labels: Any
        if isinstance(label, dict):
            labels = {name: _plain(value) for name, value in label.items()}
        else:
            labels = _plain(label)
        return replace(one, images=_plain(image), labels=labels)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor).unsqueeze(0)
