"""The random parameters of one face: pose, shape, colors, hair, light, and the two rare accessories.

Knows distributions and the counter-based generator behind them. Does not know how anything is rendered, nor which split
an index belongs to.

Lengths are in head radii (about half the height of a skull), angles in radians, colors linear RGB in [0, 1]. Color
arrays are float32 [3].
"""

from dataclasses import dataclass
from math import radians
from typing import Any

import numpy as np

from handsoff_stream.datasets.rendered_faces.raycast import Array

HAIR_STYLES = ("bald", "buzz", "short", "quiff", "bob", "long", "curly", "bun", "buns")
HAT_STYLES = ("beanie", "cap", "brimmed")
_HAIR_ODDS = (0.06, 0.08, 0.18, 0.14, 0.16, 0.15, 0.11, 0.07, 0.05)

_SKIN = ("f6d7c0", "efc3a2", "e3ad86", "d19a70", "b57a4f", "935d3a", "6f4429", "4f3122")
_HAIR = ("1d1715", "2e211b", "4a2f20", "6b4226", "8a5a30", "b98443", "dcb46a", "a2452a", "8d8a88", "d9d5cd")
_IRIS = ("4a2d1a", "6d4524", "3f6b8f", "5d8fb0", "4e7a4b", "6b6f45", "59636b")
_CLOTH = ("3d5a80", "c8553d", "588157", "e0b04c", "7a5c8e", "2f3e46", "e8e4da", "b56576", "3a7d7c", "9c6644")
_BACK = ("dfe7ec", "c9d8c5", "f0dfc8", "d8cfe3", "a9c3d6", "8fa7a0", "e7c3b8", "6d7f92", "f3efe6", "5f6f63")
_HAT = ("b5403a", "2c4a6e", "d9a441", "3f6b4f", "5b4a6b", "3a3a3f", "c9c2b4", "c46f8a")
_RIM = ("1b1b1f", "5a2e1a", "23395b", "7a1f2b", "3d4a3a")

_STREAM_FACE, _STREAM_GLASSES, _STREAM_HAT, STREAM_VARIETY = range(4)


def linear(code: str) -> Array:
    """Hexadecimal display color => linear RGB (gamma 2), float32 [3]."""
    channels = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return np.square(np.array(channels, np.float32))


@dataclass(frozen=True)
class Glasses:
    """Shape and color of glasses."""

    round: float  # from 0, a rounded square, to 1, a circle
    radius: float
    color: Array


@dataclass(frozen=True)
class Hat:
    """Style, one of `HAT_STYLES`, position and colors of a hat."""

    style: str
    tilt: float
    color: Array
    band: Array


@dataclass(frozen=True)
class Beard:
    """Style, one of `variety.BEARD_STYLES`, relative size and color of a beard."""

    style: str
    size: float
    color: Array


@dataclass(frozen=True)
class Pattern:
    """Pattern of the clothing; style is one of `variety.PATTERN_STYLES`."""

    style: str
    frequency: float  # periods in 2 pi head radii
    angle: float
    color: Array


@dataclass(frozen=True)
class Hair:
    """Style, one of `HAIR_STYLES`, and shape of the hair."""

    style: str
    color: Array
    volume: float  # thickness of the hair over the skull
    line: float  # height of the hairline over the forehead
    part: float  # slope of the hairline, in [-1, 1]
    opening: float  # in [0, 1]; with long hair, larger values cover more of the sides of the face
    length: float
    curl: Array  # [24, 3] jitter of curls and locks in [-1, 1]


