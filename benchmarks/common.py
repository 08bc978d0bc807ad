"""What every benchmark here shares: options, a clock, a description of the machine, a result file, the last JSON line.

A benchmark prints tables for people and, as its last line, one JSON object for programs; the same object is written to
`benchmarks/results/<name>.json`. The name's part before the first "-" is the kind of result, which `report.py` reads:
`throughput.json` and `throughput-cuda.json` are of one kind. Knows nothing of what is measured.
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "handsoff_stream")


def parser(doc: str | None, *, name: str) -> argparse.ArgumentParser:
    """Options that every measurement of a stream has: `--device`, `--option`, `--name`; add your own.

    Args:
        doc: the script's docstring, shown by `--help`.
        name: result file without suffix on a CPU; on CUDA "-cuda" is appended.
    """
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keyword argument of HandsOffStream, such as chunk_size=8; may be repeated",
    )
    options.add_argument("--name", help=f"of the result file (default: {name}, on CUDA {name}-cuda)")
    options.set_defaults(default_name=name)
    return options


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """The `--option KEY=VALUE` pairs; values are JSON where they parse as such, else strings.

    Raises:
        ValueError: a pair without "=".
    """
    options: dict[str, Any] = {}
    for pair in args.option:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} has no value; write it as KEY=VALUE, such as chunk_size=8")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def result_name(args: argparse.Namespace) -> str:
    """Where the result of a `parser` run goes: `--name`, or the default of its kind of device."""
    on_gpu = torch.device(args.device).type == "cuda"
    return args.name or args.default_name + ("-cuda" if on_gpu else "")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a `parser` run, JSON-able, paths cut down as in `command`."""
    hidden = ("default_name", "name")
    return {key: _shorten(value) for key, value in vars(args).items() if key not in hidden}


def _shorten(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shorten(item) for item in value]
    return _short(str(value)) if isinstance(value, (str, Path)) else value


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(function: Callable[[], object], *, device: torch.device, repeats: int) -> float:
    """Shortest of `repeats` runs after one that is not counted: what the machine can do when nobody disturbs it."""
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
    """The command that was given, paths cut down to the repository or to the file's name."""
    return " ".join(["python", *(_short(argument) for argument in sys.argv)])


def _short(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    path = Path(value)
    if value and path.exists() and path.resolve().is_relative_to(ROOT):
        value = str(path.resolve().relative_to(ROOT))
    elif path.is_absolute():
        value = path.name
    return key + equals + value


def _commit() -> str | None:
    """Short hash of the checked-out commit, "+" appended if files differ from it; None outside a checkout."""
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
    """Add the machine to `record`, write it to `benchmarks/results/<name>.json`, print it as one line.

    Args:
        name: file name without suffix; an older result of that name is replaced.
        record: JSON-able, finite numbers only.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    whole = {"benchmark": name, **record, "machine": machine()}
    line = json.dumps(whole, allow_nan=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    print(line, flush=True)
    return path
