"""Where the time of a pair goes: milliseconds, bytes and FLOPs of each stage, beside the roofline of the machine.

    python -m benchmarks.stages
    python -m benchmarks.stages --checkpoint config-f-256

Every stage runs on a whole chunk, and its numbers are per pair (an image with its label):

- mapping: indices => w+;
- synthesis: w+ => image on 8-bit levels, and feature maps;
- label head: feature maps => label and uncertainty map;
- filter: uncertainty map => image score, its copy to the host, and the decision;
- hand-over: a finished chunk => batches of the stream (selection and batching);
- published label path: feature maps => label and uncertainty, for comparison, on one image.

FLOPs are those of matrix products and convolutions, two per multiplication. Bytes are those that every operator reads
and writes, views left out; in practice caches serve some of them. Both are counted on a CPU on the default (exact)
path, so the time of a fused kernel is compared with the work that it replaces. The roofline is measured in the same run
by one square matrix product and one large copy; `bound_ms` is the larger of FLOPs / rate and bytes / bandwidth. Calls
are operator calls on a CPU, and kernel launches as torch.profiler counts them on CUDA. The last line of the output is
the result as JSON.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import geometries
from benchmarks.common import (
    add_stream_options,
    best_seconds,
    parser,
    result_name,
    settings,
    stream_options,
    synchronize,
    write_result,
)
from benchmarks.reference.published_generation import PublishedGeneration
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row, setting
from handsoff_stream import HandsOffStream
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.filters import RollingPercentile
from handsoff_stream.seeding import latents
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.uncertainty import image_score

PUBLISHED = "published label path"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
MAX_COUNTED = 4
"""Most samples of the pass on the CPU that counts work."""

Stages = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """The work of a stage per pair."""

    flops: float
    bytes: float
    operators: float

    def minus(self, part: "Work") -> "Work":
        """The work without that of a part."""
        return Work(self.flops - part.flops, self.bytes - part.bytes, self.operators - part.operators)


class OperatorCounter(TorchDispatchMode):
    """Counts operators that are not views, and the bytes that they read and write."""

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
    """Kernel launches and graph replays of one call, per pair; 0 on a CPU."""
    on_gpu = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *on_gpu]) as profile:
        function()
        synchronize(device)
    return count_launches(profile.key_averages()) / pairs


def count_launches(events: Iterable[Any]) -> int:
    """How many calls among a profiler's averages started work on the device."""
    return sum(event.count for event in events if event.key in LAUNCHES)


def stages(synthesizer: Synthesizer, indices: Sequence[int]) -> Stages:
    """Each stage as a function without arguments; "generation" is mapping and synthesis together."""
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
    """A `synthesize` function that returns a finished chunk, so that only the work of the stream itself remains."""

    def __init__(self, batch: LabelledBatch):
        self.batch = batch

    def __call__(self, indices: Sequence[int]) -> LabelledBatch:
        return replace(self.batch, indices=torch.tensor(indices), next_index=indices[-1] + 1)


def hand_over(path: str, batch: LabelledBatch, *, batch_size: int, device: str) -> Callable[[], object]:
    """A function that takes one batch from a stream that neither synthesizes nor rejects anything."""
    chunk = len(batch)
    stream = HandsOffStream(
        path, batch_size=batch_size, filter=None, device=device, chunk_size=chunk, synthesize=ReadyChunk(batch)
    )
    batches = iter(stream)
    return lambda: next(batches)


