"""The command line of `python -m benchmarks.soak`, and how its results are shown."""

import argparse

import benchmarks.soak
from benchmarks.common import add_stream_options, parser, result_name, settings, stream_options, write_result
from benchmarks.report.bar_chart import Chart
from benchmarks.report.rows import Presentation, Result, Row
from benchmarks.soak.failures import BATCH_SIZE, run_failures
from benchmarks.soak.rate import run_rate
from handsoff_stream import HandsOffStream


def rows(result: Result) -> list[Row]:
    """What was lost or came twice, and the growth of memory."""
    growth = result["resident_mb_per_1000_pairs"]
    length = f"{result['pairs']:,} pairs in {result['seconds'] / 60:.3g} minutes"
    slope = "not enough windows"
    if growth is not None:
        slope = f"{growth['slope']:+.2g} ± {growth['confidence_95']:.2g} MB per 1000 pairs"
    grows = Row(f"soak: growth of the process's memory over {length}", slope, "none: 0", None)
    if "failures" not in result:
        wrong = result["out_of_order"] + result["unaccounted"]
        what = f"soak at {result['pairs_per_s']:.3g} pairs/s: samples lost or twice, of {length}"
        return [Row(what, str(wrong), "none: 0", None), grows]
    count = sum(result["failures"].values())
    wrong = sum(result[name] for name in ("lost", "twice", "elsewhere", "other_pixels"))
    what = f"soak: {result['samples']:,} samples, resumed after {count} failures: samples lost, twice or changed"
    return [Row(what, str(wrong), "a run without failures: 0", None), grows]


def charts(result: Result) -> list[Chart]:
    """Memory in each window."""
    bars = [(f"window {i}", window["resident_mb"]) for i, window in enumerate(result["windows"])]
    return [Chart("soak: resident memory at the end of each window, MB", bars)]


PRESENTATION = Presentation(rows, charts)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(benchmarks.soak.__doc__, name="soak")
    add_stream_options(options)
    options.add_argument("part", choices=["rate", "failures"])
    options.add_argument("--checkpoint", default="faces", help="of `rate`: name or path")
    options.add_argument("--minutes", type=float, default=60, help="of `rate`")
    options.add_argument("--window-seconds", type=float, default=60, help="of `rate`")
    options.add_argument("--samples", type=int, default=100_000, help="of `failures`")
    options.add_argument("--workers", type=int, default=2, help="of `failures`")
    options.add_argument("--windows", type=int, default=20, help="of `failures`")
    options.add_argument("--note", help="what else is to be known about the run, for the result file")
    args = options.parse_args()
    if args.workers < 2:
        options.error(f"--workers {args.workers}: a worker is killed while another one goes on; pass at least 2")
    args.default_name = f"soak-{args.part}"
    return args


def main() -> None:
    """Run one part, and write its result again and again."""
    args = arguments()
    if args.part == "rate":
        stream = HandsOffStream(args.checkpoint, batch_size=BATCH_SIZE, device=args.device, **stream_options(args))
        results = run_rate(stream, seconds=60 * args.minutes, window_seconds=args.window_seconds)
    else:
        results = run_failures(args.samples, workers=args.workers, windows=args.windows)
    for result in results:
        write_result(result_name(args), {"settings": settings(args), **result})
