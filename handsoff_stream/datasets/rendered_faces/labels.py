"""The labels of a rendered face: the finest parts that the renderer distinguishes, and the ten classes of parts.

Knows names, ids, colors, and which part belongs to which class. Does not know shapes or how parts are drawn.

The parts are about as fine as the 34 face classes of DatasetGAN (Zhang et al., CVPR 2021, appendix): parts of the eye,
the nose, the mouth and the ear, regions of the skin, and parts of CelebAMask-HQ's background. Left and right are those
of the image in a frontal pose.
"""

import colorsys
from enum import IntEnum

import numpy as np

CLASS_NAMES: tuple[str, ...] = (
    "background",
    "skin",
    "nose",
    "eyes",
    "brows",
    "ears",
    "mouth",
    "hair",
    "glasses",
    "hat",
)
PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (240, 190, 150),
    (230, 130, 60),
    (70, 140, 240),
    (130, 80, 40),
    (190, 90, 200),
    (220, 50, 70),
    (110, 200, 90),
    (250, 230, 70),
    (60, 210, 210),
)


class Part(IntEnum):
    """Ids of the parts. Parts on both sides of the face end in `_LEFT` and `_RIGHT`."""

    BACKGROUND = 0
    NECK = 1
    COLLAR = 2
    CLOTHING = 3
    SKIN = 4  # temples, jaw, scalp: all skin without a name of its own below
    FOREHEAD = 5
    CHEEK_LEFT = 6
    CHEEK_RIGHT = 7
    EYELID_LEFT = 8
    EYELID_RIGHT = 9
    PHILTRUM = 10
    CHIN = 11
    BEARD = 12
    NOSE_BRIDGE = 13
    NOSE_TIP = 14
    NOSTRIL_LEFT = 15  # with the wing around it
    NOSTRIL_RIGHT = 16
    SCLERA_LEFT = 17
    SCLERA_RIGHT = 18
    IRIS_LEFT = 19
    IRIS_RIGHT = 20
    PUPIL_LEFT = 21
    PUPIL_RIGHT = 22
    LASHES_LEFT = 23
    LASHES_RIGHT = 24
    BROW_LEFT = 25
    BROW_RIGHT = 26
    EAR_LEFT = 27
    EAR_RIGHT = 28
    CONCHA_LEFT = 29
    CONCHA_RIGHT = 30
    UPPER_LIP = 31
    LOWER_LIP = 32
    TEETH = 33
    MOUTH_INSIDE = 34  # with the tongue
    HAIR_FRONT = 35
    HAIR_BEHIND = 36
    GLASSES = 37
    HAT = 38

    @staticmethod
    def of_side(name: str, side: int) -> "Part":
        """The part of that name on the image's left (side -1) or right (side 1)."""
        return Part[f"{name}_{'LEFT' if side < 0 else 'RIGHT'}"]


_PARTS_OF_CLASS = (
    (Part.BACKGROUND, Part.CLOTHING),
    (Part.SKIN, Part.BEARD),
    (Part.NOSE_BRIDGE, Part.NOSTRIL_RIGHT),
    (Part.SCLERA_LEFT, Part.LASHES_RIGHT),
    (Part.BROW_LEFT, Part.BROW_RIGHT),
    (Part.EAR_LEFT, Part.CONCHA_RIGHT),
    (Part.UPPER_LIP, Part.MOUTH_INSIDE),
    (Part.HAIR_FRONT, Part.HAIR_BEHIND),
    (Part.GLASSES, Part.GLASSES),
    (Part.HAT, Part.HAT),
)
CLASS_OF_PART = np.repeat(
    np.arange(len(CLASS_NAMES), dtype=np.uint8), [last - first + 1 for first, last in _PARTS_OF_CLASS]
)
"""uint8 [parts]: the id into `CLASS_NAMES` of each part."""

FINE_CLASS_NAMES: tuple[str, ...] = tuple(part.name.lower() for part in Part)


def _shades() -> tuple[tuple[int, int, int], ...]:
    """A color for each part; the hues differ much, with two saturations and three brightnesses."""
    colors = [
        colorsys.hsv_to_rgb(0.618034 * part % 1, 0.55 + 0.4 * (part % 2), 0.95 - 0.15 * (part % 3))
        for part in range(len(Part) - 1)
    ]
    return ((0, 0, 0), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colors))


FINE_PALETTE: tuple[tuple[int, int, int], ...] = _shades()