def roofline(device: torch.device, *, matrix: int, copy_mb: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """FLOP/s of one square matrix product, and bytes/s, read and written, of one large copy.

    Args:
        device: where to compute.
        matrix: side of the product.
        copy_mb: size of the copy's source in MiB.
        dtype: of the product.
        repeats: timed calls of each.
    """
    left, right = (torch.rand(matrix, matrix, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copy_mb << 18, device=device)
    target = torch.ones_like(source)
    product_s = best_seconds(lambda: left @ right, device=device, repeats=repeats)
    copy_s = best_seconds(lambda: target.copy_(source), device=device, repeats=repeats)
    return {"flops_per_s": 2 * matrix**3 / product_s, "bytes_per_s": 2 * source.nbytes / copy_s}


def count_all(path: str, chunk_size: int) -> dict[str, Work]:
    """Work of every stage on the exact path, and of the published label path, counted on the CPU."""
    checkpoint, size = load_checkpoint(path), min(chunk_size, MAX_COUNTED)
    cpu = HandsOffStream(path, filter=None, device="cpu")
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


def stage_records(
    timed: dict[str, float], work: dict[str, Work], calls: dict[str, float], roof: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """One record per stage, in the order of the data flow; synthesis is generation without mapping."""
    timed = {**timed, "synthesis": timed["generation"] - timed["mapping"]}
    work = {**work, "synthesis": work["generation"].minus(work["mapping"])}
    if calls:
        calls = {**calls, "synthesis": calls["generation"] - calls["mapping"]}
    table: dict[str, dict[str, Any]] = {}
    for name in ("mapping", "synthesis", "label head", "filter", "hand-over", PUBLISHED):
        bound_ms = 1e3 * max(work[name].flops / roof["flops_per_s"], work[name].bytes / roof["bytes_per_s"])
        table[name] = {"ms": timed[name], "bound_ms": bound_ms, **asdict(work[name]), "launches": calls.get(name)}
    return table


def rows(result: Result) -> list[Row]:
    """The label head against the published label path."""
    ours, theirs = result["stages"]["label head"], result["stages"][PUBLISHED]
    return [
        Row(
            f"{setting(result)}: label head alone",
            f"{ours['ms']:.3g} ms, {ours['flops'] / 1e9:.3g} GFLOP per pair",
            f"{PUBLISHED}: {theirs['ms']:.3g} ms, {theirs['flops'] / 1e9:.3g} GFLOP",
            theirs["ms"] / ours["ms"],
        )
    ]


def charts(result: Result) -> list[Chart]:
    """Milliseconds of each stage, measured and by the roofline."""
    measured = result["stages"].items()
    return [
        Chart(f"{setting(result)}: milliseconds per pair", [(name, stage["ms"]) for name, stage in measured]),
        Chart("lower bound by the roofline, ms per pair", [(name, stage["bound_ms"]) for name, stage in measured]),
    ]


PRESENTATION = Presentation(rows, charts)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, name="stages")
    add_stream_options(options)
    geometries.add_arguments(options)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--matrix", type=int, help="side of the roofline's product (default: 2048, on CUDA 8192)")
    options.add_argument("--copy-mb", type=int, default=256, help="size of the roofline's copy")
    options.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the roofline's product"
    )
    return options.parse_args()


def main() -> None:
    """Measure, print a table, and write the result."""
    args = arguments()
    device = torch.device(args.device)
    matrix = args.matrix or (8192 if device.type == "cuda" else 2048)
    dtype = getattr(torch, args.dtype)
    roof = roofline(device, matrix=matrix, copy_mb=args.copy_mb, dtype=dtype, repeats=args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = geometries.checkpoint_path(args, Path(folder))
        timed, calls, chunk = time_all(path, args)
        table = stage_records(timed, count_all(path, chunk), calls, roof)
        geometry = geometries.describe(load_checkpoint(path))
    rates = f"{roof['flops_per_s'] / 1e9:,.0f} GFLOP/s {args.dtype}, {roof['bytes_per_s'] / 1e9:,.1f} GB/s"
    shown = Table("per pair", "ms", "bound, ms", "GFLOP", "MB", "calls", title=f"{args.checkpoint}, {device}; {rates}")
    for name, row in table.items():
        calls_made = row["operators"] if row["launches"] is None else row["launches"]
        numbers = (row["ms"], row["bound_ms"], row["flops"] / 1e9, row["bytes"] / 1e6, calls_made)
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
