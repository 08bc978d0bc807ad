"""Run a part: its steps one after the other, until its minutes are over.

    python -m benchmarks.gpu 1 --device cuda --minutes 9 --out gpu-results
    python -m benchmarks.gpu all --device cpu --dry-run --out /tmp/dry

DIR gets part<N>.json and part<N>.svg, written anew after each step. A part that was cut is run again with the same DIR
and goes on after the steps that are done. SIGTERM and Ctrl-C end it in good order. The last line of the output says
what was found. `python -m benchmarks.gpu.collect DIR/part<N>.json` copies the results to benchmarks/results/.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.parts import PARTS, steps_of
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import Stop, run_step

RESERVE_S = 10.0
"""For ending the last step and writing the files."""
LEAST_S = 5.0
"""A step with less time than this is not begun."""


def run_part(part: int, args: argparse.Namespace, stop: Stop) -> bool:
    """Run one part and print its summary; whether every step is done."""
    deadline = time.monotonic() + 60 * args.minutes - RESERVE_S
    steps = steps_of(part, minutes=args.minutes, out=args.out, dry_run=args.dry_run)
    record = Record(part, steps, args.device, args.out)
    record.write()
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            left = deadline - time.monotonic()
            if stop.asked or record.is_done(step) or left < LEAST_S:
                continue
            print(f"--- {step.name}, at most {min(left, step.limit_s):.0f} s", flush=True)
            record.add(step, run_step(step, device=args.device, seconds=left, folder=Path(folder), stop=stop))
    print(record.summary(), flush=True)
    return record.finished()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, by default those of the command line; returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=[*map(str, PARTS), "all"])
    options.add_argument("--device", default="cuda")
    options.add_argument("--minutes", type=float, default=9.0, help="that each part may take")
    options.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR")
    options.add_argument("--dry-run", action="store_true", help="the same steps in the smallest size")
    args = options.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    with Stop().listening() as stop:
        finished = [run_part(part, args, stop) for part in (PARTS if args.part == "all" else [int(args.part)])]
    return 0 if all(finished) else 1
