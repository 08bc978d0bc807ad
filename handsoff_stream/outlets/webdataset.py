"""Samples as WebDataset shards, so that what was streamed can be kept, shared, or read by another framework.

    <key>.image.png  <key>.<head>.png or .npy  <key>.json        key = zero-padded global index

PNG and npy are lossless: reading a shard back gives the streamed tensors. A shard is written under a temporary name and
renamed when whole; the stream's position is saved beside it, so that an interrupted export continues where it stopped
and ends with the same files, byte for byte. The only importer of webdataset.
"""

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from torch import Tensor

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.files.atomic import whole_file
from handsoff_stream.stream import HandsOffStream

STATE_FILE = "export.json"
MTIME = 0.0  # fixed, so that the same samples make the same bytes


def write_shards(
    stream: HandsOffStream,
    folder: str | Path,
    *,
    num_samples: int,
    shard_size: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write `num_samples` accepted samples; continue if the folder holds an unfinished export of the same stream.

    Args:
        stream: with `batch_size=n`; its transforms, if any, are exported too.
        folder: receives `shard-000000.tar`, ...; created if missing.
        num_samples: samples in all, the last shard may be shorter.
        shard_size: samples a shard.
        progress: called with the number of samples in whole shards.

    Returns:
        The shards' paths.

    Raises:
        ValueError: a stream of single samples, a count below 1, or a folder that holds another stream's export.
    """
    if stream.batch_size is None or num_samples < 1 or shard_size < 1:
        raise ValueError(
            f"batch_size={stream.batch_size}, num_samples={num_samples}, shard_size={shard_size}: build the stream "
            "with batch_size=n and pass counts of at least 1"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    single = _one_by_one(stream)
    settings = {"num_samples": num_samples, "shard_size": shard_size}
    done = _continue(single, folder / STATE_FILE, settings)
    samples = iter(single)
    paths = [folder / f"shard-{i:06d}.tar" for i in range(-(-num_samples // shard_size))]
    for number in range(done, len(paths)):
        count = min(shard_size, num_samples - number * shard_size)
        _write_shard(paths[number], samples, count)
        _write_json(folder / STATE_FILE, {**settings, "shards": number + 1, "stream": single.state_dict()})
        if progress is not None:
            progress(number * shard_size + count)
    return paths


def _one_by_one(stream: HandsOffStream) -> HandsOffStream:
    # Shards end where the user says, not where a batch ends.
    single = copy.copy(stream)
    single.batch_size = 1
    return single


def _continue(stream: HandsOffStream, path: Path, settings: dict[str, Any]) -> int:
    """Position the stream after the last whole shard; returns the number of whole shards."""
    if not path.exists():
        return 0
    saved = json.loads(path.read_text())
    if {name: saved.get(name) for name in settings} != settings:
        raise ValueError(
            f"{path}: an export with other counts than {settings}; finish it with its own, or use a new folder"
        )
    stream.load_state_dict(saved["stream"])
    return int(saved["shards"])


def _write_shard(path: Path, samples: Iterator[Any], count: int) -> None:
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a run that was killed while it wrote this shard
        leftover.unlink()
    with whole_file(path) as partial, webdataset.TarWriter(str(partial), mtime=MTIME, encoder=False) as writer:
        for _ in range(count):
            writer.write(_fields(next(samples)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content))


def _fields(batch: LabelledBatch) -> dict[str, Any]:
    """One sample as file contents."""
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
