"""A labelled folder is checked as a whole before anything is done with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handsoff_stream.datasets.labelled_folder import ImageFolder, LabelledFolder, LabelledImagesError

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (12, 8, 3), dtype=np.uint8)
IDS = RANDOM.integers(0, 3, (12, 8), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two pairs: `a` with an indexed mask, `b` with an array."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    Image.fromarray(PIXELS).save(images / "b.png")
    Image.fromarray(255 - PIXELS).save(images / "a.png")
    indexed = Image.fromarray(IDS, mode="P")
    indexed.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    indexed.save(labels / "a.png")
    np.save(labels / "b.npy", IDS.astype(np.int64))
    return images, labels


def problems(folders: tuple[Path, Path], num_classes: int = 3, size: tuple[int, int] | None = None) -> list[str]:
    with pytest.raises(LabelledImagesError) as caught:
        LabelledFolder(*folders, num_classes=num_classes, size=size)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_pairs_come_sorted_by_name_with_images_and_ids(folders):
    first, second = LabelledFolder(*folders, num_classes=3, size=(12, 8))
    assert (first[0], second[0]) == ("a", "b")
    assert second[1].dtype == torch.float32 and second[1].shape == (3, 12, 8)
    assert torch.equal(second[1] * 255, torch.from_numpy(PIXELS).permute(2, 0, 1).float())
    for _, _, mask in (first, second):
        assert mask.dtype == torch.int64
        assert torch.equal(mask, torch.from_numpy(IDS).long())


def test_grey_sixteen_bit_and_black_and_white_masks_are_ids(folders):
    Image.fromarray(IDS.astype(np.uint16)).save(folders[1] / "a.png")
    (folders[1] / "b.npy").unlink()
    Image.fromarray(IDS > 0).save(folders[1] / "b.png")
    first, second = LabelledFolder(*folders, num_classes=3)
    assert torch.equal(first[2], torch.from_numpy(IDS).long())
    assert torch.equal(second[2], torch.from_numpy(IDS > 0).long())


def test_unlabelled_pixels_and_hidden_files_pass(folders):
    ids = IDS.copy()
    ids[0] = 255
    Image.fromarray(ids).save(folders[1] / "a.png")
    (folders[0] / ".DS_Store").write_bytes(b"")
    assert (LabelledFolder(*folders, num_classes=3)[0][2][0] == 255).all()


def test_empty_and_missing_folders_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    assert "no such folder" in problems((tmp_path / "images", tmp_path / "labels"))[0]
    (tmp_path / "labels").mkdir()
    assert "one is needed" in problems((tmp_path / "images", tmp_path / "labels"))[0]


def test_a_file_that_is_no_image_is_named(folders):
    (folders[0] / "a.png").write_bytes(b"not a picture")
    (folders[0] / "notes.txt").write_text("hello")
    unreadable, foreign = sorted(problems(folders), key=lambda text: "notes" in text)
    assert "a.png: cannot be read" in unreadable
    assert "notes.txt: not an image" in foreign


def test_a_truncated_image_is_named(folders):
    whole = (folders[0] / "a.png").read_bytes()
    (folders[0] / "a.png").write_bytes(whole[: len(whole) // 2])
    assert ["a.png: cannot be read" in text for text in problems(folders)] == [True]


def test_files_without_a_partner_are_named(folders):
    (folders[1] / "a.png").rename(folders[1] / "c.png")
    without_mask, without_image = problems(folders)
    assert "a.png: no mask" in without_mask and "c.png: no image" in without_image


def test_two_files_of_one_name_are_refused(folders):
    Image.fromarray(PIXELS).save(folders[0] / "a.jpg")
    assert ["same name as a.jpg" in text for text in problems(folders)] == [True]


def test_masks_of_another_size_are_named(folders):
    np.save(folders[1] / "b.npy", IDS[:6])
    assert ["b.npy: 6 x 8 pixels, its image is 12 x 8" in text for text in problems(folders)] == [True]


def test_images_of_another_size_than_the_generators_are_named(folders):
    found = problems(folders, size=(64, 64))
    assert len(found) == 2 and all("12 x 8 pixels, the generator makes 64 x 64" in text for text in found)
    assert all("resize" in text for text in found)


def test_ids_that_are_no_classes_are_named(folders):
    np.save(folders[1] / "b.npy", np.where(IDS == 1, -1, 300))
    unknown_a, unknown_b = problems(folders, num_classes=2)
    assert "a.png: ids [2]" in unknown_a and "b.npy: ids [-1, 300]" in unknown_b


@pytest.mark.parametrize(
    "array", [IDS.astype(np.float32), IDS[None], np.array([{"a": 1}], dtype=object)], ids=["float", "3d", "pickle"]
)
def test_arrays_that_are_no_ids_are_refused(folders, array):
    np.save(folders[1] / "b.npy", array, allow_pickle=True)
    assert ["b.npy: cannot be read" in text for text in problems(folders)] == [True]


def test_an_array_whose_header_promises_too_much_is_refused(folders):
    with (folders[1] / "b.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**30, 2**20)})
    assert ["b.npy: cannot be read" in text for text in problems(folders)] == [True]


def test_colour_masks_are_refused(folders):
    Image.fromarray(PIXELS).save(folders[1] / "a.png")
    (text,) = problems(folders)
    assert "mode RGB" in text and "save ids" in text


def test_all_problems_come_together(folders):
    np.save(folders[1] / "b.npy", IDS[:6])
    (folders[0] / "a.png").write_bytes(b"")
    Image.fromarray(PIXELS).save(folders[0] / "z.png")
    found = problems(folders, size=(64, 64))
    assert len(found) == 4 and len({text.split(":")[0] for text in found}) == 4


def test_a_folder_of_images_alone_is_read_and_checked_alike(folders):
    assert [(name, image.shape) for name, image in ImageFolder(folders[0])] == [("a", (3, 12, 8)), ("b", (3, 12, 8))]
    (folders[0] / "a.png").write_bytes(b"not a picture")
    with pytest.raises(LabelledImagesError, match="a.png: cannot be read") as caught:
        ImageFolder(folders[0], size=(64, 64))
    assert len(caught.value.problems) == 2
    (folders[0] / "empty").mkdir()
    with pytest.raises(LabelledImagesError, match="one is needed"):
        ImageFolder(folders[0] / "empty")
