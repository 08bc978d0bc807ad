"""Untrusted dictionaries => values of known types, checked by pydantic; an error names the wrong entry in one sentence.

A schema lists the allowed entries with their types. Other entries, other types, NaN and infinity are refused. Knows
types and bounds. Does not know what the entries mean.
"""

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import from_json

from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.budget import MAX_NAME, MAX_NAMES, MAX_TEXT_BYTES, MAX_WIDTH

NUM_NAMED = 2  # wrong entries that a message names
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tabs and line breaks


class Schema(BaseModel):
    """Base class of all schemas: values are not converted; unknown entries, NaN and infinity are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def _without_control_characters(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


Count = Annotated[int, Field(ge=0, le=MAX_WIDTH)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_without_control_characters)]
PLAIN: dict[Any, Any] = {bool: bool, int: Count, float: Number, str: Name, NoneType: None}

S = TypeVar("S", bound=Schema)


def validated(schema: type[S], value: Any, what: str) -> S:
    """The value as an instance of the schema.

    Args:
        schema: its class.
        value: a dictionary.
        what: name of the dictionary in messages.

    Raises:
        CheckpointError: entries that are missing, unknown, or of another type or range; the message names the first.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        wrong = [_sentence(detail) for detail in found[:NUM_NAMED]]
        more = f" and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
        raise CheckpointError(f"{what} is not as this release writes it: {'; '.join(wrong)}{more}") from None


@cache
def arguments_of(function: Callable[..., Any]) -> type[Schema]:
    """The schema of a constructor's arguments that are numbers, strings or lists of them, from its annotations."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _strict(hints[name])
        if kind is not None:
            fields[name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    return create_model(f"{getattr(function, '__name__', 'Arguments')}Arguments", __base__=Schema, **fields)


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse untrusted JSON; `what`: its name in messages.

    Raises:
        CheckpointError: the text is not JSON or too long, is nested more than 200 levels deep, or contains NaN,
            infinity or control characters.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{what} has {len(text)} characters, but up to {MAX_TEXT_BYTES} are read; shorten it")
    try:
        value = from_json(text)
    except ValueError as error:
        raise CheckpointError(f"{what} is not readable JSON ({error}); correct it") from None
    found = _bad_scalar(value)
    if found is not None:
        where, problem = found
        raise CheckpointError(f"{what} holds {problem} at {'.'.join(reversed(where)) or 'the top'}; write it again")
    return value


def read_json(path: Path, what: str) -> Any:
    """Parse untrusted JSON in a file, after a check of its size; `what`: its name in messages.

    Raises:
        CheckpointError: as `parse_json`, or the file cannot be read; the message begins with the path.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_TEXT_BYTES} bytes, the limit for {what}; check the path")
        return parse_json(path.read_bytes(), what)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _bad_scalar(value: Any) -> tuple[list[str], str] | None:
    """(keys from the inside out, the problem) of the first non-finite number or text with control characters."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], str(value))
    if isinstance(value, str):
        return None if CONTROL_CHARACTERS.search(value) is None else ([], "control characters")
    if not isinstance(value, dict | list):
        return None
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        found = _bad_scalar(child) or (_bad_scalar(key) if isinstance(key, str) else None)
        if found is not None:
            return [*found[0], str(key)], found[1]
    return None


def _sentence(detail: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in detail["loc"]) or "the whole"
    came = detail["input"]
    shown = f" ({came!r:.40} came)" if isinstance(came, (str, float)) or came is None or type(came) is bool else ""
    if type(came) is int:
        shown = f" ({came} came)" if abs(came) < 10**18 else " (a huge number came)"
    message = str(detail["msg"])
    return f"{printable(where, 80)}: {message[:1].lower()}{message[1:]}{shown}"


def _strict(hint: Any) -> Any:
    """An annotation => the type of its JSON values; None if JSON cannot express it."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if origin in (typing.Union, UnionType):
        (inner,) = (part for part in parts if part is not NoneType)
        kind = _strict(inner)
        return None if kind is None else kind | None
    if origin in (Sequence, list) or (origin is tuple and parts[1:] == (...,)):
        return Annotated[list[_strict(parts[0])], Field(max_length=MAX_NAMES)]  # type: ignore[misc]
    if origin is tuple:
        return Annotated[list[_strict(parts[0])], Field(min_length=len(parts), max_length=len(parts))]  # type: ignore[misc]
    return None
