"""The limits of all file readers: how much memory and time reading a file may take.

An untrusted file claims sizes, counts and depths. The memory and time that they may cost are bounded by the file's real
size, or by numbers far above those of real files. Knows numbers. Does not know formats.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from handsoff_stream.errors import CheckpointError

# Limits in proportion to the size of the file. The published files stay below half of each.
EXPANSION = 4  # bytes of content per byte of file; more than 1, since content may be referred to repeatedly
SLACK = 2**20  # bytes of content that even the smallest file may have
BYTES_PER_OPERATION = 8  # an operation is a pickle instruction or a copied entry; published files have 50 to 5000
FEW_OPERATIONS = 30_000  # that even the smallest file may take
MAX_OPERATIONS = 1_000_000  # that even the largest file may take

# Limits for files of any size.
MAX_NESTING = 64  # containers inside containers; a module inside a module takes three, NVlabs files have 18
MAX_KEY = 512  # characters of a dictionary key, which are hashed and compared at each use
MAX_ZIP_ENTRIES = 20_000  # storages of a PyTorch file; the largest published one has 3,000
MAX_TENSORS = 20_000  # of a safetensors file
MAX_HEADER_BYTES = 2**23  # of a safetensors file; faces.safetensors has 96 KB, most of it calibration scores
MAX_TEXT_BYTES = 2**22  # of a manifest, a class map, a list of images, an experiment

# Limits on what a file describes.
MAX_SIDE = 4096  # pixels; the largest published generator has 1024
MAX_WIDTH = 8192  # channels or any other count; published generators have at most 512 channels and about 1000 classes
MAX_LEVELS = 11  # resolutions, each twice the one before: 4 to 4096
MAX_LAYERS = 64  # of a mapping network; published ones have 8
MAX_HEADS = 64
MAX_MEMBERS = 1000
MAX_NAMES = 1000  # classes or points of a head
MAX_NAME = 200  # characters of a name
MAX_SCORES = 1_000_000  # calibration scores of one kind


@dataclass
class Budget:
    """The memory and time that reading one file may still take; shared by all pickles inside it.

    memory: bytes. operations: pickle instructions and copied entries.
    """

    file_size: int
    memory: int = field(init=False)
    operations: int = field(init=False)

    def __post_init__(self) -> None:
        self.memory = EXPANSION * self.file_size + SLACK
        self.operations = min(FEW_OPERATIONS + self.file_size // BYTES_PER_OPERATION, MAX_OPERATIONS)

    def spend(self, num_bytes: int) -> None:
        """Count bytes of memory beside those of the mapped file.

        Raises:
            CheckpointError: the memory is used up.
        """
        self.memory -= num_bytes
        if self.memory < 0:
            raise CheckpointError(
                f"its content would take more than {EXPANSION} times the {self.file_size} bytes of the file, "
                "which no real file does; get the file from its publisher again"
            )

    def step(self, operations: int = 1) -> None:
        """Count operations: instructions, or entries that one instruction copies.

        Raises:
            CheckpointError: the operations are used up.
        """
        self.operations -= operations
        if self.operations < 0:
            raise CheckpointError(
                f"it needs more instructions and copied entries than real files of {self.file_size} bytes do; get the "
                "file from its publisher again"
            )


def check_count(count: int, limit: int, what: str) -> int:
    """The count, which must not exceed the limit.

    Raises:
        CheckpointError: the count exceeds the limit; the message calls the counted things `what`.
    """
    if count > limit:
        raise CheckpointError(f"{count} {what}; up to {limit} are read, and no real file has more")
    return count


def check_nesting(value: Any, children: Callable[[Any], Iterable[Any] | None]) -> None:
    """Refuse containers that are nested too deeply or contain themselves; takes time in proportion to their number.

    Args:
        value: content of a file.
        children: container => its items; None for anything else.

    Raises:
        CheckpointError: more than `MAX_NESTING` levels.
    """
    first = children(value)
    if first is None:
        return
    heights: dict[int, int] = {}  # of finished containers, so that a shared one is visited once
    path, waiting = [value], [iter(first)]
    tallest = [1]
    open_ids = {id(value)}
    while path:
        for child in waiting[-1]:
            inner = children(child)
            if inner is None:
                continue
            height = heights.get(id(child))
            if id(child) in open_ids or len(path) + (height or 1) > MAX_NESTING:
                raise CheckpointError(
                    f"containers nested more than {MAX_NESTING} deep, or inside themselves, which no published file "
                    "has; get the file from its publisher again"
                )
            if height is None:
                path.append(child)
                waiting.append(iter(inner))
                tallest.append(1)
                open_ids.add(id(child))
                break
            tallest[-1] = max(tallest[-1], height + 1)
        else:
            done, height = path.pop(), tallest.pop()
            waiting.pop()
            open_ids.discard(id(done))
            heights[id(done)] = height
            if tallest:
                tallest[-1] = max(tallest[-1], height + 1)
