"""The samples of `faces` do not change: what index i gave when the goldens were written, it gives today.

Two kinds of comparison, because the last bits of a float32 product depend on the CPU and on the version of PyTorch:

- on the kind of CPU and the version of PyTorch that wrote the goldens, sha256 of every tensor must be equal;
- on any other, images may differ by one 8-bit level in a few pixels, labels in a few pixels, and scores by one part in
  a thousand. Thumbnails of every image and label, and every score, are compared with these tolerances.

After a change that is meant to change samples: `python tests/test_goldens.py` writes the goldens again.
"""

import hashlib
import io
import json
import platform
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handsoff_stream import HandsOffStream
from handsoff_stream.outlets.webdataset import write_shards

DATA = Path(__file__).parent / "data"
NUM_SAMPLES = 32
THUMBNAIL = 16  # pixels per side: 128 x 128 images and labels, every eighth pixel


def kind_of_machine() -> dict[str, str]:
    """What float32 products depend on in their last bits."""
    return {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.partition("+")[0],
    }


def stream(batch_size: int | None = None) -> HandsOffStream:
    return HandsOffStream("faces", batch_size=batch_size, device="cpu", precision="exact")


def in_single_samples() -> tuple[torch.Tensor, torch.Tensor]:
    iterator = iter(stream())
    images, labels = zip(*(next(iterator) for _ in range(NUM_SAMPLES)), strict=True)
    return torch.stack(images), torch.stack(labels)


@dataclass
class Run:
    """Part of a run in batches of five."""

    images: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    indices: list[int]
    state_after_three: dict[str, Any] | None = None
    """JSON-able state after 15 samples."""


def in_batches_of_five(count: int = NUM_SAMPLES, state: dict[str, Any] | None = None) -> Run:
    """The next `count` samples, from the beginning or from a saved state."""
    source = stream(batch_size=5)
    if state is not None:
        source.load_state_dict(json.loads(json.dumps(state)))
    iterator, batches, after_three = iter(source), [], None
    while len(batches) * 5 < count:
        batches.append(next(iterator))
        if len(batches) == 3:
            after_three = source.state_dict()
    parts = zip(*((b.images, b.labels, b.uncertainty, b.indices) for b in batches), strict=True)
    images, labels, scores, indices = (torch.cat(part)[:count] for part in parts)
    return Run(images, labels, scores, indices.tolist(), after_three)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def shard(folder: Path) -> Path:
    (path,) = write_shards(stream(batch_size=4), folder, num_samples=4, shard_size=4)
    return path


def contents_of_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [4, H, W, 3] and labels [4, H, W], read without the library that wrote them."""
    images, labels = [], []
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".png"):
                pixels = np.array(Image.open(io.BytesIO(tar.extractfile(member).read())))
                (images if pixels.ndim == 3 else labels).append(pixels)
    return np.stack(images), np.stack(labels)


def thumbnails(images: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    step = images.shape[-1] // THUMBNAIL
    pixels = (images[..., ::step, ::step] * 255).round().byte().numpy()
    return pixels, labels[..., ::step, ::step].byte().numpy()


def write_goldens() -> None:
    images, labels = in_single_samples()
    run = in_batches_of_five()
    with tempfile.TemporaryDirectory() as folder:
        shard_digest = hashlib.sha256(shard(Path(folder)).read_bytes()).hexdigest()
    small_images, small_labels = thumbnails(images, labels)
    np.savez_compressed(DATA / "goldens.npz", images=small_images, labels=small_labels, scores=run.scores.numpy())
    digests = {"images": digest(images), "labels": digest(labels), "scores": digest(run.scores), "shard": shard_digest}
    content = {"kind": kind_of_machine(), "sha256": digests, "indices": run.indices, "state": run.state_after_three}
    (DATA / "goldens.json").write_text(json.dumps(content) + "\n")


def recorded() -> dict[str, Any]:
    return json.loads((DATA / "goldens.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "goldens.npz")


@pytest.fixture(scope="module")
def sha256():
    """The digests where they must hold, otherwise None."""
    content = recorded()
    return content["sha256"] if content["kind"] == kind_of_machine() else None


@pytest.fixture(scope="module")
def singles():
    return in_single_samples()


@pytest.fixture(scope="module")
def batches():
    return in_batches_of_five()


def test_single_samples_are_those_of_the_goldens(golden, sha256, singles):
    images, labels = singles
    small_images, small_labels = thumbnails(images, labels)
    difference = np.abs(small_images.astype(int) - golden["images"].astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert (small_labels != golden["labels"]).mean() < 0.005
    if sha256:
        assert (digest(images), digest(labels)) == (sha256["images"], sha256["labels"])


def test_batches_hold_the_same_bits_as_single_samples_and_the_scores_of_the_goldens(golden, sha256, singles, batches):
    assert torch.equal(batches.images, singles[0])
    assert torch.equal(batches.labels, singles[1])
    assert batches.indices == recorded()["indices"]
    np.testing.assert_allclose(batches.scores.numpy(), golden["scores"], rtol=1e-3)
    if sha256:
        assert digest(batches.scores) == sha256["scores"]


@pytest.mark.parametrize("saved", ["just now", "when the goldens were written"])
def test_a_resumed_run_hands_out_the_same_bits(batches, saved):
    state = batches.state_after_three if saved == "just now" else recorded()["state"]
    resumed = in_batches_of_five(count=5, state=state)
    assert resumed.indices == batches.indices[15:20]
    assert torch.equal(resumed.images, batches.images[15:20])
    assert torch.equal(resumed.labels, batches.labels[15:20])


def test_an_exported_shard_holds_the_samples_of_the_goldens(sha256, singles, tmp_path):
    path = shard(tmp_path)
    images, labels = contents_of_shard(path)
    assert np.array_equal(images, (singles[0][:4] * 255).round().byte().permute(0, 2, 3, 1).numpy())
    assert np.array_equal(labels, singles[1][:4].byte().numpy())
    if sha256:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256["shard"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_goldens()
