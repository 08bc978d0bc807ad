"""The demo tells of every arm: same budget, same test renders, and what the stream adds."""

import json

import pytest
from rich.console import Console

from handsoff_stream.datasets.rendered_faces import CLASS_NAMES
from handsoff_stream.demo import NUM_LABELLED, arms_of, comparison, run_demo
from handsoff_stream.downstream import SegmentationScores


def test_every_network_is_trained_with_the_same_budget_and_scored(tmp_path):
    console = Console(record=True, width=100)
    result = run_demo(tmp_path, steps=1, test_images=2, device="cpu", console=console)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert list(result["arms"]) == ["transfer", "labelled", "mixed"] and result["budget"]["steps"] == 1
    assert result["arms"]["mixed"]["accepted"] == result["budget"]["batch_size"] / 2
    assert all(record["num_images"] == 2 for record in result["arms"].values())
    told = console.export_text()
    assert all(name in told for name in [*CLASS_NAMES, *result["arms"], f"the {NUM_LABELLED} labelled images"])
    assert (tmp_path / "preview.png").stat().st_size > 10_000


def test_nothing_is_frozen_without_imagenet_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights of earlier downloads
    assert arms_of("efficientnet-lite0") == ["transfer", "labelled", "mixed"]
    assert arms_of("resnet18") == arms_of("unknown") == ["labelled", "mixed"]


def test_an_unknown_network_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="backbone='resnet9'.*pass one of"):
        run_demo(tmp_path / "out", backbone="resnet9", device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_table_shows_what_the_stream_adds():
    def scores(*ious: float) -> SegmentationScores:
        return SegmentationScores(sum(ious) / len(ious), ious, 0.9, ("skin", "hat"), 2)

    console = Console(record=True, width=100)
    console.print(comparison({"labelled": scores(0.5, 0.25), "mixed": scores(0.625, 0.225)}, "title"))
    rows = [line.replace("\u2502", " ").split() for line in console.export_text().splitlines()]
    assert ["skin", "50.0", "62.5", "+12.5"] in rows
    assert ["hat", "25.0", "22.5", "-2.5"] in rows
    assert ["mean", "37.5", "42.5", "+5.0"] in rows
