"""Augmentations: labels move with the pixels, rare classes get more augmentations, colors change where allowed."""

import pytest
import torch
from torch import Tensor

from handsoff_stream.datasets.rendered_faces import CLASS_NAMES
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.fitting import AugmentationSettings, with_augmentations
from handsoff_stream.fitting.augment import augment, repeat_factors

GLASSES, HAT = CLASS_NAMES.index("glasses"), CLASS_NAMES.index("hat")
STILL = {"degrees": 0.0, "shift": 0.0, "zoom": 1.0}
SAME_LIGHT = {"hue": 0.0, "light": 0.0}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def few_faces(count: int = 4, size: int = 32) -> tuple[list[tuple[str, Tensor]], Tensor]:
    faces = labelled_faces(count, size=size)
    return [(f"face-{i}", faces[i][0]) for i in range(count)], torch.stack([faces[i][1] for i in range(count)])


def painted(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """An image whose gray says the label, so that it can be read back."""
    return torch.nn.functional.interpolate(mask[None, None] / 10, size, mode="nearest-exact")[0].expand(3, -1, -1)


def test_an_image_counts_as_often_as_its_rarest_class_asks():
    masks = torch.zeros(16, 4, 4, dtype=torch.int64)
    masks[3:7, 0, 0] = 1  # four of sixteen
    masks[6, 1, 1] = 2  # one of sixteen
    masks[9] = 255  # unlabelled
    factors = repeat_factors(masks, 4)
    assert factors[3] == pytest.approx(2.0) and factors[6] == pytest.approx(4.0) and factors[9] == 1.0
    assert factors[0] == pytest.approx((16 / 15) ** 0.5)


def test_images_come_first_and_unchanged_and_augmentations_are_named_after_them():
    images, masks = few_faces()
    more, labels = with_augmentations(images, masks, len(CLASS_NAMES), AugmentationSettings(per_image=2))
    assert more[:4] == images and torch.equal(labels[:4], masks)
    names = [name for name, _ in more]
    assert len(set(names)) == len(names) == len(labels) and names[4] == "face-0.augmented-00"
    for _, augmented_image in more:
        assert (
            augmented_image.dtype == torch.float32
            and augmented_image.shape == (3, 32, 32)
            and 0 <= augmented_image.min()
            and augmented_image.max() <= 1
        )
    assert labels.dtype == torch.int64 and set(labels.unique().tolist()) <= set(range(len(CLASS_NAMES)))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(40, 40), (24, 56), (56, 24)], ids=str)
