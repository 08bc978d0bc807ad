"""Rendered faces: labelled images of 3-D heads, each a pure function of (seed, index), without a download.

Knows the splits, the ground truth, and the torch Dataset. Does not know anatomy (`parts`), class names (`labels`), hair
and accessories (`wear`), distributions (`scene`), ray casting (`raycast`) or shading (`canvas`).

The mask has the eight classes of CelebAMask-HQ-8, in which neck and clothing are background, and two rare ones, glasses
and hat. Glasses are rims, bridge and temples; pixels behind the lenses have the classes of the face. A second mask
divides these ten classes into parts. The image is the mean of 2 x 2 samples per pixel. In the masks a pixel has the
most frequent label of its four samples; ties go to the larger id.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import degrees

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from handsoff_stream.datasets.rendered_faces import parts, wear
from handsoff_stream.datasets.rendered_faces.labels import CLASS_NAMES, CLASS_OF_PART, FINE_CLASS_NAMES
from handsoff_stream.datasets.rendered_faces.parts import EYE_Y, MOUTH_Y, Stage
from handsoff_stream.datasets.rendered_faces.raycast import Array
from handsoff_stream.datasets.rendered_faces.scene import FaceScene, sample_scene
from handsoff_stream.datasets.rendered_faces.variety import sample_varied_scene

LANDMARK_NAMES: tuple[str, ...] = (
    "left_eye",
    "right_eye",
    "nose_tip",
    "left_mouth_corner",
    "right_mouth_corner",
)
SPLIT_SIZE = 2**32
SPLITS: dict[str, int] = {name: i * SPLIT_SIZE for i, name in enumerate(("train", "validation", "test", "generator"))}
NATURAL_RATE, VARIED_RATE = 0.05, 0.10  # share of plain and of varied faces that wear glasses, or a hat
CAMERA_DISTANCE = 4.0  # from the camera's plane to the center of the head, in head radii

Transforms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Attributes:
    """Pose and accessories of a rendered face; angles in degrees.

    yaw > 0 turns the face to the image's right, pitch > 0 upwards, roll > 0 tilts it counter-clockwise. hair: one of
    `scene.HAIR_STYLES`.
    """

    yaw: float
    pitch: float
    roll: float
    hair: str
    glasses: bool
    hat: bool


@dataclass(frozen=True)
class RenderedFace:
    """One image with its ground truth.

    image: uint8 [H, W, 3]. mask: uint8 [H, W], ids into `CLASS_NAMES`. parts: uint8 [H, W], ids into
    `FINE_CLASS_NAMES`; `CLASS_OF_PART[parts]` is the mask.
    landmarks: float32 [5, 2], (x, y) of `LANDMARK_NAMES` in pixels, with pixel centers at integers; left and right are
    those of the image in a frontal pose.
    visible: bool [5], false if a landmark is outside the image or hidden by the head itself; hair, hats and glasses do
    not count.
    depth: float32 [H, W], distance from the camera's plane in head radii (the head's center is at `CAMERA_DISTANCE`) of
    the pixel's nearest sample, +inf if no sample hits anything. `np.isfinite(depth)` is the validity mask. Neck and
    clothing have a depth although their class is background.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    landmarks: Array
    visible: NDArray[np.bool_]
    depth: Array
    attributes: Attributes


def _background(scene: FaceScene, size: int) -> Array:
    """Linear RGB [H, W, 3]: a gradient from top to bottom with soft blobs."""
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = grid[None, :, None], grid[:, None, None]
    picture: Array = scene.background[0] * (1 - y) + scene.background[1] * y + np.zeros_like(x)
    for blob in scene.blobs:
        if blob[3] > 0:
            reach = blob[3] * np.exp(-((x - blob[0]) ** 2 + (y - blob[1]) ** 2) / blob[2] ** 2)
            picture += reach * (blob[4:] - picture)
    return picture


def _landmark_points(stage: Stage) -> Array:
    """World coordinates [5, 3] of the landmarks, on the face's surface."""
    scene = stage.scene
    corner = 0.93 * scene.mouth_width
    eye, corner = scene.eye_spacing, 0.93 * scene.mouth_width
    u = np.array([-eye, eye, 0, -corner, corner], np.float32)
    v = np.array([EYE_Y, EYE_Y, 0, MOUTH_Y, MOUTH_Y], np.float32)
    v[3:] += 0.5 * scene.smile
    local = np.stack([u, v, parts.face_z(scene, u, v)], 1)
    local[2] = parts.nose_tip(scene) + np.array([0, 0, 0.15], np.float32)
    return np.stack([stage.head.to_world((x, y, z)) for x, y, z in local.tolist()])


