"""The parts for a GPU: a dry run of all of them on the CPU, and what is left when a part or a step is cut."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.gpu import collect, command, gpu_tests, parts, training
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import Outcome, Step, Stop, run_step
from benchmarks.report.kinds import KINDS

ROOT = common.ROOT


PROGRAM = [sys.executable, "-m", "benchmarks.gpu"]
OPTIONS = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The folder and the output of all parts in the smallest size."""
    out = tmp_path_factory.mktemp("dry")
    arguments = ["all", "--device", "cpu", "--dry-run", "--out", str(out)]
    return out, subprocess.run([*PROGRAM, *arguments], **OPTIONS, capture_output=True)


def test_every_part_runs_and_says_what_it_found(dry_run):
    out, process = dry_run
    assert process.returncode == 0, process.stdout + process.stderr
    summaries = [line for line in process.stdout.splitlines() if line.startswith("part ")]
    assert [line.partition(":")[0] for line in summaries] == [f"part {part}" for part in parts.PARTS]
    assert process.stdout.splitlines()[-1] == summaries[-1]
    for part, summary in zip(parts.PARTS, summaries, strict=True):
        written = json.loads((out / f"part{part}.json").read_text())
        assert written["summary"] == summary
        assert {step["state"] for step in written["steps"].values()} == {"done"}
        assert str(out) not in json.dumps(written) and str(ROOT) not in json.dumps(written)
        if part < 5:
            assert (out / f"part{part}.svg").read_text().startswith("<svg")


def test_the_same_steps_run_dry_and_in_full(tmp_path):
    for part in parts.PARTS:
        full = parts.steps_of(part, minutes=9, out=tmp_path, dry_run=False)
        dry = parts.steps_of(part, minutes=9, out=tmp_path, dry_run=True)
        assert {step.module for step in full} == {step.module for step in dry}
        assert len({step.name for step in full}) == len(full)
        for step in [*full, *dry]:
            assert step.name.partition("-")[0] in KINDS
            assert 0 < step.limit_s <= 9 * 60


def test_the_graph_changes_no_bit_in_the_dry_run(dry_run):
    variants = json.loads((dry_run[0] / "part4.json").read_text())["steps"]["variants"]["result"]["variants"]
    assert list(variants) == ["as it is", "graph", "compiled", "compiled, graph"]
    assert all(variant["same_bits"] for variant in variants.values())


def test_results_become_files_that_the_report_shows(dry_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["collect", str(dry_run[0] / "part2.json")])
    collect.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name in ("throughput", "stages"):
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["benchmark"] == name and KINDS[name].rows(result)


# What is left of a cut part ------------------------------------------------------------------------------------


def test_a_part_that_is_terminated_keeps_what_it_has_and_goes_on_later(tmp_path, capfd):
    arguments = ["2", "--device", "cpu", "--dry-run", "--out", str(tmp_path)]
    with subprocess.Popen([*PROGRAM, *arguments], **OPTIONS, stdout=subprocess.PIPE) as process:
        output = iter(process.stdout)
        next(line for line in output if line.startswith("--- stages"))
        process.send_signal(signal.SIGTERM)
        last = [line.strip() for line in output if line.strip()][-1]
    assert process.returncode == 1
    assert last.startswith("part 2: 1 of 2 steps done in") and last.endswith("stages cut")
    written = json.loads((tmp_path / "part2.json").read_text())
    assert written["summary"] == last and written["steps"]["throughput"]["result"]["sides"]

    assert command.main(arguments) == 0
    again = capfd.readouterr().out
    assert "--- throughput" not in again and "--- stages" in again
    assert again.splitlines()[-1].startswith("part 2: 2 of 2 steps done in")


def test_a_part_without_time_left_begins_nothing_and_says_so(tmp_path, capsys):
    status = command.main(["3", "--device", "cpu", "--dry-run", "--out", str(tmp_path), "--minutes", "0.1"])
    assert status == 1
    assert capsys.readouterr().out == "part 3: 0 of 2 steps done in 0 s; overlap not run; memory not run\n"


