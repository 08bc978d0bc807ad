"""How the decisions of a rolling filter with lanes compare with those of one window over all samples.

    python -m benchmarks.rolling_lanes --samples 3000

The scores of the stream's first samples are computed once. Then filters with different numbers of lanes decide on
them, as in a stream: chunk k belongs to lane k % lanes, and every window starts from the calibration scores. The
benchmark compares the share of samples kept, how many decisions equal those of one window, and how many equal those of
"generate all, drop the top tenth". It repeats this for a long sequence of scores drawn from the first ones with
replacement, so that every window is eventually filled with scores of its own lane.
"""

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import add_stream_options, parser, result_name, settings, stream_options, write_result
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.filters import LANES_WITH_HISTORY, RollingPercentile
from handsoff_stream.stream import HandsOffStream

Bools = NDArray[np.bool_]


def decisions(scores: list[float], calibration: list[float], lanes: int, chunk_size: int) -> Bools:
    """Decisions of `RollingPercentile(lanes=lanes)` on scores in the order of their indices; True: kept."""
    filters: defaultdict[int, RollingPercentile] = defaultdict(lambda: _started(calibration))
    kept = [filters[index // chunk_size % lanes].push(score)[0] for index, score in enumerate(scores)]
    return np.array(kept)


def _started(calibration: list[float]) -> RollingPercentile:
    filter = RollingPercentile()
    filter.start(calibration)
    return filter


def offline(scores: list[float]) -> Bools:
    """Decisions of "generate all, drop the top tenth"; True: kept."""
    return np.array(scores) <= np.quantile(scores, 0.9, method="inverted_cdf")


def compare(scores: list[float], calibration: list[float], counts: list[int], chunk_size: int) -> list[dict[str, Any]]:
    """One row for each number of lanes."""
    one, sorted_out = decisions(scores, calibration, 1, chunk_size), offline(scores)
    rows = []
    for lanes in counts:
        kept = decisions(scores, calibration, lanes, chunk_size)
        thousands = kept[: len(kept) // 1000 * 1000].reshape(-1, 1000).mean(axis=1)
        rows.append(
            {
                "lanes": lanes,
                "kept": float(kept.mean()),
                "kept_of_each_1000": [float(thousands.min()), float(thousands.max())],
                "equal_to_one_window": float((kept == one).mean()),
                "equal_to_offline": float((kept == sorted_out).mean()),
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> Table:
    """One row per number of lanes, in percent."""
    table = Table("lanes", "kept, %", "of each 1000, %", "as one window, %", "as offline, %", title=title)
    for row in rows:
        low, high = row["kept_of_each_1000"]
        numbers = (row["kept"], row["equal_to_one_window"], row["equal_to_offline"])
        kept, window, sorted_out = (f"{100 * number:.2f}" for number in numbers)
        table.add_row(str(row["lanes"]), kept, f"{100 * low:.1f} to {100 * high:.1f}", window, sorted_out)
    return table


def rows(result: Result) -> list[Row]:
    """The share that each number of lanes keeps, beside that of one window, and how often both decisions agree."""
    found = []
    for run in ("samples", "long_run"):
        one = next(row for row in result[run] if row["lanes"] == 1)
        found += [
            Row(
                f"rolling filter with {row['lanes']} lanes, {run.replace('_', ' ')}: share kept",
                f"{row['kept']:.2%}, {row['equal_to_one_window']:.2%} of the decisions as with one window",
                f"one window: {one['kept']:.2%}",
                None,
            )
            for row in result[run]
            if row["lanes"] != 1
        ]
    return found


PRESENTATION = Presentation(rows)


def synthesized(stream: HandsOffStream[LabelledBatch], samples: int) -> list[float]:
    """Scores of the first samples of the stream, whole batches of 20."""
    batches = track(zip(range(samples // 20), stream, strict=False), total=samples // 20)
    return [score for _, batch in batches for score in batch.uncertainty.tolist()]


def main() -> None:
    """Compare the decisions, print two tables, and write the result."""
    options = parser(__doc__, name="rolling_lanes")
    add_stream_options(options)
    options.add_argument("--checkpoint", default="faces", help="name or path")
    options.add_argument(
        "--samples",
        type=int,
        default=3000,
        help="to synthesize; 0: half of the checkpoint's calibration scores are samples, the other half calibrates",
    )
    options.add_argument("--long-run", type=int, default=200_000, help="scores drawn from those of the samples")
    options.add_argument("--lanes", type=int, nargs="+", default=[1, 4, LANES_WITH_HISTORY, 96])
    args = options.parse_args()
    stream = HandsOffStream(args.checkpoint, filter=None, batch_size=20, device=args.device, **stream_options(args))
    calibration = stream._source.calibration_scores(stream.options)
    scores = synthesized(stream, args.samples)
    if not scores:
        calibration, scores = calibration[::2], calibration[1::2]
    drawn = np.random.default_rng(0).choice(scores, args.long_run).tolist()
    runs = {"samples": scores, "long_run": drawn}
    result: dict[str, Any] = {
        "settings": settings(args),
        "calibration_scores": len(calibration),
        **{name: compare(values, calibration, args.lanes, stream.chunk_size) for name, values in runs.items()},
    }
    for name, values in runs.items():
        Console().print(show(f"{name}: {len(values)} scores", result[name]))
    write_result(result_name(args), result)


if __name__ == "__main__":
    main()
