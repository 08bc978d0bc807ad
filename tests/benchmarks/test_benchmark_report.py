"""README's table and the plots show the committed results with their hardware and date, and nothing else."""

import copy
import json
import runpy
import sys
import types
from pathlib import Path

import pytest

from benchmarks.report.bar_chart import Chart, svg
from benchmarks.report.command import main
from benchmarks.report.kinds import KINDS
from benchmarks.report.tables import BEGIN, END, between_markers, rows_of

SLOW = {"pairs_per_s": 0.5, "first_batch_s": 30.0, "bytes_on_disk": 8_000_000, "measured_candidates": 2}
RESULT = {
    "machine": {"gpu": None, "cpu": "Some CPU", "cpu_cores": 2, "date": "2026-11-20T12:17:47+00:00"},
    "settings": {"checkpoint": "faces"},
    "geometry": {"label": [128, 128]},
    "sides": {
        "stream, 0 workers": {"pairs_per_s": 8.0, "first_batch_s": 0.8},
        "published loop": SLOW,
        "export, then read": SLOW,
    },
    "ratios": {
        f"stream, 0 workers against {other}": {"all_batches": 16.0, "first_batch": 37.5}
        for other in ("published loop", "export, then read")
    },
}


@pytest.fixture
def repository(tmp_path):
    """A README with markers, one result below it, and the report run on both."""
    readme, file = tmp_path / "README.md", tmp_path / "results" / "throughput.json"
    file.parent.mkdir()
    readme.write_text(f"before\n{BEGIN}\nstale table\n{END}\nafter\n")
    file.write_text(json.dumps(RESULT))

    def report_on(*arguments: str) -> int:
        return main(["--readme", str(readme), "--results", str(file.parent), *arguments])

    return types.SimpleNamespace(readme=readme, file=file, result=copy.deepcopy(RESULT), report=report_on)


def test_the_table_shows_every_number_with_its_hardware_and_date(repository):
    assert repository.report() == 0
    text = repository.readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale table" not in text
    place = "[2 cores of Some CPU, 2026-11-20](results/throughput.json)"
    loop = "published loop: 0.5 pairs/s, from 2 pairs"
    assert f"| faces, 128 x 128: stream, 0 workers | 8 pairs/s | {loop} | 16x | {place} |" in text
    assert "None of this has run on a GPU yet" in text


def test_the_readme_has_the_headlines_and_the_folder_of_the_results_has_every_row(repository):
    repository.report()
    text, everything = repository.readme.read_text(), (repository.file.parent / "README.md").read_text()
    assert "[All rows](results/README.md)" in text and "[All rows]" not in everything
    rows = rows_of(repository.file, repository.result)
    assert {row.headline for row in rows} == {True, False}
    for row in rows:
        line = f"| {row.what} | {row.ours} | {row.other} |"
        assert (line in text) == row.headline and line in everything
    assert "(throughput.json)" in everything


def test_the_check_fails_as_soon_as_a_result_and_the_readme_differ(repository, capsys):
    assert repository.report("--check") == 1
    repository.report()
    assert repository.report("--check") == 0
    repository.result["sides"]["stream, 0 workers"]["pairs_per_s"] *= 2
    repository.file.write_text(json.dumps(repository.result))
    assert repository.report("--check") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stale"] == [
        "README.md",
        "results/README.md",
        "results/throughput.svg",
    ]


def test_once_something_has_run_on_a_gpu_the_readme_names_it(repository):
    repository.result["machine"]["gpu"] = "NVIDIA H200"
    repository.file.with_stem("throughput-cuda").write_text(json.dumps(repository.result))
    repository.report()
    assert "NVIDIA H200, " in repository.readme.read_text() and "None of this" not in repository.readme.read_text()


def test_results_of_unknown_kinds_are_named(repository, capsys):
    repository.file.with_stem("unheard_of").write_text("{}")
    repository.report()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left_out"] == ["unheard_of.json"]


def test_a_result_that_cannot_be_shown_is_named_with_the_remedy(repository):
    del repository.result["ratios"]
    repository.file.write_text(json.dumps(repository.result))
    with pytest.raises(ValueError, match="throughput.json lacks 'ratios'.*measure again"):
        repository.report()
    with pytest.raises(ValueError, match="add them"):
        between_markers("no markers", "table")