@dataclass(frozen=True)
class FaceScene:
    """Everything that `render_scene` needs, apart from the image's size."""

    yaw: float
    pitch: float
    roll: float
    scale: float  # head radius, as a share of the image's size
    x0: float  # position of the head's center, as a share of the image's width; y0: of its height
    y0: float
    skin: Array
    blush: float
    width: float
    jaw: float
    chin: float
    cheeks: float
    nose: float
    nose_length: float
    ears: float
    eye_spacing: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    gaze: tuple[float, float]
    iris: Array
    brow_height: float
    brow_width: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float
    brow_color: Array
    mouth_width: float
    smile: float
    lips: float
    mouth_open: float  # 0 for a closed mouth
    lip_color: Array
    hair: Hair
    cloth: Array
    collar: Array
    collar_width: float
    background: Array  # [2, 3] upper and lower color
    blobs: Array  # [3, 7]: x, y, radius as shares of the image's size, strength, color
    light_direction: Array  # unit, towards the light
    light_color: Array
    ambient: Array
    glasses: Glasses | None
    hat: Hat | None
    beard: Beard | None = None
    pattern: Pattern | None = None


def random_stream(seed: int, index: int, stream: int) -> np.random.Generator:
    """Random numbers of (seed, index); index and stream are the counter's upper words, so sequences do not overlap."""
    counter = np.array([0, 0, stream, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter))


def _mix(rng: np.random.Generator, codes: tuple[str, ...], spread: float = 0.0) -> Array:
    """A random color between two neighbors in a list, with an intensity varied by `spread`."""
    at = rng.uniform(0, len(codes) - 1)
    low = min(int(at), len(codes) - 2)
    color = linear(codes[low]) * (1 - (at - low)) + linear(codes[low + 1]) * (at - low)
    return (color * rng.uniform(1 - spread, 1 + spread)).astype(np.float32)


def _pick(rng: np.random.Generator, codes: tuple[str, ...], spread: float = 0.15) -> Array:
    """A random color of a list, with a brightness varied by `spread`."""
    return (linear(codes[rng.integers(len(codes))]) * rng.uniform(1 - spread, 1 + spread)).astype(np.float32)


def _hair(rng: np.random.Generator) -> Hair:
    style = HAIR_STYLES[int(rng.choice(len(HAIR_STYLES), p=_HAIR_ODDS))]
    return Hair(
        style=style,
        color=_pick(rng, _HAIR, 0.2),
        volume=rng.uniform(0.09, 0.15),
        line=rng.uniform(0.58, 0.70),
        part=rng.uniform(-1, 1),
        opening=rng.uniform(0, 1),
        length=rng.uniform(0, 1),
        curl=rng.uniform(-1, 1, (24, 3)).astype(np.float32),
    )


def _light(rng: np.random.Generator) -> dict[str, Any]:
    azimuth, elevation = rng.uniform(-1.0, 1.0), rng.uniform(0.25, 0.95)
    level = np.cos(elevation)
    direction = np.array([np.sin(azimuth) * level, np.sin(elevation), np.cos(azimuth) * level], np.float32)
    warmth, power = rng.uniform(-0.08, 0.10), rng.uniform(0.78, 0.98)
    return {
        "light_direction": direction,
        "light_color": (power * np.array([1 + warmth, 1, 1 - warmth])).astype(np.float32),
        "ambient": (rng.uniform(0.30, 0.42) * np.array([1 - warmth, 1, 1 + warmth])).astype(np.float32),
    }


def _background(rng: np.random.Generator) -> dict[str, Any]:
    kind = rng.integers(3)
    upper, lower = _pick(rng, _BACK), _pick(rng, _BACK)
    blobs = np.zeros((3, 7), np.float32)
    for blob in blobs:
        blob[:3] = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.15, 0.4)
        blob[3], blob[4:] = rng.uniform(0.4, 0.9), _pick(rng, _BACK)
    if kind == 0:
        lower = upper * 0.85
    if kind != 2:
        blobs[:, 3] = 0
    return {"background": np.stack([upper, lower]), "blobs": blobs}