@pytest.mark.parametrize("label_scale", [1, 2])
def test_a_label_goes_where_its_pixel_goes(size, label_scale, flip):
    """The image shows its own mask; after all motion it still does, but for pixels on an edge."""
    height, width = size
    mask = torch.zeros(height * label_scale, width * label_scale, dtype=torch.int64)
    mask[len(mask) // 5 : len(mask) // 2, mask.shape[1] // 3 : mask.shape[1] // 2] = 3
    mask[len(mask) // 2 :, : mask.shape[1] // 4] = 7
    settings = AugmentationSettings(degrees=20, shift=0.1, zoom=1.2, **SAME_LIGHT)
    for seed in range(5):
        augmented_image, label = augment(painted(mask, size), mask, settings, random(seed), flip=flip)
        again = painted(label, size)
        assert (augmented_image - again).abs().lt(0.05).float().mean() > 0.9
        assert label.shape == mask.shape and set(label.unique().tolist()) == {0, 3, 7}


def test_a_rotation_is_one_on_images_that_are_not_square():
    """A bar of 2 x 20 pixels stays as long and as thick: area and extent change by the rounding of pixels only."""
    mask = torch.zeros(64, 128, dtype=torch.int64)
    mask[31:33, 40:80] = 1
    settings = AugmentationSettings(degrees=30, shift=0, zoom=1, **SAME_LIGHT)
    for seed in range(4):
        _, label = augment(painted(mask, (64, 128)), mask, settings, random(seed), flip=False)
        y, x = torch.nonzero(label, as_tuple=True)
        length = ((y.max() - y.min()) ** 2 + (x.max() - x.min()) ** 2).float().sqrt()
        assert 70 <= len(y) <= 90 and 37 <= length <= 42


def test_a_mirrored_augmentation_is_the_mirror_image():
    images, masks = few_faces(1)
    augmented_image, label = augment(
        images[0][1], masks[0], AugmentationSettings(**STILL, **SAME_LIGHT), random(), flip=True
    )
    assert torch.allclose(augmented_image, images[0][1].flip(2), atol=0.51 / 255) and torch.equal(
        label, masks[0].flip(1)
    )


def test_only_every_other_augmentation_is_mirrored_and_none_unasked():
    images, masks = few_faces(1)
    for flip in (False, True):
        settings = AugmentationSettings(per_image=3, flip=flip, **STILL, **SAME_LIGHT)
        _, labels = with_augmentations(images, masks, len(CLASS_NAMES), settings)
        mirrored = [torch.equal(label, masks[0].flip(1)) for label in labels[1:]]
        assert mirrored == [flip and k % 2 == 1 for k in range(len(mirrored))]


def test_a_class_of_any_color_takes_its_own_and_leaves_the_rest_in_one_light():
    image = torch.rand(3, 8, 8, generator=random()) * 0.5 + 0.25
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[2:5, 2:5] = 1
    plain, _ = augment(image, mask, AugmentationSettings(**STILL), random(3), flip=False)
    recolored, _ = augment(image, mask, AugmentationSettings(**STILL, any_color=(1,)), random(3), flip=False)
    changed = ((plain - recolored).abs() > 0.02).any(dim=0)
    assert changed[mask == 1].float().mean() > 0.8 and not changed[mask == 0].any()


def test_unlabelled_pixels_stay_unlabelled():
    mask = torch.full((16, 16), 255)
    mask[:8] = 1
    _, labels = with_augmentations([("a", torch.rand(3, 16, 16))], mask[None], 2, AugmentationSettings(per_image=2))
    assert set(labels.unique().tolist()) == {1, 255}


def test_augmentations_depend_on_seed_name_and_number_alone():
    images, masks = few_faces(3)
    settings = AugmentationSettings(per_image=2, any_color=(GLASSES, HAT), flip=True)
    (first, a), (second, b) = (with_augmentations(images, masks, len(CLASS_NAMES), settings) for _ in range(2))
    assert torch.equal(a, b) and all(torch.equal(x, y) for (_, x), (_, y) in zip(first, second, strict=True))
    augmented = [augmented_image for name, augmented_image in first if ".augmented-" in name]
    assert all(not torch.equal(x, y) for i, x in enumerate(augmented) for y in augmented[:i])
    fewer, _ = with_augmentations(images[1:], masks[1:], 3, AugmentationSettings(per_image=2, flip=True))
    more, _ = with_augmentations(images, masks, 3, AugmentationSettings(per_image=2, flip=True))
    assert all(
        torch.equal(augmented_image, dict(more)[name]) for name, augmented_image in fewer
    )  # the first image plays no part
    other, _ = with_augmentations(images, masks, len(CLASS_NAMES), AugmentationSettings(per_image=2, seed=1))
    assert not torch.equal(other[3][1], first[3][1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_image": -1},
        {"degrees": -1},
        {"degrees": float("inf")},
        {"shift": 1.0},
        {"zoom": 0.5},
        {"hue": 0.6},
        {"light": 2},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentationSettings(**wrong)


def test_as_many_masks_as_images():
    images, masks = few_faces(2)
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        with_augmentations(images, masks[:1], len(CLASS_NAMES), AugmentationSettings(per_image=1))


def test_only_classes_that_there_are_can_be_recolored():
    images, masks = few_faces(1)
    with pytest.raises(ValueError, match="any_color=.99,. names classes that are not among 10"):
        with_augmentations(images, masks, len(CLASS_NAMES), AugmentationSettings(per_image=1, any_color=(99,)))


def test_augmented_images_have_eight_bits():
    images, masks = few_faces(2)
    more, _ = with_augmentations(images, masks, len(CLASS_NAMES), AugmentationSettings(per_image=1))
    for _, augmented_image in more[2:]:
        assert torch.equal(augmented_image, augmented_image.mul(255).round().div(255))
