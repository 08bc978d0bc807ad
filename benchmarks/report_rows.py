"""What is said of each kind of result about the stream: the rows of the tables, and the bars of its plot.

A new kind is two functions and a line in `STREAM`; the name of a result file up to the first "-" is its kind. Knows
what the benchmarks write. Does not know files or Markdown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bar_chart import Chart

Result = dict[str, Any]
LONG_ENOUGH_S = 1200
"""A shorter run says nothing of an hour."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    other: str
    ratio: float | None
    """How many times better ours is; None where that means nothing."""
    headline: bool = False
    """Whether README shows it too; the table beside the results has all rows."""


@dataclass(frozen=True)
class Kind:
    """How one kind of result is shown."""

    rows: Callable[[Result], list[Row]]
    charts: Callable[[Result], Sequence[Chart]]


def where(result: Result) -> str:
    """Checkpoint, label size, and the options of the stream that are not the defaults."""
    height, width = result["geometry"]["label"]
    return ", ".join([result["settings"]["checkpoint"], f"{height} x {width}", *result["settings"].get("option", [])])


def throughput_rows(result: Result) -> list[Row]:
    sides, ratios, place = result["sides"], result["ratios"], where(result)
    streams = [name for name in sides if name.startswith("stream")]
    loop, export = "published loop", "export, then read"
    scaled = sides[loop]["measured_candidates"]
    slow = f"{loop}: {_rate(sides[loop])}" + (f", from {scaled} pairs" if scaled is not None else "")
    best = max(streams, key=lambda name: sides[name]["pairs_per_s"])
    rows = [
        Row(f"{place}: {name}", _rate(sides[name]), slow, ratios[f"{name} against {loop}"]["all_batches"], name == best)
        for name in streams
    ]
    megabytes = sides[export]["bytes_on_disk"] / 1e6
    rest = f"{export}: {sides[export]['first_batch_s']:.3g} s, {megabytes:.3g} MB on disk"
    pair, first = ratios[f"{best} against {export}"], f"{sides[best]['first_batch_s']:.3g} s, nothing on disk"
    embedded = result["settings"]["checkpoint"] == "faces"
    return [
        *rows,
        Row(f"{place}: {best}", _rate(sides[best]), f"{export}: {_rate(sides[export])}", pair["all_batches"]),
        Row(f"{place}: first batch after", first, rest, pair["first_batch"], embedded),
    ]


def _rate(side: Result) -> str:
    return f"{side['pairs_per_s']:.3g} pairs/s"


def throughput_charts(result: Result) -> list[Chart]:
    bars = [(name, side["pairs_per_s"]) for name, side in result["sides"].items()]
    return [Chart(f"{where(result)}: pairs per second", bars)]


def label_head_rows(result: Result) -> list[Row]:
    return [row for case in result["cases"] for row in _label_paths(case)]


def _label_paths(case: Result) -> list[Row]:
    (head,), (height, width), paths = case["heads"].values(), case["label"], case["paths"]
    what = f"{case['case']}, {height} x {width}, {head['members']} members of {tuple(head['hidden'])}: label head"
    theirs = paths["published"]
    other = f"published label path: {theirs['seconds']:.3g} s, {theirs['peak_mb']:,.0f} MB"
    return [
        Row(
            f"{what}, {name}",
            f"{ours['seconds']:.3g} s, {ours['peak_mb']:,.0f} MB, {ours['labels_changed']:.2%} of labels changed",
            other,
            ours["ratio"],
            True,
        )
        for name, ours in paths.items()
        if name != "published"
    ]


def label_head_charts(result: Result) -> list[Chart]:
    return [
        Chart(
            f"{case['case']}: labels of one image, s", [(name, path["seconds"]) for name, path in case["paths"].items()]
        )
        for case in result["cases"]
    ]


def synthesis_rows(result: Result) -> list[Row]:
    formats = {"exact": "float32", "fast": result["fast"]}

    def way(case: Result, name: str) -> str:
        kind, *compiled = name.split(", ")
        first_call = f", torch.compile (first call {case['first_call_compiled_s'][kind]:.0f} s)" if compiled else ""
        return f"{formats[kind]}{first_call}"

    return [
        Row(
            f"synthesis of {_geometry(case)}, {way(case, name)}",
            f"{case['images_per_s'][name]:.3g} images/s",
            f"per-sample weights, float32: {case['images_per_s']['plain']:.3g} images/s",
            case["times_plain"][name],
        )
        for case in result["speed"]
        for name in case["times_plain"]
        if name != "plain"
    ]


