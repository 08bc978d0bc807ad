"""Export of samples as WebDataset shards, to keep them, share them, or read them in another framework.

    <key>.image.png  <key>.<head>.png or .npy  <key>.json        key = zero-padded global index
    export.json                                                  samples, bytes and sha256 of each shard

PNG and npy are lossless: reading a shard back gives the streamed tensors. A shard is written under a temporary name and
renamed when it is complete, and the stream's position is saved beside it. So an interrupted export continues where it
stopped and ends with the same files, byte for byte. A shard that was deleted, truncated or replaced is detected by its
digest and written again. For that the stream runs from the beginning, since a filter's decisions may depend on all
earlier samples.

Knows streams, batches and files. Does not know how samples are made. No other module imports webdataset.
"""

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import webdataset
from PIL import Image
from pydantic import Field
from torch import Tensor

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.errors import CheckpointError
from handsoff_stream.files.atomic import check_folder, locked_folder, whole_file, write_file
from handsoff_stream.files.schema import Name, Schema, read_json, validated
from handsoff_stream.provenance import sha256
from handsoff_stream.stream import HandsOffStream

STATE_FILE = "export.json"
FORMAT_VERSION = 2
MAX_SHARDS = 1_000_000  # their names have six digits
MTIME = 0.0  # fixed, so that the same samples make the same bytes

Natural = Annotated[int, Field(ge=0)]


