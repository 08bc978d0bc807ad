"""Inversions are measured by what a network sees in them, compared with what it sees in the images."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from benchmarks import inversion_labels
from benchmarks.inversion_labels import Faces, measure, ratios, score
from handsoff_stream.checkpoint import Checkpoint, Head, save_checkpoint
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, PALETTE
from handsoff_stream.downstream import build_deeplab
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.tasks import Segmentation


class Brightness(torch.nn.Module):
    """A teacher for two classes: dark and bright."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        bright = images_BCHW.mean(dim=1) * self.weight
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)


@pytest.fixture
def faces() -> Faces:
    """Two images, dark and with a bright half; the teacher is wrong on the upper row."""
    images = torch.zeros(2, 3, 4, 8)
    images[..., 4:] = 1
    masks = (images[:, 0] > 0.5).long()
    masks[:, 0] = 0
    return Faces([("a", images[0]), ("b", images[1])], masks, (images[:, 0] > 0.5).long(), ("dark", "bright"))


def stacked(faces: Faces) -> torch.Tensor:
    return torch.stack([image for _, image in faces.images])


def test_exact_reconstructions_keep_all_that_the_teacher_sees(faces):
    real = score(faces, faces.seen_NHW)
    nothing = torch.zeros_like(faces.masks_NHW, dtype=torch.bool)
    found = measure(faces, Brightness(), stacked(faces) * 0.999, nothing, real)
    assert found["miou_ratio"] == 1 and found["ratio_per_class"] == {"dark": 1, "bright": 1}
    assert real["iou_per_class"]["bright"] == 0.75 and found["iou_per_class"] == real["iou_per_class"]
    assert found["mask"]["left_out"] == found["mask"]["wrong_of_kept"] == 0


def test_what_a_reconstruction_lacks_lowers_the_ratio_and_the_mask_is_judged_by_it(faces):
    made, lost = stacked(faces).mul(0.999), torch.zeros_like(faces.masks_NHW, dtype=torch.bool)
    made[1, :, :, 6:] = 0  # a quarter of the second image turns dark
    lost[1, :, 7] = lost[1, :, 0] = True
    found = measure(faces, Brightness(), made, lost, score(faces, faces.seen_NHW))
    assert found["ratio_per_class"]["bright"] == pytest.approx(0.8) and found["miou_ratio"] < 1
    # Three rows of two columns are wrong where the teacher was right; one of the columns is left out.
    assert found["mask"]["wrong_that_is_left_out"] == 0.5
    assert found["mask"]["wrong_of_left_out"] == pytest.approx(3 / 7)
    assert found["mask"]["wrong_of_kept"] == pytest.approx(3 / 49)
    assert found["mask"]["miou_of_kept_pixels"] > found["miou"]


def test_a_class_that_the_teacher_never_sees_has_no_ratio():
    real, made = {"iou_per_class": {"hat": 0.0, "hair": 0.5}}, {"iou_per_class": {"hat": None, "hair": 0.4}}
    assert ratios(made, real) == {"hat": None, "hair": 0.8}


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_the_benchmark_continues_from_its_folder_to_the_same_scores(tmp_path: Path, monkeypatch, capsys):
    base = make_checkpoint()
    labels = LabelGenerator(base.generator.feature_channels, hidden=(7, 5), num_outputs=10, members=2)
    head = Head(Segmentation(CLASS_NAMES, PALETTE), labels.eval().requires_grad_(False))
    save_checkpoint(tmp_path / "tiny.safetensors", Checkpoint(base.generator, {"segmentation": head}))
    teacher = build_deeplab(10, backbone="efficientnet-lite0")
    teacher.network.classifier[0].bias.data[0] = 100.0  # sees background everywhere
    (tmp_path / "folder").mkdir()
    torch.save(teacher.state_dict(), tmp_path / "folder" / "teacher.pt")
    arguments = [
        "inversion_labels", "--checkpoint", tmp_path / "tiny.safetensors", "--images", 2, "--steps", 1,
        "--encoder-steps", 3, "--training-images", 8, "--device", "cpu",
        "--folder", tmp_path / "folder", "--sheet", tmp_path / "sheet.png", "--name", tmp_path / "result",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
    results = []
    for _ in range(2):
        inversion_labels.main()
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    first, second = results
    for way in first["ways"]:
        first["ways"][way].pop("seconds"), second["ways"][way].pop("seconds")
    assert list(first["ways"]) == ["random distance", "ImageNet distance", "ImageNet, encoder", "encoder alone"]
    assert first["ways"] == second["ways"] and first["real"] == second["real"]
    assert "ImageNet features" in first["ways"]["ImageNet distance"]["image_distance"]
    assert (tmp_path / "sheet.png").stat().st_size > 0
    assert len(inversion_labels.rows(first)) == len(inversion_labels.charts(first)[0].bars) == 4
    assert str(tmp_path) not in json.dumps(first)
