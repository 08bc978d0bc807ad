"""A pickle reader that cannot execute code: it interprets the instructions itself and never imports a name.

The standard unpickler imports any module that a file names. Here a name is a pair of strings that is looked up in an
allow-list. Only functions of this package are called, and the result is inert: None, bool, int, float, str, list,
tuple, dict, set, memoryviews for byte strings, tensors, numpy arrays, and the plain records of this package. A `Budget`
bounds memory and time in proportion to the size of the file, whatever sizes the file claims.

Knows the instructions of protocols 2 to 5. Does not know PyTorch: `torch_pickle` contains the allow-list.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from handsoff_stream.errors import CheckpointError, printable
from handsoff_stream.files.budget import MAX_KEY, Budget, check_nesting

MAX_INT_BYTES = 16
MAX_NAME_BYTES = 256

Constructor = Callable[..., Any]
AllowList = Mapping[tuple[str, str], Constructor | None]
"""(module, name) => the function that replaces it; None for names that may be mentioned but not called."""


@dataclass(frozen=True)
class Name:
    """An allowed global that the file mentions: only a pair of strings."""

    module: str
    name: str


@dataclass(eq=False, repr=False)
class Record:
    """An object of a foreign class, reduced to its class name and its attributes."""

    class_name: str
    state: dict[str, Any]


def loads(
    data: memoryview,
    allowed: AllowList,
    budget: Budget,
    *,
    start: int = 0,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: bytes that contain the pickle.
        allowed: the only globals that the pickle may mention.
        budget: limits, shared with other pickles of the same file.
        start: offset of the pickle in `data`.
        persistent: persistent id => object; None means that persistent ids are refused.

    Returns:
        (inert content, offset after the pickle).

    Raises:
        CheckpointError: a global that is not allowed (the message names it), an instruction that is not allowed,
            damage, or a cost beyond the budget. No other exception is raised.
    """
    machine = _Machine(data, allowed, budget, start, persistent)
    try:
        value = machine.run()
        check_nesting(value, children)
        return value, machine.position
    except CheckpointError:
        raise
    except Exception as error:  # instructions of a damaged file may fail in any way
        raise CheckpointError(
            f"damaged pickle at byte {machine.position} ({type(error).__name__}: {printable(str(error), 100)}); "
            "copy or download it again"
        ) from error


def check_key(key: Any) -> Any:
    """The key of a dictionary or member of a set, which must be a short string, a small integer, a bool or None.

    These hash fast and without collisions. Hashing nested tuples can take exponential time. Inserting huge integers of
    equal hash, or repeatedly comparing long equal strings, can take quadratic time.

    Raises:
        CheckpointError: any other key.
    """
    if type(key) is str:
        if len(key) > MAX_KEY:
            raise CheckpointError(
                f"a dictionary key of {len(key)} characters, which no published file has; copy the file again"
            )
    elif not (key is None or type(key) is bool or type(key) is int and abs(key) < 2**31):
        raise CheckpointError(
            f"a {type(key).__name__} as a dictionary key, which no published file has; copy the file again"
        )
    return key


def children(value: Any) -> Iterable[Any] | None:
    """The items of a container; None for other values."""
    if type(value) in (list, tuple, set):
        return value
    if type(value) is dict:
        return value.values()
    if type(value) is Record:
        return value.state.values()
    return value.ravel() if isinstance(value, np.ndarray) and value.dtype.hasobject else None


def shown(value: Any) -> str:
    """A short printable form of an untrusted value for messages; containers, which may be endless, by their type."""
    return ascii(value[:80])[1:-1] if isinstance(value, str) else f"<{type(value).__name__}>"


def blocked(module: Any, name: Any) -> CheckpointError:
    """The error for a global that is not allowed."""
    if isinstance(module, str) and module.startswith("dnnlib.tflib"):
        return CheckpointError(
            "a TensorFlow-era StyleGAN pickle, which only TensorFlow code can open; convert it with `python legacy.py "
            "--source=IN.pkl --dest=OUT.pkl` of NVlabs/stylegan2-ada-pytorch and load OUT.pkl"
        )
    return CheckpointError(
        f"blocked global '{shown(module)}.{shown(name)}': reading it might execute code, so nothing was read. If a "
        "known training code wrote the file, report the name; if not, delete the file"
    )


