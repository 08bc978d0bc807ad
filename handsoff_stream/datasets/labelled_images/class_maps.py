"""Class maps: which ids or colors of a user's masks become which classes, as data.

Knows ids, colors and names. Does not know files (`pictures`, `config`) or what is learned from the classes.

Shape letters: H W mask size.
"""

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handsoff_stream.class_ids import IGNORE_INDEX, Color
from handsoff_stream.datasets.labelled_images.pictures import RawMask

PIXELS_AT_ONCE = 2**18  # of a mask; looking one up takes about 50 bytes
PALETTE_HUE_STEP = 0.618034  # golden ratio: neighboring ids get distant hues

SourceValue = int | Color
"""What a mask holds at a pixel: an id, or a color."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Ids and colors of a user's masks."""

    from_ids: tuple[int, ...] = ()
    """As in a gray, indexed or `.npy` mask."""
    from_colors: tuple[Color, ...] = ()
    """RGB, 0 to 255, as in a color mask."""


@dataclass(frozen=True, kw_only=True)
class MappedClass(Sources):
    """One class, and the sources that become it."""

    name: str
    color: Color | None = None
    """To draw it with, RGB, 0 to 255; None: one is chosen."""


@dataclass(frozen=True)
class ClassMap:
    """The classes in the order of their ids, and the source ids and colors that each is made of.

    Raises:
        ValueError: everything that is wrong with the map, one line each.
    """

    classes: tuple[MappedClass, ...]
    """If none of them names a source, masks hold class ids already: class i is source id i."""
    ignore: Sources | None = None
    """What is unlabelled in the masks. None: id 255, unless a class is made of it."""
    others: str | None = None
    """Name of the class that all remaining ids and colors become, or "ignore"; None: they are errors."""

    def __post_init__(self) -> None:
        problems = [*self._class_problems(), *self._source_problems()]
        if problems:
            raise ValueError(f"{len(problems)} problem(s) with the class map:\n  " + "\n  ".join(problems))

    @classmethod
    def of_ids(cls, class_names: Iterable[str]) -> "ClassMap":
        """The map of masks that hold class ids already; 255 is unlabelled."""
        return cls(tuple(MappedClass(name=name) for name in class_names))

    @property
    def num_classes(self) -> int:
        """Number of classes, without the unlabelled id."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the ids."""
        return tuple(c.name for c in self.classes)

    @property
    def palette(self) -> tuple[Color, ...]:
        """Display color of each class."""
        chosen = distinct_colors(len(self.classes))
        return tuple(c.color or chosen[i] for i, c in enumerate(self.classes))

    @property
    def ids(self) -> dict[int, int]:
        """Source id => class id, or 255 for unlabelled."""
        return dict(self._pairs("from_ids"))

    @property
    def colors(self) -> dict[Color, int]:
        """Source color => class id, or 255 for unlabelled."""
        return dict(self._pairs("from_colors"))

    def apply(self, mask: RawMask) -> tuple[NDArray[np.uint8], dict[SourceValue, int]]:
        """Source ids or colors => class ids.

        Colors decide if the map lists colors, and the mask holds nothing else or the map lists nothing else. Otherwise
        ids decide. An indexed picture has both.

        Returns:
            uint8 [H, W], class ids, 255 where unlabelled or unmapped; and the values that the map does not know, each
            with its number of pixels, most frequent first.

        Raises:
            ValueError: a mask of colors and a map of ids, or the other way round.
        """
        classes = np.empty(mask.size, dtype=np.uint8)
        unknown: Counter[SourceValue] = Counter()
        rows = max(PIXELS_AT_ONCE // mask.size[1], 1)
        for top in range(0, len(classes), rows):
            part = slice(top, top + rows)
            classes[part], others = self._apply(RawMask(mask.values[part], mask.palette))
            unknown.update(others)
        return classes, dict(unknown.most_common())

    def _apply(self, mask: RawMask) -> tuple[NDArray[np.uint8], Mapping[SourceValue, int]]:
        """As `apply`, of some rows."""
        if self._lists("from_colors") and (mask.is_colored or not self._lists("from_ids")):
            table = {int(_pack(np.array(color))): i for color, i in self.colors.items()}
            classes, unknown = self._look_up(_pack(mask.colors()), table)
            return classes, {_unpack(value): pixels for value, pixels in unknown.items()}
        classes, others = self._look_up(mask.ids(), self.ids)
        return classes, {value: pixels for value, pixels in others.items()}

    def config(self) -> dict[str, Any]:
        """JSON-able; for the provenance of a checkpoint that was fitted on such labels."""
        return {
            "class_names": list(self.class_names),
            "from_ids": [list(pair) for pair in self.ids.items()],
            "from_colors": [[list(color), class_id] for color, class_id in self.colors.items()],
            "others": self.others,
        }

    def _look_up(self, values: NDArray[np.int64], table: Mapping[int, int]) -> tuple[NDArray[np.uint8], dict[int, int]]:
        """(class ids, unknown value => pixels)."""
        keys = np.array(sorted(table), dtype=np.int64)
        targets = np.array([table[int(key)] for key in keys], dtype=np.uint8)
        position = np.searchsorted(keys, values).clip(max=len(keys) - 1)
        known = keys[position] == values
        if self.others is not None:
            rest = IGNORE_INDEX if self.others == "ignore" else self.class_names.index(self.others)
            return np.where(known, targets[position], np.uint8(rest)), {}
        classes = np.where(known, targets[position], np.uint8(IGNORE_INDEX))
        found, pixels = np.unique(values[~known], return_counts=True)
        return classes, dict(zip(found.tolist(), pixels.tolist(), strict=True))

    def _lists(self, kind: str) -> bool:
        """Whether any class is made of sources of this kind."""
        return any(getattr(c, kind) for c in self.classes)

    def _pairs(self, kind: str) -> list[tuple[Any, int]]:
        """(source, class id) of all, with repetitions."""
        pairs = [(source, i) for i, c in enumerate(self.classes) for source in getattr(c, kind)]
        if kind == "from_ids" and not (pairs or self._lists("from_colors")):
            pairs = [(i, i) for i in range(len(self.classes))]
        if self.ignore is not None:
            return pairs + [(source, IGNORE_INDEX) for source in getattr(self.ignore, kind)]
        default = kind == "from_ids" and IGNORE_INDEX not in dict(pairs)
        return [*pairs, (IGNORE_INDEX, IGNORE_INDEX)] if default else pairs

    def _class_problems(self) -> list[str]:
        problems = []
        if not 2 <= len(self.classes) <= IGNORE_INDEX:
            problems.append(f"{len(self.classes)} classes; 2 to {IGNORE_INDEX} are possible")
        for name, number in Counter(self.class_names).items():
            if number > 1:
                problems.append(f"{number} classes are named {name!r}; give each its own name")
            if not name.strip() or name == "ignore":
                problems.append(f"a class cannot be named {name!r}; choose another name")
        listed = self._lists("from_ids") or self._lists("from_colors")
        for i, c in enumerate(self.classes):
            if listed and not (c.from_ids or c.from_colors or c.name == self.others):
                problems.append(f"class {i} ({c.name}) is made of nothing; give it from_ids or from_colors")
        if self.others not in (None, "ignore", *self.class_names):
            problems.append(f"others: {self.others!r} is not a class; name a class, or write ignore")
        return problems

    def _source_problems(self) -> list[str]:
        problems = []
        for kind in ("from_ids", "from_colors"):
            claims: dict[SourceValue, list[str]] = {}
            for source, class_id in self._pairs(kind):
                claims.setdefault(source, []).append(self._title(class_id))
            twice = {source: names for source, names in claims.items() if len(names) > 1}
            problems += [f"{source_text(s)} is mapped twice: to {' and to '.join(n)}" for s, n in twice.items()]
        drawn = [c.color for c in self.classes if c.color is not None]
        for color in dict.fromkeys([*drawn, *self.colors]):
            if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
                problems.append(f"{list(color)} is not a color; pass three integers from 0 to 255")
        problems += [f"id {i} is out of range; ids are at most 32 bits" for i in self.ids if not -(2**31) <= i < 2**31]
        return problems

    def _title(self, class_id: int) -> str:
        return "ignore" if class_id == IGNORE_INDEX else f"class {class_id} ({self.class_names[class_id]})"


def distinct_colors(count: int) -> list[Color]:
    """Display colors of `count` classes, RGB, 0 to 255: black, then hues far apart."""
    colors = [colorsys.hsv_to_rgb(i * PALETTE_HUE_STEP % 1.0, 0.65, 0.95) for i in range(count - 1)]
    return [(0, 0, 0), *((round(r * 255), round(g * 255), round(b * 255)) for r, g, b in colors)]


def source_text(value: SourceValue) -> str:
    """An id or color as messages write it; a color as in a class map."""
    return f"id {value}" if isinstance(value, int) else f"color {list(value)}"


def _pack(colors: NDArray[np.generic]) -> NDArray[np.int64]:
    """[..., 3] => one number each."""
    red, green, blue = np.moveaxis(colors.astype(np.int64), -1, 0)
    packed: NDArray[np.int64] = (red << 16) | (green << 8) | blue
    return packed


def _unpack(packed: int) -> Color:
    return packed >> 16, packed >> 8 & 255, packed & 255