class _ShardRecord(Schema):
    """The file name, size and digest of a complete shard."""

    file: Name
    samples: Natural
    bytes: Natural
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    def is_in(self, folder: Path) -> bool:
        """Whether the file exists and is unchanged."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes and sha256(path) == self.sha256


class _ExportRecord(Schema):
    """The content of `export.json`."""

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    num_samples: Natural
    shard_size: Natural
    shards: list[_ShardRecord]
    """The complete shards, in order."""
    start: dict[str, Any]
    """State of the stream before the first shard."""
    stream: dict[str, Any]
    """State of the stream after the last complete shard."""

    def save(self, folder: Path) -> None:
        write_file(folder / STATE_FILE, self.model_dump_json(indent=1).encode())


def write_shards(
    stream: HandsOffStream,
    folder: str | Path,
    *,
    num_samples: int,
    shard_size: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write `num_samples` accepted samples as shards.

    If the folder holds an unfinished export of the same stream, it is continued.

    Args:
        stream: built with `batch_size=n`; its transforms are applied to the exported samples.
        folder: receives `shard-000000.tar`, ... and `export.json`; created if missing.
        num_samples: total number of samples; the last shard may be shorter.
        shard_size: samples per shard.
        progress: called after each sample, with the number of samples that are written by then.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: a stream of single samples, a mixture, a count below 1, or a folder that holds another stream's
            export, or shards that `export.json` does not list.
        CheckpointError: a damaged `export.json`.
        OutputError: another process exports to the folder, or the folder cannot be written, or its disk has too little
            space for all samples, estimated from the first one.
    """
    if stream.batch_size is None or num_samples < 1 or shard_size < 1 or -(-num_samples // shard_size) > MAX_SHARDS:
        raise ValueError(
            f"batch_size={stream.batch_size}, num_samples={num_samples}, shard_size={shard_size}: build the stream "
            f"with batch_size=n and pass counts of at least 1, for at most {MAX_SHARDS} shards"
        )
    if stream.assembly.companions is not None:
        raise ValueError(
            f"this stream is a mixture with {stream.assembly.companions}, and shards would repeat images that exist "
            "already; export the stream alone"
        )
    with locked_folder(folder) as locked:
        export = _Export(stream, locked, num_samples, shard_size)
        export.repair(progress)
        export.go_on(progress)
    return export.paths


class _Export:
    """One export: its folder, its record, and the stream it comes from."""

    def __init__(self, stream: HandsOffStream, folder: Path, num_samples: int, shard_size: int) -> None:
        self.folder, self.num_samples, self.shard_size = folder, num_samples, shard_size
        self.stream = _one_by_one(stream)
        count = -(-num_samples // shard_size)
        self.paths = [folder / f"shard-{i:06d}.tar" for i in range(count)]
        self.record = self._stored() or _ExportRecord(
            format_version=FORMAT_VERSION,
            num_samples=num_samples,
            shard_size=shard_size,
            shards=[],
            start=self.stream.state_dict(),
            stream=self.stream.state_dict(),
        )
        self.stream.load_state_dict(self.record.stream)  # refuses the state of another stream
        self._refuse_unknown_shards()
        self.record.save(folder)  # a shard without a record can now only be one that a killed run had just finished

    def repair(self, progress: Callable[[int], None] | None) -> None:
        """Write missing and changed shards again.

        Raises:
            ValueError: a shard comes out differently, which another machine can cause.
        """
        lost = [i for i, shard in enumerate(self.record.shards) if not shard.is_in(self.folder)]
        if not lost:
            return
        names = ", ".join(self.record.shards[i].file for i in lost[:5])
        warnings.warn(f"{self.folder}: {names} is missing or was changed; it is written again", stacklevel=4)
        again = _one_by_one(self.stream)
        again.load_state_dict(self.record.start)
        samples = iter(again)
        for i in range(lost[-1] + 1):
            if i not in lost:
                for _ in range(self.record.shards[i].samples):
                    next(samples)
                continue
            made = self._write(i, samples, progress)
            if made != self.record.shards[i]:
                raise ValueError(
                    f"{self.paths[i]}: written again, but with other bytes than {STATE_FILE} lists, which another "
                    "machine or version can cause; export to a new folder"
                )

    def go_on(self, progress: Callable[[int], None] | None) -> None:
        """Write the remaining shards."""
        samples = iter(self.stream)
        for i in range(len(self.record.shards), len(self.paths)):
            made = self._write(i, samples, progress)
            shards = [*self.record.shards, made]
            self.record = self.record.model_copy(update={"shards": shards, "stream": self.stream.state_dict()})
            self.record.save(self.folder)

    def _stored(self) -> _ExportRecord | None:
        path = self.folder / STATE_FILE
        if not path.exists():
            return None
        record = validated(_ExportRecord, read_json(path, "the record of an export"), f"{path}: it")
        if (record.num_samples, record.shard_size) != (self.num_samples, self.shard_size):
            raise ValueError(
                f"{path}: an export with other counts ({record.num_samples} samples, {record.shard_size} per shard) "
                f"than {self.num_samples} and {self.shard_size}; finish it with its own counts, or use a new folder"
            )
        expected = [(path.name, self._count(i)) for i, path in enumerate(self.paths[: len(record.shards)])]
        if [(shard.file, shard.samples) for shard in record.shards] != expected:
            raise CheckpointError(f"{path}: lists other shards than an export of its counts has; use a new folder")
        return record

    def _refuse_unknown_shards(self) -> None:
        known = {path.name for path in self.paths[: len(self.record.shards) + (self.folder / STATE_FILE).exists()]}
        unknown = sorted(p.name for p in self.folder.glob("shard-*.tar") if p.name not in known)
        if unknown:
            raise ValueError(
                f"{self.folder}: {unknown[0]} does not belong to this export, since {STATE_FILE} does not list it; "
                "move it elsewhere, or use a new folder"
            )

    def _count(self, number: int) -> int:
        return min(self.shard_size, self.num_samples - number * self.shard_size)

    def _write(self, number: int, samples: Iterator[Any], progress: Callable[[int], None] | None) -> _ShardRecord:
        path, count = self.paths[number], self._count(number)
        with whole_file(path) as partial, webdataset.TarWriter(str(partial), mtime=MTIME, encoder=False) as writer:
            for i in range(count):
                fields = _fields(next(samples))
                if i == 0:
                    check_folder(self.folder, needed=count * _stored_bytes(fields) * (len(self.paths) - number))
                writer.write(fields)
                if progress is not None:
                    progress(number * self.shard_size + i + 1)
        return _ShardRecord(file=path.name, samples=count, bytes=path.stat().st_size, sha256=sha256(path))


def _one_by_one(stream: HandsOffStream) -> HandsOffStream:
    # Shards have `shard_size` samples, whatever the batch size.
    single = copy.copy(stream)
    single.batch_size = 1
    return single


def _stored_bytes(fields: dict[str, Any]) -> int:
    """Bytes in a tar file, whose members have a header and fill whole blocks."""
    return sum(512 + -(-len(value) // 512) * 512 for name, value in fields.items() if name != "__key__")


def _fields(batch: LabelledBatch) -> dict[str, Any]:
    """The files of one sample: suffix => content."""
    index = int(batch.indices[0])
    labels = batch.labels if isinstance(batch.labels, dict) else {"label": batch.labels}
    image = (batch.images[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    fields: dict[str, Any] = {"__key__": f"{index:012d}", "image.png": _png(image)}
    for name, label in labels.items():
        fields |= _label(name, label[0].cpu())
    about = {"index": index, "uncertainty": float(batch.uncertainty[0])}
    return {**fields, "json": json.dumps(about).encode()}


def _label(name: str, label: Tensor) -> dict[str, bytes]:
    if not label.is_floating_point() and label.ndim == 2 and int(label.max()) < 256:
        return {f"{name}.png": _png(label.byte().numpy())}
    buffer = io.BytesIO()
    np.save(buffer, label.numpy(), allow_pickle=False)
    return {f"{name}.npy": buffer.getvalue()}


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
