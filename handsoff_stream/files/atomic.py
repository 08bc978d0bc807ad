"""Files that appear whole or not at all, and folders that one process writes at a time.

A file is written beside its place under a hidden name, flushed to the disk, and renamed. Until then what stood there
stays, whatever fails. A hidden file is locked while it is written (flock, which the kernel releases when a process dies
in any way), so the next writer tells the leftovers of a killed run from the work of a living one, and removes them.

Knows paths and disks. Does not know what is written.
"""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from handsoff_stream.errors import OutputError

SUFFIX = ".partial"
MAX_FILE_NAME = 200  # bytes; the hidden name is longer, and file systems allow 255
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be as large",
}
REASONS = {
    **FULL,
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error",
    errno.ENOENT: "no such folder",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.ENAMETOOLONG: "the name is too long",
}
PROBE_BYTES = 2**16


@contextmanager
def whole_file(path: str | Path, *, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """A hidden file beside `path` to write to; it takes `path`'s place when the block ends, and goes if it fails.

    A new file gets the permissions that the umask leaves, a replaced one keeps its own.

    Args:
        path: file to write; its folder exists.
        inputs: files that the content is made from; `path` may be none of them.

    Raises:
        OutputError: whatever `check_file` refuses; a write that failed (full disk, quota, permissions).
    """
    path = Path(path)
    check_file(path, inputs=inputs)
    _remove_leftovers(path)
    partial, handle = _create(path)
    try:
        yield partial
        if path.is_file():
            shutil.copymode(path, partial)
        _sync(partial)
        check_file(path, inputs=inputs)  # it may have changed meanwhile
        partial.replace(path)
        _sync(path.parent)
    except BaseException as error:
        failure = _disk_failure(partial, error)
        partial.unlink(missing_ok=True)
        if failure is not None:
            raise OutputError(f"{path}: cannot be written ({failure}); what was there before is untouched") from error
        raise
    finally:
        os.close(handle)


def write_file(path: str | Path, content: bytes) -> None:
    """Write bytes, whole or not at all.

    Raises:
        OutputError: as `whole_file`.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def check_file(path: str | Path, *, inputs: Sequence[str | Path] = (), needed: int = 0) -> None:
    """Find out, before the work, whether a file can be written; nothing is created.

    Args:
        path: file to write; missing folders above it count as writable if the first that exists is.
        inputs: files and folders that it may not replace.
        needed: bytes that must be free on its disk.

    Raises:
        OutputError: a link, device, pipe or folder stands there; the folder cannot be written; the name is too long; it
            is one of the inputs; too little free space.
    """
    path = Path(path)
    if len(os.fsencode(path.name)) > MAX_FILE_NAME:
        raise OutputError(f"{path.name}: a name of more than {MAX_FILE_NAME} bytes; choose a shorter one")
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); choose another path") from error
    else:
        if stat.S_ISLNK(mode):
            raise OutputError(
                f"{path}: is a symbolic link, which would be replaced, not followed; pass the file that it points to, "
                "or remove the link"
            )
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
            raise OutputError(f"{path}: is a {kind}, which a file would replace; pass the name of a file")
        for file in inputs:
            if Path(file).exists() and path.samefile(file):
                raise OutputError(f"{path}: is read and written at once; pass another output, the input stays")
    _check_parents(path, needed)


def check_folder(folder: str | Path, *, needed: int = 0) -> None:
    """Find out, before the work, whether files can be written into a folder that may not exist yet.

    Raises:
        OutputError: it is no folder, cannot be written, or has too little free space.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is no folder; pass the name of a folder, it is made if it does not exist")
    _check_parents(folder / "file", needed)


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[Path]:
    """The folder, made if it does not exist, as this process's own; the lock ends with the block or the process.

    What killed runs left in it is removed; a folder that was made and is still empty goes if the block fails.

    flock on the folder itself, so nothing is left in it; where the file system has no locks (some network drives), none
    is taken.

    Raises:
        OutputError: another process writes to it; it cannot be made or written.
    """
    folder = Path(folder)
    check_folder(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({_reason(error)}); choose another folder") from error
    try:
        if _lock(handle) is False:
            raise OutputError(
                f"{folder}: another process is writing to it; wait until it has ended, or choose another folder"
            )
        for leftover in folder.glob(f".*{SUFFIX}"):
            _remove_if_unused(leftover)
        yield folder
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    finally:
        os.close(handle)


def _check_parents(path: Path, needed: int) -> None:
    folder = path.parent
    while len(os.fsencode(folder.name)) > MAX_FILE_NAME or not os.path.lexists(folder):
        if len(os.fsencode(folder.name)) > MAX_FILE_NAME:
            raise OutputError(f"{folder}: a folder's name of more than {MAX_FILE_NAME} bytes; choose a shorter one")
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{folder}: is no folder, so {path.name} cannot be written into it; choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
        reason = "the disk is read-only" if read_only else "permission denied"
        raise OutputError(f"{folder}: cannot be written ({reason}); choose another path")
    free = shutil.disk_usage(folder).free
    if free < max(needed, PROBE_BYTES):
        raise OutputError(
            f"{folder}: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed; free some, or choose another disk"
        )


def _create(path: Path) -> tuple[Path, int]:
    """(new hidden file, its locked handle)."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        # 0o666 minus the umask; O_EXCL neither follows a link nor opens what somebody else has put there.
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); choose another path") from error
    _lock(handle)
    return partial, handle


def _remove_leftovers(path: Path) -> None:
    """Hidden files of runs that were killed while they wrote `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{SUFFIX}"):
        _remove_if_unused(leftover)


def _remove_if_unused(leftover: Path) -> None:
    """Remove a hidden file that nobody holds a lock on."""
    try:
        handle = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _lock(handle):
            leftover.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the file could be locked; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def _disk_failure(partial: Path, error: BaseException) -> str | None:
    """Why the disk refused, in words; None if something else went wrong."""
    if isinstance(error, OSError) and not isinstance(error, OutputError) and error.errno in REASONS:
        return _reason(error)
    if not isinstance(error, Exception) or isinstance(error, OutputError):
        return None
    # safetensors reports a full disk with the system's number in the text, torch.save without it.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None and int(number[1]) in REASONS:
        return REASONS[int(number[1])]
    try:
        with partial.open("ab") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as probed:
        return _reason(probed) if probed.errno in FULL else None
    return None


def _reason(error: OSError) -> str:
    return REASONS.get(error.errno or 0, error.strerror or str(error))
