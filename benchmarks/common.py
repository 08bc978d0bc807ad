"""What every benchmark here shares: a description of the machine, a result file, and the JSON line at the end.

A benchmark prints tables for people and, as its last line, one JSON object for programs; the same object is written to
`benchmarks/results/<name>.json`. Knows nothing of what is measured.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "handsoff_stream")


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
    path = Path(argument)
    if path.resolve().is_relative_to(ROOT) and path.exists():
        return str(path.resolve().relative_to(ROOT))
    return path.name if path.is_absolute() else argument


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
