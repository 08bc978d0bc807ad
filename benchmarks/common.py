"""What every benchmark shares: arguments, a clock, a description of the machine, and the result file.

A benchmark prints tables for people and, as its last line, one JSON object for programs; the same object is written to
`benchmarks/results/<name>.json`. The part of the name before the first "-" is the kind of result, which
`benchmarks.report` reads: `throughput.json` and `throughput-cuda.json` are of one kind. Does not know what is measured.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from handsoff_stream.files.atomic import write_file

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
RESULTS = PACKAGE / "results"
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "handsoff_stream")


def parser(doc: str | None, *, name: str) -> argparse.ArgumentParser:
    """A parser with `--device` and `--name`, for `result_name` and `settings`; add your own arguments.

    Args:
        doc: the module's docstring, which `--help` shows.
        name: of the result file, without suffix, on a CPU; on CUDA "-cuda" is appended.
    """
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--name", help=f"of the result file, or its path (default: {name}, on CUDA {name}-cuda)")
    options.set_defaults(default_name=name)
    return options


def add_stream_options(options: argparse.ArgumentParser) -> None:
    """Add `--option KEY=VALUE`, which `stream_options` reads."""
    options.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keyword argument of HandsOffStream, such as chunk_size=8; may be repeated",
    )


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """The pairs of `--option KEY=VALUE`; a value that is valid JSON is read as such, any other is a string.

    Raises:
        ValueError: a pair without "=".
    """
    options: dict[str, Any] = {}
    for pair in args.option:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} sets nothing without a value; write KEY=VALUE, such as chunk_size=8")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def result_name(args: argparse.Namespace) -> str:
    """Name of the result file of a `parser` run, without suffix: `--name`, or the default for the kind of device."""
    on_gpu = torch.device(args.device).type == "cuda"
    return args.name or args.default_name + ("-cuda" if on_gpu else "")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a `parser` run, JSON-able, with paths shortened as in `command`."""
    hidden = ("default_name", "name")
    return {key: _shorten(value) for key, value in vars(args).items() if key not in hidden}


def _shorten(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shorten(item) for item in value]
    return short_path(str(value)) if isinstance(value, (str, Path)) else value


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; on a CPU, return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(function: Callable[[], object], *, device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, which other processes disturbed least; a first call warms up."""
    function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, Any]:
    """Hardware, versions, date and command of this run, JSON-able; no path outside the repository."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def command() -> str:
    """The command line of this process; paths are relative to the repository, or file names if they lie outside."""
    program, *arguments = sys.argv
    return " ".join(["python", *_program(Path(program)), *(short_path(argument) for argument in arguments)])


def _program(file: Path) -> list[str]:
    """How to run a file: as a module if it belongs to this package, else by its path."""
    if not file.resolve().is_relative_to(PACKAGE):
        return [short_path(str(file))]
    parts = file.resolve().relative_to(ROOT).with_suffix("").parts
    return ["-m", ".".join(part for part in parts if part != "__main__")]


def short_path(argument: str) -> str:
    """An argument whose path, if it is one, is relative to the repository, or a file name if it lies outside.

    `KEY=PATH` is treated alike.
    """
    key, equals, value = argument.rpartition("=")
    path = Path(value)
    if value and path.exists() and path.resolve().is_relative_to(ROOT):
        value = str(path.resolve().relative_to(ROOT))
    elif path.is_absolute():
        value = path.name
    return key + equals + value


def _commit() -> str | None:
    """Short hash of the checked-out commit, with "+" appended if tracked files differ; None outside a checkout."""
    git = ("git", "-C", str(ROOT))
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_result(name: str, record: dict[str, Any]) -> Path:
    """Add the machine to `record`, write it to `benchmarks/results/<name>.json`, and print it as one line.

    Args:
        name: file name or path without suffix, from `benchmarks/results/`; an older result of that name is replaced.
        record: JSON-able, with finite numbers only.

    Returns:
        The path of the result file.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    whole = {"benchmark": Path(name).name, **record, "machine": machine()}
    line = json.dumps(whole, allow_nan=False)
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    print(line, flush=True)
    return path
