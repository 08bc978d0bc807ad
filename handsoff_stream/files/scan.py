"""Lists the globals that the pickles in a file would import or call, without loading them.

It is the function behind `handsoff-stream inspect --scan`. Python's `pickletools` splits a pickle into instructions.
They are run here on a stack that holds only strings, so names that are assembled on the stack are found too, and
computed names are reported as such. Zip archives (PyTorch, npz), PyTorch's older container, raw pickles of every
protocol, object arrays, and pickles inside byte strings are scanned.

Knows instructions and containers. Does not know which globals are dangerous: every global that the strict reader does
not read counts as suspicious.
"""

import io
import mmap
import os
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from handsoff_stream.errors import printable
from handsoff_stream.files.budget import MAX_ZIP_ENTRIES
from handsoff_stream.files.containers import NPY_START, ZIP_START
from handsoff_stream.files.torch_pickle import GLOBALS

PICKLE_SUFFIXES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
MAX_MEMBER = 2**28  # bytes of the largest archive member that is scanned
MAX_DEPTH = 4  # levels of pickles inside byte strings of pickles
COMPUTED = "(computed while loading)"
MARK, UNKNOWN = object(), None


@dataclass
class Findings:
    """The globals and problems found in one file."""

    path: Path
    pickles: int = 0
    known: set[str] = field(default_factory=set)
    """Globals for which the strict reader has replacements; the published loaders import them."""
    suspicious: set[str] = field(default_factory=set)
    """All other globals."""
    problems: list[str] = field(default_factory=list)
    """Why parts of the file could not be scanned."""

    @property
    def verdict(self) -> str:
        """ "suspicious", "error" or "clean"."""
        return "suspicious" if self.suspicious else "error" if self.problems else "clean"

    def sentence(self) -> str:
        """Verdict, file, globals and problems in one line; unprintable characters are not escaped."""
        parts = [f"would call {name}" for name in sorted(self.suspicious)]
        parts += self.problems
        if self.known:
            parts.append(f"known: {', '.join(sorted(self.known))}")
        if not self.pickles and not self.problems:
            parts.append("no pickle inside")
        return f"{self.verdict} {self.path}: {'; '.join(parts) or 'a pickle without globals'}"


