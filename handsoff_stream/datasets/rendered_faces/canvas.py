"""The frame buffer of the renderer: depth, label and color of each sample, and the light that shades them.

Knows depth testing, one directional light, soft shadows, supersampling, and how samples become pixels. Does not know
shapes (`raycast`), nor what a label means.

Arrays are float32, and colors are linear. Shape letters: P hit samples, S all samples of the frame (row-major), H W
image size, 3 the axes x, y, z or the channels R, G, B.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from handsoff_stream.datasets.rendered_faces.raycast import (
    MISS,
    SUPERSAMPLES,
    Array,
    Camera,
    Ellipsoid,
    Hits,
    smoothstep,
)

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Light:
    """A directional light and an ambient light that is stronger from above.

    direction: [3], unit vector towards the light. color, ambient: linear RGB [3].
    """

    direction: Array
    color: Array
    ambient: Array

    def shade(self, normals_3P: Array, albedo_3P: Array, gloss_P: float | Array, exposure_P: float | Array) -> Array:
        """Linear color float32 [3, P] of lit samples.

        Args:
            normals_3P: unit normals.
            albedo_3P: linear RGB.
            gloss_P: strength of the highlight, at least 0.
            exposure_P: in [0, 1]; 0 removes the directional light and half of the ambient light.
        """
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
        lit = self.color[:, None] * diffuse + self.ambient[:, None] * sky
        return np.asarray(albedo_3P * lit + self.color[:, None] * shine, np.float32)


class Canvas:
    """Depth, label and linear color of each sample of a frame.

    z: [S], `MISS` where nothing was drawn. label: uint8 [S]. color: [3, S].
    """

    def __init__(self, camera: Camera, light: Light) -> None:
        samples = camera.side**2
        self.camera, self.light = camera, light
        self.z = np.full(samples, MISS, np.float32)
        self.label = np.zeros(samples, np.uint8)
        self.color = np.zeros((3, samples), np.float32)

    def draw(
        self,
        hits: Hits,
        label: int | NDArray[np.uint8],
        albedo: Array,
        *,
        gloss: float | Array = 0.0,
        exposure: float | Array = 1.0,
    ) -> None:
        """Shade and write the hits that are nearer than what was drawn before.

        Args:
            hits: P hits.
            label: one label, or uint8 [P].
            albedo: linear RGB, [3] or [3, P].
            gloss: strength of the highlight, one number or [P].
            exposure: in [0, 1], one number or [P]; see `Light.shade`.
        """
        nearer = np.flatnonzero(hits.points[2] > self.z[hits.index])
        index = hits.index[nearer]
        self.z[index] = hits.points[2].take(nearer)
        self.label[index] = label[nearer] if isinstance(label, np.ndarray) else label
        color = self.light.shade(
            hits.normals.take(nearer, 1),
            albedo[:, None] if albedo.ndim == 1 else albedo.take(nearer, 1),
            gloss[nearer] if isinstance(gloss, np.ndarray) else gloss,
            exposure[nearer] if isinstance(exposure, np.ndarray) else exposure,
        )
        color *= 1.3 / (1 + 0.45 * color)  # highlights are compressed instead of clipped
        for channel, values in zip(self.color, color, strict=True):
            channel[index] = values

    def image(self, background: Array) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], gamma 2; `background`: linear [H, W, 3], visible where rays hit nothing."""
        size = self.camera.size
        cover = pool((self.z > MISS / 2).astype(np.float32), size).mean(0)
        color = np.stack([pool(np.minimum(channel, 1), size).mean(0) for channel in self.color], -1)
        linear = np.clip(color + background * (1 - cover)[..., None], 0, 1)
        return np.asarray(np.sqrt(linear) * 255 + 0.5).astype(np.uint8)

    def mask(self, class_of_label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W]: the most frequent class of each pixel's four samples; ties go to the larger id.

        `class_of_label`: uint8 [labels], the class of each label.
        """
        first, second, third, last = np.sort(pool(class_of_label[self.label], self.camera.size), axis=0)
        pair = np.where(first == second, first, last)
        mode = np.where(third == last, last, np.where(second == third, second, pair))
        return mode.astype(np.uint8)

    def parts(self, class_of_label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W]: each pixel's most frequent label among the samples that have the pixel's class in `mask`.

        Ties go to the larger id. Hence `class_of_label` of this array is `mask`.
        """
        labels = pool(self.label, self.camera.size).astype(np.uint16)
        votes = (labels[:, None] == labels[None]).sum(0, dtype=np.uint16)
        votes[class_of_label[labels] != self.mask(class_of_label)] = 0
        return ((votes << 8) + labels).max(0).astype(np.uint8)

    def nearest(self) -> Array:
        """float32 [H, W]: the largest z of each pixel's samples, -inf where no sample hits anything."""
        z = pool(self.z, self.camera.size).max(0)
        return np.where(z > MISS / 2, z, np.float32(-np.inf))


def pool(samples_S: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """Samples [S] => [4, H, W]: the four samples of each pixel; `size`: H = W."""
    grid = samples_S.reshape(size, SUPERSAMPLES, size, SUPERSAMPLES)
    return np.ascontiguousarray(grid.transpose(1, 3, 0, 2)).reshape(SUPERSAMPLES**2, size, size)


def soft_shadow(points_3P: Array, light: Array, body: Ellipsoid, *, strength: float, softness: float) -> Array:
    """Share of the light that reaches each point past one ellipsoid, [P] in [1 - strength, 1].

    Args:
        points_3P: world coordinates.
        light: [3], unit vector towards the light.
        body: the ellipsoid that casts the shadow.
        strength: share of the light that the full shadow removes, in [0, 1].
        softness: width of the shadow's edge, relative to the body.
    """
    quadric = body.quadric()
    offset = points_3P - body.center[:, None]
    towards = quadric @ light
    along = towards @ offset
    square = float(light @ towards)
    # Squared distance of the ray's nearest point, in units where the ellipsoid is the unit sphere.
    nearest = np.einsum("ap,ap->p", offset, quadric @ offset) - along * np.abs(along) / square
    ahead = smoothstep(0.2, -0.2, along)
    return 1 - np.float32(strength) * ahead * smoothstep(1 + softness, 1 - softness, nearest)
