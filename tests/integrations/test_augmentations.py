"""Augmentation libraries, as examples/integrations/augmentations.py wraps them: joint, and a function of the index."""

import augmentations
import pytest
import torch
from conftest import assert_same
from frameworks import make_stream

from handsoff_stream.batch import LabelledBatch


def patterned(indices) -> LabelledBatch:
    """The image is its label / 2: what moves one and not the other shows."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (8, 8), generator=generator)
    labels = torch.stack([label.roll(int(index), 0) for index in indices])
    i = torch.tensor(indices)
    return LabelledBatch(
        (labels[:, None] / 2).expand(-1, 3, -1, -1).contiguous(), labels, i.float(), i, indices[-1] + 1
    )


def of_torchvision():
    return augmentations.of_torchvision().transforms[0]


def of_albumentations():
    albumentations = pytest.importorskip("albumentations")
    return augmentations.OfAlbumentations(albumentations.Compose([albumentations.D4(p=1)]))


def of_kornia():
    kornia = pytest.importorskip("kornia.augmentation")
    flip = kornia.AugmentationSequential(kornia.RandomHorizontalFlip(), data_keys=["input", "mask"])
    return augmentations.OfKornia(flip)


@pytest.mark.parametrize("make", [of_torchvision, of_albumentations, of_kornia])
def test_augmentations_are_joint_and_depend_on_the_index_alone(checkpoint, make):
    transform = make()
    stream = make_stream(checkpoint, transforms=transform, synthesize=patterned)
    samples = [stream[i] for i in range(12)]
    again = [make_stream(checkpoint, transforms=make(), synthesize=patterned)[i] for i in reversed(range(12))]
    assert_same(samples, again[::-1])
    for image, label in samples:
        assert label.dtype == torch.int64
        assert torch.allclose(image[0], label / 2, atol=1 / 255)
    plain = make_stream(checkpoint, synthesize=patterned)
    changed = [not torch.equal(label, plain[i][1]) for i, (_, label) in enumerate(samples)]
    assert any(changed)
