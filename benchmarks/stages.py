"""Where the time of a pair goes: each stage's milliseconds, bytes and FLOPs, next to what the machine could do.

    python benchmarks/stages.py
    python benchmarks/stages.py --checkpoint config-f-256

Stages, each on a whole chunk and given per pair: mapping (indices => w+), synthesis (w+ => image on 8-bit levels and
feature maps), label head (feature maps => label and uncertainty map), filter (image score, its way to the host, the
decision), hand-over (what the stream does with a finished chunk: selecting, rebatching). Beside them the published
label path on one image.

FLOPs are those of matrix products and convolutions, two a multiplication; bytes are what every operator reads and
writes, views left out, although caches serve some of it. Both are counted on a CPU on the default (exact) path, so a
fused kernel is set against the work it replaces. The roofline is measured in the same run: one square matrix product
and one large copy; `bound_ms` is the larger of FLOPs / rate and bytes / bandwidth. Calls are operator calls on a CPU,
and kernel launches as torch.profiler sees them on CUDA. Last line of stdout: the result as JSON.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import geometries
import torch
from common import best_seconds, parser, result_name, settings, stream_options, synchronize, write_result
from published_generation import PublishedGeneration
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from handsoff_stream import HandsOffStream
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.filters import RollingPercentile
from handsoff_stream.seeding import latents
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.uncertainty import image_score

PUBLISHED = "published label path"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
MAX_COUNTED = 4  # samples of the counting pass on the CPU

Stages = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """What a stage does to one pair."""

    flops: float
    bytes: float
    operators: float

    def minus(self, part: "Work") -> "Work":
        return Work(self.flops - part.flops, self.bytes - part.bytes, self.operators - part.operators)


class OperatorCounter(TorchDispatchMode):
    """Counts operators that are not views, and the bytes of their tensors, read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view:
            read = (args[1:], {}) if func.overloadpacket is torch.ops.aten.copy_ else (args, kwargs | {"out": None})
            tensors = [t for t in tree_leaves((read, result)) if isinstance(t, torch.Tensor)]
            self.calls += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return result


def count(function: Callable[[], object], pairs: int) -> Work:
    """The work of one call, per pair."""
    flops = FlopCounterMode(display=False, custom_mapping=PRODUCTS)
    with flops, OperatorCounter() as operators:
        function()
    return Work(flops.get_total_flops() / pairs, operators.bytes / pairs, operators.calls / pairs)


def _addmm_(total: Any, left: Sequence[int], right: Sequence[int], **unused: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _onednn_linear(x: Sequence[int], weight: Sequence[int], *unused: Any, **named: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# Products that PyTorch's counter does not know; the second is there on builds with oneDNN.
PRODUCTS: dict[Any, Callable[..., int]] = {torch.ops.aten.addmm_: _addmm_}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    PRODUCTS[torch.ops.mkldnn._linear_pointwise] = _onednn_linear


def launches(function: Callable[[], object], pairs: int, device: torch.device) -> float:
    """Kernel launches and graph replays of one call, per pair; on a CPU there are none."""
    on_gpu = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *on_gpu]) as profile:
        function()
        synchronize(device)
    return count_launches(profile.key_averages()) / pairs


def count_launches(events: Iterable[Any]) -> int:
    """Of profiler averages, how many calls gave the device something to run."""
    return sum(event.count for event in events if event.key in LAUNCHES)


def stages(synthesizer: Synthesizer, indices: Sequence[int]) -> Stages:
    """Every stage as a function of nothing; "generation" holds "mapping" and what follows it."""
    _, features = synthesizer.generate(indices)
    batch = synthesizer(indices)
    name = next(iter(synthesizer.labeller.tasks))
    _, uncertainty_BHW = synthesizer.label(name, features)
    filter = RollingPercentile()
    filter.start(batch.uncertainty.tolist() * 100)

    def map_latents() -> None:
        z = latents(synthesizer.options.seed, indices, synthesizer.generator.z_dim).to(synthesizer.device)
        with torch.no_grad():
            synthesizer.generator.truncate(synthesizer.generator.mapping(z), synthesizer.options.truncation)

    def decide() -> None:
        for score in image_score(uncertainty_BHW, "top10_mean").tolist():
            filter.push(score)

    return {
        "mapping": map_latents,
        "generation": lambda: synthesizer.generate(indices),
        "label head": lambda: [synthesizer.label(head, features) for head in synthesizer.labeller.tasks],
        "filter": decide,
    }


class ReadyChunk:
    """A synthesizer whose chunk is finished: what remains is the stream's own work."""

    def __init__(self, batch: LabelledBatch):
        self.batch = batch

    def __call__(self, indices: Sequence[int]) -> LabelledBatch:
        return replace(self.batch, indices=torch.tensor(indices), next_index=indices[-1] + 1)


def hand_over(path: str, batch: LabelledBatch, *, batch_size: int, device: str) -> Callable[[], object]:
    """One batch through a stream that has nothing to synthesise and drops nothing."""
    chunk = len(batch)
    stream = HandsOffStream(
        path, batch_size=batch_size, filter=None, device=device, chunk_size=chunk, synthesize=ReadyChunk(batch)
    )
    batches = iter(stream)
    return lambda: next(batches)


