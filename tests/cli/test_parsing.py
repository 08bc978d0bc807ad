"""Strings of the command line become arguments of functions, or an error that says what to write instead."""

import math

import pytest

from handsoff_stream.cli.parsing import (
    parse_augmentation,
    parse_class_map,
    parse_crop_box,
    parse_inversion,
    parse_names,
)
from handsoff_stream.datasets.labelled_images import ClassMap
from handsoff_stream.fitting import AugmentationSettings, InversionSettings
from handsoff_stream.geometry import Rectangle

CLASSES = ClassMap.of_ids(["background", "hat", "glasses"])


def test_names_are_separated_by_commas_and_spaces_do_not_count():
    assert parse_names("hat, glasses") == ("hat", "glasses") and parse_names(None) == ()


def test_a_crop_box_is_four_whole_numbers_rows_first():
    assert parse_crop_box("1,2,7,11") == Rectangle(top=1, left=2, bottom=7, right=11)
    assert parse_crop_box(None) is None
    for wrong in ("1,2,7", "1,2,7,11,4", "1,2,7,x", "1.5,2,7,11", ""):
        with pytest.raises(ValueError, match="is not TOP,LEFT,BOTTOM,RIGHT; pass four whole numbers"):
            parse_crop_box(wrong)


def test_what_masks_mean_is_said_once():
    assert parse_class_map(None, "a, b").class_names == ("a", "b")
    assert parse_class_map("celebamask_hq_8", None).num_classes == 8
    for arguments, said in (((None, None), "neither"), (("celebamask_hq_8", "a,b"), "both")):
        with pytest.raises(ValueError, match=f"{said} --class-map .* given once"):
            parse_class_map(*arguments)


@pytest.mark.parametrize(
    ("domain", "steps", "expected"),
    [(None, None, 500), ("cars", None, 300), ("full-bodies-8", None, 2000), ("full-bodies-10", 7, 7), (None, 0, 0)],
)
def test_steps_are_those_of_the_domain_unless_they_are_given(domain, steps, expected):
    assert parse_inversion(domain, steps, 0.5) == InversionSettings(steps=expected)


def test_an_infinite_radius_is_no_bound_and_an_unknown_domain_is_refused():
    assert parse_inversion(None, None, math.inf).radius is None and parse_inversion(None, None, 2.0).radius == 2.0
    with pytest.raises(ValueError, match="no steps were published for 'cats'"):
        parse_inversion("cats", None, 0.5)


def test_classes_of_any_color_are_named_and_become_ids():
    found = parse_augmentation(CLASSES, per_image=2, flip=True, any_color="glasses,hat")
    assert found == AugmentationSettings(per_image=2, flip=True, any_color=(2, 1))
    assert parse_augmentation(CLASSES, per_image=0, flip=False, any_color=None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_image": 2, "flip": False, "any_color": "cap"}, "no class is named 'cap'; pass some of background, hat"),
        (
            {"per_image": 0, "flip": True, "any_color": None},
            "no augmentations to flip or recolor; pass --augmentations",
        ),
        ({"per_image": 0, "flip": False, "any_color": "hat"}, "no augmentations to flip or recolor"),
        ({"per_image": -1, "flip": False, "any_color": None}, "per_image=-1"),
    ],
)
def test_settings_of_augmentations_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_augmentation(CLASSES, **options)
