"""Damaged and crafted files of all formats load or are refused; `fuzz.py` lists the rules that each one must obey."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz.py"
KINDS = 21


def fuzz(files: int, seed: int) -> dict:
    # In a process of its own, whose peak memory is its own, whose address space is limited, and which a hook watches.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(FUZZ.parent)])}
    command = [sys.executable, str(FUZZ), "--files", str(files), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3_000:]
    assert not (Path(tempfile.gettempdir()) / "handsoff_pwned").exists()
    print(done.stdout)
    return json.loads(done.stdout)


def test_two_thousand_files_load_or_are_refused():
    found = fuzz(files=2_000, seed=0)
    assert found["files"] == found["loaded"] + found["refused"] == 2_000 and len(found["kinds"]) == KINDS
    assert found["loaded"] > 200 and found["refused"] > 1_000
    assert all(counts for counts in found["kinds"].values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_thousand_files_load_or_are_refused(seed):
    assert fuzz(files=10_000, seed=seed)["files"] == 10_000