def roofline(device: torch.device, *, matrix: int, copy_mb: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """FLOP/s of one square matrix product and bytes/s, read and written, of one large copy."""
    left, right = (torch.rand(matrix, matrix, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copy_mb << 18, device=device)
    target = torch.ones_like(source)
    product_s = best_seconds(lambda: left @ right, device=device, repeats=repeats)
    copy_s = best_seconds(lambda: target.copy_(source), device=device, repeats=repeats)
    return {"flops_per_s": 2 * matrix**3 / product_s, "bytes_per_s": 2 * source.nbytes / copy_s}


def count_all(path: str, chunk_size: int) -> dict[str, Work]:
    """Work of every stage on the exact path, and of the published label path, counted on the CPU."""
    checkpoint, size = load_checkpoint(path), min(chunk_size, MAX_COUNTED)
    cpu = HandsOffStream(path, device="cpu")
    synthesizer = Synthesizer(checkpoint, cpu.options, torch.device("cpu"))
    work = {name: count(run, size) for name, run in stages(synthesizer, range(size)).items()}
    handing = hand_over(path, synthesizer(range(size)), batch_size=size, device="cpu")
    work["hand-over"] = count(handing, size)
    _, features = synthesizer.generate([0])
    published = PublishedGeneration(checkpoint, device=torch.device("cpu"))
    work[PUBLISHED] = count(lambda: published.label(features), 1)
    return work


def time_all(path: str, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float], int]:
    """Milliseconds of every stage per pair, kernel launches per pair on CUDA, and the chunk size."""
    device = torch.device(args.device)
    checkpoint = load_checkpoint(path)
    stream = HandsOffStream(path, filter=None, device=device, **stream_options(args))
    chunk = stream.chunk_size
    stream.batch_size = chunk
    synthesizer = Synthesizer(checkpoint, stream.options, device)
    runs = stages(synthesizer, range(chunk))
    runs["hand-over"] = hand_over(path, synthesizer(range(chunk)), batch_size=chunk, device=args.device)
    batches = iter(stream)
    runs["whole stream"] = lambda: next(batches)
    timed = {name: 1e3 * best_seconds(run, device=device, repeats=args.repeats) / chunk for name, run in runs.items()}
    calls = {name: launches(run, chunk, device) for name, run in runs.items()} if device.type == "cuda" else {}
    _, features = synthesizer.generate([0])
    published = PublishedGeneration(checkpoint, device=device)
    timed[PUBLISHED] = 1e3 * best_seconds(lambda: published.label(features), device=device, repeats=args.repeats)
    return timed, calls, chunk


def rows(
    timed: dict[str, float], work: dict[str, Work], calls: dict[str, float], roof: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """One record a stage, in the order of the data flow; "synthesis" is generation without mapping."""
    timed = {**timed, "synthesis": timed["generation"] - timed["mapping"]}
    work = {**work, "synthesis": work["generation"].minus(work["mapping"])}
    if calls:
        calls = {**calls, "synthesis": calls["generation"] - calls["mapping"]}
    table: dict[str, dict[str, Any]] = {}
    for name in ("mapping", "synthesis", "label head", "filter", "hand-over", PUBLISHED):
        bound_ms = 1e3 * max(work[name].flops / roof["flops_per_s"], work[name].bytes / roof["bytes_per_s"])
        table[name] = {"ms": timed[name], "bound_ms": bound_ms, **asdict(work[name]), "launches": calls.get(name)}
    return table


def arguments() -> argparse.Namespace:
    options = parser(__doc__, name="stages")
    geometries.add_arguments(options)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--matrix", type=int, help="side of the roofline's product (default: 2048, on CUDA 8192)")
    options.add_argument("--copy-mb", type=int, default=256, help="size of the roofline's copy")
    options.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the roofline's product"
    )
    return options.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    matrix = args.matrix or (8192 if device.type == "cuda" else 2048)
    dtype = getattr(torch, args.dtype)
    roof = roofline(device, matrix=matrix, copy_mb=args.copy_mb, dtype=dtype, repeats=args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = geometries.checkpoint_path(args, Path(folder))
        timed, calls, chunk = time_all(path, args)
        table = rows(timed, count_all(path, chunk), calls, roof)
        geometry = geometries.describe(load_checkpoint(path))
    rates = f"{roof['flops_per_s'] / 1e9:,.0f} GFLOP/s {args.dtype}, {roof['bytes_per_s'] / 1e9:,.1f} GB/s"
    shown = Table("per pair", "ms", "bound, ms", "GFLOP", "MB", "calls", title=f"{args.checkpoint}, {device}; {rates}")
    for name, row in table.items():
        made = row["operators"] if row["launches"] is None else row["launches"]
        numbers = (row["ms"], row["bound_ms"], row["flops"] / 1e9, row["bytes"] / 1e6, made)
        shown.add_row(name, *(f"{number:,.2f}" for number in numbers))
    shown.add_row("whole stream, filter=None", f"{timed['whole stream']:,.2f}")
    Console().print(shown)
    record = {
        "settings": settings(args),
        "geometry": geometry,
        "chunk_size": chunk,
        "roofline": roof,
        "stages": table,
        "stream_ms": timed["whole stream"],
        "label_head_ratio": table[PUBLISHED]["ms"] / table["label head"]["ms"],
    }
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
