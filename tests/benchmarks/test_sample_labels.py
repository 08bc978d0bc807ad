"""What is kept of the labels is counted as the stream keeps it, and agreement with a judge as the metrics count it."""

import json

import pytest
import torch
from conftest import make_checkpoint
from torch import Tensor, nn

from benchmarks.sample_labels import FACTOR, Labels, rows
from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, PALETTE
from handsoff_stream.fitting import calibrate
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.tasks import Segmentation

COUNT = 6


class Constant(nn.Module):
    """A judge that finds the same class everywhere."""

    def __init__(self, found: int):
        super().__init__()
        self.logits = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(found), len(CLASS_NAMES)).float())

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.logits[:, None, None].expand(len(images_B3HW), -1, *images_B3HW.shape[2:])


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Ten classes, random weights, 16 x 16."""
    base = make_checkpoint(num_calibration=1)
    torch.manual_seed(1)
    labels = LabelGenerator(base.generator.feature_channels, hidden=(7, 5), num_outputs=len(CLASS_NAMES), members=2)
    with torch.no_grad():
        labels.linear1.weight.normal_(std=0.5)
        labels.linear3.weight.normal_()
    head = Head(Segmentation(CLASS_NAMES, PALETTE), labels.eval().requires_grad_(False))
    return calibrate(Checkpoint(base.generator, {"segmentation": head}), num_samples=12)


def test_what_is_ignored_is_what_a_stream_ignores_and_one_bound_ignores_as_many(checkpoint: Checkpoint) -> None:
    found = Labels(checkpoint, None, COUNT).ignoring()
    stream = HandsOffStream(checkpoint, device="cpu", ignore="class-relative", ignore_factor=FACTOR, precision="exact")
    kept = float((stream[:COUNT].labels != 255).float().mean())
    assert found["class-relative"]["kept"] == pytest.approx(kept) and 0 < kept < 1
    assert found["one bound"]["kept"] == pytest.approx(kept, abs=1e-3)
    assert found["all pixels"]["kept"] == 1 and "miou" not in found["all pixels"]


def test_agreement_and_the_samples_that_show_a_class_are_the_judges(checkpoint: Checkpoint) -> None:
    hats = CLASS_NAMES.index("hat")
    labels = Labels(checkpoint, Constant(hats), COUNT)
    expected = float((labels.ids == hats).float().mean())
    assert labels.agreement()["pixel_accuracy"] == pytest.approx(expected)
    assert labels.agreement()["iou_per_class"]["hat"] == pytest.approx(expected)
    scores = labels.filtering()
    assert scores["samples_that_show"]["hat"] == COUNT and scores["samples_that_show"]["glasses"] == 0
    for kind in ("top10_mean", "sum", "class-relative"):
        survive = scores[kind]["survive"]
        assert survive.pop("hat") == pytest.approx(5 / 6) and set(survive.values()) == {None}
    assert json.dumps(labels.filtering(), allow_nan=False)
    assert labels.brier()["hard"] == pytest.approx(2 * (1 - expected), abs=1e-5) and 0 < labels.brier()["soft"] < 2


@pytest.mark.parametrize("judged", [False, True])
def test_results_with_and_without_a_judge_are_shown(checkpoint: Checkpoint, judged: bool) -> None:
    labels = Labels(checkpoint, Constant(9) if judged else None, COUNT)
    shown = [row.what for row in rows({"settings": {}, "ignore": labels.ignoring(), "scores": labels.filtering()})]
    assert any("is kept" in what for what in shown) and any("mIoU" in what for what in shown) == judged
