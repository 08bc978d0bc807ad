"""Varied scenes, closer to photographs: wide poses, hard and colored light, unusual colors, beards, patterns.

Knows distributions, and turns a plain scene into a varied one. Does not know how anything is rendered. Framing and the
smooth backgrounds do not change, so that a small generator can still learn the images.

Lengths are in head radii, angles in radians, colors linear RGB in [0, 1].
"""

import colorsys
from dataclasses import replace
from math import radians
from typing import Any

import numpy as np

from handsoff_stream.datasets.rendered_faces.raycast import Array
from handsoff_stream.datasets.rendered_faces.scene import (
    STREAM_VARIETY,
    Beard,
    FaceScene,
    Pattern,
    random_stream,
    sample_scene,
)

BEARD_STYLES = ("moustache", "goatee", "full", "stubble")
PATTERN_STYLES = ("stripes", "checks", "dots")


def sample_varied_scene(seed: int, index: int, *, glasses: float, hat: float) -> FaceScene:
    """The scene that `sample_scene` draws for (seed, index), varied with additional random numbers."""
    scene = sample_scene(seed, index, glasses=glasses, hat=hat)
    return _vary(scene, random_stream(seed, index, STREAM_VARIETY))


def _vary(scene: FaceScene, rng: np.random.Generator) -> FaceScene:
    """The scene with new pose, light, colors and shape from wider distributions; accessories do not change."""
    hair_color = _any_color(rng, 0.15, 1.0, 0.05, 0.9) if rng.random() < 0.35 else scene.hair.color
    scene = replace(scene, hair=replace(scene.hair, color=hair_color), **_pose(rng), **_shape(rng))
    scene = replace(scene, **_light(rng), **_surroundings(rng), beard=_beard(rng, scene))
    if rng.random() < 0.35:
        scene = replace(scene, brow_color=np.minimum(hair_color * 0.8, 1).astype(np.float32))
    return scene


def _any_color(rng: np.random.Generator, saturation: float, most: float, value: float, brightest: float) -> Array:
    """Linear RGB of any hue, with a saturation in [saturation, most] and a display brightness in [value, brightest]."""
    color = colorsys.hsv_to_rgb(rng.random(), rng.uniform(saturation, most), rng.uniform(value, brightest))
    return np.square(np.array(color, np.float32))


def _pose(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "yaw": radians(rng.uniform(-60, 60)),
        "pitch": radians(rng.uniform(-22, 22)),
        "roll": radians(rng.uniform(-15, 15)),
    }


def _shape(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "width": rng.uniform(0.90, 1.08),
        "jaw": rng.uniform(0.80, 1.18),
        "chin": rng.uniform(-0.12, 0.10),
        "cheeks": rng.uniform(0.75, 1.2),
        "nose": rng.uniform(0.75, 1.4),
        "nose_length": rng.uniform(-0.08, 0.10),
        "ears": rng.uniform(0.75, 1.3),
        "eye_spacing": rng.uniform(0.32, 0.40),
        "eye_width": rng.uniform(0.16, 0.23),
        "eye_height": rng.uniform(0.05, 0.16),
        "eye_tilt": rng.uniform(-0.14, 0.22),
        "gaze": (rng.uniform(-0.09, 0.09), rng.uniform(-0.03, 0.04)),
        "brow_height": rng.uniform(0.25, 0.36),
        "brow_width": rng.uniform(0.18, 0.28),
        "brow_thickness": rng.uniform(0.025, 0.09),
        "brow_arch": rng.uniform(-0.02, 0.12),
        "brow_tilt": rng.uniform(-0.15, 0.08),
        "mouth_width": rng.uniform(0.20, 0.38),
        "smile": rng.uniform(-0.10, 0.16),
        "lips": rng.uniform(0.04, 0.11),
        "mouth_open": max(0.0, rng.uniform(-0.22, 0.22)),
    }


def _light(rng: np.random.Generator) -> dict[str, Any]:
    azimuth, elevation = rng.uniform(-1.9, 1.9), rng.uniform(-0.2, 1.1)
    level = np.cos(elevation)
    direction = np.array([np.sin(azimuth) * level, np.sin(elevation), np.cos(azimuth) * level], np.float32)
    tint = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.45), 1)
    other = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.45), 1)
    return {
        "light_direction": direction,
        "light_color": (rng.uniform(0.6, 1.2) * np.array(tint)).astype(np.float32),
        "ambient": (rng.uniform(0.10, 0.40) * np.array(other)).astype(np.float32),
    }


def _surroundings(rng: np.random.Generator) -> dict[str, Any]:
    """Background and clothing."""
    blobs = np.zeros((3, 7), np.float32)
    for blob in blobs:
        blob[:3] = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.08, 0.4)
        blob[3], blob[4:] = rng.uniform(0.4, 1.0), _any_color(rng, 0, 0.8, 0.05, 1)
    pattern = None
    if rng.random() < 0.5:
        style = PATTERN_STYLES[int(rng.integers(len(PATTERN_STYLES)))]
        pattern = Pattern(style, rng.uniform(7, 16), rng.uniform(0, np.pi), _any_color(rng, 0, 0.9, 0.05, 1))
    cloth, collar = _any_color(rng, 0, 0.9, 0.05, 1), _any_color(rng, 0, 0.9, 0.05, 1)
    return {
        "background": np.stack([_any_color(rng, 0, 0.8, 0.05, 1) for _ in range(2)]),
        "blobs": blobs,
        "cloth": cloth,
        "collar": collar if rng.random() < 0.6 else cloth,
        "collar_width": rng.uniform(-0.06, 0.22),
        "pattern": pattern,
    }


def _beard(rng: np.random.Generator, scene: FaceScene) -> Beard | None:
    if rng.random() > 0.3:
        return None
    style = BEARD_STYLES[int(rng.integers(len(BEARD_STYLES)))]
    color = scene.hair.color * rng.uniform(0.6, 1.0)
    return Beard(style, rng.uniform(0.8, 1.2), color.astype(np.float32))
