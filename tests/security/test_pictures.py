"""Untrusted images and masks: five formats recognized by content, one image per file, 8 bits per channel."""

import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handsoff_stream.datasets.labelled_images import (
    LabelledImages,
    LabelledImagesError,
    UnlabelledImages,
    list_labelled,
)
from handsoff_stream.datasets.labelled_images.class_maps import ClassMap
from handsoff_stream.datasets.labelled_images.pictures import MAX_PIXELS, read_image, read_mask

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"
PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
TURNED = 0x0112, 6  # stored on its side, to be turned clockwise


def saved(tmp_path, name: str, image: Image.Image, **options) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def png(width: int, height: int, *, bits: int, color: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_postscript_named_png_starts_no_interpreter():
    # In a process of its own: an audit hook cannot be taken off again.
    code = f"""
import sys
from pathlib import Path
from handsoff_stream.datasets.labelled_images.pictures import MAX_PIXELS, read_image, read_mask
sys.addaudithook(lambda event, _: event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system") and exit(9))
for read in (read_image, read_mask):
    try:
        read(Path({str(HOSTILE / "eps_named.png")!r}))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins like none of PNG, JPEG, WEBP, BMP, TIFF") == 2


@pytest.mark.parametrize("kind", ["GIF", "ICO", "PCX", "PPM", "TGA", "EPS", "PDF", "DDS"])
def test_no_other_format_is_opened_whatever_its_name(tmp_path, kind):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS).save(path, format=kind)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="begins like none of"):
            read(path)


@pytest.mark.parametrize("kind", ["PNG", "WebP", "BMP", "TIFF"])
def test_the_format_is_that_of_the_content_not_of_the_name(tmp_path, kind):
    path = tmp_path / "picture.jpg"
    Image.fromarray(PIXELS).save(path, format=kind, **({"lossless": True} if kind == "WebP" else {}))
    assert (read_image(path) == PIXELS).all()


def test_a_jpeg_is_read(tmp_path):
    assert read_image(saved(tmp_path, "a.jpg", Image.new("RGB", (5, 7), (9, 9, 9)))).shape == (7, 5, 3)


def test_a_mask_is_no_lossy_picture(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("L", (8, 8)).save(path, format="JPEG")
    with pytest.raises(ValueError, match="JPEG.*lossless"):
        read_mask(path)


@pytest.mark.parametrize("color", [2, 6, 4])
def test_16_bits_a_channel_are_refused_not_cut_to_8(tmp_path, color):
    channels = {2: 3, 6: 4, 4: 2}[color]
    path = tmp_path / "deep.png"
    path.write_bytes(png(2, 2, bits=16, color=color, rows=2 * (b"\0" + b"\xff" * (2 * 2 * channels))))
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="16 bits per channel.*save it with 8"):
            read(path)


def test_16_bit_tiffs_in_color_and_16_bit_gray_images_are_refused(tmp_path):
    gray = saved(tmp_path, "gray.png", Image.fromarray(np.full((3, 3), 40_000, np.uint16)))
    with pytest.raises(ValueError, match="16 bits per channel|mode I"):
        read_image(gray)
    assert (read_mask(gray).values == 40_000).all()  # ids beyond 255 are no picture, and exact
    tags = [  # (tag, type, count, value or offset): 2 x 2 pixels of three 16-bit samples at byte 8
        (256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 32), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3),
        (279, 4, 1, 24),
    ]  # fmt: skip
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    path = tmp_path / "deep.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 38) + b"\xff" * 24 + struct.pack("<3H", 16, 16, 16) + ifd)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="16 bits per channel"):
            read(path)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True}), ("TIFF", {})])
def test_several_pictures_in_a_file_are_refused_not_reduced_to_the_first(tmp_path, kind, options):
    path = tmp_path / "moving.png"
    frames = [Image.new("RGB", (8, 8), (i, 200 - i, 0)) for i in (0, 60, 120)]
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], **options)
    for read in (read_image, read_mask) if kind != "WebP" else (read_image,):
        with pytest.raises(ValueError, match="more than one picture"):
            read(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_refused_since_its_colors_depend_on_a_profile(tmp_path, name):
    with pytest.raises(ValueError, match="CMYK.*RGB"):
        read_image(saved(tmp_path, name, Image.new("CMYK", (4, 4), (10, 20, 30, 40))))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_pictures_stored_on_their_side_stand_upright(tmp_path, name):
    exif = Image.Exif()
    exif[TURNED[0]] = TURNED[1]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, name, Image.fromarray(np.rot90(PIXELS).copy()), exif=exif, **options)
    assert (read_image(path) == PIXELS).all()
    if name != "a.webp":
        assert (read_mask(path).colors() == PIXELS).all()
        ids = saved(tmp_path, f"ids-{name}", Image.fromarray(np.rot90(PIXELS[..., 0]).copy()), exif=exif)
        assert (read_mask(ids).values == PIXELS[..., 0]).all()


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, bits=8, color=0, rows=b""))
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=f"{side} x {side} pixels.*{MAX_PIXELS}"):
            read(path)
    np.lib.format.open_memmap(tmp_path / "bomb.npy", "w+", np.uint8, (side, side))  # sparse: no block on disk
    with pytest.raises(ValueError, match="pixels"):
        read_mask(tmp_path / "bomb.npy")


def test_more_pixels_than_its_bytes_can_hold_are_not_made(tmp_path):
    (tmp_path / "short.png").write_bytes(png(8000, 8000, bits=8, color=0, rows=b""))
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="claims 8000 x 8000 pixels in"):
            read(tmp_path / "short.png")
    for mode in ("1", "L", "RGB"):
        whole = saved(tmp_path, f"{mode}.png", Image.new(mode, (2048, 2048)), optimize=True)
        assert read_image(whole).shape == (2048, 2048, 3)  # the emptiest picture there is


def test_the_emptiest_pictures_take_little_memory(tmp_path):
    """Of 1.3 KB: about as many pixels as so many bytes may hold."""
    side = 2300
    path = tmp_path / "empty.png"
    path.write_bytes(png(side, side, bits=1, color=0, rows=bytes(1 + (side + 7) // 8) * side))
    path.write_bytes(path.read_bytes() + bytes(max(0, 1_300 - path.stat().st_size)))
    everything = ClassMap.of_ids(["a", "b"])
    for read in (read_image, lambda file: everything.apply(read_mask(file))):
        tracemalloc.start()
        read(path)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert peak < 40, f"{peak:.0f} MiB, not counting Pillow's own"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY\x01\x00\x04\x00{((("])
def test_a_mask_named_npy_is_a_numpy_array_or_refused(tmp_path, content):
    (tmp_path / "m.npy").write_bytes(content)
    with pytest.raises(ValueError):
        read_mask(tmp_path / "m.npy")


def test_what_is_wrong_with_a_set_is_printable_line_by_line(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    name = "\x1b]0;pwned\x07\x1b[2J" + "x" * 150
    (tmp_path / "images" / f"{name}.png").write_bytes((HOSTILE / "eps_named.png").read_bytes())
    Image.new("L", (4, 4)).save(tmp_path / "masks" / f"{name}.png")
    listing = list_labelled(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(LabelledImagesError) as caught:
        LabelledImages(listing, ClassMap.of_ids(("a", "b")))
    for line in str(caught.value).splitlines():
        assert line.isprintable() and len(line) <= 302, line  # indented by two
    with pytest.raises(LabelledImagesError):
        UnlabelledImages(tmp_path / "images")
