"""Images and masks of any size are brought to the generator's size, and stay aligned."""

import numpy as np
import pytest
from PIL import Image

from handsoff_stream.datasets.labelled_images.geometry import Geometry
from handsoff_stream.geometry import Rectangle

RANDOM = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(height: int, width: int) -> np.ndarray:
    return RANDOM.integers(0, 5, (height, width), dtype=np.uint8)


def halves(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """White image, class 1, below and right of the middle; else black, class 0."""
    ids = np.zeros((height, width), dtype=np.uint8)
    ids[height // 2 :, width // 2 :] = 1
    return np.repeat(ids[..., None] * np.uint8(255), 3, axis=2), ids


def test_by_default_nothing_changes():
    image, ids = picture(6, 9), mask(6, 9)
    assert np.array_equal(Geometry().image(image), image)
    assert np.array_equal(Geometry().mask(ids, (6, 9)), ids)
    assert np.array_equal(Geometry((6, 9)).image(image), image)
    assert Geometry((6, 9)).problem((6, 9)) is None


def test_exact_refuses_other_sizes_and_says_what_to_do():
    assert Geometry((8, 8)).problem((6, 9)) == (
        "6 x 9 pixels, the generator makes 8 x 8; resize the image, or pass resize crop or pad"
    )
    for resize in ("crop", "pad"):
        assert Geometry((8, 8), resize=resize).problem((6, 9)) is None


def test_crop_takes_the_largest_centered_part_of_the_wanted_shape():
    bodies = Geometry((1024, 512), resize="crop")
    assert bodies.place((1101, 750)).source == Rectangle(0, (750 - 550.5) / 2, 1101, (750 + 550.5) / 2)
    streets = Geometry((512, 512), resize="crop")
    assert streets.place((1024, 2048)).source == Rectangle(0, 512, 1024, 1536)
    tall, ids = picture(12, 4), mask(12, 4)
    square = Geometry((4, 4), resize="crop")
    assert np.array_equal(square.image(tall), tall[4:8])
    assert np.array_equal(square.mask(ids, (12, 4)), ids[4:8])


def test_pad_puts_cars_into_rows_64_to_448_and_leaves_the_rest_unlabelled():
    cars = Geometry((512, 512), resize="pad")
    image, ids = picture(384, 512), mask(384, 512)
    padded, labels = cars.image(image), cars.mask(ids, (384, 512))
    assert np.array_equal(padded[64:448], image) and np.array_equal(labels[64:448], ids)
    for rows in (slice(0, 64), slice(448, 512)):
        assert (padded[rows] == 0).all() and (labels[rows] == 255).all()


def test_what_no_image_fills_is_known():
    cars = Geometry((512, 512), resize="pad")
    assert cars.covered([(384, 512), (384, 512), (768, 1024)]) == (64, 0, 448, 512)
    assert cars.covered([(384, 512), (300, 512)]) == (64, 0, 448, 512)
    assert cars.covered([(384, 512), (512, 384)]) is None and cars.covered([]) is None
    for whole in (Geometry((512, 512), resize="crop"), Geometry()):
        assert whole.covered([(384, 512)]) is None


def test_what_no_image_fills_ends_between_label_pixels():
    assert Geometry((64, 64), resize="pad").covered([(42, 64)]) == (11, 0, 53, 64)
    assert Geometry((64, 64), (16, 16), resize="pad").covered([(42, 64)]) == (8, 0, 56, 64)


def test_pad_works_sideways_and_with_odd_margins():
    image, ids = picture(8, 3), mask(8, 3)
    square = Geometry((8, 8), resize="pad")
    assert np.array_equal(square.image(image)[:, 2:5], image)
    labels = square.mask(ids, (8, 3))
    assert np.array_equal(labels[:, 2:5], ids) and (labels[:, [0, 1, 5, 6, 7]] == 255).all()


def test_the_thinnest_image_keeps_a_pixel():
    thin = Geometry((8, 8), resize="pad")
    assert thin.image(picture(400, 1)).shape == (8, 8, 3)
    assert (thin.mask(mask(400, 1), (400, 1)) != 255).sum() == 8


def test_a_crop_box_comes_first():
    image, ids = picture(10, 12), mask(10, 12)
    box = Geometry(crop_box=Rectangle(1, 2, 7, 11))
    assert np.array_equal(box.image(image), image[1:7, 2:11])
    assert np.array_equal(box.mask(ids, (10, 12)), ids[1:7, 2:11])
    both = Geometry((6, 6), resize="crop", crop_box=Rectangle(1, 2, 7, 10))
    assert np.array_equal(both.image(image), image[1:7, 3:9])
    assert np.array_equal(both.mask(ids, (10, 12)), ids[1:7, 3:9])


def test_a_crop_box_beyond_the_image_is_a_problem():
    assert Geometry(crop_box=Rectangle(0, 0, 20, 5)).problem((10, 12)) == (
        "10 x 12 pixels, the crop box [0, 0, 20, 5] goes beyond"
    )
    left = Geometry((8, 8), crop_box=Rectangle(0, 0, 5, 5)).problem((10, 12))
    assert left is not None and "the crop box leaves 5 x 5 pixels" in left


def test_images_are_reduced_with_antialiasing_and_masks_by_the_nearest_pixel():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    smaller = Geometry((8, 8), resize="crop")
    assert np.abs(smaller.image(stripes).astype(int) - 127.5).max() <= 10
    ids = stripes[..., 0] // 255 * np.uint8(4)
    assert set(np.unique(smaller.mask(ids, (64, 64)))) <= {0, 4}
    image = picture(30, 30)
    expected = Image.fromarray(image).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(smaller.image(image), np.asarray(expected))


@pytest.mark.parametrize("resize", ["crop", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (32, 64), (64, 32)])
@pytest.mark.parametrize("given", [(100, 100), (48, 100), (100, 48), (20, 20)])
def test_the_mask_stays_on_top_of_the_image(resize, size, given):
    image, ids = halves(*given)
    geometry = Geometry(size, resize=resize)
    bright, labels = geometry.image(image)[..., 0] > 127, geometry.mask(ids, given)
    wrong = (bright != (labels == 1)) & (labels != 255)
    assert wrong.mean() < 0.03 and bright.any()
    # Where they differ, it is at the edge between the halves.
    rows, columns = np.nonzero(wrong)
    off = np.minimum(np.abs(rows - size[0] / 2), np.abs(columns - size[1] / 2))
    assert (off <= 2.5).all()


def test_masks_of_half_the_size_are_those_of_celebamask_hq():
    ids = mask(8, 8)
    same = Geometry((16, 16), (8, 8))
    assert np.array_equal(same.mask(ids, (16, 16)), ids)
    assert np.array_equal(Geometry((16, 16)).mask(ids, (16, 16)), ids.repeat(2, axis=0).repeat(2, axis=1))
    boxed = Geometry(crop_box=Rectangle(4, 6, 12, 12))
    assert np.array_equal(boxed.mask(ids, (16, 16)), ids[2:6, 3:6].repeat(2, axis=0).repeat(2, axis=1))


def test_labels_smaller_than_the_image_are_padded_at_the_same_place():
    ids = mask(384, 512)
    labels = Geometry((512, 512), (256, 256), resize="pad").mask(ids, (384, 512))
    assert (labels[:32] == 255).all() and (labels[224:] == 255).all() and (labels[32:224] != 255).all()
    assert np.array_equal(labels[32:224], ids[1::2, 1::2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": "stretch", "size": (8, 8)}, "choose one of exact, crop, pad"),
        ({"resize": "crop"}, "pass size="),
        ({"label_size": (8, 8)}, "pass size="),
        ({"size": (0, 8)}, "at least 1"),
        ({"size": (8, 8), "label_size": (4, 8)}, "another shape"),
        ({"crop_box": Rectangle(4, 0, 4, 8)}, "crop_box .* is empty"),
        ({"crop_box": Rectangle(-1, 0, 4, 8)}, "top, left, bottom, right"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**arguments)