def scan(path: str | Path) -> Iterator[Findings]:
    """Scan a file, or all files below a folder; links are not followed.

    Raises:
        FileNotFoundError: there is no such file or folder.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder; check the path")
        yield scan_file(path)
        return
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders.sort()
        for name in sorted(files):
            file = Path(folder) / name
            if file.is_file() and not file.is_symlink():
                yield scan_file(file)


def scan_file(path: Path) -> Findings:
    """Scan one file; read errors are reported among its problems."""
    found = Findings(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(NPY_START))
            if path.stat().st_size == 0:
                return found
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if start.startswith(ZIP_START):
                    file.seek(0)
                    _scan_zip(file, found)
                else:
                    _scan_stream(data, found, sure=start[:1] == b"\x80" or path.suffix.lower() in PICKLE_SUFFIXES)
    except OSError as error:
        found.problems.append(f"cannot be read ({error.strerror})")
    return found


def _scan_zip(file: BinaryIO, found: Findings) -> None:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        found.problems.append(f"a damaged zip archive ({printable(str(error), 80)})")
        return
    infos = archive.infolist()
    if len(infos) > MAX_ZIP_ENTRIES:
        found.problems.append(f"{len(infos)} entries in its zip directory, of which {MAX_ZIP_ENTRIES} are scanned")
    for info in infos[:MAX_ZIP_ENTRIES]:
        sure = Path(info.filename).suffix.lower() in PICKLE_SUFFIXES
        try:
            with archive.open(info) as member:
                start = member.read(len(NPY_START))
                if not (sure or start[:1] == b"\x80" or start == NPY_START):
                    continue  # the numbers of a storage
                if info.file_size > MAX_MEMBER:
                    found.problems.append(f"{info.filename}: {info.file_size} bytes, too many to be scanned")
                    continue
                data = io.BytesIO(start + member.read(MAX_MEMBER))
        except Exception as error:  # zlib, checksums and encryption raise different errors
            found.problems.append(f"{info.filename}: cannot be read ({printable(str(error), 80)})")
            continue
        _scan_stream(data, found, sure=sure)


def _scan_stream(data: Any, found: Findings, *, sure: bool) -> None:
    """Scan consecutive pickles, from the start or after the header of an object array.

    Args:
        data: BytesIO or mmap, whose `read` returns no more than there is.
        found: receives the results.
        sure: whether the file name says that it is a pickle, so that damage is a problem.
    """
    data.seek(0)
    start = data.read(12)
    modern = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    position = 0
    if start.startswith(NPY_START):
        width = 2 if start[6] == 1 else 4
        position = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
        data.seek(8 + width)
        if b"O" not in data.read(min(position, 10_000) - 8 - width).partition(b"fortran")[0]:
            return  # numbers
        sure = True
    data.seek(position)
    first = True
    while first or data.read(1) == b"\x80":
        data.seek(position)
        scratch = Findings(found.path)
        whole = _scan_pickle(data, scratch, depth=0)
        if not whole and not (sure and first) and not (scratch.suspicious and modern):
            return  # not a pickle, but text or numbers that begin like one, or numbers after the last pickle
        found.known |= scratch.known
        found.suspicious |= scratch.suspicious
        if not whole:
            found.problems += scratch.problems
            return
        found.pickles += 1
        found.problems += scratch.problems
        position, first = data.tell(), False


def _scan_pickle(data: Any, found: Findings, depth: int) -> bool:
    """Scan one pickle from the current position; returns whether its end was reached."""
    machine = _Names(found, depth)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.run(opcode, argument)
    except Exception as error:  # a loader would still execute what comes before the damage
        found.problems.append(f"a damaged pickle ({type(error).__name__}: {printable(str(error), 80)})")
        return False
    return True


class _Names:
    """A pickle machine whose stack holds only strings; all other values are unknown."""

    def __init__(self, found: Findings, depth: int) -> None:
        self.found, self.depth = found, depth
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            self.add(argument.replace(" ", ".", 1))
        elif name in ("EXT1", "EXT2", "EXT4"):
            self.add(f"extension {argument} of copyreg")
        elif name == "STACK_GLOBAL":
            parts = [part if isinstance(part, str) else COMPUTED for part in self.stack[-2:]]
            self.add(".".join(parts) or COMPUTED)
        if isinstance(argument, bytes | bytearray) and argument[:1] == b"\x80" and self.depth < MAX_DEPTH:
            self.look_into(bytes(argument))
        self.move(opcode, argument)

    def move(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1] if self.stack else UNKNOWN
            return
        if name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo.get(argument, UNKNOWN))
            return
        if name == "DUP":
            self.stack.append(self.stack[-1] if self.stack else UNKNOWN)
            return
        before = list(opcode.stack_before)
        if pickletools.stackslice in before or (before and before[0] is pickletools.markobject):
            while self.stack and self.stack.pop() is not MARK:
                pass
            before = before[: before.index(pickletools.markobject)]
        elif name == "POP" and self.stack and self.stack[-1] is MARK:
            before = [pickletools.anyobject]
        del self.stack[max(0, len(self.stack) - len(before)) :]
        for kind in opcode.stack_after:
            is_text = isinstance(argument, str) and name not in ("GLOBAL", "INST", "PERSID")
            self.stack.append(MARK if kind is pickletools.markobject else argument if is_text else UNKNOWN)

    def add(self, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        known = (module, attribute) in GLOBALS
        (self.found.known if known else self.found.suspicious).add(name)

    def look_into(self, raw: bytes) -> None:
        """Scan a byte string that begins like a pickle, such as the storages inside NVlabs' files."""
        inner, scratch = io.BytesIO(raw), Findings(self.found.path)
        while inner.tell() < len(raw) and raw[inner.tell() : inner.tell() + 1] == b"\x80":
            if not _scan_pickle(inner, scratch, self.depth + 1):
                break
        self.found.known |= scratch.known
        self.found.suspicious |= scratch.suspicious


def _raise(error: OSError) -> None:
    raise error
