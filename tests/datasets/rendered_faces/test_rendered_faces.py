"""The included domain: determinism, ground truth, rare classes, and the ray casting."""

from collections.abc import Callable
from dataclasses import fields, replace
from math import radians

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from handsoff_stream.datasets.rendered_faces.canvas import Canvas, Light, pool
from handsoff_stream.datasets.rendered_faces.dataset import (
    CAMERA_DISTANCE,
    LANDMARK_NAMES,
    SPLIT_SIZE,
    SPLITS,
    RenderedFace,
    RenderedFaces,
    render_face,
    render_scene,
)
from handsoff_stream.datasets.rendered_faces.labels import (
    CLASS_NAMES,
    PALETTE,
)
from handsoff_stream.datasets.rendered_faces.raycast import (
    Array,
    Blob,
    Camera,
    Ellipsoid,
    Frame,
    Surface,
    cast_ellipsoids,
    rotation,
)
from handsoff_stream.datasets.rendered_faces.scene import FaceScene, sample_scene

EYES, MOUTH, GLASSES, HAT = (CLASS_NAMES.index(name) for name in ("eyes", "mouth", "glasses", "hat"))
FRONT = Frame(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))


def bits(face: RenderedFace) -> tuple[bytes, ...]:
    return tuple(
        array.tobytes() for array in (face.image, face.mask, face.parts, face.landmarks, face.visible, face.depth)
    )


def bare_scene(index: int = 0, **changes: object) -> FaceScene:
    scene = sample_scene(0, index, glasses=0, hat=0)
    return replace(scene, yaw=0.0, pitch=0.0, roll=0.0, **changes)  # type: ignore[arg-type]