def module_with(monkeypatch, tmp_path, body):
    """A benchmark of its own, importable as `sleeper`."""
    (tmp_path / "sleeper.py").write_text(f"import json, os, subprocess, sys, time\ndef main():\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("sleeper", None)


def test_a_step_beyond_its_limit_is_ended_with_all_it_started(tmp_path, monkeypatch):
    body = "print(subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[-1] + '.pid', 'w'), flush=True); "
    module_with(monkeypatch, tmp_path, body + "time.sleep(600)")
    outcome = run_step(Step("x", "sleeper", (), limit_s=2.0), device="cpu", seconds=60.0, folder=tmp_path, stop=Stop())
    assert outcome.state == "cut" and outcome.note == "ended after its limit of 2 s"
    assert outcome.seconds < 30
    child = Path(f"/proc/{(tmp_path / 'x.pid').read_text().strip()}/status")
    deadline = time.monotonic() + 10
    while child.exists() and "Z (zombie)" not in child.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "Z (zombie)" in child.read_text()


@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("json.dump({'a': 1}, open(sys.argv[-1] + '.json', 'w'))", "done"),
        ("raise RuntimeError('no')", "failed"),
        ("os.kill(os.getpid(), 9)", "failed"),
        ("pass", "failed"),
    ],
)
def test_a_step_ends_alone(tmp_path, monkeypatch, body, state):
    module_with(monkeypatch, tmp_path, body)
    outcome = run_step(Step("x", "sleeper", (), limit_s=60.0), device="cpu", seconds=60.0, folder=tmp_path, stop=Stop())
    assert outcome.state == state and (outcome.result == {"a": 1}) == (state == "done")


def test_a_result_that_was_written_before_the_cut_is_kept(tmp_path, monkeypatch):
    module_with(monkeypatch, tmp_path, "json.dump({'a': 1}, open(sys.argv[-1] + '.json', 'w')); time.sleep(600)")
    outcome = run_step(Step("x", "sleeper", (), limit_s=2.0), device="cpu", seconds=60.0, folder=tmp_path, stop=Stop())
    assert (outcome.state, outcome.result) == ("cut", {"a": 1})


def test_the_file_of_a_part_is_whole_at_every_moment(tmp_path):
    steps = parts.steps_of(5, minutes=1, out=tmp_path, dry_run=True)
    record = Record(5, steps, "cpu", tmp_path)
    last = {"resolution": 16, "images": 8, "images_per_s": 2.0}
    for outcome in (Outcome("cut", 1.0, None, "why"), Outcome("done", 2.0, {"last": last}, "")):
        record.add(steps[0], outcome)
        written = json.loads((tmp_path / "part5.json").read_text())
        assert written["steps"]["generator_training"]["state"] == outcome.state
    assert written["summary"] == (
        "part 5: 1 of 1 steps done in 2 s; generator training at 16 x 16: 2 images/s, against 8 images so far"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part5.json", "tiny.safetensors"]


# Pieces of the parts -------------------------------------------------------------------------------------------


def test_files_with_gpu_tests_are_those_with_tests_marked_so():
    marked = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "pytest.mark.gpu" in map(ast.unparse, node.decorator_list)
    }
    assert ROOT / "tests" / "test_graphs.py" in marked
    assert set(gpu_tests.files_with_gpu_tests(ROOT / "tests")) == marked


def test_a_state_in_pieces_is_put_together_again(tmp_path):
    path, content = tmp_path / "state.pt", os.urandom(2500)
    path.write_bytes(content)
    training.split(path, 1000)
    assert sorted(piece.name for piece in tmp_path.iterdir()) == ["state.pt.000", "state.pt.001", "state.pt.002"]
    assert max(piece.stat().st_size for piece in tmp_path.iterdir()) == 1000
    training.join(path)
    assert [piece.name for piece in tmp_path.iterdir()] == ["state.pt"] and path.read_bytes() == content
    training.join(path)
    assert path.read_bytes() == content
