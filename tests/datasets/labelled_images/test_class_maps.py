"""Ids and colors in masks become classes as a class map says; the included maps are the published ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from handsoff_stream.class_ids import IGNORE_INDEX
from handsoff_stream.config import class_map_names, load_class_map
from handsoff_stream.datasets.labelled_images.class_maps import (
    ClassMap,
    MappedClass,
    Sources,
    distinct_colors,
)
from handsoff_stream.datasets.labelled_images.pictures import RawMask
from handsoff_stream.tasks import Segmentation

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "class_tables.json").read_text())
MERGED = {  # ours => the published code's
    "celebamask_hq_8": "trans_mask_stylegan_19classTo8",
    "celebamask_hq_9_hat": "trans_mask_stylegan_19classTo9_hat",
    "celebamask_hq_9_glasses": "trans_mask_stylegan_19classTo9_glasses",
    "celebamask_hq_10": "trans_mask_stylegan_19classTo10",
    "car_parts_10": "trans_mask_car_19classTo10",
    "car_parts_11": "trans_mask_car_19classTo11_bumper",
    "cityscapes_8": "trans_mask_cityscapes_35_8",
    "datasetgan_face_8": "trans_mask_stylegan_34classTo8",
    "datasetgan_car_12": "trans_mask_stylegan_20classTo12",
}
DEEPFASHION_10 = [0, 1, 2, 3, 3, 4, 4, 9, 5, 6, 4, 7, 8, 9, 5, 6, 6, 6, 7, 6, 6, 3, 5, 1]  # table 3c, by source id
DEEPFASHION_8 = [0, 1, 1, 2, 2, 3, 3, 7, 4, 5, 3, 6, 0, 7, 4, 5, 5, 5, 6, 5, 5, 2, 4, 1]  # table 3d
VEHICLES = [*range(26, 34), -1]


def ids(*rows: list[int]) -> RawMask:
    return RawMask(np.array(rows, dtype=np.int64))


def colors(*rows: list[list[int]]) -> RawMask:
    return RawMask(np.array(rows, dtype=np.uint8))


def classes(*sources: dict, **other) -> ClassMap:
    return ClassMap(tuple(MappedClass(name=f"c{i}", **source) for i, source in enumerate(sources)), **other)


def problems(*sources: dict, **other) -> str:
    with pytest.raises(ValueError) as caught:
        classes(*sources, **other)
    return str(caught.value)


def test_ids_become_classes_and_255_is_unlabelled():
    mapped, unknown = classes({"from_ids": (0, 7)}, {"from_ids": (300, -1)}).apply(ids([0, 7, 300], [-1, 255, 0]))
    assert mapped.dtype == np.uint8 and mapped.tolist() == [[0, 0, 1], [1, 255, 0]]
    assert unknown == {}


def test_a_map_without_sources_takes_masks_of_class_ids():
    mapped, unknown = ClassMap.of_ids(["background", "skin", "hair"]).apply(ids([0, 1, 2, 255, 3]))
    assert mapped.tolist() == [[0, 1, 2, 255, 255]] and unknown == {3: 1}


def test_unlabelled_is_what_the_task_takes_for_unlabelled():
    assert IGNORE_INDEX == Segmentation.ignore_index


def test_a_class_can_be_made_of_255():
    assert classes({"from_ids": (0,)}, {"from_ids": (255,)}).apply(ids([0, 255]))[0].tolist() == [[0, 1]]


def test_what_is_ignored_can_be_said_and_replaces_255():
    class_map = classes({"from_ids": (1,)}, {"from_ids": (2,)}, ignore=Sources(from_ids=(0,)))
    mapped, unknown = class_map.apply(ids([0, 1, 2, 255]))
    assert mapped.tolist() == [[255, 0, 1, 255]] and unknown == {255: 1}


def test_unknown_values_are_counted_most_frequent_first():
    _, unknown = classes({"from_ids": (0,)}, {"from_ids": (1,)}).apply(ids([9, 0, 4], [4, 1, 4]))
    assert list(unknown.items()) == [(4, 3), (9, 1)]
    _, unknown = classes({"from_colors": ((0, 0, 0),)}, {"from_colors": ((1, 2, 3),)}).apply(
        colors([[0, 0, 0], [1, 2, 4], [1, 2, 3]])
    )
    assert unknown == {(1, 2, 4): 1}


@pytest.mark.parametrize(("others", "expected"), [("c1", 1), ("ignore", 255)])
def test_others_take_what_is_left(others, expected):
    mapped, unknown = classes({"from_ids": (0,)}, {"from_ids": (1,)}, others=others).apply(ids([0, 1, 77]))
    assert mapped.tolist() == [[0, 1, expected]] and unknown == {}


def test_a_class_may_be_made_of_others_alone():
    assert classes({}, {"from_ids": (1,)}, others="c0").apply(ids([5, 1]))[0].tolist() == [[0, 1]]


def test_colors_become_classes():
    class_map = classes({"from_colors": ((255, 0, 0), (0, 0, 0))}, {"from_colors": ((0, 0, 255),)})
    mapped, _ = class_map.apply(colors([[255, 0, 0], [0, 0, 0], [0, 0, 255]]))
    assert mapped.tolist() == [[0, 0, 1]]


def test_of_an_indexed_picture_ids_count_unless_the_map_has_only_colors():
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[1] = (9, 9, 9)
    indexed = RawMask(np.array([[0, 1]]), palette)
    both = classes({"from_ids": (1,), "from_colors": ((9, 9, 9),)}, {"from_ids": (0,), "from_colors": ((0, 0, 0),)})
    assert both.apply(indexed)[0].tolist() == [[1, 0]]
    only_colors = classes({"from_colors": ((9, 9, 9),)}, {"from_colors": ((0, 0, 0),)})
    assert only_colors.apply(indexed)[0].tolist() == [[1, 0]]
    swapped = classes({"from_ids": (0,), "from_colors": ((9, 9, 9),)}, {"from_ids": (1,), "from_colors": ((0, 0, 0),)})
    assert swapped.apply(indexed)[0].tolist() == [[0, 1]]


def test_gray_saved_in_color_holds_ids_and_other_colors_need_a_map():
    class_map = classes({"from_ids": (0,)}, {"from_ids": (5,)})
    assert class_map.apply(colors([[0, 0, 0], [5, 5, 5]]))[0].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="give it from_colors"):
        class_map.apply(colors([[0, 0, 1]]))
    with pytest.raises(ValueError, match="give it from_ids"):
        classes({"from_colors": ((0, 0, 0),)}, {"from_colors": ((5, 5, 5),)}).apply(ids([300]))


def test_every_mistake_is_named():
    text = problems({"from_ids": (1, 2)}, {"from_ids": (2,)}, {}, others="sky")
    assert "3 problem(s)" in text
    assert "id 2 is mapped twice: to class 0 (c0) and to class 1 (c1)" in text
    assert "class 2 (c2) is made of nothing" in text and "others: 'sky' is not a class" in text


def test_a_source_cannot_be_a_class_and_ignored():
    text = problems({"from_ids": (1,)}, {"from_ids": (2,)}, ignore=Sources(from_ids=(2,)))
    assert "id 2 is mapped twice: to class 1 (c1) and to ignore" in text
    red = {"from_colors": ((255, 0, 0),)}
    assert "color [255, 0, 0] is mapped twice" in problems(red, red)


def test_colors_and_ids_have_ranges():
    assert "[0, 0, 256] is not a color" in problems({"from_colors": ((0, 0, 256),)}, {"from_ids": (1,)})
    assert "[-1, 0, 0] is not a color" in problems({"color": (-1, 0, 0)}, {})
    assert "at most 32 bits" in problems({"from_ids": (2**31,)}, {"from_ids": (1,)})


def test_names_are_unique_and_their_number_is_limited():
    with pytest.raises(ValueError, match="2 classes are named 'hair'"):
        ClassMap.of_ids(["skin", "hair", "hair"])
    with pytest.raises(ValueError, match="cannot be named 'ignore'"):
        ClassMap.of_ids(["skin", "ignore"])
    for number in (1, 256):
        with pytest.raises(ValueError, match="2 to 255"):
            ClassMap.of_ids(map(str, range(number)))


def test_classes_without_a_color_get_one():
    class_map = ClassMap((MappedClass(name="a"), MappedClass(name="b", color=(1, 2, 3)), MappedClass(name="c")))
    assert class_map.palette == (distinct_colors(3)[0], (1, 2, 3), distinct_colors(3)[2])
    assert len(set(distinct_colors(40))) == 40


def test_its_record_is_json_and_complete():
    config = json.loads(json.dumps(classes({"from_ids": (4,)}, {"from_colors": ((1, 2, 3),)}, others="c0").config()))
    assert config == {
        "class_names": ["c0", "c1"],
        "from_ids": [[4, 0], [255, 255]],
        "from_colors": [[[1, 2, 3], 1]],
        "others": "c0",
    }


# What ships


@pytest.mark.parametrize("name", class_map_names())
def test_a_map_that_ships_is_complete_and_makes_a_task(name):
    class_map = load_class_map(name)
    sources = sorted(set(class_map.ids) - {255, -1})
    assert sources == list(range(len(sources)))
    assert all(c.color is not None for c in class_map.classes)
    assert Segmentation(class_map.class_names, class_map.palette).num_classes == class_map.num_classes


@pytest.mark.parametrize(("ours", "theirs"), MERGED.items())
def test_merged_classes_are_the_published_ones(ours, theirs):
    published, class_map = PUBLISHED["maps"][theirs], load_class_map(ours)
    expected = {int(source): target for source, target in published["old_to_new"].items()}
    if ours == "cityscapes_8":  # their rule for vehicles does nothing
        assert all(expected[source] == 0 for source in VEHICLES)
        expected |= dict.fromkeys(VEHICLES, 7)
    assert class_map.ids == {**expected, 255: 255}
    names = published.get("new_id_names_from_rules") or PUBLISHED["names"][published["new_names"]]
    assert list(class_map.class_names) == names


@pytest.mark.parametrize(
    ("ours", "theirs", "renamed"),
    [
        ("celebamask_hq_19", "face_class", {"neck_l": "necklace"}),
        ("car_parts_19", "car_parts_19", {"_background_": "background"}),
        ("datasetgan_car_20", "car_20_class", {}),
        (
            "datasetgan_face_34",
            "face_class_34",
            {
                "head***eye***botton lid": "head/eye/bottom lid",
                "head***mouth***oral comisure": "head/mouth/oral commissure",
            },
        ),
    ],
)
def test_unmerged_classes_are_the_published_ones(ours, theirs, renamed):
    class_map = load_class_map(ours)
    assert list(class_map.class_names) == [renamed.get(n, n.replace("***", "/")) for n in PUBLISHED["names"][theirs]]
    assert class_map.ids == {**{i: i for i in range(class_map.num_classes)}, 255: 255}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("celebamask_hq_8", "face_8_palette"),
        ("celebamask_hq_9_hat", "face_palette"),
        ("celebamask_hq_9_glasses", "face_palette"),
        ("celebamask_hq_10", "face_palette"),
        ("celebamask_hq_19", "face_palette"),
        ("datasetgan_face_8", "face_8_palette"),
        ("datasetgan_face_34", "face_palette"),
        ("datasetgan_car_20", "car_20_palette"),
    ],
)
def test_palettes_are_the_published_ones(ours, theirs):
    palette = load_class_map(ours).palette
    assert [list(color) for color in palette] == PUBLISHED["palettes_rgb"][theirs][: len(palette)]


def test_the_twelve_car_classes_have_the_name_and_the_color_of_what_they_hold():
    merged, fine = load_class_map("datasetgan_car_12"), load_class_map("datasetgan_car_20")
    for part in merged.classes:
        assert part.color in [fine.palette[source] for source in part.from_ids]
    holds = {part.name: [fine.class_names[source] for source in part.from_ids] for part in merged.classes}
    assert holds["licence plate"] == ["licensePlate"] and holds["tail light"] == ["tailLight"]
    assert holds["wheel"] == ["tire"] and holds["window"] == ["window"] and holds["mirror"] == ["mirror"]
    colors = dict(zip(PUBLISHED["names"]["car_12_class"], PUBLISHED["palettes_rgb"]["car_12_palette"], strict=True))
    assert list(merged.classes[3].color or ()) == colors["licence plate"]


def test_five_streets_classes_are_the_published_merging_of_eight():
    eight, five = load_class_map("cityscapes_8").ids, load_class_map("cityscapes_5").ids
    merging = PUBLISHED["maps"]["trans_mask_cityscapes_8_to_5"]["old_to_new"]
    assert five == {source: 255 if target == 255 else merging[str(target)] for source, target in eight.items()}
    assert list(load_class_map("cityscapes_5").class_names) == PUBLISHED["names"]["cityscapes_5_class"]


def test_full_bodies_are_merged_as_in_the_papers_table():
    ten, eight = load_class_map("deepfashion_mm_10"), load_class_map("deepfashion_mm_8")
    assert ten.ids == {**dict(enumerate(DEEPFASHION_10)), 255: 255}
    assert eight.ids == {**dict(enumerate(DEEPFASHION_8)), 255: 255}
    assert ten.class_names == (
        *("background", "top", "outerwear", "dress", "bottoms"),
        *("face", "skin", "footwear", "bags", "hair"),
    )
    assert eight.class_names == ("background", "top", "dress", "bottoms", "face", "skin", "footwear", "hair")


def test_glasses_are_id_3_of_faces_and_back_glass_id_2_of_cars():
    """Table 3 of the paper misprints both."""
    assert load_class_map("celebamask_hq_19").class_names[3:6] == ("glasses", "left_eye", "right_eye")
    assert load_class_map("celebamask_hq_9_glasses").classes[8].from_ids == (3,)
    assert load_class_map("car_parts_19").class_names[2:4] == ("back_glass", "back_left_door")
    assert load_class_map("car_parts_10").classes[2].from_ids == (2,)
