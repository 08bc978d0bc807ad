"""The fine classes of the rendered faces: each belongs to one of the ten classes and lies in its place on the face."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from handsoff_stream.datasets.rendered_faces import RenderedFaces, labelled_faces
from handsoff_stream.datasets.rendered_faces.canvas import Canvas, Light, pool
from handsoff_stream.datasets.rendered_faces.dataset import RenderedFace, render_face, render_scene
from handsoff_stream.datasets.rendered_faces.labels import (
    CLASS_NAMES,
    CLASS_OF_PART,
    FINE_CLASS_NAMES,
    FINE_PALETTE,
    Part,
)
from handsoff_stream.datasets.rendered_faces.raycast import Camera
from handsoff_stream.datasets.rendered_faces.scene import sample_scene

TEN_CLASS_MASKS = "aedcc290eb18bef4cc0a1a3e950b6cc2aa0a8fc25b363d76927fb1f1041259f2"
"""SHA-256 of the images and ten-class masks of faces 0 to 15 at 64 pixels, from before there were parts."""


def frontal(index: int = 0) -> RenderedFace:
    scene = sample_scene(0, index, glasses=0, hat=0)
    return render_scene(replace(scene, yaw=0.0, pitch=0.0, roll=0.0, mouth_open=0.12), 128)


def center(face: RenderedFace, part: Part) -> tuple[float, float]:
    """Mean (row, column) of a part's pixels."""
    rows, columns = np.nonzero(face.parts == part)
    return float(rows.mean()), float(columns.mean())


def test_the_ten_classes_of_a_face_are_those_from_before_there_were_parts() -> None:
    digest = hashlib.sha256()
    for index in range(16):
        face = render_face(0, index, size=64, glasses=0.3, hat=0.3)
        digest.update(face.image.tobytes())
        digest.update(face.mask.tobytes())
    assert digest.hexdigest() == TEN_CLASS_MASKS


@pytest.mark.parametrize("size", [16, 64, 128])
def test_every_pixels_part_belongs_to_the_pixels_class(size: int) -> None:
    for index in range(6):
        face = render_face(3, index, size=size, glasses=0.5, hat=0.5)
        assert np.array_equal(CLASS_OF_PART[face.parts], face.mask)


def test_parts_are_grouped_by_class_in_the_order_of_the_ten() -> None:
    assert len(CLASS_OF_PART) == len(Part) == len(FINE_CLASS_NAMES) == len(set(FINE_PALETTE))
    assert [int(k) for k in dict.fromkeys(CLASS_OF_PART.tolist())] == list(range(len(CLASS_NAMES)))
    assert (np.diff(CLASS_OF_PART.astype(int)) >= 0).all()


def test_a_pixels_part_is_the_most_frequent_of_its_class_and_ties_go_to_the_larger_id() -> None:
    canvas = Canvas(Camera(2, 1.0, 0.0, 0.0), Light(np.zeros(3, np.float32), np.zeros(3), np.zeros(3)))
    samples = np.array([[5, 5, 6, 9], [9, 9, 5, 6], [0, 0, 0, 0], [5, 6, 9, 9]], np.uint8)  # [pixel, sample]
    where = pool(np.arange(16), 2).reshape(4, 4)  # [sample, pixel] => position on the canvas
    canvas.label[where.T] = samples
    class_of_label = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2], np.uint8)
    assert canvas.mask(class_of_label).ravel().tolist() == [1, 2, 0, 2]
    assert canvas.parts(class_of_label).ravel().tolist() == [5, 9, 0, 9]


def test_parts_lie_where_anatomy_puts_them() -> None:
    face = frontal()
    row = {part: center(face, part)[0] for part in Part if (face.parts == part).any()}
    assert row[Part.FOREHEAD] < row[Part.BROW_LEFT] < row[Part.LASHES_LEFT] < row[Part.IRIS_LEFT]
    assert row[Part.IRIS_LEFT] < row[Part.CHEEK_LEFT] < row[Part.CHIN] < row[Part.NECK] < row[Part.CLOTHING]
    assert row[Part.NOSE_BRIDGE] < row[Part.NOSE_TIP] < row[Part.PHILTRUM] < row[Part.UPPER_LIP]
    assert row[Part.UPPER_LIP] < row[Part.TEETH] < row[Part.MOUTH_INSIDE] < row[Part.LOWER_LIP] < row[Part.CHIN]
    middle = center(face, Part.NOSE_TIP)[1]
    for part in Part:
        if part.name.endswith("_LEFT") and part in row:
            assert center(face, part)[1] < middle < center(face, Part[part.name.replace("LEFT", "RIGHT")])[1], part


def test_the_pupil_lies_in_the_iris_and_the_iris_in_the_sclera() -> None:
    face = frontal()
    for side in ("LEFT", "RIGHT"):
        boxes = []
        for name in ("SCLERA", "IRIS", "PUPIL"):
            columns = np.nonzero(face.parts == Part[f"{name}_{side}"])[1]
            boxes.append((columns.min(), columns.max()))
        assert boxes[0][0] < boxes[1][0] < boxes[2][0] <= boxes[2][1] < boxes[1][1] < boxes[0][1]


def test_fine_masks_are_asked_for_and_name_their_classes() -> None:
    coarse, fine = (RenderedFaces("test", num_images=2, size=48, fine=fine) for fine in (False, True))
    assert coarse.class_names == CLASS_NAMES and fine.class_names == FINE_CLASS_NAMES
    (image, mask), (same, parts) = coarse[1], fine[1]
    assert torch.equal(image, same) and parts.dtype == torch.int64
    assert torch.equal(torch.from_numpy(CLASS_OF_PART).long()[parts], mask)


def test_every_fine_class_occurs_among_the_sixteen_labelled_faces_and_beards_among_the_varied() -> None:
    plain, varied = (
        {int(part) for i in range(16) for part in labelled_faces(16, fine=True, varied=varied)[i][1].unique()}
        for varied in (False, True)
    )
    assert varied == {int(part) for part in Part}
    assert plain == varied - {int(Part.BEARD)}
