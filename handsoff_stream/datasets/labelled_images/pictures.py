"""Files => arrays: images as colours, masks as the ids or colours they hold.

Knows picture formats. Does not know what an id or a colour means, or which size is wanted.

Shape letters: H W picture size.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".bmp", ".npy", ".png", ".tif", ".tiff")  # lossless ones
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
ID_MODES = ("1", "I", "I;16", "L", "P")


@dataclass(frozen=True)
class RawMask:
    """A mask as its file has it, before any class map."""

    values: NDArray[np.generic]
    """int64 [H, W], ids; or uint8 [H, W, 3], colours."""
    palette: NDArray[np.uint8] | None = None
    """[256, 3], the colours of an indexed picture's ids."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def is_colored(self) -> bool:
        """Whether the file holds colours and no ids."""
        return self.values.ndim == 3

    def ids(self) -> NDArray[np.int64]:
        """[H, W]; a colour picture that is grey everywhere holds ids. ValueError for other colours."""
        if not self.is_colored:
            return self.values.astype(np.int64)
        if (self.values != self.values[..., :1]).any():
            raise ValueError("a picture in colours, but the class map lists no colours; give it from_colors")
        return self.values[..., 0].astype(np.int64)

    def colors(self) -> NDArray[np.uint8]:
        """[H, W, 3]; an indexed picture goes through its palette, ids are levels of grey. ValueError for ids
        beyond these."""
        if self.is_colored:
            return self.values.astype(np.uint8)
        if self.values.min() < 0 or self.values.max() > 255:
            raise ValueError("ids beyond 0 to 255, but the class map lists only colours; give it from_ids")
        grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        return (grey if self.palette is None else self.palette)[self.values.astype(np.int64)]


def read_image(file: Path) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], upright as its EXIF orientation says.

    Raises:
        ValueError: more than 8 bits a channel; transparent pixels.
        Exception: whatever PIL raises on a damaged file, SyntaxError among others.
    """
    with Image.open(file) as picture:
        if picture.mode not in IMAGE_MODES:
            raise ValueError(f"a picture of mode {picture.mode}; save it with 8 bits a channel")
        _require_opaque(picture)
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


def read_mask(file: Path) -> RawMask:
    """Ids: a grey or indexed picture, or an `.npy` array of integers [H, W]. Colours: an RGB picture, or uint8
    [H, W, 3].

    Raises:
        ValueError: neither of these; transparent pixels; an empty array.
        Exception: whatever PIL or numpy raise on a damaged file.
    """
    if file.suffix.lower() == ".npy":
        return RawMask(_read_array(file))
    with Image.open(file) as picture:
        if picture.mode in ID_MODES:
            return RawMask(np.array(picture).astype(np.int64), _palette(picture))
        if picture.mode not in ("LA", "RGB", "RGBA"):
            raise ValueError(f"a picture of mode {picture.mode}; a mask is grey, indexed or RGB")
        _require_opaque(picture)
        return RawMask(np.array(picture.convert("RGB")))


def _read_array(file: Path) -> NDArray[np.generic]:
    # Memory-mapped: a header that promises more than the file holds is an error, not an allocation.
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    is_ids = array.ndim == 2 and array.dtype.kind in "biu"
    is_colors = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (is_ids or is_colors) or array.size == 0:
        raise ValueError(
            f"array of {array.dtype} {list(array.shape)}; a mask is integers [H, W], or colours uint8 [H, W, 3]"
        )
    return np.array(array) if is_colors else array.astype(np.int64)


def _palette(picture: Image.Image) -> NDArray[np.uint8] | None:
    """[256, 3]; black where the file has fewer colours."""
    colors = picture.getpalette("RGB") if picture.mode == "P" else None
    if colors is None:
        return None
    padded = np.zeros(768, dtype=np.uint8)
    padded[: len(colors)] = colors
    return padded.reshape(256, 3)


def _require_opaque(picture: Image.Image) -> None:
    if picture.has_transparency_data:
        lowest = picture.convert("RGBA").getchannel("A").getextrema()[0]
        if lowest != 255:
            raise ValueError("transparent pixels, whose colour nobody has seen; put it on a background")
