"""`inspect --scan` names all globals that loading a file would import, in every container, and loads nothing."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from handsoff_stream.cli import app
from handsoff_stream.files.scan import COMPUTED, scan, scan_file

DATA = Path(__file__).parents[1] / "data"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def globals_of(tmp_path, content: bytes, name: str = "file.pkl") -> set[str]:
    (tmp_path / name).write_bytes(content)
    found = scan_file(tmp_path / name)
    return found.suspicious


class Payload:
    def __reduce__(self):
        return print, ("not to be seen",)


@pytest.mark.parametrize("protocol", range(6))
def test_what_the_standard_pickler_writes_in_every_protocol(tmp_path, protocol):
    data = pickle.dumps({"a": [1, Payload()]}, protocol)
    name = "__builtin__.print" if protocol < 3 else "builtins.print"
    assert globals_of(tmp_path, data) == {name}
    assert globals_of(tmp_path, data, "named_otherwise.txt") == {name}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93.", "os.system"),
        (b"\x80\x04" + text("os") + b"q\x000" + text("system") + b"q\x010h\x00h\x01\x93.", "os.system"),
        (b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93.", "os.system"),
        (b"\x80\x04" + text("os") + text("nt") + b"(NNN1\x85" + b"0" + text("system") + b"\x93.", "os.system"),
        (b"\x80\x04" + text("os") + text("system") + b"2000" + text("os") + text("system") + b"\x93.", "os.system"),
        (b"\x80\x04(" + text("os") + text("nt") + b"0" + text("system") + b"\x930.", "os.system"),
        (b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93.", "torch.serialization.os.system"),
        (b"\x80\x02\x82\x01.", "extension 1 of copyreg"),
        (b"\x80\x04" + text("a") + b"]" + b"\x93.", f"a.{COMPUTED}"),
        (b"\x80\x04cos\nsystem\n" + text("true") + b"\x85R" + b"\xfe\xfe", "os.system"),  # damaged behind the payload
    ],
)
def test_every_way_to_name_a_global(tmp_path, content, name):
    assert name in globals_of(tmp_path, content)


def test_every_pickle_in_a_row_and_inside_byte_strings(tmp_path):
    evil = pickle.dumps(Payload(), 2)
    harmless = pickle.dumps(1, 2)
    assert globals_of(tmp_path, harmless + harmless + evil + b"\0numbers") == {"__builtin__.print"}
    nested = pickle.dumps(pickle.dumps([pickle.dumps(evil, 4)], 4), 4)
    assert globals_of(tmp_path, nested) == {"__builtin__.print"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("member", ["archive/data.pkl", "anything", "arr.npy"])
def test_members_of_archives(tmp_path, compression, member):
    array = io.BytesIO()
    np.save(array, np.array([Payload()], dtype=object), allow_pickle=True)
    content = array.getvalue() if member == "arr.npy" else pickle.dumps(Payload(), 2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        archive.writestr("first", b"\x80numbers of a storage")
        archive.writestr(member, content)
    found = scan_file(tmp_path / "a.zip")
    assert len(found.suspicious) == 1 and next(iter(found.suspicious)).endswith(".print") and not found.problems


def test_honest_files_are_clean_and_hostile_ones_are_not():
    verdicts = {found.path.name: found.verdict for found in scan(DATA)}
    evil = {name for name in verdicts if name.startswith("evil") and not name.startswith("evil_persistence")}
    assert {name for name, verdict in verdicts.items() if verdict == "suspicious"} == evil and len(evil) == 9
    assert {name for name, verdict in verdicts.items() if verdict == "error"} == set()


def test_files_of_torch_save_are_clean(tmp_path):
    for legacy in (False, True):
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        found = scan_file(tmp_path / "a.pt")
        assert found.verdict == "clean" and "torch._utils._rebuild_tensor_v2" in found.known


@pytest.mark.parametrize(
    "content", [b"\x80\x04", b"PK\x03\x04", b"\x80\x04B\xff\xff\xff\xff", b"\x80\x04\x8e" + b"\xff" * 8]
)
def test_what_cannot_be_looked_into_is_an_error(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert scan_file(tmp_path / "a.pt").verdict == "error"


def run(*arguments) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["inspect", "--scan", *map(str, arguments)])
    return result.exit_code, result.output.splitlines()


def test_the_exit_code_says_the_worst_and_links_are_not_followed(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "number.pkl").write_bytes(pickle.dumps(1))
    code, lines = run(tmp_path)
    assert code == 0 and lines[-1] == "1 clean, 0 suspicious, 0 error"
    (tmp_path / "damaged.pt").write_bytes(b"\x80\x04")
    assert run(tmp_path)[0] == 2
    (tmp_path / "inner" / "[bold]\x1b[31m.pkl").write_bytes(pickle.dumps(Payload()))
    code, lines = run(tmp_path)
    assert code == 1 and lines[-1] == "1 clean, 1 suspicious, 1 error"
    (said,) = [line for line in lines if line.startswith("suspicious")]
    assert "[bold]\\x1b[31m.pkl: would call builtins.print" in said
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.pkl").symlink_to(tmp_path / "damaged.pt")
    assert run(tmp_path)[1] == lines
    assert run(tmp_path / "missing")[0] == 2