class _Machine:
    def __init__(
        self,
        data: memoryview,
        allowed: AllowList,
        budget: Budget,
        start: int,
        persistent: Callable[[Any], Any] | None,
    ):
        self.data, self.position = data, start
        self.allowed, self.budget, self.persistent = allowed, budget, persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stack below each open mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            self.budget.step()
            code = self.uint(1)
            if code == ord("."):
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise CheckpointError(
                    f"pickle instruction {bytes([code])!r} at byte {self.position - 1} does not occur in StyleGAN "
                    "files; the file is damaged or has another format, so copy or download it again"
                )
            instruction(self)

    def take(self, size: int) -> memoryview:
        """The next bytes, without a copy; sizes that exceed the file are refused before anything is allocated."""
        if size > len(self.data) - self.position:
            raise CheckpointError(f"claims {size} bytes at byte {self.position}, beyond its end; copy it again")
        self.position += size
        return self.data[self.position - size : self.position]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        size = bytes(self.data[self.position : self.position + MAX_NAME_BYTES]).index(b"\n")
        return str(self.take(size + 1)[:size], "utf-8")

    def integer(self, size: int) -> None:
        if size > MAX_INT_BYTES:
            raise CheckpointError(f"an integer of {size} bytes, which no published file has")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        raw = self.take(size)
        self.budget.spend(size)
        self.stack.append(str(raw, "utf-8", "surrogatepass"))

    def items(self) -> list[Any]:
        """The values that were pushed since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def last(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise CheckpointError(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def extend_dict(self, flat: list[Any]) -> None:
        target = self.last(dict)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[check_key(key)] = value

    def extend_list(self, values: list[Any]) -> None:
        self.last(list).extend(values)

    def extend_set(self, values: list[Any]) -> None:
        self.last(set).update(map(check_key, values))

    def tuple_since_mark(self) -> None:
        values = tuple(self.items())
        self.stack.append(values)

    def tuple_of(self, size: int) -> None:
        if size > len(self.stack):
            raise IndexError("stack is empty")
        values = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(values)

    def mention(self, module: Any, name: Any) -> None:
        # Only exact pairs are allowed: a dotted name could reach another module through a harmless one.
        if type(module) is not str or type(name) is not str or (module, name) not in self.allowed:
            raise blocked(module, name)
        self.stack.append(Name(module, name))

    def mention_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.mention(module, name)

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        constructor = self.allowed[name.module, name.name] if type(name) is Name else None
        if constructor is None or type(arguments) is not tuple:
            called = f"{name.module}.{name.name}" if type(name) is Name else f"a {type(name).__name__}"
            raise CheckpointError(
                f"calls {called}, which no readable file does; the file is damaged or malicious, so delete it"
            )
        self.stack.append(constructor(self.budget, *arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:
            return  # attributes of an OrderedDict, such as a state dict's _metadata, or EasyDict's empty state
        if type(target) is Record and type(state) is dict:
            self.budget.step(len(state))
            if not all(type(key) is str for key in state):
                raise CheckpointError("sets attributes whose names are not strings, which no published file does")
            target.state.update(state)
        elif hasattr(type(target), "set_pickle_state"):
            target.set_pickle_state(self.budget, state)
        else:
            raise CheckpointError(f"sets attributes of a {type(target).__name__}, which no published file does")

    def resolve(self) -> None:
        if self.persistent is None:
            raise CheckpointError("refers to data outside of the pickle, which only torch.save files do")
        self.stack.append(self.persistent(self.stack.pop()))

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def protocol(self) -> None:
        if not 2 <= (version := self.uint(1)) <= 5:
            raise CheckpointError(f"pickle protocol {version}; protocols 2 to 5 are read")

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def double(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])


_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord(code): instruction
    for code, instruction in {
        # Framing and marks.
        b"\x80": _Machine.protocol,
        b"\x95": lambda m: m.uint(8),  # frame length, which is not needed for data in memory
        b"(": _Machine.mark,
        b"0": lambda m: m.stack.pop(),
        b"1": _Machine.items,
        # Scalars.
        b"N": lambda m: m.stack.append(None),
        b"\x88": lambda m: m.stack.append(True),
        b"\x89": lambda m: m.stack.append(False),
        b"J": lambda m: m.integer(4),
        b"K": lambda m: m.stack.append(m.uint(1)),
        b"M": lambda m: m.stack.append(m.uint(2)),
        b"\x8a": lambda m: m.integer(m.uint(1)),
        b"\x8b": lambda m: m.integer(m.uint(4)),
        b"G": _Machine.double,
        # Strings and bytes.
        b"\x8c": lambda m: m.text(m.uint(1)),
        b"X": lambda m: m.text(m.uint(4)),
        b"\x8d": lambda m: m.text(m.uint(8)),
        b"C": lambda m: m.stack.append(m.take(m.uint(1))),
        b"B": lambda m: m.stack.append(m.take(m.uint(4))),
        b"\x8e": lambda m: m.stack.append(m.take(m.uint(8))),
        # Containers.
        b"]": lambda m: m.stack.append([]),
        b"}": lambda m: m.stack.append({}),
        b"\x8f": lambda m: m.stack.append(set()),
        b")": lambda m: m.stack.append(()),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"t": _Machine.tuple_since_mark,
        b"a": lambda m: m.extend_list([m.stack.pop()]),
        b"e": lambda m: m.extend_list(m.items()),
        b"s": lambda m: m.extend_dict([m.stack.pop(-2), m.stack.pop()]),
        b"u": lambda m: m.extend_dict(m.items()),
        b"\x90": lambda m: m.extend_set(m.items()),
        # Memo.
        b"q": lambda m: m.memoize(m.uint(1)),
        b"r": lambda m: m.memoize(m.uint(4)),
        b"\x94": lambda m: m.memoize(len(m.memo)),
        b"h": lambda m: m.stack.append(m.memo[m.uint(1)]),
        b"j": lambda m: m.stack.append(m.memo[m.uint(4)]),
        # Globals, calls, attributes, persistent ids.
        b"c": lambda m: m.mention(m.line(), m.line()),
        b"\x93": _Machine.mention_from_stack,
        b"R": _Machine.call,
        b"\x81": _Machine.call,
        b"b": _Machine.build,
        b"Q": _Machine.resolve,
    }.items()
}
