"""Whole pairs by the synthesizer as it is, with a compiled generator, and replayed as a CUDA graph.

    python -m benchmarks.gpu.variants --device cuda --checkpoint config-f-256

The variants share weights and take turns. A first chunk includes compiling and capturing. What changes is counted on
one chunk against the synthesizer as it is: a graph launches the same kernels and changes nothing; a compiler fuses
operations and may move the last bits. A variant that raises is reported with its error, and the others go on. On a CPU
a tape of operators stands for the graph, and its times mean nothing. The last line of the output is the result as JSON.
"""

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import geometries
from benchmarks.common import (
    add_stream_options,
    parser,
    result_name,
    settings,
    stream_options,
    synchronize,
    write_result,
)
from benchmarks.gpu.operator_tape import record_on_tape
from benchmarks.processes import device_peak_mb
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row, setting
from benchmarks.stages import launches
from benchmarks.synthesis import take_turns
from handsoff_stream import HandsOffStream
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.graphs import GraphedSynthesizer, capture
from handsoff_stream.isolation import isolated
from handsoff_stream.synthesizer import Synthesizer

PLAIN = "as it is"
Variant = Callable[[Sequence[int]], LabelledBatch]


class CompiledSynthesizer(Synthesizer):
    """A synthesizer that shares the networks of another, with a compiled synthesis network.

    The label head is not compiled: on a GPU it is one kernel already.
    """

    def __init__(self, synthesizer: Synthesizer, backend: str):
        self.__dict__.update(synthesizer.__dict__)
        self._synthesis = torch.compile(synthesizer._synthesis, backend=backend)


def variants(synthesizer: Synthesizer, backend: str) -> dict[str, Variant]:
    """The synthesizer in every form that is compared."""
    record = capture if synthesizer.device.type == "cuda" else record_on_tape
    compiled = CompiledSynthesizer(synthesizer, backend)
    return {
        PLAIN: synthesizer,
        "graph": GraphedSynthesizer(synthesizer, record),
        "compiled": compiled,
        "compiled, graph": GraphedSynthesizer(compiled, record),
    }


def measure(path: str, args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], int]:
    """The numbers of each variant, or its error, and the chunk size."""
    device = torch.device(args.device)
    stream = HandsOffStream(path, device=device, filter=None, **stream_options(args))
    synthesizer = Synthesizer(load_checkpoint(path), stream.options, device)
    chunk = range(stream.chunk_size)
    expected = synthesizer(chunk).packed()
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], object]] = {}
    with isolated():
        for name, variant in variants(synthesizer, args.backend).items():
            run = functools.partial(variant, chunk)
            try:
                found[name] = first_chunk(run, expected, device)
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"}
                continue
            ready[name] = run
        for name, seconds in take_turns(ready, device=device, repeats=args.repeats).items():
            on_gpu = device.type == "cuda"
            found[name] |= {
                "pairs_per_s": len(chunk) / seconds,
                "launches": launches(ready[name], len(chunk), device) if on_gpu else None,
            }
    return found, len(chunk)


def first_chunk(run: Callable[[], LabelledBatch], expected: LabelledBatch, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of a first call, and how far its results are from `expected`, a packed batch."""
    device_peak_mb(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds, peak = time.perf_counter() - start, device_peak_mb(device)
    batch = run().packed()
    pairs = list(zip(batch.tensors(), expected.tensors(), strict=True))
    (images, wanted), (scores, wanted_scores), *labels = pairs
    return {
        "first_chunk_s": seconds,
        "first_chunk_peak_mb": peak,
        "same_bits": all(torch.equal(got, want) for got, want in pairs),
        "image_levels": int((images.int() - wanted.int()).abs().max()),
        "score_error": float((scores - wanted_scores).abs().max()),
        "labels_changed": max(float((got != want).float().mean()) for got, want in labels),
    }


def rows(result: Result) -> list[Row]:
    """Every variant that ran against the synthesizer as it is."""
    table = result["variants"]
    plain = table[PLAIN]["pairs_per_s"]
    return [
        Row(
            f"{setting(result)}: whole pairs, {name}",
            f"{row['pairs_per_s']:.3g} pairs/s, {_changes(row)}, first chunk after {row['first_chunk_s']:.3g} s",
            f"{PLAIN}: {plain:.3g} pairs/s",
            row["pairs_per_s"] / plain,
        )
        for name, row in table.items()
        if name != PLAIN and "error" not in row
    ]


def _changes(row: Result) -> str:
    return "same bits" if row["same_bits"] else f"{row['labels_changed']:.2%} of labels changed"


def charts(result: Result) -> list[Chart]:
    """Pairs per second of each variant."""
    bars = [(name, row["pairs_per_s"]) for name, row in result["variants"].items() if "error" not in row]
    return [Chart(f"{setting(result)}: pairs per second", bars)]


PRESENTATION = Presentation(rows, charts)


def main() -> None:
    """Measure the variants that the command line chooses, and write their times."""
    options = parser(__doc__, name="variants")
    add_stream_options(options)
    geometries.add_arguments(options)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--backend", default="inductor", help="of torch.compile")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = geometries.checkpoint_path(args, Path(folder))
        found, chunk = measure(path, args)
        geometry = geometries.describe(load_checkpoint(path))
    table = Table("", "pairs/s", "launches", "first chunk, s", "peak, MB", "labels changed", title=str(args.checkpoint))
    for name, row in found.items():
        if "error" in row:
            table.add_row(name, row["error"])
            continue
        numbers = (row["pairs_per_s"], row["launches"] or math.nan, row["first_chunk_s"], row["first_chunk_peak_mb"])
        table.add_row(name, *(f"{number:,.2f}" for number in numbers), _changes(row))
    Console().print(table)
    record = {"settings": settings(args), "geometry": geometry, "chunk_size": chunk, "variants": found}
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
