"""A slice of training a generator: the recipe's trainer for some seconds, in a folder that the next slice goes on from.

    python -m benchmarks.gpu.training --run runs/faces --seconds 480

Arguments that are unknown here go to `recipes.faces.train_generator`. Where files that come back from a machine must
be small, `--piece-mb 15` leaves the state in pieces, which the next slice puts together. The last line of the output is
the result as JSON.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import parser, result_name, settings, write_result
from benchmarks.report.rows import Presentation, Result, Row
from handsoff_stream.files.atomic import whole_file

TRAINER = "recipes.faces.train_generator"
STATE, METRICS = "state.pt", "metrics.jsonl"


def split(path: Path, piece_bytes: int) -> None:
    """Replace a file by pieces of at most so many bytes: `<name>.000`, `<name>.001`, ..."""
    content = path.read_bytes()
    for number, start in enumerate(range(0, len(content), piece_bytes)):
        with whole_file(path.with_name(f"{path.name}.{number:03d}")) as partial:
            partial.write_bytes(content[start : start + piece_bytes])
    path.unlink()


def join(path: Path) -> None:
    """Put the pieces of a file together, and remove them; nothing happens if there are none."""
    pieces = sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9]"))
    if pieces and not path.exists():
        with whole_file(path) as partial:
            partial.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    for piece in pieces:
        piece.unlink()


def last_metrics(run: Path) -> dict[str, Any]:
    """The last line of the metrics of a run.

    Raises:
        RuntimeError: there is none.
    """
    path = run / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        raise RuntimeError(f"{path} holds no metrics, so nothing was trained; give the slice more --seconds")
    metrics: dict[str, Any] = json.loads(lines[-1])
    return metrics


def rows(result: Result) -> list[Row]:
    """Images so far, and the rate of the slice."""
    last = result["last"]
    what = f"generator training at {last['resolution']:.0f} x {last['resolution']:.0f}"
    return [Row(what, f"{last['images_per_s']:.4g} images/s", f"{last['images']:,.0f} images so far", None)]


PRESENTATION = Presentation(rows)


def main() -> None:
    """Train for as long as the command line says, and write the rate and the losses."""
    options = parser(__doc__, name="generator_training")
    options.add_argument("--run", type=Path, required=True, help="folder of the run; an existing run goes on")
    options.add_argument("--seconds", type=float, required=True, help="stop after this long, and save")
    options.add_argument("--piece-mb", type=int, help="leave the state in pieces of so many MiB")
    args, passed_on = options.parse_known_args()
    args.run.mkdir(parents=True, exist_ok=True)
    join(args.run / STATE)
    given, sys.argv = sys.argv, [TRAINER, str(args.run), "--device", args.device, "--seconds", str(args.seconds)]
    sys.argv += passed_on
    importlib.import_module(TRAINER).main()  # SIGTERM lets it save and return
    sys.argv = given
    record = {"settings": {**settings(args), "trainer": passed_on}, "last": last_metrics(args.run)}
    if args.piece_mb is not None:
        split(args.run / STATE, args.piece_mb << 20)
    write_result(result_name(args), record)


if __name__ == "__main__":
    main()
