"""Published files => inert Python content, whatever the container: raw pickle, torch.save old and new, `.npy`.

Told apart by their first bytes. Knows containers; `strict_pickle` and `torch_pickle` know what may be inside, the
adapters next door what it means. No file is ever given to the standard unpickler, to torch.load or to numpy.load.
"""

import ast
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.strict_pickle import Budget, loads, shown
from handsoff_stream.files.torch_pickle import (
    GLOBALS,
    Storage,
    flat_tensor,
    read_legacy,
    storage_id,
)

LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9"  # protocol 2, then the first bytes of torch.save's magic number
ZIP_START = b"PK\x03\x04"
ZIP_ENTRY = b"PK\x01\x02"
NPY_START = b"\x93NUMPY"
MAX_ZIP_ENTRIES = 50_000


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    value: Any
    """Inert: scalars, strings, containers, tensors, arrays, `strict_pickle.Record`."""
    container: str
    """In words, for messages and `inspect`."""


def read_content(path: str | Path) -> Content:
    """Read a published file without executing or importing anything that it names.

    Raises:
        CheckpointError: missing or damaged file, unknown container, a global that is not allowed (named in the
            message), or sizes that the file does not have. The messages begin with the path.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    try:
        return parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse(data: bytes) -> Content:
    """As `read_content`, for bytes in memory; messages do not name a path."""
    view, budget = memoryview(data), Budget(len(data))
    try:
        if data.startswith(ZIP_START):
            return Content(_read_zip(data, budget), "PyTorch file (zip container)")
        if data.startswith(NPY_START):
            return Content(_read_npy(view, budget), "NumPy array file")
        if data.startswith(LEGACY_START):
            return Content(read_legacy(view, GLOBALS, budget), "PyTorch file (legacy container)")
        if data[:1] == b"\x80":
            return Content(loads(view, GLOBALS, budget)[0], f"pickle of protocol {data[1]}")
    except CheckpointError:
        raise
    except Exception as error:  # whatever numpy, zipfile or torch say of damaged headers and numbers
        raise CheckpointError(
            f"damaged file ({type(error).__name__}: {str(error)[:200]}); copy or download it again"
        ) from error
    raise CheckpointError(
        "none of safetensors, PyTorch file, pickle, NumPy array (damaged at the front, or another format); "
        "generators are read from handsoff_stream, rosinality, NVlabs and DatasetGAN files"
    )


def _read_zip(data: bytes, budget: Budget) -> Any:
    if data.count(ZIP_ENTRY) > MAX_ZIP_ENTRIES:
        raise CheckpointError(f"a zip directory of more than {MAX_ZIP_ENTRIES} entries, which no published file has")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"neither a whole PyTorch zip archive ({error}; truncated, or another format) nor any other file that is "
            "read; copy or download it again"
        ) from error
    main = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(main) != 1:
        raise CheckpointError("a zip archive, but not one that torch.save wrote: it needs one data.pkl")
    root = main[0].removesuffix("data.pkl")
    names = set(archive.namelist())
    if f"{root}byteorder" in names and _member(archive, f"{root}byteorder", budget) != b"little":
        raise CheckpointError("written on a big-endian machine; re-save it on an ordinary one")
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        key, dtype, numel = storage_id(pid)
        if key not in storages:
            raw = _member(archive, f"{root}data/{key}", budget)
            if len(raw) != numel * dtype.itemsize:
                raise CheckpointError(f"storage {shown(key)} has {len(raw)} bytes for {numel} numbers of {dtype}")
            storages[key] = Storage(flat_tensor(memoryview(raw), dtype, budget))
        if (storages[key].data.dtype, storages[key].data.numel()) != (dtype, numel):
            raise CheckpointError(f"storage {shown(key)} is used as two different types")
        return storages[key]

    return loads(memoryview(_member(archive, main[0], budget)), GLOBALS, budget, persistent=persistent)[0]


def _member(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytes:
    """One stored entry; every byte of it is in the file, so only copies cost anything."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(f"{shown(name)} is compressed, which torch.save never does; re-save the file")
    if info.file_size > budget.file_size:
        raise CheckpointError(f"{shown(name)} claims {info.file_size} bytes, more than the file has; copy it again")
    return archive.read(info)


def _read_npy(data: memoryview, budget: Budget) -> np.ndarray:
    major = data[6]
    width = 2 if major == 1 else 4
    start = 8 + width
    end = start + int.from_bytes(data[8:start], "little")
    if not 1 <= major <= 3 or end > min(len(data), start + 10_000):
        raise CheckpointError("a damaged NumPy header; copy the file again")
    header = ast.literal_eval(str(data[start:end], "latin1"))
    shape, fortran = header["shape"], header["fortran_order"]
    dtype = np.dtype(header["descr"])
    if dtype.hasobject:
        array = loads(data, GLOBALS, budget, start=end)[0]
        if not isinstance(array, np.ndarray) or array.shape != shape:
            raise CheckpointError("an array of objects that is not the array its header announces")
        return array
    if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(data) - end or min(shape, default=0) < 0:
        raise CheckpointError(f"{len(data) - end} bytes for a {list(shape)} array of {dtype}; copy the file again")
    budget.spend(len(data))
    return np.frombuffer(bytes(data[end:]), dtype).reshape(shape, order="F" if fortran else "C").copy()
