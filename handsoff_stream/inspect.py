"""Facts about a checkpoint or a generator file in words and numbers, as `handsoff-stream inspect` prints them.

Knows files and the sizes that they declare. Runs no network.
"""

import json
from pathlib import Path
from typing import Any

from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, resolve
from handsoff_stream.files.tensors import is_safetensors
from handsoff_stream.generators import Generator
from handsoff_stream.generators.published import read_generator


def describe(name_or_path: str | Path) -> dict[str, str]:
    """Facts about a checkpoint or a generator file: name of the fact => its value in words, in the order to be read.

    Raises:
        CheckpointError: the file is missing, damaged or unsupported.
    """
    path = resolve(name_or_path)
    if is_safetensors(path):
        checkpoint = load_checkpoint(path)
        facts = {"file": _file(path, "handsoff_stream checkpoint"), **_generator(checkpoint.generator)}
        return facts | _checkpoint(checkpoint)
    read = read_generator(path)
    return {"file": _file(path, read.source), **_generator(read.generator)}


def _file(path: Path, kind: str) -> str:
    return f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB, {kind}"


def _generator(generator: Generator) -> dict[str, str]:
    height, width = generator.resolution
    parameters = sum(p.numel() for p in generator.parameters())
    channels = generator.feature_channels
    condition = f"conditional on {generator.label_dim} numbers" if generator.label_dim else "unconditional"
    return {
        "generator": f"{generator.family}, {height} x {width} (height x width), {parameters / 1e6:.2f} M parameters",
        "latents": f"z {generator.z_dim}, w {generator.w_dim}, {generator.num_ws} style inputs, {condition}",
        "hypercolumn": f"{sum(channels)} channels from {len(channels)} maps: {' '.join(map(str, channels))}",
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    facts: dict[str, str] = {}
    for name, head in checkpoint.heads.items():
        ensemble = head.label_generator
        classes = getattr(head.task, "class_names", None) or getattr(head.task, "point_names", None)
        facts[f"head {name!r}"] = (
            f"{head.task.name}, {ensemble.num_outputs} outputs, {ensemble.members} members, hidden {ensemble.hidden}"
            + (f"; {', '.join(classes)}" if classes else "")
        )
    if not checkpoint.heads:
        facts["heads"] = "none: fit one with `handsoff-stream fit`"
    part = ""
    if checkpoint.crop is not None:
        top, left, bottom, right = checkpoint.crop
        part = f", rows {top}:{bottom}, columns {left}:{right} of the image"
    facts["output"] = f"{checkpoint.size[0]} x {checkpoint.size[1]}{part}, truncation {checkpoint.truncation}"
    if checkpoint.calibration is None:
        facts["calibration"] = "none: a rolling filter starts with an empty window"
    else:
        counts = {kind: len(scores) for kind, scores in checkpoint.calibration.scores.items()}
        facts["calibration"] = ", ".join(f"{n} scores ({kind})" for kind, n in counts.items())
    facts["fingerprint"] = checkpoint.manifest()["fingerprint"]
    return facts | {f"provenance: {k}": _short(v) for k, v in checkpoint.provenance.items()}


def _short(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
