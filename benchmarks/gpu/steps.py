"""One measurement of a part, in a process of its own, which ends at its limit with all that it started.

A step is a benchmark of this repository with its arguments. It runs in a fork of this process, which has imported
PyTorch already but never touched the GPU: an error of CUDA, which no process survives, ends one step and not the part.
Linux only. Knows processes. Does not know what is measured.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

GRACE_SECONDS = 5.0
"""Between asking a step to stop and killing it."""
POLL_SECONDS = 0.1

State = Literal["done", "failed", "cut"]


@dataclass(frozen=True)
class Step:
    """A benchmark and its arguments."""

    name: str
    """Of its result; the part before the first "-" is the kind of result."""
    module: str
    """Its module, which has a `main` that reads `sys.argv`; such as "benchmarks.throughput"."""
    arguments: tuple[str, ...]
    limit_s: float
    """Longest time, in seconds."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    state: State
    seconds: float
    result: dict[str, Any] | None
    """What the benchmark wrote; None if it wrote nothing."""
    note: str
    """Why it is not done, in one line."""


class Stop:
    """Whether this process was asked to stop. Raising from a signal handler would not do: within a fork it is lost."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Inside, SIGTERM and SIGINT (Ctrl-C) ask to stop, and do nothing else."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


def run_step(step: Step, *, device: str, seconds: float, folder: Path, stop: Stop) -> Outcome:
    """Run a step, print what it prints, and wait for it.

    Args:
        step: what to run.
        device: where it computes.
        seconds: that are left; the step ends after these or after its own limit.
        folder: an existing folder for what it writes.
        stop: ends the step when it is asked to.
    """
    result = folder / f"{step.name}.json"
    arguments = (*step.arguments, "--device", device, "--name", str(folder / step.name))
    process = multiprocessing.get_context("fork").Process(target=_child, args=(step.module, arguments))
    sys.stdout.flush()
    started = time.monotonic()
    limit = min(seconds, step.limit_s)
    process.start()
    try:
        while process.is_alive() and time.monotonic() - started < limit and not stop.asked:
            process.join(POLL_SECONDS)
        in_time = not process.is_alive()
    finally:
        _end(process)
    taken = round(time.monotonic() - started, 1)
    found = json.loads(result.read_text()) if result.exists() else None
    if not in_time:
        why = "asked to stop" if stop.asked else f"ended after its limit of {limit:.0f} s"
        return Outcome("cut", taken, found, why)
    if process.exitcode != 0 or found is None:
        return Outcome("failed", taken, found, f"exit status {process.exitcode}; the output says more")
    return Outcome("done", taken, found, "")


def _child(module: str, arguments: Sequence[str]) -> None:
    os.setsid()  # a group of its own, so that all it starts can be ended with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    benchmark: Any = importlib.import_module(module)
    sys.argv = [str(benchmark.__file__), *arguments]
    try:
        benchmark.main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _end(process: BaseProcess) -> None:
    """End what still runs of a step: politely, then for good."""
    _signal(process, signal.SIGTERM)
    process.join(GRACE_SECONDS)
    _signal(process, signal.SIGKILL)
    process.join()


def _signal(process: BaseProcess, number: int) -> None:
    """To the group of a step, or to the step alone if it has not made its group yet."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        if process.is_alive():
            os.kill(process.pid, number)