SIDE = {"peak_mb": 100.0, "curve": [{"seconds": 8.0, "accuracy": 0.5, "epochs": 1}]}
OTHER_RESULTS = {
    "fitting": {
        "settings": {"images": 4},
        "ours": SIDE,
        "published": {**SIDE, "peak_mb": 800.0},
        "accuracy": 0.5,
        "ours_s": 8.0,
        "published_s": 40.0,
        "time_ratio": 5.0,
        "memory_ratio": 8.0,
    },
    "synthesis": {
        "fast": "bfloat16",
        "speed": [
            {
                "geometry": "256",
                "images_per_s": {"plain": 2.0, "exact": 3.0, "fast": 5.0, "fast, compiled": 6.0},
                "times_plain": {"plain": 1.0, "exact": 1.5, "fast": 2.5, "fast, compiled": 3.0},
                "first_call_compiled_s": {"fast": 27.3},
            }
        ],
    },
    "label_head": {
        "cases": [
            {
                "case": "faces",
                "label": [128, 128],
                "heads": {"segmentation": {"members": 10, "hidden": [128, 32]}},
                "paths": {
                    name: {"seconds": 0.5, "peak_mb": 80.0, "labels_changed": 0.0, "ratio": 9.0}
                    for name in ("published", "exact", "fast")
                },
            }
        ]
    },
    "fitting_memory": {
        "measured": {"images": 50, "channels": 6080, "fit_peak_mb": 9000.0},
        "settings": {"members": 10, "hidden": [256, 32]},
    },
    "inversion": {
        "arguments": {"images": 4},
        "ways": {name: {"psnr_db": 12.0, "seconds_per_image": 0.5} for name in ("average latent", "encoder")},
    },
    "inversion_labels": {
        "settings": {"images": 16, "steps": 150, "teacher_steps": 1000},
        "real": {"miou": 0.8},
        "ways": {name: {"miou_ratio": 0.91, "psnr_db": 26.0} for name in ("random distance", "encoder alone")},
    },
    "generator": {
        "arguments": {"images": 9},
        "sets": {name: {"distance": 0.5, "precision": 0.8, "recall": 0.25} for name in ("other renders", "generated")},
    },
    "downstream": {
        "settings": {"backbone": "resnet18", "steps": 300, "seeds": [0, 1]},
        "summary": {name: {"miou_mean": 0.319, "miou_std": 0.01} for name in ("stream", "labelled", "rendered")},
    },
    "label_agreement": {
        "judge_on_renders": {"miou": 0.69},
        "agreement": [{"checkpoint": "faces", "psi": psi, "miou": 0.638} for psi in (0.7, 1.0)],
    },
}


@pytest.mark.parametrize(
    "name, rows, shown",
    [
        ("fitting", 2, "published training: 40 s"),
        ("synthesis", 3, "synthesis of config-f-256, bfloat16, torch.compile (first call 27 s) 6 images/s"),
        ("label_head", 2, "10 members of (128, 32): label head, fast 0.5 s, 80 MB, 0.00% of labels changed"),
        ("fitting_memory", 1, "9 GB of the process"),
        ("inversion", 1, "average latent: 12 dB"),
        ("inversion_labels", 2, "of 16 faces, 150 steps: encoder alone 91% of the images' mIoU, 26.0 dB"),
        ("generator", 1, "other renders: 0.5, 80.0%, 25.0%"),
        ("downstream", 2, "the labelled images: 31.9% ± 1.0%"),
        ("label_agreement", 2, "at psi 0.7, mIoU with a teacher's 63.8%"),
    ],
)
def test_results_of_the_other_benchmarks_are_shown_too(name, rows, shown):
    path, result = Path(f"{name}.json"), OTHER_RESULTS[name]
    found = rows_of(path, result)
    assert len(found) == rows
    assert shown in " ".join(f"{row.what} {row.ours} {row.other}" for row in found)
    charts = KINDS[name].charts
    assert charts is None or all(chart.bars for chart in charts(result))


def test_the_longest_bar_is_as_wide_as_there_is_room_and_half_of_it_is_half():
    drawn = svg([Chart("a < b", [("one", 2.0), ("two", 1.0), ("none", -1.0)])])
    assert [f'width="{width}" height="18"' in drawn for width in ("380.0", "190.0", "0.0")] == [True] * 3
    assert "a &lt; b" in drawn


def test_the_readme_shows_the_committed_results_as_the_module_says(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.report", "--check"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("benchmarks.report", run_name="__main__")
    assert exit.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"stale": [], "left_out": []}