def _landmarks(stage: Stage, head_z: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Pixel coordinates [5, 2] and visibility [5]; `head_z` [S] is the depth buffer of the bare head."""
    camera = stage.camera
    points = _landmark_points(stage)
    pixels = np.array([camera.project(point) for point in points], np.float32)
    visible = np.zeros(len(points), np.bool_)
    for i, (point, (x, y)) in enumerate(zip(points, pixels, strict=True)):
        if 0 <= x + 0.5 < camera.size and 0 <= y + 0.5 < camera.size:
            row, column = (int((at + 0.5) * camera.side / camera.size) for at in (y, x))
            # The surface on which a landmark lies does not hide it; a surface clearly in front of it does.
            visible[i] = point[2] > head_z[row * camera.side + column] - 0.12
    return pixels, visible


def render_scene(scene: FaceScene, size: int) -> RenderedFace:
    """The image and ground truth of one scene at size x size pixels."""
    stage = parts.make_stage(scene, size)
    parts.draw_head(stage)
    pixels, visible = _landmarks(stage, stage.canvas.z.copy())
    parts.draw_ears(stage)
    parts.draw_body(stage)
    wear.draw_hair(stage)
    wear.draw_hat(stage)
    wear.draw_glasses(stage)
    return RenderedFace(
        image=stage.canvas.image(_background(scene, size)),
        mask=stage.canvas.mask(CLASS_OF_PART),
        parts=stage.canvas.parts(CLASS_OF_PART),
        landmarks=pixels,
        visible=visible,
        depth=np.float32(CAMERA_DISTANCE) - stage.canvas.nearest(),
        attributes=Attributes(
            yaw=degrees(scene.yaw),
            pitch=degrees(scene.pitch),
            roll=degrees(scene.roll),
            hair=scene.hair.style,
            glasses=scene.glasses is not None,
            hat=scene.hat is not None,
        ),
    )


def _check(size: int, glasses: float | None, hat: float | None) -> None:
    if size < 1:
        raise ValueError(f"size is {size}, so there is nothing to render; give a positive number of pixels")
    for name, probability in (("glasses", glasses), ("hat", hat)):
        if probability is not None and not 0 <= probability <= 1:
            raise ValueError(f"{name} is {probability}, which is not a probability; give a number in [0, 1]")


def render_face(
    seed: int,
    index: int,
    *,
    size: int = 128,
    glasses: float | None = None,
    hat: float | None = None,
    varied: bool = False,
) -> RenderedFace:
    """The face of (seed, index): the same bits for the same arguments.

    Args:
        seed: in [0, 2**64).
        index: position in the concatenation of all splits; `SPLITS` says where each split begins.
        size: height and width in pixels; it scales the image and changes nothing else.
        glasses: probability of glasses, which changes nothing else; None means `NATURAL_RATE`, or `VARIED_RATE` for
            varied faces.
        hat: likewise, for a hat.
        varied: draw pose, light, colors and shape from wider distributions, and add beards and patterns (`variety`).

    Raises:
        ValueError: a size below 1, a probability outside [0, 1], or a seed outside its range.
        IndexError: an index outside all splits.
    """
    _check(size, glasses, hat)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, but the generator is keyed with 64 bits; give one in [0, 2**64)")
    end = len(SPLITS) * SPLIT_SIZE
    if not 0 <= index < end:
        raise IndexError(f"index is {index}, outside every split; give one in [0, {end})")
    rate = VARIED_RATE if varied else NATURAL_RATE
    worn = {"glasses": rate if glasses is None else glasses, "hat": rate if hat is None else hat}
    return render_scene((sample_varied_scene if varied else sample_scene)(seed, index, **worn), size)


class RenderedFaces(Dataset[tuple[Tensor, Tensor]]):
    """`num_images` faces of one split, as pairs (image, mask).

    image: float32 [3, H, W], multiples of 1/255 in [0, 1]. mask: int64 [H, W], ids into `class_names`.

    Args:
        split: "train", "validation", "test", or "generator" for the images that a generator is trained on; no face
            occurs in two splits.
        num_images: number of faces.
        size: height and width in pixels.
        seed: in [0, 2**64).
        glasses: as in `render_face`.
        hat: as in `render_face`.
        fine: whether `class_names` are the parts, `FINE_CLASS_NAMES`, instead of the ten classes, `CLASS_NAMES`.
        varied: as in `render_face`.
        transforms: called as `transforms(image, mask)`; returns both.

    Raises:
        ValueError: an unknown split, a size below 1, a probability outside [0, 1], or more images than a split holds.
        IndexError: by indexing, for an index outside [0, num_images).
    """

    def __init__(
        self,
        split: str,
        *,
        num_images: int,
        size: int = 128,
        seed: int = 0,
        glasses: float | None = None,
        hat: float | None = None,
        fine: bool = False,
        varied: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, which does not exist; choose one of {', '.join(SPLITS)}")
        if not 1 <= num_images <= SPLIT_SIZE:
            raise ValueError(f"num_images is {num_images}; a split holds between 1 and {SPLIT_SIZE} images")
        _check(size, glasses, hat)
        self.split, self.num_images, self.size, self.seed = split, num_images, size, seed
        self.glasses, self.hat, self.fine, self.varied, self.transforms = glasses, hat, fine, varied, transforms
        self.class_names = FINE_CLASS_NAMES if fine else CLASS_NAMES

    def __len__(self) -> int:
        return self.num_images

    def scene(self, index: int) -> RenderedFace:
        """Image `index` with its complete ground truth.

        Raises:
            IndexError: an index outside [0, num_images).
        """
        if not 0 <= index < self.num_images:
            raise IndexError(f"index is {index}, but {self.split} has {self.num_images} images; start at 0")
        position = SPLITS[self.split] + index
        return render_face(self.seed, position, size=self.size, glasses=self.glasses, hat=self.hat, varied=self.varied)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        face = self.scene(index)
        image = torch.from_numpy(face.image).permute(2, 0, 1).contiguous().float() / 255
        mask = torch.from_numpy(face.parts if self.fine else face.mask).long()
        return (image, mask) if self.transforms is None else self.transforms(image, mask)
