"""What the camera sees: a depth buffer of samples with labels and colours, and the light that shades them.

Knows: depth testing, one directional light, supersampling, how samples become pixels. It does not know shapes
(`raycast`), nor what a label means.

Arrays are float32, colours linear. Letters: P hit samples, S all samples of the frame (row-major), 3 the axes
x, y, z or the channels R, G, B.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from handsoff_stream.datasets.rendered_faces.raycast import MISS, SUPERSAMPLES, Array, Camera, Hits

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Light:
    """A directional light, unit `direction` pointing to it, over a sky-and-ground ambient."""

    direction: Array
    colour: Array
    ambient: Array

    def shade(self, normals_3P: Array, albedo_3P: Array, gloss_P: float | Array, exposure_P: float | Array) -> Array:
        """Linear colour [3, P]; `exposure` in [0, 1] dims the key light fully and the ambient by half."""
        half = self.direction + np.array([0, 0, 1], np.float32)
        half /= np.linalg.norm(half)
        facing = self.direction @ normals_3P
        diffuse = np.clip((facing + 0.25) * np.float32(1 / 1.25), 0, 1) * exposure_P
        sky = (0.72 + 0.28 * normals_3P[1]) * (0.5 + 0.5 * exposure_P)
        rim = np.clip(1 - normals_3P[2], 0, 1)
        sky += 0.35 * rim * rim * rim
        shine = np.clip(half @ normals_3P, 0, 1)
        for _ in range(4):
            shine *= shine
        shine *= gloss_P * exposure_P
        lit = self.colour[:, None] * diffuse + self.ambient[:, None] * sky
        return np.asarray(albedo_3P * lit + self.colour[:, None] * shine, np.float32)


class Canvas:
    """What the camera sees, sample by sample: depth, label and linear colour."""

    def __init__(self, camera: Camera, light: Light) -> None:
        samples = camera.side**2
        self.camera, self.light = camera, light
        self.z = np.full(samples, MISS, np.float32)
        self.label = np.zeros(samples, np.uint8)
        self.colour = np.zeros((3, samples), np.float32)

    def draw(
        self,
        hits: Hits,
        label: int | NDArray[np.uint8],
        albedo: Array,
        *,
        gloss: float | Array = 0.0,
        exposure: float | Array = 1.0,
    ) -> None:
        """Shades and writes the hits that are nearer than what is there; albedo is linear, [3] or [3, P]."""
        nearer = np.flatnonzero(hits.points[2] > self.z[hits.index])
        index = hits.index[nearer]
        self.z[index] = hits.points[2].take(nearer)
        self.label[index] = label[nearer] if isinstance(label, np.ndarray) else label
        colour = self.light.shade(
            hits.normals.take(nearer, 1),
            albedo[:, None] if albedo.ndim == 1 else albedo.take(nearer, 1),
            gloss[nearer] if isinstance(gloss, np.ndarray) else gloss,
            exposure[nearer] if isinstance(exposure, np.ndarray) else exposure,
        )
        colour *= 1.3 / (1 + 0.45 * colour)  # highlights roll off instead of clipping
        for channel, values in zip(self.colour, colour, strict=True):
            channel[index] = values

    def image(self, background: Array) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], gamma 2; `background` is linear [H, W, 3] and shows where rays hit nothing."""
        size = self.camera.size
        cover = pool((self.z > MISS / 2).astype(np.float32), size).mean(0)
        colour = np.stack([pool(np.minimum(channel, 1), size).mean(0) for channel in self.colour], -1)
        linear = np.clip(colour + background * (1 - cover)[..., None], 0, 1)
        return np.asarray(np.sqrt(linear) * 255 + 0.5).astype(np.uint8)

    def mask(self, class_of_label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W]: the most frequent class of each pixel's four samples, ties to the larger id.

        `class_of_label` uint8 [labels] names the class of each label.
        """
        first, second, third, last = np.sort(pool(class_of_label[self.label], self.camera.size), axis=0)
        pair = np.where(first == second, first, last)
        mode = np.where(third == last, last, np.where(second == third, second, pair))
        return mode.astype(np.uint8)

    def parts(self, class_of_label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W]: the most frequent label among each pixel's samples that have the pixel's class in `mask`.

        Ties go to the larger id. So the class of a pixel's label is the pixel's class.
        """
        labels = pool(self.label, self.camera.size).astype(np.uint16)
        votes = (labels[:, None] == labels[None]).sum(0, dtype=np.uint16)
        votes[class_of_label[labels] != self.mask(class_of_label)] = 0
        return ((votes << 8) + labels).max(0).astype(np.uint8)

    def nearest(self) -> Array:
        """float32 [H, W]: the largest z of each pixel's samples, -inf where all of them miss."""
        z = pool(self.z, self.camera.size).max(0)
        return np.where(z > MISS / 2, z, np.float32(-np.inf))


def pool(samples_S: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """[S] => [4, H, W]: the samples of each pixel."""
    grid = samples_S.reshape(size, SUPERSAMPLES, size, SUPERSAMPLES)
    return np.ascontiguousarray(grid.transpose(1, 3, 0, 2)).reshape(SUPERSAMPLES**2, size, size)
