"""Labelled images are all checked before any is used, and have the generator's size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handsoff_stream.datasets.labelled_images import (
    LabelledImages,
    LabelledImagesError,
    UnlabelledImages,
    list_labelled,
)
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap, MappedClass
from handsoff_stream.datasets.labelled_images.geometry import Geometry

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


def ids(num_classes: int) -> ClassMap:
    return ClassMap.of_ids(f"class {i}" for i in range(num_classes))


def problems(folders: tuple[Path, Path], num_classes: int = 3, size: tuple[int, int] | None = None) -> list[str]:
    with pytest.raises(LabelledImagesError) as caught:
        labelled(folders, ids(num_classes), geometry=Geometry(size))
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def labelled(folders: tuple[Path, Path], class_map: ClassMap | None = None, **options) -> LabelledImages:
    return LabelledImages(list_labelled(*folders), class_map or ClassMap.of_ids("abc"), **options)


def test_pairs_come_sorted_by_name_with_images_and_ids(folders):
    first, second = labelled(folders, geometry=Geometry((12, 8)))
    assert (first[0], second[0]) == ("a", "b")
    assert second[1].dtype == torch.float32 and second[1].shape == (3, 12, 8)
    assert torch.equal(second[1] * 255, torch.from_numpy(PIXELS).permute(2, 0, 1).float())
    for _, _, mask in (first, second):
        assert mask.dtype == torch.int64
        assert torch.equal(mask, torch.from_numpy(IDS).long())


def test_gray_sixteen_bit_and_black_and_white_masks_are_ids(folders):
    Image.fromarray(IDS.astype(np.uint16)).save(folders[1] / "a.png")
    (folders[1] / "b.npy").unlink()
    Image.fromarray(IDS > 0).save(folders[1] / "b.png")
    first, second = labelled(folders)
    assert torch.equal(first[2], torch.from_numpy(IDS).long())
    assert torch.equal(second[2], torch.from_numpy(IDS > 0).long())


def test_unlabelled_pixels_and_hidden_files_pass(folders):
    ids = IDS.copy()
    ids[0] = 255
    Image.fromarray(ids).save(folders[1] / "a.png")
    (folders[0] / ".DS_Store").write_bytes(b"")
    assert (labelled(folders)[0][2][0] == 255).all()


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
    assert f"a.png: not in the class map: id 2 ({(IDS == 2).sum()} pixels)" in unknown_a
    assert "b.npy: not in the class map: id 300" in unknown_b and "id -1" in unknown_b


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


def test_color_masks_need_a_class_map(folders):
    Image.fromarray(PIXELS).save(folders[1] / "a.png")
    assert ["a.png: a picture in colors" in text and "from_colors" in text for text in problems(folders)] == [True]


def test_all_problems_come_together(folders):
    np.save(folders[1] / "b.npy", IDS[:6])
    (folders[0] / "a.png").write_bytes(b"")
    Image.fromarray(PIXELS).save(folders[0] / "z.png")
    np.save(folders[1] / "y.npy", IDS + 7)
    found = problems(folders, size=(64, 64))
    of_file = {text.split(":")[0].removeprefix(str(folders[0].parent)) for text in found}
    assert of_file == {"/images/a.png", "/images/b.png", "/images/z.png", "/labels/b.npy", "/labels/y.npy"}
    assert sum("z.png" in text for text in found) == sum("y.npy" in text for text in found) == 2
    assert len(found) == 7


def test_a_problem_with_the_list_does_not_hide_those_of_the_files(folders):
    (folders[0] / "a.png").write_bytes(b"")
    manifest = folders[0].parent / "set.csv"
    manifest.write_text("image,label\nimages/a.png,labels/none.png\nimages/b.png,labels/b.npy\n")
    with pytest.raises(LabelledImagesError) as caught:
        labelled((manifest,))
    missing, unreadable = caught.value.problems
    assert "set.csv, line 2: no such label" in missing and "a.png: cannot be read" in unreadable


def test_unmapped_values_are_summed_over_the_set(folders):
    np.save(folders[1] / "b.npy", np.where(IDS == 2, 77, IDS))
    with pytest.raises(LabelledImagesError) as caught:
        labelled(folders, ids(2))
    twos = int((IDS == 2).sum())
    assert caught.value.unmapped == {2: [twos], 77: [twos]}
    np.save(folders[1] / "b.npy", IDS)
    with pytest.raises(LabelledImagesError) as caught:
        labelled(folders, ids(2))
    assert caught.value.unmapped == {2: [twos, twos]}
    assert f"not in the class map, in all: id 2 ({2 * twos} pixels, masks: 2); add them" in str(caught.value)


def test_a_smoothed_color_mask_is_summarized(folders):
    Image.fromarray(PIXELS).save(folders[1] / "a.png")
    (folders[1] / "b.npy").unlink()
    (folders[0] / "b.png").unlink()
    red_or_not = ClassMap(
        (MappedClass(name="no", from_colors=((0, 0, 0),)), MappedClass(name="red", from_colors=((255, 0, 0),)))
    )
    with pytest.raises(LabelledImagesError, match="color .* and [0-9]+ more, as smoothed or lossy") as caught:
        labelled(folders, red_or_not)
    assert sum(pixels for (pixels,) in caught.value.unmapped.values()) == IDS.size
    assert len(str(caught.value)) < 1500


def test_a_class_map_is_applied_to_ids_and_to_colors(folders):
    colors = np.array([[0, 0, 0], [0, 0, 255], [255, 0, 0]], dtype=np.uint8)[IDS]
    Image.fromarray(colors).save(folders[1] / "a.png")
    class_map = ClassMap(
        (
            MappedClass(name="both", from_ids=(0, 1), from_colors=((0, 0, 0), (0, 0, 255))),
            MappedClass(name="red", from_ids=(2,), from_colors=((255, 0, 0),)),
        )
    )
    images = labelled(folders, class_map)
    for _, _, mask in images:
        assert torch.equal(mask, torch.from_numpy(IDS == 2).long())
    reds = int((IDS == 2).sum())
    assert images.pixels_per_class == (2 * (IDS.size - reds), 2 * reds)


def test_color_arrays_and_sixteen_bit_arrays_are_masks_too(folders):
    np.save(folders[1] / "b.npy", np.repeat(IDS[..., None], 3, axis=2))
    assert torch.equal(labelled(folders)[1][2], torch.from_numpy(IDS).long())
    np.save(folders[1] / "b.npy", IDS.astype(">u2"))
    assert torch.equal(labelled(folders)[1][2], torch.from_numpy(IDS).long())


def test_images_and_masks_of_another_size_are_brought_to_the_generators(folders):
    cropped = labelled(folders, geometry=Geometry((8, 8), (4, 4), resize="crop"))
    for _, image, mask in cropped:
        assert image.shape == (3, 8, 8) and image.dtype == torch.float32
        assert mask.shape == (4, 4) and mask.dtype == torch.int64
    assert torch.equal(cropped[1][1] * 255, torch.from_numpy(PIXELS[2:10]).permute(2, 0, 1).float())
    padded = labelled(folders, geometry=Geometry((12, 12), resize="pad"))
    assert torch.equal(padded[0][2][:, 2:10], torch.from_numpy(IDS).long()) and (padded[0][2][:, :2] == 255).all()
    assert sum(padded.pixels_per_class) == 2 * IDS.size
    assert [tuple(image.shape) for _, image in UnlabelledImages(folders[0], Geometry((12, 12), resize="pad"))] == [
        (3, 12, 12)
    ] * 2


def test_small_regions_become_unlabelled_on_request(folders):
    ids = np.zeros((12, 8), dtype=np.uint8)
    ids[0:5, 0:6] = 1
    ids[8:10, 0:2] = 2
    for name in ("a.png", "b.png"):
        Image.fromarray(ids).save(folders[1] / name)
    (folders[1] / "b.npy").unlink()
    assert labelled(folders).pixels_per_class == (124, 60, 8)
    cleaned = labelled(folders, smallest_region=30)
    assert cleaned.pixels_per_class == (124, 60, 0)
    assert (cleaned[0][2][8:10, 0:2] == 255).all()


def test_a_manifest_names_latents_and_leaves_reading_them_to_others(folders):
    root = folders[0].parent
    (root / "b.pt").write_bytes(b"not read here")
    (root / "set.csv").write_text("image,label,latent\nimages/b.png,labels/b.npy,b.pt\nimages/a.png,labels/a.png,\n")
    images = labelled((root / "set.csv",))
    assert images.names == ["a", "b"] and [entry.latent for entry in images.entries] == [None, root / "b.pt"]
    assert images.files == [(folders[0] / "a.png", folders[1] / "a.png"), (folders[0] / "b.png", folders[1] / "b.npy")]


def test_masks_that_teach_nothing_are_refused(folders):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.where(IDS > 0, np.uint8(255), np.uint8(0))).save(folders[1] / name)
    (folders[1] / "b.npy").unlink()
    assert ["all labelled pixels are class 0" in text for text in problems(folders)] == [True]
    Image.fromarray(np.full_like(IDS, 255)).save(folders[1] / "a.png")
    assert ["a.png: no labelled pixel" in text for text in problems(folders)] == [True]


def test_transparent_and_deep_pictures_are_refused(folders):
    Image.fromarray(np.concatenate([PIXELS, PIXELS[..., :1]], axis=2)).save(folders[0] / "a.png")
    Image.fromarray(PIXELS[..., 0].astype(np.uint16)).save(folders[0] / "b.png")
    transparent, deep = problems(folders)
    assert "a.png: cannot be read" in transparent and "transparent pixels" in transparent
    assert "b.png: cannot be read" in deep and "8 bits per channel" in deep


def test_photographs_are_turned_upright(folders):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side, to be turned clockwise
    Image.fromarray(np.rot90(PIXELS).copy()).save(folders[0] / "a.png", exif=exif)
    assert torch.equal(labelled(folders)[0][1] * 255, torch.from_numpy(PIXELS).permute(2, 0, 1).float())


def test_a_folder_of_images_alone_is_read_and_checked_alike(folders):
    assert [(name, image.shape) for name, image in UnlabelledImages(folders[0])] == [
        ("a", (3, 12, 8)),
        ("b", (3, 12, 8)),
    ]
    (folders[0] / "a.png").write_bytes(b"not a picture")
    with pytest.raises(LabelledImagesError, match="a.png: cannot be read") as caught:
        UnlabelledImages(folders[0], size=(64, 64))
    assert len(caught.value.problems) == 2
    (folders[0] / "empty").mkdir()
    with pytest.raises(LabelledImagesError, match="one is needed"):
        UnlabelledImages(folders[0] / "empty")
