"""Pixels that a reconstruction lacks are unlabelled for fitting, and the report names the image and the class."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.fitting.invertibility import check_factor, leave_out_lost, lost_pixels, without_lost_pixels
from handsoff_stream.generators import StyleGAN2

SIZE = 64
MARGIN = 5  # of smoothing (1 pixel of standard deviation, cut after 2) and of the coarsest map (3 pixels)


class Blocks(Perceptual):
    """Means of blocks of 2 x 2 pixels as features."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "blocks")

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(images_BCHW, 2)]


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StyleGAN2(channels=(8, 8, 8, 8, 8), z_dim=8, w_dim=8, mapping_layers=1).eval().requires_grad_(False)
    for block in model.blocks:
        block.to_rgb.conv.weight.data.mul_(0.1)  # images well inside [-1, 1], so that clamping loses nothing
    return model


@pytest.fixture(scope="module")
def w_plus(generator) -> Tensor:
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    return generator.truncate(generator.mapping(z))


def images_of(generator: StyleGAN2, w_plus: Tensor, noise: float = 0.0) -> list[tuple[str, Tensor]]:
    made = generator.synthesis(w_plus).images.clamp(-1, 1).add(1).div(2)
    made = made + noise * torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    return [(f"face {i}", image) for i, image in enumerate(made.clamp(0, 1))]


def one_class() -> Tensor:
    return torch.zeros(4, SIZE, SIZE, dtype=torch.int64)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("top", [8, 40])
def test_exactly_the_changed_region_is_lost(generator, w_plus, noise, top):
    images = images_of(generator, w_plus, noise)
    image = images[2][1]
    image[:, top : top + 12, 20:44] = 1 - image[:, top : top + 12, 20:44]
    image[0, top : top + 12, 20:44] = 1.0
    lost = lost_pixels(generator, images, w_plus, Blocks(), one_class(), 1)
    assert lost.dtype == torch.bool and lost.shape == (4, SIZE, SIZE)
    assert lost[2, top : top + 12, 20:44].all()
    lost[2, top - MARGIN : top + 12 + MARGIN, 20 - MARGIN : 44 + MARGIN] = False
    assert not lost.any()


def test_nothing_is_lost_where_reconstructions_are_right_up_to_eight_bits(generator, w_plus):
    images = [(name, image.mul(255).round().div(255)) for name, image in images_of(generator, w_plus)]
    assert not lost_pixels(generator, images, w_plus, Blocks(), one_class(), 1, 1.01).any()


def test_imagenet_features_find_the_region_too(generator, w_plus):
    images = images_of(generator, w_plus, 0.02)
    images[1][1][:, 16:40, 16:40] = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    lost = lost_pixels(generator, images, w_plus, load_perceptual("efficientnet-lite0"), one_class(), 1)
    inside = lost[1, 16:40, 16:40].float().mean()
    outside = lost.sum() - lost[1, 8:48, 8:48].sum()
    assert inside > 0.9 and outside < 0.01 * lost.numel()


def test_a_larger_factor_leaves_less_out(generator, w_plus):
    images = images_of(generator, w_plus, 0.1)
    lost = [lost_pixels(generator, images, w_plus, Blocks(), one_class(), 1, factor) for factor in (1.05, 1.3, 2.0)]
    assert lost[0].sum() > lost[1].sum() > lost[2].sum()
    assert not (lost[2] & ~lost[1]).any() and not (lost[1] & ~lost[0]).any()


