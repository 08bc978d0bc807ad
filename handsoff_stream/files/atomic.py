"""Files that appear whole or not at all, and folders that one process writes at a time.

A file is written in a hidden folder beside its place, flushed to the disk, and renamed. Until then the old file stays,
whatever fails. The folder also holds what libraries write on their way. It is locked while it is used (with flock,
which the kernel releases when a process ends for any reason), so the next writer can distinguish the leftovers of a
killed run from the work of a running one, and removes them.

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
FAILING = {**FULL, errno.EROFS: "the disk is read-only", errno.EIO: "the disk reports an error"}
REASONS = {
    **FAILING,
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "no such folder",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.ENAMETOOLONG: "the name is too long",
}
PROBE_BYTES = 2**16


@contextmanager
def whole_file(path: str | Path, *, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Yield a file in a hidden folder beside `path` to write to; it replaces `path` when the block ends, and is removed
    if the block fails.

    A new file gets the permissions that the umask allows; a replaced file keeps its permissions.

    Args:
        path: file to write, in an existing folder.
        inputs: files that the content is made from; `path` must not be one of them.

    Raises:
        OutputError: what `check_file` refuses, or a failed write (full disk, quota, permissions).
    """
    path = Path(path)
    check_file(path, inputs=inputs)
    _remove_leftovers(path)
    folder, handle = _hidden_folder(path)
    partial = folder / path.name
    try:
        yield partial
        # Some libraries write files that only their owner may read; the folder has what the umask leaves.
        partial.chmod(stat.S_IMODE(path.stat().st_mode) if path.is_file() else folder.stat().st_mode & 0o666)
        _sync(partial)
        check_file(path, inputs=inputs)  # `path` may have changed in the meantime
        partial.replace(path)
        _sync(path.parent)
    except BaseException as error:
        failure = _disk_failure(partial, error)
        if failure is not None:
            raise OutputError(f"{path}: cannot be written ({failure}); what was there before is unchanged") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: as `whole_file`.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def check_file(path: str | Path, *, inputs: Sequence[str | Path] = (), needed: int = 0) -> None:
    """Check, before the work, whether a file can be written; nothing is created.

    Args:
        path: file to write; a missing folder counts as writable if its first existing parent is writable.
        inputs: files and folders that `path` must not replace.
        needed: bytes that must be free on its disk.

    Raises:
        OutputError: `path` is a link, device, pipe or folder, or one of the inputs; its name is too long; its folder
            cannot be written; the disk has too little free space.
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
                f"{path}: is a symbolic link, which would be replaced instead of followed; pass the file that it "
                "points to, or remove the link"
            )
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
            raise OutputError(f"{path}: is a {kind}, which cannot be replaced by a file; pass the name of a file")
        for file in inputs:
            if Path(file).exists() and path.samefile(file):
                raise OutputError(
                    f"{path}: is read and written at once, so the input would be lost; pass another output"
                )
    _check_parents(path, needed)


def check_folder(folder: str | Path, *, needed: int = 0) -> None:
    """Check, before the work, whether files can be written into a folder; nothing is created.

    Args:
        folder: a folder, which may not exist yet.
        needed: bytes that must be free on its disk.

    Raises:
        OutputError: `folder` is not a folder or cannot be written, or its disk has too little free space.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is no folder; pass the name of a folder, which is created if missing")
    _check_parents(folder / "file", needed)


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[Path]:
    """Yield the folder, created if missing and locked for this process until the block or the process ends.

    Leftovers of killed runs in it are removed. If the block fails, a new folder that is still empty is removed too. The
    lock is flock on the folder itself, so there is no lock file. File systems without locks (some network drives) are
    used without.

    Raises:
        OutputError: another process writes to the folder, or it cannot be created or written.
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
            raise OutputError(f"{folder}: a name of more than {MAX_FILE_NAME} bytes; choose a shorter one")
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


def _hidden_folder(path: Path) -> tuple[Path, int]:
    """(new hidden folder, its locked handle)."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
        try:
            folder.mkdir()
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if path.parent.is_dir():
                continue  # another writer took it for a leftover before it was locked
            raise OutputError(f"{path}: cannot be written (no such folder); choose another path") from None
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({_reason(error)}); choose another path") from error
        if _lock(handle) is not False and folder.exists():
            return folder, handle
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Remove hidden folders of runs that were killed while they wrote `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{SUFFIX}"):
        _remove_if_unused(leftover)


def _remove_if_unused(leftover: Path) -> None:
    """Remove a hidden folder that no process has locked."""
    try:
        handle = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _lock(handle):
            shutil.rmtree(leftover, ignore_errors=True)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the file was locked; None if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync
            raise
    finally:
        os.close(handle)


def _disk_failure(partial: Path, error: BaseException) -> str | None:
    """Why the disk refused the write, in words; None if the error has another cause."""
    if not isinstance(error, Exception) or isinstance(error, OutputError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return _reason(error) if error.errno in FAILING else None
    # safetensors reports a full disk with the error number in its text; torch.save reports it without a number.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        return FAILING.get(int(number[1]))
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
