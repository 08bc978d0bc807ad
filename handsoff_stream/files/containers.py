"""Published files => inert Python content, for all containers: raw pickle, old and new torch.save, and `.npy`.

The first bytes of a file tell its container. Knows containers. Does not know what may be inside (`strict_pickle`,
`torch_pickle`), nor what it means (the callers). No file is ever passed to the standard unpickler, to torch.load or to
numpy.load.
"""

import io
import math
import mmap
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.budget import MAX_ZIP_ENTRIES, Budget, check_count
from handsoff_stream.files.strict_pickle import loads, shown
from handsoff_stream.files.torch_pickle import (
    GLOBALS,
    Storage,
    flat_tensor,
    read_legacy,
    storage_id,
)

LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9"  # protocol 2, then the first bytes of torch.save's magic number
ZIP_START = b"PK\x03\x04"
ZIP_END, ZIP64_END = b"PK\x05\x06", b"PK\x06\x06"
END_BYTES, ENTRY_BYTES = 22, 46  # of the record at the end of an archive, of a directory entry without its name
ZIP64_BYTES = 56 + 20  # of the two records before it in large archives
NPY_START = b"\x93NUMPY"
NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[<>|=]?[a-zA-Z]\d{0,3})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(\d{1,18}, ?)*(\d{1,18})?)\), \}\s*"
)
MAX_NPY_HEADER = 1000
HEAD_BYTES = 16


@dataclass(frozen=True)
class Content:
    """The content of a file."""

    value: Any
    """Inert content: scalars, strings, containers, tensors, arrays, `strict_pickle.Record`."""
    container: str
    """Name of the container, for messages and `inspect`."""


def read_content(path: str | Path) -> Content:
    """Read a published file without executing or importing anything that it names.

    The file is mapped into memory instead of copied.

    Raises:
        CheckpointError: a missing or damaged file, an unknown container, a global that is not allowed (the message
            names it), or sizes that exceed the file. The messages begin with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        with path.open("rb") as file:
            return _parse(file, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse(data: bytes) -> Content:
    """As `read_content`, for bytes in memory.

    Raises:
        CheckpointError: as `read_content`; the messages do not begin with a path.
    """
    return _parse(io.BytesIO(data), len(data))


def _parse(file: BinaryIO, size: int) -> Content:
    head, budget = file.read(HEAD_BYTES), Budget(size)
    try:
        if head.startswith(ZIP_START):
            return Content(_read_zip(file, budget), "PyTorch file (zip container)")
        if head.startswith(NPY_START):
            return Content(_read_npy(_view(file), budget), "NumPy array file")
        if head.startswith(LEGACY_START):
            return Content(read_legacy(_view(file), GLOBALS, budget), "PyTorch file (legacy container)")
        if head[:1] == b"\x80":
            return Content(loads(_view(file), GLOBALS, budget)[0], f"pickle of protocol {head[1]}")
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # numpy, zipfile and torch raise many kinds for damaged files
        raise CheckpointError(
            f"damaged file ({type(error).__name__}: {printable(str(error), 100)}); copy or download it again"
        ) from error
    raise CheckpointError(
        "none of safetensors, PyTorch file, pickle, NumPy array (damaged at the start, or another format); pass a file "
        "of handsoff_stream, rosinality, NVlabs or DatasetGAN"
    )


def _view(file: BinaryIO) -> memoryview:
    """The whole file, without a copy."""
    if isinstance(file, io.BytesIO):
        return file.getbuffer().toreadonly()
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_zip(file: BinaryIO, budget: Budget) -> Any:
    check_count(_directory_bytes(file) // ENTRY_BYTES, MAX_ZIP_ENTRIES, "entries in its zip directory")
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"not a complete PyTorch zip archive ({error}; truncated, or another format); copy or download it again"
        ) from error
    main = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(main) != 1:
        raise CheckpointError("a zip archive, but not one that torch.save wrote: it needs one data.pkl")
    root = main[0].removesuffix("data.pkl")
    names = set(archive.namelist())
    if f"{root}byteorder" in names and _member(archive, f"{root}byteorder", budget) != b"little":
        raise CheckpointError("written on a big-endian machine; save it again on a little-endian one")
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        key, dtype, numel = storage_id(pid)
        if key not in storages:
            raw = _member(archive, f"{root}data/{key}", budget)
            if len(raw) != numel * dtype.itemsize:
                raise CheckpointError(
                    f"storage {shown(key)} has {len(raw)} bytes for {numel} numbers of {dtype}; copy it again"
                )
            storages[key] = Storage(flat_tensor(memoryview(raw), dtype, budget))
        if (storages[key].data.dtype, storages[key].data.numel()) != (dtype, numel):
            raise CheckpointError(f"storage {shown(key)} is used with two different types; copy the file again")
        return storages[key]

    return loads(memoryview(_member(archive, main[0], budget)), GLOBALS, budget, persistent=persistent)[0]


def _directory_bytes(file: BinaryIO) -> int:
    """Size of a zip archive's directory, from the record at the end of the file, which zipfile reads first too.

    It must be checked before zipfile opens the archive, since zipfile reads the whole directory, however long it is.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - ZIP64_BYTES - END_BYTES))
    tail = file.read()
    file.seek(0)
    end = tail[-END_BYTES:]
    if not end.startswith(ZIP_END) or end[-2:] != b"\0\0":
        raise CheckpointError(
            "not a complete PyTorch zip archive (truncated, or another format); copy or download it again"
        )
    if len(tail) > END_BYTES and tail.startswith(ZIP64_END):  # more than 4 GiB or 65,535 entries
        return int.from_bytes(tail[40:48], "little")
    return int.from_bytes(end[12:16], "little")


def _member(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytes:
    """The bytes of one uncompressed entry, which the file really holds."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(f"{shown(name)} is compressed, which torch.save never does; save the file again")
    if info.file_size > budget.file_size:
        raise CheckpointError(f"{shown(name)} claims {info.file_size} bytes, more than the file has; copy it again")
    return archive.read(info)


def _read_npy(data: memoryview, budget: Budget) -> np.ndarray:
    major = data[6]
    width = 2 if major == 1 else 4
    start = 8 + width
    end = start + int.from_bytes(data[8:start], "little")
    # numpy.load would parse the header as Python code, which deep nesting can exhaust. numpy always writes this form.
    header = NPY_HEADER.fullmatch(bytes(data[start : min(end, start + MAX_NPY_HEADER)]))
    if not 1 <= major <= 3 or end > len(data) or header is None:
        raise CheckpointError("a damaged NumPy header, or an array of records; copy the file again")
    shape = tuple(int(side) for side in header["shape"].decode().replace(" ", "").split(",") if side)
    dtype, fortran = np.dtype(header["descr"].decode()), header["fortran"] == b"True"
    if dtype.hasobject:
        array = loads(data, GLOBALS, budget, start=end)[0]
        if not isinstance(array, np.ndarray) or array.shape != shape:
            raise CheckpointError("an array of objects that differs from its header; copy the file again")
        return array
    if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(data) - end:
        raise CheckpointError(f"{len(data) - end} bytes for a {list(shape)} array of {dtype}; copy the file again")
    budget.spend(len(data))
    return np.frombuffer(bytes(data[end:]), dtype).reshape(shape, order="F" if fortran else "C").copy()
