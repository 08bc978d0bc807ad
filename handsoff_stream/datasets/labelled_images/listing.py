"""Which image goes with which mask: two folders paired by file names, or a CSV or JSON manifest.

Knows names and paths, and collects everything that is wrong with them. Opens no picture.

A manifest lists one labelled image per row:

    image,label,latent
    photos/001.jpg,masks/001.png,latents/001.npy
    photos/002.jpg,masks/002.png,

or in JSON: `[{"image": "photos/001.jpg", "label": "masks/001.png"}, ...]`. `latent` may be missing or empty. So may
`name`, which is the image's file name without suffix; names must differ. Paths are relative to the manifest.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handsoff_stream.datasets.labelled_images.pictures import IMAGE_SUFFIXES, MASK_SUFFIXES

LATENT_SUFFIXES = (".npy", ".pt", ".safetensors")
COLUMNS = ("image", "label", "latent", "name")
MAX_MANIFEST_BYTES = 2**22


@dataclass(frozen=True)
class Entry:
    """One labelled image; all files exist."""

    name: str
    """Unique; becomes the file name of the inversion."""
    image: Path
    label: Path
    latent: Path | None = None
    """A file with the image's latent, which is not read here."""


@dataclass(frozen=True)
class Listing:
    """The labelled images of a set, sorted by name, and everything that is wrong with the list."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    unpaired: tuple[tuple[Path | None, Path | None], ...] = ()
    """(image, None) and (None, mask) of files without a partner. Each is a problem, and is checked like the others."""


def list_labelled(images: str | Path, labels: str | Path | None = None) -> Listing:
    """A folder of images and a folder of masks, or a manifest alone => which belong together, and what is wrong."""
    if labels is not None:
        return pair_folders(Path(images), Path(labels))
    if Path(images).suffix.lower() in (".csv", ".json"):
        return read_labelled_manifest(Path(images))
    return Listing(
        (), (f"{images}: not a manifest (.csv, .json); if it is a folder of images, pass the folder of the masks too",)
    )


def pair_folders(images_dir: Path, labels_dir: Path) -> Listing:
    """Files of one name up to the suffix."""
    problems: list[str] = []
    images = files_by_name(images_dir, IMAGE_SUFFIXES, "an image", problems)
    labels = files_by_name(labels_dir, MASK_SUFFIXES, "a mask in a lossless format", problems)
    without_mask = [images[name] for name in sorted(images.keys() - labels)]
    without_image = [labels[name] for name in sorted(labels.keys() - images)]
    if images and labels:
        remedy = "rename one, or pair them in a manifest"
        problems += [f"{image}: no mask of this name in {labels_dir}; {remedy}" for image in without_mask]
        problems += [f"{label}: no image of this name in {images_dir}; {remedy}" for label in without_image]
    elif not problems:
        problems.append(f"{images_dir}, {labels_dir}: no labelled image; one is needed")
    names = sorted(images.keys() & labels)
    entries = tuple(Entry(name, images[name], labels[name]) for name in names)
    unpaired = (*((image, None) for image in without_mask), *((None, label) for label in without_image))
    return Listing(entries, tuple(problems), unpaired)


def files_by_name(folder: Path, suffixes: tuple[str, ...], kind: str, problems: list[str]) -> dict[str, Path]:
    """Name => file of one folder; hidden files are passed over."""
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder")
        return {}
    named: dict[str, Path] = {}
    for file in sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")):
        if file.suffix.lower() not in suffixes:
            problems.append(f"{file}: not {kind} ({', '.join(suffixes)}); move it elsewhere")
        elif file.stem in named:
            problems.append(f"{file}: same name as {named[file.stem].name}; keep one of them")
        else:
            named[file.stem] = file
    return named


def read_labelled_manifest(manifest: Path) -> Listing:
    """A CSV or JSON manifest, see the module."""
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    unpaired: list[tuple[Path | None, Path | None]] = []
    try:
        for where, row in _rows(manifest):
            name, image, label, latent = _fields(manifest.parent, where, row, problems)
            if name in entries:
                problems.append(f"{where}: a second {name!r}; give each row a name of its own in a column name")
            if image and label and name not in entries:
                entries[name] = Entry(name, image, label, latent)
            else:
                unpaired.append((image, label))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        problems.append(f"{manifest}: cannot be read ({error})")
    if not entries and not problems:
        problems.append(f"{manifest}: no labelled image; one is needed")
    return Listing(tuple(entries[name] for name in sorted(entries)), tuple(problems), tuple(unpaired))


def _rows(manifest: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(where, column => value) of every row that is not empty."""
    if manifest.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"more than {MAX_MANIFEST_BYTES} bytes, which no list of labelled images has")
    # Excel writes a byte order mark.
    content = manifest.read_text(encoding="utf-8-sig")
    if manifest.suffix.lower() == ".json":
        rows = json.loads(content)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError('it is a list of objects: [{"image": ..., "label": ...}, ...]')
        yield from ((f"{manifest}, entry {number}", row) for number, row in enumerate(rows, start=1))
        return
    reader = csv.DictReader(content.splitlines(), strict=True)
    columns = reader.fieldnames or []
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown or "image" not in columns or "label" not in columns:
        raise ValueError(f"the first line names the columns image, label, latent, name (two suffice); found {columns}")
    for row in reader:
        yield f"{manifest}, line {reader.line_num}", dict(row)


def _fields(
    folder: Path, where: str, row: dict[str, object], problems: list[str]
) -> tuple[str, Path | None, Path | None, Path | None]:
    """(name, image, mask, latent) of one row; None for files that are missing."""
    unknown = [column for column in row if column not in COLUMNS]
    if unknown:
        problems.append(f"{where}: no such column: {unknown}; the columns are {', '.join(COLUMNS)}")
    image = _file(folder, where, row, "image", IMAGE_SUFFIXES, problems)
    label = _file(folder, where, row, "label", MASK_SUFFIXES, problems)
    latent = _file(folder, where, row, "latent", LATENT_SUFFIXES, problems) if row.get("latent") else None
    name = row.get("name") or Path(str(row.get("image"))).stem
    if not isinstance(name, str) or name != Path(name).name:
        problems.append(f"{where}: name {name!r} becomes a file name; write one without slashes")
    return str(name), image, label, latent


def _file(
    folder: Path, where: str, row: dict[str, object], column: str, suffixes: tuple[str, ...], problems: list[str]
) -> Path | None:
    """The file that a column names, if it exists."""
    value = row.get(column)
    if not isinstance(value, str) or not value:
        problems.append(f"{where}: no {column}; each row needs an image and a label")
    elif Path(value).suffix.lower() not in suffixes:
        problems.append(f"{where}: {column} {value} is none of {', '.join(suffixes)}")
    elif not (folder / value).is_file():
        problems.append(f"{where}: no such {column}: {folder / value}")
    else:
        return folder / value
    return None
