"""The segmentation task: loss, decision and disagreement on single pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from handsoff_stream.tasks import TASKS, Segmentation, task_from_config

EXPECTED = np.load(Path(__file__).parents[1] / "data" / "label_generator" / "expected.npz")


def segmentation(classes: int = 5) -> Segmentation:
    return Segmentation([f"class {i}" for i in range(classes)], [(i, 2 * i, 255) for i in range(classes)])


def test_decision_and_disagreement_match_the_published_code() -> None:
    logits = torch.from_numpy(EXPECTED["logits"])
    assert torch.equal(segmentation().decide(logits), torch.from_numpy(EXPECTED["label_mode"]).flatten())
    js = torch.from_numpy(EXPECTED["js"]).flatten()
    torch.testing.assert_close(segmentation().disagreement(logits), js, atol=1e-5, rtol=0)


def test_equal_logits_and_equal_votes_go_to_the_smallest_id() -> None:
    logits = torch.tensor([[[0.0, 3.0, 3.0]], [[1.0, 0.0, 1.0]]])  # votes 1 and 0
    assert segmentation(3).decide(logits).tolist() == [0]


def test_unlabelled_pixels_do_not_count_in_the_loss() -> None:
    outputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 4, 255, 1, 255, 2])
    kept = target != 255
    torch.testing.assert_close(segmentation().loss(outputs, target), F.cross_entropy(outputs[kept], target[kept]))


def test_a_minibatch_without_labels_has_loss_and_gradient_zero() -> None:
    outputs = torch.randn(3, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    loss = segmentation().loss(outputs, torch.full((3,), 255))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and outputs.grad is not None and not outputs.grad.any()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_registered_task_carries_its_own_name(name: str) -> None:
    assert TASKS[name].name == name


def test_a_task_survives_json() -> None:
    task = segmentation()
    restored = task_from_config(json.loads(json.dumps(task.config())))
    assert restored == task and restored.num_outputs == 5


def test_unknown_task_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="'normals'.*segmentation"):
        task_from_config({"name": "normals"})


@pytest.mark.parametrize("change", [{"extra": 1}, {"name": "depth"}])
def test_description_with_other_entries_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="does not describe"):
        Segmentation.from_config({**segmentation().config(), **change})


def test_description_with_a_missing_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="palette"):
        task_from_config({"name": "segmentation", "class_names": ["a", "b"]})


@pytest.mark.parametrize(
    ("names", "palette", "message"),
    [
        (["a"], [(0, 0, 0)], "2 to 255"),
        (["a"] * 256, [(0, 0, 0)] * 256, "2 to 255"),
        (["a", "b"], [(0, 0, 0)], "one per class"),
        (["a", "b"], [(0, 0, 0), (0, 0, 256)], "0 to 255"),
    ],
)
def test_impossible_segmentations_are_refused(
    names: list[str], palette: list[tuple[int, int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Segmentation(names, palette)
