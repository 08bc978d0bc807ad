"""A file is whole or not there; what stood before stays until the new one is whole."""

import pytest

from handsoff_stream.files.atomic import whole_file


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    with whole_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old" and partial.parent == tmp_path and partial.name.startswith(".")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_there_and_nothing_else(tmp_path, interruption):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    with pytest.raises(interruption), whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise interruption
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_before_anything_is_computed(tmp_path):
    with pytest.raises(OSError), whole_file(tmp_path / "nowhere" / "result.bin"):
        raise AssertionError("the block must not begin")
