"""Damaged and crafted variants of valid files: random bytes, and changes inside a container with correct checksums.

A variant is a pure function of (seed file, random numbers). Knows containers. Does not know readers.
"""

import copy
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

EXTREMES = (b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00\x00\x00\x80", b"\x00" * 8)
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.5, "", "\x1b]0;x\x07", "\x00",
    "a" * 5_000, "\ud800", "../../x", [], {}, [[]], [None] * 50, {"": 1}, [[[[[1]]]]], {"a": {"b": []}},
)  # fmt: skip
NAMES = (b"os\nsystem\n", b"builtins\neval\n", b"builtins\ngetattr\n", b"torch\nload\n", b"numpy\nmemmap\n")
INSTRUCTIONS = b"(.01NIJKMG]}laesutbRQhjcqr0X\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8e\x8f\x90\x91\x92\x93\x94\x95BC"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: a bit, a byte, an extreme number, a piece removed, repeated, moved, or the end cut off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of the changes go to the front, where headers and the first objects are.
        position = rng.randrange(min(len(result), 2_000) if rng.random() < 0.5 else len(result))
        length = rng.choice((1, 2, 4, 8, 40, 300))
        match rng.randrange(7):
            case 0:
                result[position] ^= 1 << rng.randrange(8)
            case 1:
                result[position] = rng.randrange(256)
            case 2:
                extreme = rng.choice(EXTREMES)
                result[position : position + len(extreme)] = extreme
            case 3:
                del result[position : position + length]
            case 4:
                result[position:position] = result[position : position + length] * rng.choice((1, 1, 50))
            case 5:
                other = rng.randrange(len(result))
                result[position : position + length] = result[other : other + length]
            case 6:
                del result[max(position, 1) :]
        if not result:
            return b"\x80"
    return bytes(result)


def rezipped(data: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """A zip archive with each member's bytes given by `change(name, bytes)`, None to leave it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return out.getvalue()


def tree_mutated(tree: Any, rng: random.Random) -> Any:
    """JSON with one to three entries exchanged for odd ones, removed, renamed or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = tree
        while True:  # walk down to a random container
            inner = [child for child in _children(node) if isinstance(child, dict | list) and child]
            if not inner or rng.random() < 0.3:
                break
            node = rng.choice(inner)
        if not isinstance(node, dict | list) or not node:
            return copy.deepcopy(rng.choice(ODD))
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        match rng.randrange(5):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(("", "x", "\x1b[2J", "k" * 600, f"{key} "))] = node.pop(key)
            case 2 if isinstance(node, list):
                node.extend(copy.deepcopy(node[key]) for _ in range(rng.choice((1, 10, 500))))
            case _:
                node[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def in_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file, or the manifest in it, changed, with the right length in front."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    manifests = [key for key in metadata if metadata[key].startswith("{")]
    if manifests and rng.random() < 0.8:
        key = rng.choice(manifests)
        tree = tree_mutated(json.loads(metadata[key]), rng)
        text = json.dumps(tree)
        metadata[key] = mutated(text.encode(), rng).decode("utf-8", "replace") if rng.random() < 0.1 else text
    else:
        header = tree_mutated(header, rng)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def in_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(tree_mutated(json.loads(data), rng)).encode("utf-8", "replace")


def in_zip(data: bytes, rng: random.Random) -> bytes:
    """The pickle of a PyTorch file, behind the checksum of its archive."""
    change = pickle_spliced if rng.random() < 0.3 else mutated
    return rezipped(data, lambda name, raw: change(raw, rng) if name.endswith("data.pkl") else raw)


def pickle_spliced(data: bytes, rng: random.Random) -> bytes:
    """Instructions put into a pickle: names, calls, copies, floods."""
    position = rng.randrange(2, len(data))
    piece = rng.choice(
        (
            b"c" + rng.choice(NAMES) + b")R",
            b"c" + rng.choice(NAMES),
            bytes(rng.choice(INSTRUCTIONS) for _ in range(rng.choice((1, 4, 30)))),
            b"h" + bytes([rng.randrange(40)]) + rng.choice((b"R", b"b", b"s", b"a", b"Q", b"0")),
            rng.choice((b"]", b"(", b"}", b")", b"N")) * rng.choice((10, 1_000, 40_000)),
            b"\x85" * rng.choice((3, 100, 5_000)),
            b"q\x00h\x00\x86" * rng.choice((3, 60)),
            b"X" + struct.pack("<I", rng.choice((0, 5, 2**31))) + b"abcde",
        )
    )
    return data[:position] + piece + data[position + rng.choice((0, 0, 1, 5)) :]


def in_png(data: bytes, rng: random.Random) -> bytes:
    """A chunk of a PNG changed, with its right length and checksum."""
    chunks, position = [], 8
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunks.append([data[position + 4 : position + 8], data[position + 8 : position + 8 + length]])
        position += 12 + length
    chosen = rng.choice(chunks)
    chosen[1] = mutated(chosen[1] or b"\x00", rng)
    if rng.random() < 0.2:
        kind = rng.choice((b"acTL", b"eXIf", b"iCCP", b"tEXt", b"tRNS"))
        chunks.insert(rng.randrange(len(chunks)), [kind, chosen[1]])
    out = data[:8]
    for kind, content in chunks:
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return out


def soup(_: bytes, rng: random.Random) -> bytes:
    """Pickle instructions at random."""
    return b"\x80\x04" + bytes(rng.choice(INSTRUCTIONS) for _ in range(rng.choice((5, 40, 400, 20_000)))) + b"."
