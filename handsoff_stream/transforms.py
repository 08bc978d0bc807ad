"""User transforms of image and label together, with randomness that belongs to the sample alone.

Knows torchvision's tv_tensors, imported on first use, because they tell v2 transforms which tensor is an image and
which a label (so that a label is never interpolated between class ids). Does not know where samples come from.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.isolation import isolated
from handsoff_stream.seeding import Stream, transform_seed


class JointTransform:
    """Apply `transforms(image, label)` to one sample at a time.

    Args:
        transforms: torchvision v2 transforms, or any callable of (image float32 [3, H, W] in [0, 1], label) that
            returns both. It may draw from the global generators of Python, NumPy and PyTorch (on the CPU, and on the
            sample's own device), which are seeded from (seed, index) around the call and restored after it. A
            transform with a `set_random_seed` method, such as albumentations', is seeded by it. Labels of whole
            numbers come back as int64.
        seed: seed of the stream.
        stream: which random numbers of (seed, index); samples and labelled images have their own.
    """

    def __init__(self, transforms: Callable[..., Any], seed: int, stream: Stream = Stream.TRANSFORM):
        self.transforms = transforms
        self.seed = seed
        self.stream = stream

    def __call__(self, one: LabelledBatch) -> LabelledBatch:
        """A batch of one sample => the same sample transformed."""
        from torchvision import tv_tensors

        wrapped: Any
        with (
            isolated(),
            _seeded(transform_seed(self.seed, int(one.indices[0]), self.stream), one.images.device) as seed,
        ):
            if hasattr(self.transforms, "set_random_seed"):
                self.transforms.set_random_seed(seed)
            if isinstance(one.labels, dict):
                wrapped = {name: tv_tensors.Mask(label[0]) for name, label in one.labels.items()}
            else:
                wrapped = tv_tensors.Mask(one.labels[0])
            image, label = self.transforms(tv_tensors.Image(one.images[0]), wrapped)
        labels: Any
        if isinstance(label, dict):
            labels = {name: _plain_label(value) for name, value in label.items()}
        else:
            labels = _plain_label(label)
        return replace(one, images=_plain(image), labels=labels)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[int]:
    """The global generators of Python, NumPy, PyTorch's CPU and of one device, seeded; restored afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    try:
        # Not torch.manual_seed: it seeds every CUDA device, and nothing would restore them.
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            for own in cuda:
                with torch.cuda.device(own):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield seed
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor).unsqueeze(0)


def _plain_label(tensor: Tensor) -> Tensor:
    label = _plain(tensor)
    return label if label.is_floating_point() else label.long()
