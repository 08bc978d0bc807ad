"""A short soak: failures of every kind, a run cut short, and what the counts would see."""

import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
from conftest import make_checkpoint

from benchmarks.common import ROOT
from benchmarks.report.tables import rows_of
from benchmarks.soak.failures import FAILURES, NOT_FINITE_OF, Log, differences, run_failures
from benchmarks.soak.rate import Ledger, run_rate
from handsoff_stream.checkpoint import save_checkpoint
from handsoff_stream.stream import HandsOffStream

SAMPLES = 520  # so many that the first three lives, which fail in different ways, cannot hand out all of them


@pytest.mark.slow
def test_after_failures_of_every_kind_each_sample_came_once_and_in_order(tmp_path):
    *_, result = run_failures(SAMPLES, workers=2, windows=4, batches_per_failure=10)
    assert result["finished"] and result["samples"] == SAMPLES
    wrong = {name: result[name] for name in ("lost", "twice", "elsewhere", "other_pixels")}
    assert wrong == {"lost": 0, "twice": 0, "elsewhere": 0, "other_pixels": 0}
    assert set(result["failures"]) == set(FAILURES) and min(result["failures"].values()) >= 1
    assert result["lives"] == sum(result["failures"].values()) + 1
    assert result["pairs"] > SAMPLES, "what came after the last file of the position came again"
    assert result["skipped_not_finite"] == 1 and NOT_FINITE_OF // 2 < SAMPLES
    assert [row.ours for row in rows_of(tmp_path / "soak-failures.json", result)][0] == "0"


def filled(pairs) -> Log:
    log = Log(len(pairs))
    for log.length, (index, checksum) in enumerate(pairs, 1):
        log.indices[log.length - 1], log.checksums[log.length - 1] = index, checksum
    return log


def test_what_is_lost_repeated_exchanged_or_changed_is_counted():
    expected = filled([(0, 10), (1, 11), (3, 13), (4, 14)])
    nothing = {"lost": 0, "twice": 0, "elsewhere": 0, "other_pixels": 0}
    assert differences(expected, filled([(0, 10), (1, 11), (3, 13)])) == nothing
    lost = differences(expected, filled([(0, 10), (1, 11), (4, 14), (5, 15)]))
    assert lost == {"lost": 1, "twice": 0, "elsewhere": 2, "other_pixels": 2}
    twice = differences(expected, filled([(0, 10), (1, 11), (1, 11), (3, 13)]))
    assert twice == {"lost": 1, "twice": 1, "elsewhere": 2, "other_pixels": 2}
    assert differences(expected, filled([(0, 10), (1, 99)])) == {**nothing, "other_pixels": 1}
    assert differences(expected, filled([(1, 11), (0, 10)]))["elsewhere"] == 2


def test_at_full_rate_every_index_was_handed_out_once_or_dropped(checkpoint):
    stream = HandsOffStream(checkpoint, batch_size=8, device="cpu")
    *_, last = itertools.islice(run_rate(stream, seconds=math.inf, window_seconds=0), 20)
    assert (last["out_of_order"], last["unaccounted"], last["finished"]) == (0, 0, False)
    assert last["pairs"] == stream.accepted == 160 and last["rejected"] == stream.rejected > 0
    assert [window["pairs"] for window in last["windows"]] == [8] * 20


def test_a_run_at_full_rate_ends_when_its_time_is_over(checkpoint):
    results = list(run_rate(HandsOffStream(checkpoint, batch_size=8, device="cpu"), seconds=0, window_seconds=0))
    assert [result["finished"] for result in results] == [True]


@pytest.mark.parametrize("change", ["repeated", "left out"])
def test_the_ledger_sees_what_was_repeated_or_left_out(checkpoint, change):
    stream, ledger = HandsOffStream(checkpoint, batch_size=8, device="cpu"), Ledger()
    for number, batch in zip(range(4), stream, strict=False):
        counts = {"accepted": stream.accepted, "rejected": stream.rejected}
        if number != 2 or change == "repeated":
            ledger.add(batch, counts)
        if number == 2 and change == "repeated":
            ledger.add(dataclasses.replace(batch), counts)
    assert ledger.unaccounted == 8
    assert (ledger.out_of_order > 0) == (change == "repeated")


def test_a_run_that_is_killed_leaves_what_it_has_measured(tmp_path):
    save_checkpoint(tmp_path / "tiny.safetensors", make_checkpoint())
    out = tmp_path / "soak-rate.json"
    arguments = ["rate", "--checkpoint", str(tmp_path / "tiny.safetensors"), "--device", "cpu", "--minutes", "10"]
    command = [sys.executable, "-m", "benchmarks.soak", *arguments, "--window-seconds", "0.1"]
    command += ["--name", str(out.with_suffix(""))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    result = json.loads(out.read_text())
    assert not result["finished"] and result["pairs"] > 0 and result["machine"]["cpu_cores"]
    assert rows_of(out, result)[0].ours == "0"