def test_medians_are_those_of_labelled_pixels(generator, w_plus):
    """Bars that the generator makes differently do not hide what is lost elsewhere."""
    images = images_of(generator, w_plus, 0.02)
    masks = one_class()
    masks[:, : SIZE // 2 + 8] = IGNORE_INDEX
    for _, image in images:
        image[:, : SIZE // 2] = 1.0
    images[0][1][:, 50:60, 20:40] = 1.0
    assert lost_pixels(generator, images, w_plus, Blocks(), masks, 1)[0, 50:60, 20:40].all()
    assert not lost_pixels(generator, images, w_plus, Blocks(), one_class(), 1)[0, 50:60, 20:40].all()


def test_every_class_weighs_alike_however_large_it_is(generator, w_plus):
    """An easy background of 94 % of the pixels does not make the other two classes look lost."""
    images, masks = images_of(generator, w_plus, 0.02), one_class()
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for i, (_, image) in enumerate(images):
        image[:, :16, :16] = (image[:, :16, :16] + 0.15 * noise[i]).clamp(0, 1)
    masks[:, :16, :8], masks[:, :16, 8:16] = 1, 2
    balanced = lost_pixels(generator, images, w_plus, Blocks(), masks, 3, 2.0)
    over_all = lost_pixels(generator, images, w_plus, Blocks(), one_class(), 1, 2.0)
    assert balanced.float().mean() < 0.01 and over_all[:, 2:14, 2:14].float().mean() > 0.9


@pytest.mark.parametrize("label_size", [16, 32, 128])
def test_the_result_has_the_size_of_the_labels(generator, w_plus, label_size):
    images = images_of(generator, w_plus)
    images[3][1][:, :32, :32] = 1.0
    masks = torch.zeros(4, label_size, label_size, dtype=torch.int64)
    lost = lost_pixels(generator, images, w_plus, Blocks(), masks, 1)
    quarter = label_size // 2
    assert lost.shape == masks.shape and lost[3, :quarter, :quarter].float().mean() > 0.9
    assert not lost[:3].any() and not lost[3, quarter + label_size // 8 :].any()


def test_the_report_names_the_image_and_the_classes_that_lose_most_of_their_pixels():
    masks = torch.zeros(2, 4, 4, dtype=torch.int64)
    masks[0, 0], masks[1, 3], masks[1, 2] = 1, 2, IGNORE_INDEX
    lost = torch.zeros(2, 4, 4, dtype=torch.bool)
    lost[0, 0, :3] = lost[1, 3] = lost[1, 2] = True
    lost[0, 1, 0] = True
    kept, report = without_lost_pixels(masks, lost, ["anna", "ben"], ("skin", "glasses", "hat", "scarf"), 3.0)
    assert report.classes == {"anna": {"glasses": 0.75}, "ben": {"hat": 1.0}} and report.gone == ("hat",)
    assert report.share == pytest.approx(8 / 28) and report.factor == 3.0
    assert (kept[lost] == IGNORE_INDEX).all() and torch.equal(kept[~lost], masks[~lost])
    assert masks[0, 0, 0] == 1  # the given masks stay
    assert report.config() == {
        "factor": 3.0,
        "left_out": report.share,
        "classes": report.classes,
        "gone": ["hat"],
    }


def test_trusted_latents_are_not_looked_at(generator, w_plus):
    images = images_of(generator, w_plus)
    for _, image in images[:2]:
        image[:, 10:20, 10:20] = 1.0
    masks = torch.zeros(4, SIZE, SIZE, dtype=torch.int64)
    kept, report = leave_out_lost(generator, images, w_plus, masks, Blocks(), ("all",), 3.0, trusted={"face 0"})
    assert not (kept[0] == IGNORE_INDEX).any() and (kept[1, 10:20, 10:20] == IGNORE_INDEX).all()
    assert 0 < report.share < 0.05 and report.classes == {} and report.gone == ()


def test_masks_without_a_labelled_pixel_lose_nothing(generator, w_plus):
    masks = torch.full((4, SIZE, SIZE), IGNORE_INDEX)
    kept, report = leave_out_lost(generator, images_of(generator, w_plus), w_plus, masks, Blocks(), ("all",), 3.0)
    assert torch.equal(kept, masks) and report.share == 0


@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_that_leaves_out_half_of_the_pixels_is_refused(factor):
    with pytest.raises(ValueError, match="pass a number above 1, or None"):
        check_factor(factor)
