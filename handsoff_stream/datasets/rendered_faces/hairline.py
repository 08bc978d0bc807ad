"""The hairline: a field over the head that is positive where hair covers the scalp.

Knows hair styles and the head's local frame (see `parts`). Does not know how hair is drawn (`wear`).
"""

import numpy as np

from handsoff_stream.datasets.rendered_faces.raycast import Array, smoothstep
from handsoff_stream.datasets.rendered_faces.scene import Hair


def tucked(hair: Hair) -> bool:
    """Whether long hair is worn behind the ears."""
    return hair.opening < 0.4


def hairness(hair: Hair, x: Array, y: Array, z: Array) -> Array:
    """The field at points of the head frame, float32 of their shape: positive where hair covers the scalp.

    Near the hairline its value approximates the distance from it, in head radii.
    """
    forward = np.asarray(z / np.sqrt(x * x + z * z + np.float32(1e-4)), np.float32)
    lean = hair.line + 0.10 * hair.part * x - 0.16 * x * x
    if hair.style in ("bob", "long") and not tucked(hair):
        edge = 0.30 + 0.30 * hair.opening - 0.12 * smoothstep(0.3, -0.7, y)
        fringe = lean - 0.10 * (hair.part > 0) + 0.05 * np.cos(4 * x + hair.part)
        return np.minimum(np.maximum(y - fringe, edge - forward), y + _bottom(hair))
    side = 0.10 + 0.10 * smoothstep(0.45, 0.1, np.abs(forward - 0.1))
    line = lean + (side - lean) * smoothstep(0.75, 0.25, forward)
    line = line + (-0.45 - side) * smoothstep(-0.12, -0.5, forward)
    if hair.style in ("bob", "long"):
        return np.minimum(np.maximum(y - line, -0.25 - forward), y + _bottom(hair))
    return y - line


def _bottom(hair: Hair) -> float:
    """Distance from the head's center down to the ends of a bob, in head radii."""
    return 0.75 + 0.25 * hair.length
