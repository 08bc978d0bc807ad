"""From a user's files to a checkpoint that streams, through the command line alone, with kills in between."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.datasets.rendered_faces import RenderedFaces

GENERATOR = Path(__file__).parent / "data" / "stylegan2ada_32.pkl"
NUM_IMAGES = 18  # two batches of inversion: 16 and 2
COLORS = np.array([[0, 0, 0], [200, 120, 90], [40, 40, 200]], np.uint8)
CLASS_MAP = """
classes:
  0: {name: background, from_colors: [[0, 0, 0]]}
  1: {name: face, from_colors: [[200, 120, 90]]}
  2: {name: hair, from_colors: [[40, 40, 200]]}
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """Photographs of 40 x 36, color masks of the same size, and a class map."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    faces = RenderedFaces("train", num_images=NUM_IMAGES, size=40)
    for i in range(NUM_IMAGES):
        face = faces.scene(i)
        ids = np.select([face.mask == 0, face.mask == 7], [0, 2], 1)
        Image.fromarray(face.image[:, 2:38]).save(tmp_path / "photos" / f"{i:02d}.png")
        Image.fromarray(COLORS[ids][:, 2:38]).save(tmp_path / "masks" / f"{i:02d}.png")
    (tmp_path / "classes.yaml").write_text(CLASS_MAP)
    return tmp_path


def fit(user: Path, name: str) -> list[str]:
    return [
        sys.executable, "-m", "handsoff_stream.cli", "fit", str(GENERATOR), "--images", str(user / "photos"),
        "--labels", str(user / "masks"), "--class-map", str(user / "classes.yaml"), "--resize", "crop", "--steps", "10",
        "--hidden", "16", "8", "--epochs", "1", "--calibration-samples", "40", "--device", "cpu",
        "--out", str(user / f"{name}.safetensors"),
    ]  # fmt: skip


def killed_in_mid_inversion(user: Path, name: str) -> int:
    """Start fitting, SIGKILL it once some but not all images are inverted; how many were."""
    folder = user / f"{name}.latents"
    process = subprocess.Popen(fit(user, name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(folder.glob("*.safetensors")):
            assert process.poll() is None, "the fit ended before the first inversion was stored"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    return len(list(folder.glob("*.safetensors")))


def test_a_fit_that_is_killed_and_continued_gives_the_checkpoint_of_an_uninterrupted_one(user):
    stored = killed_in_mid_inversion(user, "interrupted")
    assert 0 < stored < NUM_IMAGES
    assert not (user / "interrupted.safetensors").exists()
    for name in ("interrupted", "whole"):
        done = subprocess.run(fit(user, name), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "accuracy on held-out pixels" in " ".join(done.stdout.split())

    one, other = (user / f"{name}.safetensors" for name in ("interrupted", "whole"))
    tensors, others = load_file(one), load_file(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    checkpoint, uninterrupted = load_checkpoint(one), load_checkpoint(other)
    assert checkpoint.manifest()["fingerprint"] == uninterrupted.manifest()["fingerprint"]
    assert checkpoint.heads["segmentation"].task.class_names == ("background", "face", "hair")

    image, mask = next(iter(HandsOffStream(one, device="cpu")))
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and set(mask.unique().tolist()) <= {0, 1, 2}
    again, _ = next(iter(HandsOffStream(other, device="cpu")))
    assert torch.equal(image, again)
