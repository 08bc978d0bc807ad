"""The command line says which distance compared images, and which images and classes the inversions lack."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from PIL import Image
from typer.testing import CliRunner

from handsoff_stream.checkpoint import load_checkpoint, save_checkpoint
from handsoff_stream.cli import app
from handsoff_stream.fitting.encoder.files import load_restyle


def run(*arguments) -> tuple[int, str]:
    """Exit code, and what was printed to stdout and stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """Two images that the generator makes from its average latent, one of them with a square that it never makes."""
    folder = tmp_path_factory.mktemp("user")
    checkpoint = make_checkpoint(seed=3)
    generator = checkpoint.generator
    made = generator.synthesis(generator.w_avg.expand(1, generator.num_ws, -1), "const").images[0]
    pixels = made.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for name in ("anna", "ben"):
        image, mask = pixels.copy(), np.zeros((16, 16), np.uint8)
        if name == "ben":
            mask[4:9, 4:9] = 1
            image[4:9, 4:9] = 255 * (image[4:9, 4:9] < 128)
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    save_checkpoint(folder / "generator.safetensors", checkpoint)
    return folder


def fit(user: Path, out: Path, *options) -> tuple[int, str]:
    return run(
        "fit", user / "generator.safetensors", "--images", user / "images", "--labels", user / "masks", "--classes",
        "skin,glasses", "--out", out, "--steps", 0, "--epochs", 1, "--device", "cpu", "--calibration-samples", 0,
        "--latents", out.with_suffix(".latents"), *options,
    )  # fmt: skip


def test_the_image_and_the_class_that_the_inversion_lacks_are_named(user, tmp_path):
    code, text = fit(user, tmp_path / "mine.safetensors", "--invertibility", 2)
    assert code == 0, text
    assert "inversion compared images by efficientnet-lite0, ImageNet features" in text
    assert "of the labelled pixels, which inversions lack" in text
    assert "the inversion of ben lacks glasses" in text and "anna" not in text
    assert "no pixel is left of glasses, so the stream will not label them either" in text
    recorded = load_checkpoint(tmp_path / "mine.safetensors").provenance
    assert recorded["invertibility"]["factor"] == 2.0 and recorded["invertibility"]["gone"] == ["glasses"]
    assert list(recorded["invertibility"]["classes"]) == ["ben"] and recorded["invertibility"]["left_out"] > 0.04
    assert recorded["perceptual"].startswith("efficientnet-lite0")
    assert "provenance: perceptual efficientnet-lite0" in run("inspect", tmp_path / "mine.safetensors")[1]


def test_nothing_is_left_out_unless_it_is_asked_for(user, tmp_path):
    code, text = fit(user, tmp_path / "mine.safetensors")
    assert code == 0 and "lack" not in text
    assert "invertibility" not in load_checkpoint(tmp_path / "mine.safetensors").provenance


def test_a_factor_of_one_or_less_is_refused(user, tmp_path):
    code, text = fit(user, tmp_path / "mine.safetensors", "--invertibility", 1)
    assert code == 2 and "invertibility=1.0 leaves out half of the labelled pixels or more" in text
    assert list(tmp_path.iterdir()) == []


def test_invert_says_what_its_distance_is(user, tmp_path):
    code, text = run(
        "invert", user / "generator.safetensors", user / "images", tmp_path, "--steps", 0, "--device", "cpu"
    )
    assert code == 0 and "distance: efficientnet-lite0, ImageNet features" in text


def test_an_encoder_with_imagenet_weights_is_trained_and_used(user, tmp_path):
    out = tmp_path / "encoder.safetensors"
    code, text = run(
        "train-encoder", user / "generator.safetensors", user / "images", out, "--steps", 3, "--architecture",
        "efficientnet-lite0", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, text
    assert load_restyle(out).config.backbone == "efficientnet-lite0"
    code, text = run(
        "invert", user / "generator.safetensors", user / "images", tmp_path / "latents", "--steps", 1, "--encoder", out,
        "--radius", "inf", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "ben" in text
    assert torch.isfinite(load_restyle(out).latent_std).all()
