"""Files => arrays: images as colors, masks as the ids or colors they hold.

Knows picture formats. Does not know what an id or a color means, or which size is wanted.

Shape letters: H W picture size.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".bmp", ".npy", ".png", ".tif", ".tiff")  # lossless ones
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "YCbCr")  # 8 bits per channel
ID_MODES = ("1", "I", "I;16", "L", "P")
# What is read, by how it begins; PIL knows forty formats more, some of which start other programs.
FORMATS = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n....IHDR.{10}", re.DOTALL),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
}
MASK_FORMATS = ("PNG", "BMP", "TIFF")  # lossless ones
NPY_START = b"\x93NUMPY"
HEAD_BYTES, PNG_BIT_DEPTH = 32, 24
MAX_PIXELS = 2**26  # of a picture, 8192 x 8192
# Deflate packs at most 1032 bytes into one. Pictures of two colors, which have 8 pixels per byte, may be emptier up to
# 2048 x 2048.
FEW_PIXELS, PIXELS_PER_BYTE = 2**22, 1032


@dataclass(frozen=True)
class RawMask:
    """A mask as its file has it, before any class map."""

    values: NDArray[np.generic]
    """Integers [H, W], ids; or uint8 [H, W, 3], colors."""
    palette: NDArray[np.uint8] | None = None
    """[256, 3], the colors of an indexed picture's ids."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def is_colored(self) -> bool:
        """Whether the file holds colors and no ids."""
        return self.values.ndim == 3

    def ids(self) -> NDArray[np.int64]:
        """int64 [H, W]; a color picture that is gray everywhere holds ids.

        Raises:
            ValueError: other colors.
        """
        if not self.is_colored:
            return self.values.astype(np.int64)
        if (self.values != self.values[..., :1]).any():
            raise ValueError("a picture in colors, but the class map lists no colors; give it from_colors")
        return self.values[..., 0].astype(np.int64)

    def colors(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3]; an indexed picture goes through its palette, other ids are levels of gray.

        Raises:
            ValueError: ids outside 0 to 255.
        """
        if self.is_colored:
            return self.values.astype(np.uint8)
        if self.values.min() < 0 or self.values.max() > 255:
            raise ValueError("ids beyond 0 to 255, but the class map lists only colors; give it from_ids")
        gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        return (gray if self.palette is None else self.palette)[self.values.astype(np.int64)]


def read_image(file: Path) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], upright as its EXIF orientation says.

    Raises:
        ValueError: none of the `FORMATS`; several pictures in a file; more than 8 bits per channel, CMYK, too many
            pixels; transparent pixels.
        Exception: whatever PIL raises on a damaged file, SyntaxError among others.
    """
    with _opened(file, tuple(FORMATS)) as picture:
        if picture.mode == "CMYK":
            raise ValueError("a picture in CMYK, whose colors depend on a profile; convert it to RGB with that profile")
        if picture.mode not in IMAGE_MODES:
            raise ValueError(f"a picture of mode {picture.mode}; save it with 8 bits per channel")
        _require_opaque(picture)
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in ("1", "L"):
            return np.repeat(np.array(upright.convert("L"))[..., None], 3, axis=2)  # half the memory of PIL's way
        return np.array(upright.convert("RGB"))


def read_mask(file: Path) -> RawMask:
    """A mask of ids (a gray or indexed picture, or an `.npy` array of integers [H, W]) or of colors (an RGB picture, or
    an array uint8 [H, W, 3]), upright as its EXIF orientation says.

    Raises:
        ValueError: neither of these; as for `read_image`; an empty array.
        Exception: whatever PIL or numpy raise on a damaged file.
    """
    if file.suffix.lower() == ".npy":
        return RawMask(_read_array(file))
    with _opened(file, MASK_FORMATS) as picture:
        if picture.mode not in (*ID_MODES, "LA", "RGB", "RGBA"):
            raise ValueError(f"a picture of mode {picture.mode}; a mask is gray, indexed or RGB")
        if picture.mode in ID_MODES:
            upright = ImageOps.exif_transpose(picture)
            return RawMask(np.array(upright), _palette(upright))
        _require_opaque(picture)
        return RawMask(np.array(ImageOps.exif_transpose(picture).convert("RGB")))


@contextmanager
def _opened(file: Path, allowed: tuple[str, ...]) -> Iterator[Image.Image]:
    """The picture, read by the decoder of the format that its first bytes name; its pixels are not unpacked yet.

    Image.open on its own tries all formats that PIL knows, and PostScript by starting Ghostscript.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        kind = next((name for name, pattern in FORMATS.items() if pattern.match(head)), None)
        if kind is None:
            raise ValueError(f"begins like none of {', '.join(FORMATS)}, whatever its name says; convert it to PNG")
        if kind not in allowed:
            raise ValueError(f"a {kind} picture, which a mask cannot be; save it in a lossless format, best PNG")
        stream.seek(0)
        with Image.open(stream, formats=[kind]) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{height} x {width} pixels; up to {MAX_PIXELS} are read, make it smaller")
            size = file.stat().st_size
            if width * height > FEW_PIXELS + PIXELS_PER_BYTE * size:
                raise ValueError(f"claims {height} x {width} pixels in {size} bytes; it is cut short or damaged")
            _require_8_bits(picture, head)
            _require_single(picture)
            yield picture


def _require_8_bits(picture: Image.Image, head: bytes) -> None:
    """PIL reads colors of 16 bits as 8 without a word; gray ones keep theirs, in a mode of their own."""
    depths: tuple[int, ...] = (8,)
    if picture.format == "PNG":
        depths = (head[PNG_BIT_DEPTH],)
    elif isinstance(picture, TiffImagePlugin.TiffImageFile):
        depths = tuple(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,)))
    if max(depths) > 8 and picture.mode not in ID_MODES:
        raise ValueError(f"colors of {max(depths)} bits per channel, of which all but 8 would be lost; save it with 8")


def _require_single(picture: Image.Image) -> None:
    try:
        picture.seek(1)
    except EOFError:
        return
    raise ValueError("more than one picture in the file (animation or pages); save the one that is meant on its own")


def _read_array(file: Path) -> NDArray[np.generic]:
    with file.open("rb") as stream:
        if stream.read(len(NPY_START)) != NPY_START:
            raise ValueError("no NumPy array, whatever its name says; write it with numpy.save")
    # Memory-mapped: a header that promises more than the file holds is an error, not an allocation.
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses headers with Python's tokenizer, which raises errors of its own
        raise ValueError(f"a damaged NumPy array ({type(error).__name__}: {error}); write it again") from error
    is_ids = array.ndim == 2 and array.dtype.kind in "biu"
    is_colors = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (is_ids or is_colors) or array.size == 0:
        raise ValueError(
            f"array of {array.dtype} {list(array.shape)}; a mask is integers [H, W], or colors uint8 [H, W, 3]"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ValueError(f"{array.shape[0]} x {array.shape[1]} pixels; up to {MAX_PIXELS} are read, make it smaller")
    return np.array(array)


def _palette(picture: Image.Image) -> NDArray[np.uint8] | None:
    """[256, 3]; black where the file has fewer colors."""
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
            raise ValueError("transparent pixels have no certain color; put the picture on a background")
