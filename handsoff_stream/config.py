"""YAML => frozen dataclasses, class maps first of all.

A file may set each field of the dataclass once, to a value of its type; everything else is an error that names file,
line and key. Knows YAML and annotations. Does not know what the fields mean, which the dataclasses check. The only
importer of yaml.

A class map, as a user writes it (`load_class_map`):

    classes:
      0: {name: background, from_ids: [0, 7, 9]}       # what the masks hold => class id
      1: {name: skin, from_ids: [1], color: [112, 130, 107]}
      2: {name: hair, from_ids: [2, 3], from_colors: [[190, 3, 144]]}
    ignore: {from_ids: [255]}                          # unlabelled; this is the default
    others: background                                 # all other ids and colors: a class, or ignore; else an error
"""

import difflib
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from handsoff_stream.datasets.labelled_images.class_maps import ClassMap, MappedClass, Sources
from handsoff_stream.errors import printable
from handsoff_stream.files.budget import MAX_NESTING, MAX_TEXT_BYTES

CLASS_MAPS = Path(__file__).parent / "assets" / "class_maps"
T = TypeVar("T")


@dataclass(frozen=True)
class _ClassMapFile:
    """The YAML form of a `ClassMap`."""

    classes: dict[int, MappedClass]
    ignore: Sources | None = None
    others: str | None = None


def class_map_names() -> list[str]:
    """Names of the class maps that ship."""
    return sorted(file.stem for file in CLASS_MAPS.glob("*.yaml"))


def load_class_map(name_or_path: str | Path) -> ClassMap:
    """A class map that ships, by its name, or a user's YAML file.

    Raises:
        ValueError: no such map; a file that is not a class map; a gap in the class ids; whatever `ClassMap` refuses.
    """
    shipped = CLASS_MAPS / f"{name_or_path}.yaml"
    path = shipped if str(name_or_path) in class_map_names() else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"{name_or_path}: no such class map; name a YAML file or one of {', '.join(class_map_names())}"
        )
    content = load_config(path, _ClassMapFile)
    ids = sorted(content.classes)
    if ids != list(range(len(ids))):
        raise ValueError(printable(f"{path}: class ids {ids} do not count from 0 without a gap; number them so"))
    try:
        return ClassMap(tuple(content.classes[i] for i in ids), content.ignore, content.others)
    except ValueError as error:
        raise ValueError(printable(f"{path}: {error}")) from None


def load_config(path: str | Path, kind: type[T]) -> T:
    """A YAML file as a dataclass.

    Fields may be of type bool, int, float, str, None, Literal, tuple, dict, dataclass, and unions of one of these
    with None.

    Raises:
        ValueError: no YAML, or anything that `kind` has no field for; the message says where.
        OSError: a file that cannot be read.
    """
    if Path(path).stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: larger than a configuration can be, {MAX_TEXT_BYTES} bytes; check the path")
    try:
        loader = _BoundedLoader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node() or yaml.MappingNode("tag:yaml.org,2002:map", [], loader.get_mark())
        value: T = _Reader(str(path), loader).value(node, kind, "the file")
        return value
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(printable(f"{path}: no YAML: {error}")) from None
    except _RefusedError as error:
        raise ValueError(printable(f"{path}, {error}")) from None


class _RefusedError(Exception):
    """YAML that a configuration has no need of."""


class _BoundedLoader(yaml.SafeLoader):
    """Without aliases, which unfold without end, without tags, which call for other types, and not nested deep."""

    depth = 0  # of the node that is being read

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(f"{where}: an alias (*{event.anchor}); write what it stands for")
        if event.tag is not None:
            raise _RefusedError(f"{where}: a tag ({event.tag}); write plain values")
        if self.depth >= MAX_NESTING:
            raise _RefusedError(f"{where}: nested more than {MAX_NESTING} deep; no configuration is")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@dataclass(frozen=True)
class _Reader:
    """YAML nodes => values of annotated types."""

    file: str
    loader: yaml.SafeLoader

    def value(self, node: yaml.Node, kind: Any, what: str) -> Any:
        """`what`: how messages call it."""
        origin, parts = get_origin(kind), get_args(kind)
        if origin in (typing.Union, UnionType):
            if NoneType in parts and self._is_null(node):
                return None
            (kind,) = (part for part in parts if part is not NoneType)
            return self.value(node, kind, what)
        if is_dataclass(kind):
            return self._record(node, kind, what)
        if origin is dict:
            return {
                key: self.value(child, parts[1], f"{what} {key}") for key, _, child in self._items(node, parts[0], what)
            }
        if origin is tuple:
            return self._tuple(node, parts, what)
        return self._scalar(node, kind, what)

    def _record(self, node: yaml.Node, kind: Any, what: str) -> Any:
        types = typing.get_type_hints(kind)
        known = {f.name: f for f in fields(kind)}
        given: dict[str, Any] = {}
        for key, key_node, child in self._items(node, str, what):
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
                raise self._error(key_node, f"{what} has no key {key!r}; {hint}")
            given[key] = self.value(child, types[key], f"{what}: {key}" if what != "the file" else key)
        required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in required if name not in given]
        if missing:
            raise self._error(node, f"{what} needs {', '.join(missing)}")
        return kind(**given)

    def _items(self, node: yaml.Node, key_kind: Any, what: str) -> Iterator[tuple[Any, yaml.Node, yaml.Node]]:
        """(key, its node, node of the value); each key once."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} is {node.tag.rpartition(':')[2]}; write keys and values")
        seen = set()
        for key_node, child in node.value:
            key = self._scalar(key_node, key_kind, f"a key of {what}")
            if key in seen:
                raise self._error(key_node, f"{what} has {key!r} twice; keep one")
            seen.add(key)
            yield key, key_node, child

    def _tuple(self, node: yaml.Node, parts: tuple[Any, ...], what: str) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"{what} is {node.tag.rpartition(':')[2]}; write a list, [...]")
        kinds = [parts[0]] * len(node.value) if parts[1:] == (...,) else list(parts)
        if len(kinds) != len(node.value):
            raise self._error(node, f"{what} has {len(node.value)} entries; it takes {len(kinds)}")
        return tuple(self.value(child, kind, what) for child, kind in zip(node.value, kinds, strict=True))

    def _scalar(self, node: yaml.Node, kind: Any, what: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{what} is {node.tag.rpartition(':')[2]}; write a single value")
        value = self.loader.construct_object(node)
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
            raise self._error(node, f"{what} is {value!r}; choose one of {', '.join(map(str, get_args(kind)))}")
        if kind is float and type(value) is int:
            return float(value)
        # Not isinstance: True is no integer here.
        if type(value) is not kind:
            hint = "; put it in quotes" if kind is str else ""
            raise self._error(node, f"{what} is {value!r}; it takes {kind.__name__}{hint}")
        return value

    def _is_null(self, node: yaml.Node) -> bool:
        return isinstance(node, yaml.ScalarNode) and self.loader.construct_object(node) is None

    def _error(self, node: yaml.Node, message: str) -> ValueError:
        return ValueError(printable(f"{self.file}, line {node.start_mark.line + 1}: {message}"))