def synthesis_charts(result: Result) -> list[Chart]:
    return [Chart(f"{_geometry(case)}: images a second", [*case["images_per_s"].items()]) for case in result["speed"]]


def _geometry(case: Result) -> str:
    return f"config-f-{case['geometry']}" if case["geometry"].isdecimal() else str(case["geometry"])


def stages_rows(result: Result) -> list[Row]:
    ours, theirs = result["stages"]["label head"], result["stages"]["published label path"]
    return [
        Row(
            f"{where(result)}: label head alone",
            f"{ours['ms']:.3g} ms, {ours['flops'] / 1e9:.3g} GFLOP a pair",
            f"published label path: {theirs['ms']:.3g} ms, {theirs['flops'] / 1e9:.3g} GFLOP",
            theirs["ms"] / ours["ms"],
        )
    ]


def stages_charts(result: Result) -> list[Chart]:
    stages = result["stages"].items()
    return [
        Chart(f"{where(result)}: milliseconds a pair", [(name, stage["ms"]) for name, stage in stages]),
        Chart("of these, by the roofline of the machine", [(name, stage["bound_ms"]) for name, stage in stages]),
    ]


def overlap_rows(result: Result) -> list[Row]:
    share, spread = result["bubbles_share"], result["bubbles_spread_ms"] / result["both_ms"]
    return [
        Row(
            f"{where(result)}: bubbles beside DeepLabV3-{result['settings']['backbone']}",
            f"{share:+.1%} of a step of {result['both_ms']:.3g} ms (rounds within {spread:.1%})",
            f"training {result['training_ms']:.3g} ms + generation {result['generation_ms']:.3g} ms, each alone",
            None,
        )
    ]


def overlap_charts(result: Result) -> list[Chart]:
    names = {"training_ms": "training alone", "generation_ms": "generation alone", "both_ms": "both"}
    return [Chart(f"{where(result)}: milliseconds a step", [(label, result[key]) for key, label in names.items()])]


def memory_rows(result: Result) -> list[Row]:
    length = f"{result['pairs']:,} pairs in {result['seconds'] / 60:.3g} minutes"
    growth, speed = result["host_mb_per_1000_pairs"], result["pairs_per_s_percent_per_hour"]
    on_gpu = bool(result["device_peak_mb"])
    peak = "device_peak_mb" if on_gpu else "host_peak_mb"
    ours, theirs = result[peak], result["published_pair"][peak]
    rows = [
        Row(
            f"{where(result)}: peak memory{' of the device' if on_gpu else ''}, {length}",
            f"{ours:,.0f} MB",
            f"published loop, one pair: {theirs:,.0f} MB",
            theirs / ours,
        ),
        Row(f"growth of the host's memory over {length}", _slope(growth, "MB per 1000 pairs"), "flat: 0", None, True),
    ]
    if result["seconds"] >= LONG_ENOUGH_S:
        rows.append(Row(f"change of throughput over {length}", _slope(speed, "% an hour"), "steady: 0", None))
    return rows


def _slope(slope: dict[str, float], unit: str) -> str:
    return f"{slope['slope']:+.2g} ± {slope['confidence_95']:.2g} {unit}"


def memory_charts(result: Result) -> list[Chart]:
    windows = result["windows"]
    return [
        Chart(
            f"{where(result)}: host memory's peak in each window, MB",
            [(f"window {i}", window["host_peak_mb"]) for i, window in enumerate(windows)],
        ),
        Chart(
            "pairs per second in each window",
            [(f"window {i}", window["pairs"] / window["seconds"]) for i, window in enumerate(windows)],
        ),
    ]


STREAM = {
    "throughput": Kind(throughput_rows, throughput_charts),
    "synthesis": Kind(synthesis_rows, synthesis_charts),
    "label_head": Kind(label_head_rows, label_head_charts),
    "stages": Kind(stages_rows, stages_charts),
    "overlap": Kind(overlap_rows, overlap_charts),
    "memory": Kind(memory_rows, memory_charts),
}