def _face(rng: np.random.Generator) -> dict[str, Any]:
    hair, skin = _hair(rng), _mix(rng, _SKIN, 0.08)
    opened = bool(rng.random() < 0.5)
    lip_tint = np.array([0.62, 0.16, 0.16], np.float32) * rng.uniform(0.75, 1.1)
    brow = np.minimum(hair.color * 0.55, skin * 0.42) if hair.style != "bald" else linear("2e211b")
    return {
        "hair": hair,
        "skin": skin,
        "lip_color": (0.38 * skin + 0.62 * lip_tint * (0.35 + 0.65 * skin.max())).astype(np.float32),
        "brow_color": brow.astype(np.float32),
        "blush": rng.uniform(0.2, 1),
        "width": rng.uniform(0.94, 1.05),
        "jaw": rng.uniform(0.88, 1.10),
        "chin": rng.uniform(-0.07, 0.07),
        "cheeks": rng.uniform(0.85, 1.1),
        "nose": rng.uniform(0.85, 1.2),
        "nose_length": rng.uniform(-0.05, 0.06),
        "ears": rng.uniform(0.85, 1.15),
        "eye_spacing": rng.uniform(0.34, 0.39),
        "eye_width": rng.uniform(0.185, 0.22),
        "eye_height": rng.uniform(0.115, 0.15),
        "eye_tilt": rng.uniform(-0.06, 0.14),
        "gaze": (rng.uniform(-0.05, 0.05), rng.uniform(-0.01, 0.03)),
        "iris": _pick(rng, _IRIS, 0.2),
        "brow_height": rng.uniform(0.28, 0.34),
        "brow_width": rng.uniform(0.22, 0.27),
        "brow_thickness": rng.uniform(0.045, 0.075),
        "brow_arch": rng.uniform(0.02, 0.09),
        "brow_tilt": rng.uniform(-0.09, 0.01),
        "mouth_width": rng.uniform(0.27, 0.36),
        "smile": rng.uniform(0.02, 0.13),
        "lips": rng.uniform(0.06, 0.09),
        "mouth_open": rng.uniform(0.06, 0.16) * opened,
        "cloth": _pick(rng, _CLOTH),
        "collar": _pick(rng, _CLOTH),
        "collar_width": rng.uniform(0.05, 0.16),
    }


def _glasses(rng: np.random.Generator, probability: float) -> Glasses | None:
    worn = bool(rng.random() < probability)
    glasses = Glasses(round=rng.uniform(0, 1), radius=rng.uniform(0.27, 0.31), color=_pick(rng, _RIM))
    return glasses if worn else None


def _hat(rng: np.random.Generator, probability: float) -> Hat | None:
    worn = bool(rng.random() < probability)
    style = HAT_STYLES[int(rng.integers(len(HAT_STYLES)))]
    hat = Hat(style=style, tilt=rng.uniform(0.10, 0.22), color=_pick(rng, _HAT), band=_pick(rng, _HAT))
    return hat if worn else None


def sample_scene(seed: int, index: int, *, glasses: float, hat: float) -> FaceScene:
    """The scene of (seed, index).

    Glasses and hat use random numbers of their own, so their probabilities `glasses` and `hat`, in [0, 1], only decide
    whether they are worn.
    """
    rng = random_stream(seed, index, _STREAM_FACE)
    pose: dict[str, Any] = {
        "yaw": radians(rng.uniform(-35, 35)),
        "pitch": radians(rng.uniform(-15, 15)),
        "roll": radians(rng.uniform(-10, 10)),
        "scale": rng.uniform(0.26, 0.29),
        "x0": 0.5 + rng.uniform(-0.03, 0.03),
        "y0": 0.51 + rng.uniform(-0.025, 0.025),
    }
    return FaceScene(
        **pose,
        **_face(rng),
        **_background(rng),
        **_light(rng),
        glasses=_glasses(random_stream(seed, index, _STREAM_GLASSES), glasses),
        hat=_hat(random_stream(seed, index, _STREAM_HAT), hat),
    )
