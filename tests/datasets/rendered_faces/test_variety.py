"""Varied faces are functions of seed and index, and have wider distributions than the plain ones."""

from dataclasses import replace

import numpy as np
import pytest

from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.datasets.rendered_faces.dataset import VARIED_RATE, render_face, render_scene
from handsoff_stream.datasets.rendered_faces.labels import CLASS_OF_PART, Part
from handsoff_stream.datasets.rendered_faces.scene import Beard, Pattern, sample_scene
from handsoff_stream.datasets.rendered_faces.variety import BEARD_STYLES, PATTERN_STYLES, sample_varied_scene

COLOR = np.array([0.9, 0.05, 0.05], np.float32)


def test_a_varied_face_is_a_function_of_seed_and_index() -> None:
    first = render_face(5, 2, size=48, varied=True)
    render_face(5, 9, size=48, varied=True)
    again, other = (render_face(5, index, size=48, varied=True) for index in (2, 3))
    assert np.array_equal(again.image, first.image) and np.array_equal(again.parts, first.parts)
    assert not np.array_equal(other.image, first.image)


def test_what_is_worn_is_that_of_the_plain_face_and_its_rate_changes_nothing_else() -> None:
    plain, varied = (draw(1, 4, glasses=1.0, hat=1.0) for draw in (sample_scene, sample_varied_scene))
    assert plain.hat is not None and varied.hat is not None and varied.glasses is not None
    assert plain.hat.style == varied.hat.style and plain.hair.style == varied.hair.style
    bare = sample_varied_scene(1, 4, glasses=0.0, hat=0.0)
    assert bare.glasses is None and bare.hat is None and bare.yaw == varied.yaw


def test_poses_light_and_shapes_are_wider_than_those_of_plain_faces() -> None:
    plain, varied = (
        [draw(0, index, glasses=0, hat=0) for index in range(120)] for draw in (sample_scene, sample_varied_scene)
    )
    for field in ("yaw", "pitch", "roll", "eye_height", "nose", "smile", "mouth_width", "jaw", "brow_thickness"):
        spread = [float(np.std([getattr(scene, field) for scene in scenes])) for scenes in (plain, varied)]
        assert spread[1] > 1.15 * spread[0], field
    lit = [[float(scene.light_direction[0]) for scene in scenes] for scenes in (plain, varied)]
    assert np.std(lit[1]) > np.std(lit[0])
    assert all(abs(np.linalg.norm(scene.light_direction) - 1) < 1e-5 for scene in varied)


def test_a_share_of_varied_faces_has_beards_patterns_and_accessories() -> None:
    scenes = [sample_varied_scene(0, index, glasses=VARIED_RATE, hat=VARIED_RATE) for index in range(400)]
    shares = {name: np.mean([getattr(s, name) is not None for s in scenes]) for name in ("beard", "pattern", "hat")}
    assert shares == pytest.approx({"beard": 0.3, "pattern": 0.5, "hat": 0.1}, abs=0.07)
    assert {s.beard.style for s in scenes if s.beard} == set(BEARD_STYLES)
    assert {s.pattern.style for s in scenes if s.pattern} == set(PATTERN_STYLES)


@pytest.mark.parametrize("style", BEARD_STYLES)
def test_a_beard_lies_around_the_mouth_is_skin_among_the_ten_classes_and_hides_no_lip(style: str) -> None:
    bare = replace(sample_scene(0, 0, glasses=0, hat=0), yaw=0.0, pitch=0.0, roll=0.0)
    face, shaved = (render_scene(replace(bare, beard=beard), 128) for beard in (Beard(style, 1.0, COLOR), None))
    rows, _ = np.nonzero(face.parts == Part.BEARD)
    eyes, _ = np.nonzero(face.parts == Part.IRIS_LEFT)
    assert len(rows) > 20 and rows.min() > eyes.max()
    assert np.array_equal(face.mask, shaved.mask) and CLASS_OF_PART[Part.BEARD] == CLASS_OF_PART[Part.SKIN]
    for lip in (Part.UPPER_LIP, Part.LOWER_LIP):
        assert np.array_equal(face.parts == lip, shaved.parts == lip)


@pytest.mark.parametrize("style", PATTERN_STYLES)
def test_a_pattern_has_both_colors_of_the_clothing_and_changes_no_label(style: str) -> None:
    bare = replace(sample_scene(0, 0, glasses=0, hat=0), cloth=np.array([0.05, 0.05, 0.9], np.float32))
    plain, patterned = (
        render_scene(replace(bare, pattern=pattern), 128) for pattern in (None, Pattern(style, 12.0, 0.5, COLOR))
    )
    assert np.array_equal(plain.parts, patterned.parts)
    red, blue = patterned.image[patterned.parts == Part.CLOTHING][:, [0, 2]].astype(int).T
    assert (red > blue).mean() > 0.1 and (blue > red).mean() > 0.1


def test_the_dataset_gives_varied_faces_when_asked() -> None:
    plain, varied = (RenderedFaces("test", num_images=1, size=32, varied=varied) for varied in (False, True))
    assert not np.array_equal(plain[0][0].numpy(), varied[0][0].numpy())
    assert np.array_equal(varied.scene(0).image, render_face(0, 2 * 2**32, size=32, varied=True).image)
