"""A YAML file sets the fields of a dataclass and nothing else; errors name the line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from handsoff_stream.config import class_map_names, load_class_map, load_config
from handsoff_stream.datasets.labelled_images.class_maps import Sources
from handsoff_stream.fitting import FitSettings


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    note: str | None = None
    many: tuple[Inner, ...] = ()
    table: dict[int, str] = field(default_factory=dict)


GOOD = """
name: first
inner: {size: [4, 6]}
many:
  - {size: [1, 2], rate: 1}
table: {0: zero, 3: three}
"""
MAP = """
classes:
  0: {name: background, from_ids: [0, 2]}
  1:
    name: hair
    from_ids: [1]
    from_colors: [[255, 0, 0]]
"""


def load(tmp_path: Path, content: str, kind: type = Outer):
    (tmp_path / "c.yaml").write_text(content)
    return load_config(tmp_path / "c.yaml", kind)


def error(tmp_path: Path, content: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(tmp_path, content)
    return str(caught.value).removeprefix(f"{tmp_path / 'c.yaml'}")


def map_error(tmp_path: Path, content: str) -> str:
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(ValueError, match="m.yaml") as caught:
        load_class_map(tmp_path / "m.yaml")
    return str(caught.value)


def test_a_file_becomes_a_dataclass(tmp_path):
    expected = Outer("first", Inner((4, 6)), many=(Inner((1, 2), 1.0),), table={0: "zero", 3: "three"})
    assert load(tmp_path, GOOD) == expected
    assert isinstance(load(tmp_path, GOOD).many[0].rate, float)


def test_every_kind_of_field_is_read(tmp_path):
    content = (
        'name: ü\ninner: {size: [1, 2]}\nkind: b\nflag: true\nnote: "n: 1"\n'
        "many: [{size: [3, 4], rate: 2.5}]\ntable: {7: x}\n"
    )
    expected = Outer("ü", Inner((1, 2)), kind="b", flag=True, note="n: 1", many=(Inner((3, 4), 2.5),), table={7: "x"})
    assert load(tmp_path, content) == expected
    settings = load(tmp_path, "hidden: [8, 4]\nepochs: 3\n", FitSettings)
    assert settings == FitSettings(epochs=3, hidden=(8, 4))


def test_unknown_keys_are_errors_with_line_and_suggestion(tmp_path):
    assert error(tmp_path, GOOD + "nmae: x\n") == ", line 7: the file has no key 'nmae'; did you mean name?"
    text = error(tmp_path, GOOD.replace("rate: 1", "zzz: 1"))
    assert text == ", line 5: many has no key 'zzz'; the keys are size, rate"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: first", "name: first\nname: second", "line 3: the file has 'name' twice"),
        ("name: first", "name: no", "line 2: name is False; it takes str; put it in quotes"),
        ("name: first", "name: first\nflag: 1", "line 3: flag is 1; it takes bool"),
        ("name: first", "name: first\nkind: c", "kind is 'c'; choose one of a, b"),
        ("name: first", "", "line 3: the file needs name"),
        ("[4, 6]", "[4, true]", "inner: size is True; it takes int"),
        ("[4, 6]", "[4, 6, 8]", "inner: size has 3 entries; it takes 2"),
        ("[4, 6]", "4", "inner: size is int; write a list"),
        ("{size: [4, 6]}", "[]", "inner is seq; write keys and values"),
        ("name: first", "name: [x]", "name is seq; write a single value"),
        ("0: zero", "zero: zero", "a key of table is 'zero'; it takes int"),
        ("0: zero", "3: zero", "table has 3 twice"),
        ("first", "!!python/object:os.system x", "line 2: a tag"),
        ("first", "[", "no YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    assert message in error(tmp_path, GOOD.replace(old, new))


def test_an_empty_file_and_bytes_that_are_no_text_are_errors(tmp_path):
    assert "the file needs name, inner" in error(tmp_path, "")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no YAML"):
        load_config(tmp_path / "c.yaml", Outer)


def test_a_class_map_of_ones_own(tmp_path):
    (tmp_path / "m.yaml").write_text(MAP + "ignore: {from_ids: [9]}\nothers: background\n")
    class_map = load_class_map(tmp_path / "m.yaml")
    assert class_map.class_names == ("background", "hair") and class_map.others == "background"
    assert class_map.ids == {0: 0, 2: 0, 1: 1, 9: 255} and class_map.colors == {(255, 0, 0): 1}
    assert class_map.ignore == Sources(from_ids=(9,))


def test_the_example_in_the_documentation_is_a_class_map(tmp_path):
    import handsoff_stream.config as config

    example = (config.__doc__ or "").partition("(`load_class_map`):\n")[2]
    (tmp_path / "m.yaml").write_text(example)
    assert load_class_map(tmp_path / "m.yaml").class_names == ("background", "skin", "hair")


def test_class_ids_have_no_gap_and_no_duplicate(tmp_path):
    assert "class ids [0, 2] do not count from 0 without a gap" in map_error(tmp_path, MAP.replace("  1:", "  2:"))
    assert "class ids [1, 2]" in map_error(tmp_path, MAP.replace("  1:", "  2:").replace("  0:", "  1:"))
    assert "line 4: classes has 0 twice" in map_error(tmp_path, MAP.replace("  1:", "  0:"))


def test_mistakes_in_a_class_map_are_named_with_its_file(tmp_path):
    assert "id 1 is mapped twice" in map_error(tmp_path, MAP.replace("[0, 2]", "[0, 1]"))
    assert "2 classes are named 'hair'" in map_error(tmp_path, MAP.replace("background", "hair"))
    assert "line 3: classes 0 has no key 'ids'; the keys are" in map_error(
        tmp_path, MAP.replace("from_ids: [0", "ids: [0")
    )
    assert "classes 1: from_colors has 2 entries; it takes 3" in map_error(
        tmp_path, MAP.replace("[255, 0, 0]", "[1, 2]")
    )


def test_a_map_that_neither_ships_nor_exists_is_an_error_that_lists_those_that_ship():
    with pytest.raises(ValueError, match="celebamask_hq_8, ") as caught:
        load_class_map("celebamask")
    assert all(name in str(caught.value) for name in class_map_names())
