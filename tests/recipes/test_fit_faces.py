"""From a training run of the generator to a checkpoint, with the networks that were trained beside the generator."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handsoff_stream import HandsOffStream, load_checkpoint
from recipes.faces.discriminator import Discriminator
from recipes.faces.fit_faces import TrainedDistance, open_run
from recipes.faces.gan_losses import feature_distance, pyramid_distance

ROOT = Path(__file__).parents[2]


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, "-m", f"recipes.faces.{name}", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "faces"
    size = ("--resolution", 16, "--channels", 8, 7, 6, "--z-dim", 8, "--mapping-layers", 2)
    script("train_generator", folder, *size, "--images", 8, "--batch", 4, "--autoencode", 10, "--workers", 0)
    return folder


def test_the_distance_is_the_loss_that_the_encoder_was_trained_by():
    torch.manual_seed(0)
    discriminator = Discriminator(channels=(8, 7, 6))
    a, b = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        loss = 10 * pyramid_distance(a, b) + feature_distance(discriminator.features(a), discriminator.features(b))
        distance = TrainedDistance(discriminator, b).distance(a, b)
    torch.testing.assert_close(distance, loss[None])


def test_another_discriminator_is_another_distance():
    images = torch.rand(2, 3, 16, 16)
    descriptions = {TrainedDistance(Discriminator(channels=(8, 7, 6)), images).description for _ in range(2)}
    assert len(descriptions) == 2  # inversions on disk are told apart by it


def test_a_run_becomes_a_checkpoint_that_streams_and_tells_its_history(run, tmp_path):
    out = tmp_path / "faces.safetensors"
    text = script(
        "fit_faces",
        run,
        out,
        "--num-labelled",
        3,
        "--steps",
        4,
        "--epochs",
        1,
        "--augmentations",
        1,
        "--calibration-samples",
        8,
        "--taught-samples",
        2,
        "--teacher-steps",
        1,
        "--teacher-confidence",
        0.05,
    )
    assert f"wrote {out}; inversions" in text
    provenance = load_checkpoint(out).provenance
    assert provenance["perceptual"].startswith("pixels and discriminator features")
    assert provenance["augmentation"]["per_image"] == 1
    assert (provenance["samples"]["samples"], provenance["samples"]["teacher"]["steps"]) == (2, 1)
    assert provenance["images"][:3] == ["train-00", "train-01", "train-02"]
    assert sum(".augmented-" in name for name in provenance["images"]) == len(provenance["images"]) - 3 >= 3
    assert provenance["inversion"]["radius"] is None
    assert len(provenance["inversion"]["psnr"]) == len(provenance["images"])
    assert provenance["generator_training"]["images"] == 8
    image, label = HandsOffStream(out, device="cpu")[5]
    assert image.shape == (3, 16, 16) and label.shape == (16, 16)
    generator, networks, _ = open_run(run)
    assert networks.keys() == {"generator", "ema", "discriminator", "encoder"}
    w = load_checkpoint(out).generator.state_dict()
    assert all(torch.allclose(tensor, w[name], rtol=1e-3, atol=1e-5) for name, tensor in generator.state_dict().items())