def same(left: object, right: object) -> bool:
    """Equality of scene fields, arrays included."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    if hasattr(left, "__dataclass_fields__") and type(left) is type(right):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))  # type: ignore[arg-type]
    return left == right


def test_a_face_is_a_function_of_seed_and_index() -> None:
    first = bits(render_face(7, 3, size=48))
    render_face(1, 9, size=48)
    np.random.seed(0)
    assert bits(render_face(7, 3, size=48)) == first
    assert bits(render_face(7, 4, size=48)) != first
    assert bits(render_face(8, 3, size=48)) != first


def test_rendering_leaves_the_global_random_state_alone() -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    render_face(0, 0, size=16)
    assert np.random.random() == expected


def test_shapes_dtypes_and_ranges_are_as_documented() -> None:
    face = render_face(0, 0, size=40)
    assert face.image.shape == (40, 40, 3) and face.image.dtype == np.uint8
    assert face.mask.shape == (40, 40) and face.mask.dtype == np.uint8
    assert face.landmarks.shape == (len(LANDMARK_NAMES), 2) and face.landmarks.dtype == np.float32
    assert face.visible.shape == (len(LANDMARK_NAMES),) and face.visible.dtype == np.bool_
    assert face.depth.shape == (40, 40) and face.depth.dtype == np.float32
    assert len(CLASS_NAMES) == len(PALETTE) == 10


def test_another_size_is_the_same_picture_scaled() -> None:
    for index in range(4):
        small, large = (render_face(0, index, size=size, glasses=1, hat=1) for size in (64, 128))
        halved = large.image.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - small.image).mean() < 3
        assert (large.mask[::2, ::2] == small.mask).mean() > 0.95
        np.testing.assert_allclose((large.landmarks + 0.5) / 2, small.landmarks + 0.5, atol=1e-3)
        assert large.attributes == small.attributes


def test_any_size_renders() -> None:
    for size in (1, 2, 17):
        assert render_face(0, 1, size=size, glasses=1, hat=1).mask.shape == (size, size)


def test_splits_are_disjoint_ranges_of_scenes() -> None:
    starts = sorted(SPLITS.values())
    assert set(SPLITS) == {"train", "validation", "test", "generator"}
    assert all(later - earlier >= SPLIT_SIZE for earlier, later in zip(starts, starts[1:], strict=False))
    images = {RenderedFaces(split, num_images=1, size=16).scene(0).image.tobytes() for split in SPLITS}
    assert len(images) == len(SPLITS)


def test_the_eight_face_classes_are_there_and_large_enough_to_be_learned() -> None:
    counts = np.stack([np.bincount(render_face(0, i, glasses=0, hat=0).mask.ravel(), minlength=10) for i in range(40)])
    assert counts.shape[1] == 10
    assert (counts[:, GLASSES:] == 0).all()
    everywhere = [CLASS_NAMES.index(name) for name in ("background", "skin", "nose", "eyes", "mouth")]
    assert (counts[:, everywhere] >= 60).all()
    # Curls may cover brows, long hair the ears, and there are bald heads.
    assert (np.median(counts[:, :8], axis=0) >= 60).all()


def test_glasses_and_hats_are_worn_as_often_as_asked() -> None:
    scenes = [sample_scene(0, i, glasses=0.05, hat=0.2) for i in range(1000)]
    assert 30 <= sum(scene.glasses is not None for scene in scenes) <= 70
    assert 160 <= sum(scene.hat is not None for scene in scenes) <= 240


def test_what_is_worn_is_in_the_mask_and_nothing_else_is() -> None:
    faces = [render_face(0, i, size=64, glasses=0.5, hat=0.5) for i in range(30)]
    for face in faces:
        assert (face.mask == GLASSES).any() == face.attributes.glasses
        assert (face.mask == HAT).any() == face.attributes.hat
        assert face.mask.max() < len(CLASS_NAMES)
    assert {(face.attributes.glasses, face.attributes.hat) for face in faces} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


def test_probabilities_decide_what_is_worn_and_nothing_else() -> None:
    for index in range(20):
        never, always = (sample_scene(3, index, glasses=p, hat=p) for p in (0.0, 1.0))
        assert never.glasses is None and always.glasses is not None and always.hat is not None
        assert same(never, replace(always, glasses=None, hat=None))
        often = sample_scene(3, index, glasses=1.0, hat=0.5)
        assert same(often.glasses, always.glasses)
        assert often.hat is None or same(often.hat, always.hat)


def test_landmarks_lie_on_their_classes() -> None:
    for index in range(25):
        face = render_face(0, index, glasses=0, hat=0)
        left, right, tip, *corners = np.round(face.landmarks).astype(int)
        assert left[0] < tip[0] < right[0] or abs(face.attributes.yaw) > 15
        assert face.mask[left[1], left[0]] == EYES and face.mask[right[1], right[0]] == EYES
        assert face.mask[tip[1], tip[0]] == CLASS_NAMES.index("nose")
        for x, y in corners:
            assert (face.mask[y - 2 : y + 3, x - 2 : x + 3] == MOUTH).any()


def test_a_frontal_face_shows_all_landmarks_and_a_profile_hides_the_far_ones() -> None:
    assert render_scene(bare_scene(), 128).visible.all()
    turned = render_scene(replace(bare_scene(), yaw=radians(80)), 128)
    assert dict(zip(LANDMARK_NAMES, turned.visible.tolist(), strict=True)) == {
        "left_eye": True,
        "right_eye": False,
        "nose_tip": True,
        "left_mouth_corner": True,
        "right_mouth_corner": False,
    }


def test_a_landmark_outside_the_picture_is_not_visible() -> None:
    shifted = render_scene(bare_scene(x0=1.02), 64)
    assert shifted.landmarks[1, 0] > 63.5 and not shifted.visible[1]
    assert shifted.landmarks[0, 0] < 63.5 and shifted.visible[0]


def test_depth_orders_nose_eyes_ears_and_is_infinite_where_nothing_is() -> None:
    face = render_scene(bare_scene(hair=replace(bare_scene().hair, style="bald")), 128)
    x, y = np.round(face.landmarks).astype(int).T
    nose, eye = face.depth[y[2], x[2]], face.depth[y[0], x[0]]
    ear = face.depth[face.mask == CLASS_NAMES.index("ears")].min()
    assert nose < eye < ear < CAMERA_DISTANCE + 0.5
    assert np.isposinf(face.depth[0, 0]) and face.mask[0, 0] == 0
    assert np.isfinite(face.depth[face.mask > 0]).all()
    assert np.isfinite(face.depth[-1, 64]) and face.mask[-1, 64] == 0, "clothing has depth, not a class"


def test_glasses_stand_before_the_face() -> None:
    without, worn = (render_face(0, 2, glasses=p, hat=0) for p in (0, 1))
    rims = worn.mask == GLASSES
    assert rims.sum() > 100
    assert (worn.depth <= without.depth).all()
    # In a pixel at a rim's edge, one of the face's samples may be the nearest.
    assert (worn.depth[rims] < without.depth[rims]).mean() > 0.95
    assert np.array_equal(worn.landmarks, without.landmarks) and np.array_equal(worn.visible, without.visible)


def test_a_dataset_gives_float_images_on_8_bit_levels_and_int64_masks() -> None:
    faces = RenderedFaces("test", num_images=3, size=24, seed=2)
    image, mask = faces[2]
    assert len(faces) == 3
    assert image.dtype == torch.float32 and image.shape == (3, 24, 24)
    assert mask.dtype == torch.int64 and mask.shape == (24, 24)
    face = render_face(2, SPLITS["test"] + 2, size=24)
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), face.image)
    assert torch.equal(image, (image * 255).round() / 255)
    assert np.array_equal(mask.numpy(), face.mask)
    assert bits(faces.scene(2)) == bits(face)


def test_transforms_see_image_and_mask_together() -> None:
    def mirror(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image.flip(-1), mask.flip(-1)

    plain = RenderedFaces("train", num_images=1, size=16)[0]
    mirrored = RenderedFaces("train", num_images=1, size=16, transforms=mirror)[0]
    assert torch.equal(mirrored[0].flip(-1), plain[0]) and torch.equal(mirrored[1].flip(-1), plain[1])


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_the_dataset_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match="2 images"):
        RenderedFaces("train", num_images=2, size=8)[index]


def test_iteration_ends_after_num_images() -> None:
    assert len(list(RenderedFaces("train", num_images=2, size=8))) == 2  # type: ignore[call-overload]


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="split is 'val'.*validation"):
        RenderedFaces("val", num_images=1)
    with pytest.raises(ValueError, match="size is 0"):
        RenderedFaces("train", num_images=1, size=0)
    with pytest.raises(ValueError, match="num_images is 0"):
        RenderedFaces("train", num_images=0)
    with pytest.raises(ValueError, match="glasses is 1.5"):
        RenderedFaces("train", num_images=1, glasses=1.5)
    with pytest.raises(ValueError, match="hat is nan"):
        render_face(0, 0, hat=float("nan"))
    with pytest.raises(ValueError, match="seed is -1"):
        render_face(-1, 0)
    with pytest.raises(IndexError, match="outside every split"):
        render_face(0, 4 * SPLIT_SIZE)


def march(inside_at: Callable[[Array], NDArray[np.bool_]], x: float, y: float) -> float | None:
    """The obvious ray caster: the largest z on a fine grid that is inside."""
    z = np.linspace(2, -2, 8001)
    inside = inside_at(np.stack([np.full_like(z, x), np.full_like(z, y), z]))
    return float(z[np.argmax(inside)]) if inside.any() else None


def quadratic_form(body: Ellipsoid, points: Array) -> Array:
    local = (body.axes.T @ (points - body.center[:, None])) / body.radii[:, None]
    return np.asarray((local**2).sum(0))


def test_an_ellipsoid_is_hit_where_marching_along_the_ray_enters_it() -> None:
    camera = Camera(24, 8.0, 12.0, 12.0)
    body = Ellipsoid.at(FRONT, (0.2, -0.1, 0.3), (0.9, 0.4, 0.6), rotation(0.5, 0.3, -0.4))
    hits = cast_ellipsoids(camera, [body])
    every = Surface(camera, [body])
    assert len(hits.index) > 200
    for x, y, z in hits.points.T[::17]:
        entry = march(lambda p: quadratic_form(body, p) <= 1, x, y)
        assert entry == pytest.approx(float(z), abs=2e-3)
    x, y = camera.rays(every.window)
    missed = [march(lambda p: quadratic_form(body, p) <= 1, a, b) for a in x[:2] for b in y[:2]]
    assert missed == [None] * 4, "the window has room for the whole body"


def test_a_blob_is_hit_where_marching_along_the_ray_enters_its_level_set() -> None:
    bodies = [
        Ellipsoid.at(FRONT, (0, 0.2, -0.1), (0.85, 0.9, 0.9)),
        Ellipsoid.at(FRONT, (0, -0.4, 0.1), (0.6, 0.6, 0.7)),
    ]
    blob = Blob(bodies, [7.0, 4.5])

    def inside(points: Array) -> NDArray[np.bool_]:
        terms = [np.exp(s * (1 - quadratic_form(body, points))) for body, s in zip(bodies, blob.sharpness, strict=True)]
        return np.asarray(sum(terms) >= 1)

    grid = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1.2, 1.2, 9))
    x, y = (axis.ravel().astype(np.float32) for axis in grid)
    z, normals, hit = blob.solve(x, y)
    for i in range(len(x)):
        entry = march(inside, float(x[i]), float(y[i]))
        assert hit[i] == (entry is not None)
        if entry is not None:
            assert z[i] == pytest.approx(entry, abs=0.01)
    np.testing.assert_allclose(np.linalg.norm(normals[:, hit], axis=0), 1, atol=1e-3)


def test_a_pixel_takes_the_most_frequent_label_of_its_samples() -> None:
    light = Light(*(np.array(v, np.float32) for v in ([0, 0, 1], [1, 1, 1], [0, 0, 0])))
    canvas = Canvas(Camera(4, 1.0, 2.0, 2.0), light)
    rng = np.random.default_rng(0)
    canvas.label[:] = rng.integers(0, 4, len(canvas.label))
    for pixel, label in zip(
        pool(canvas.label, 4).reshape(4, -1).T, canvas.mask(np.arange(4, dtype=np.uint8)).ravel(), strict=True
    ):
        counts = np.bincount(pixel, minlength=4)
        assert label == max(range(4), key=lambda k: (counts[k], k))
