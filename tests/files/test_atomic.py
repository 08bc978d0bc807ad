"""A file appears whole or not at all, and the old file stays until the new one is complete, whatever fails."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from handsoff_stream.errors import OutputError
from handsoff_stream.files.atomic import MAX_FILE_NAME, check_file, check_folder, locked_folder, whole_file, write_file
from handsoff_stream.files.tensors import write_tensors


@pytest.fixture
def path(tmp_path):
    (tmp_path / "result.bin").write_bytes(b"old")
    return tmp_path / "result.bin"


def untouched(path) -> bool:
    return path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_file_takes_its_place_only_when_it_is_whole(path):
    with whole_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert partial.parent.parent == path.parent and partial.parent.name.startswith(".")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_there_and_nothing_else(path, interruption):
    with pytest.raises(interruption), whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise interruption
    assert untouched(path)


def test_a_missing_folder_is_an_error_before_anything_is_computed(tmp_path):
    with pytest.raises(OSError), whole_file(tmp_path / "nowhere" / "result.bin"):
        raise AssertionError("the block must not begin")


# What stands in the way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "link", "link to nothing"])
def test_nothing_but_a_file_is_replaced(tmp_path, kind):
    path, target = tmp_path / "out", tmp_path / "target"
    match kind:
        case "device":
            path = Path("/dev/null")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link" | "link to nothing":
            if kind == "link":
                target.write_bytes(b"old")
            path.symlink_to(target)
    before = path.lstat()
    for write in (lambda: write_file(path, b"new"), lambda: check_file(path)):
        with pytest.raises(OutputError, match="is a (symbolic link|folder|device, pipe or socket)"):
            write()
    assert path.lstat().st_ino == before.st_ino and path.lstat().st_mode == before.st_mode
    assert not target.exists() or target.read_bytes() == b"old"


def test_a_file_that_is_read_is_not_written(path, tmp_path):
    os.link(path, tmp_path / "same")
    for inputs in ([path], [tmp_path / "other", tmp_path / "same"], [f"{tmp_path}/../{tmp_path.name}/result.bin"]):
        with pytest.raises(OutputError, match="is read and written at once"), whole_file(path, inputs=inputs):
            raise AssertionError("the block must not begin")
    assert path.read_bytes() == b"old"


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path):
    for path in (tmp_path / ("x" * (MAX_FILE_NAME + 1)), tmp_path / ("x" * 300) / "a", tmp_path / ("é" * 150)):
        with pytest.raises(OutputError, match="name"):
            check_file(path)
    check_file(tmp_path / ("x" * MAX_FILE_NAME))
    write_file(tmp_path / ("x" * MAX_FILE_NAME), b"new")


def refused_to_nobody(check: str, folder: str) -> str:
    """What a check says to a user without privileges; root may write everywhere."""
    code = f"""
import os
from handsoff_stream.files.atomic import check_file, check_folder, write_file
if os.geteuid() == 0:
    os.setuid(65534)
try:
    {check}
except OSError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    return done.stdout + done.stderr


def test_a_folder_without_permission_is_found_before_the_work():
    folder = tempfile.mkdtemp()  # tmp_path lies in a folder that only its owner enters
    try:
        Path(folder).chmod(0o555)
        for check in ("check_file('a/b')", "check_folder('a')", "write_file('a', b'new')"):
            said = refused_to_nobody(check, folder)
            assert said.startswith("OutputError") and "permission denied" in said
    finally:
        shutil.rmtree(folder)


def test_a_file_in_the_place_of_a_folder_is_found_before_the_work(path):
    with pytest.raises(OutputError, match="is no folder"):
        check_file(path / "a" / "b")
    with pytest.raises(OutputError, match="is no folder"):
        check_folder(path)


def test_too_little_space_is_found_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="GB free, about 1000000.00 GB needed"):
        check_file(tmp_path / "a", needed=10**15)
    with pytest.raises(OutputError, match="needed"):
        check_folder(tmp_path / "new", needed=10**15)
    assert not list(tmp_path.iterdir())


# Permissions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask_a_replaced_one_keeps_its_own(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_file(tmp_path / "a", b"1")
        write_tensors(tmp_path / "b", {"t": torch.ones(1)}, key="k", manifest={})
        for name in ("a", "b"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
        (tmp_path / "a").chmod(0o640)
        write_file(tmp_path / "a", b"2")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_content_and_name_are_on_the_disk_before_the_block_is_left(path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(Path, "replace", lambda self, other: done.append("renamed") or replace(self, other))
    with whole_file(path) as partial:
        partial.write_bytes(b"new")
    assert done == [str(partial), "renamed", str(path.parent)]


# Failing disks ---------------------------------------------------------------------------------------------------

LIMIT = 100_000
WRITERS = {
    "bytes": lambda path: write_file(path, bytes(4 * LIMIT)),
    "safetensors": lambda path: write_tensors(path, {"a": torch.ones(LIMIT)}, key="k", manifest={}),
    "torch.save": lambda path: _torch_save(path),
    "PIL": lambda path: _png(path),
}


def _torch_save(path):
    with whole_file(path) as partial:
        torch.save({"a": torch.ones(LIMIT)}, partial)


def _png(path):
    with whole_file(path) as partial:
        Image.effect_noise((600, 600), 80).save(partial, "png")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_sentence_and_the_old_file_stays(path, writer):
    """RLIMIT_FSIZE fails writes half-way, as a full disk does."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_atomic import WRITERS
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
try:
    WRITERS[{writer!r}](Path({str(path)!r}))
except OSError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout.strip()
    assert said.startswith("OutputError") and "cannot be written (files may not be as large)" in said, done.stderr
    assert len(said.splitlines()) == 1 and untouched(path)


# Killed runs and second writers ----------------------------------------------------------------------------------

HOLD = """
import sys, time
from handsoff_stream.files.atomic import locked_folder, whole_file
with {block} as place:
    print("there", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(block: str) -> Iterator[None]:
    """Another process inside the block; it is killed there."""
    command = [sys.executable, "-c", HOLD.format(block=block)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        try:
            yield
        finally:
            process.kill()


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(path):
    with holding(f"whole_file({str(path)!r})"):
        write_file(path, b"mine")
        assert len(list(path.parent.iterdir())) == 2  # the other's hidden file is in use
    assert len(list(path.parent.iterdir())) == 2
    write_file(path, b"again")
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"again"


def test_an_error_of_the_block_that_is_not_the_disks_is_passed_on(path):
    with pytest.raises(FileNotFoundError, match="input"), whole_file(path) as partial:
        partial.write_bytes(b"half")
        Path("input").read_bytes()
    assert untouched(path)


def test_a_file_of_a_similar_name_is_no_leftover(tmp_path):
    (tmp_path / ".a1.x.partial").mkdir()
    write_file(tmp_path / "a[0-9]", b"new")
    assert (tmp_path / ".a1.x.partial").exists()


def test_the_second_writer_of_a_folder_is_told_and_a_killed_one_holds_nothing(tmp_path):
    folder = tmp_path / "new" / "folder"
    with holding(f"locked_folder({str(folder)!r})"):
        with pytest.raises(OutputError, match="another process is writing to it"), locked_folder(folder):
            raise AssertionError("the block must not begin")
    with locked_folder(folder) as mine:
        assert mine == folder and not list(folder.iterdir())
    with pytest.raises(KeyError), locked_folder(folder):
        raise KeyError
    assert folder.is_dir()  # it was there before
    with pytest.raises(KeyError), locked_folder(tmp_path / "made"):
        raise KeyError
    assert not (tmp_path / "made").exists()
