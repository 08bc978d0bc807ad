"""Depth: one number per pixel, fitted where it is known, and streamed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.fitting import FitSettings, InversionSettings, calibrate, fit_checkpoint, invert, read_latent
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Depth, task_from_config

NUM_FACES, SIZE = 6, 16


class Gray(Perceptual):
    """A perceptual distance in one line."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "gray")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(images_BCHW.mean(dim=1, keepdim=True), 2).flatten(1) / 16


def test_a_pixel_has_one_number_with_or_without_an_axis_for_it():
    outputs, target = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 0.0, 0.0])
    assert Depth().num_outputs == 1
    for shaped in (target, target[:, None]):
        torch.testing.assert_close(Depth().loss(outputs, shaped), torch.tensor(20 / 3))


@pytest.mark.parametrize("invalid", [torch.nan, torch.inf, -torch.inf])
def test_invalid_pixels_neither_count_nor_pass_a_gradient(invalid):
    outputs = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    loss = Depth().loss(outputs, torch.tensor([0.0, invalid, 0.0]))
    loss.backward()
    assert loss.item() == (1 + 16) / 2
    assert outputs.grad is not None and outputs.grad.tolist() == [[1.0], [0.0], [4.0]]


def test_a_minibatch_of_invalid_pixels_has_loss_and_gradient_zero():
    outputs = torch.ones(2, 1, requires_grad=True)
    loss = Depth().loss(outputs, torch.full((2,), torch.inf))
    loss.backward()
    assert loss.item() == 0 and outputs.grad is not None and not outputs.grad.any()


def test_a_row_of_targets_is_not_taken_for_a_column_of_another_length():
    with pytest.raises(ValueError, match="as many numbers per pixel"):
        Depth().loss(torch.zeros(3, 1), torch.zeros(4))


def test_members_are_averaged_and_their_variance_is_the_disagreement():
    outputs = torch.tensor([[[1.0], [5.0]], [[3.0], [5.0]]])
    assert Depth().decide(outputs).tolist() == [[2.0], [5.0]]
    assert Depth().disagreement(outputs).tolist() == [1.0, 0.0]


def test_the_task_survives_json_and_refuses_other_entries():
    assert task_from_config(json.loads(json.dumps(Depth().config()))) == Depth()
    with pytest.raises(ValueError, match="does not describe a 'depth' task"):
        Depth.from_config({"name": "depth", "unit": "m"})


@pytest.fixture(scope="module")
def depths() -> Tensor:
    """Of rendered faces, in head radii, infinite where there is nothing, [N, H, W]."""
    faces = RenderedFaces("train", num_images=NUM_FACES, size=SIZE)
    return torch.from_numpy(np.stack([faces.scene(i).depth for i in range(NUM_FACES)]))


@pytest.fixture(scope="module")
def inversions(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inversions")


@pytest.fixture(scope="module")
def fitted(checkpoint, depths, inversions) -> Checkpoint:
    """Renders inverted, in a few steps, and their depth learned."""
    faces = RenderedFaces("train", num_images=NUM_FACES, size=SIZE)
    images = [(str(i), faces[i][0]) for i in range(NUM_FACES)]
    inversion = InversionSettings(steps=3, candidates=8)
    latents = invert(checkpoint.generator, images, inversions, inversion, perceptual=Gray())
    settings = FitSettings(
        hidden=(16, 8), members=3, epochs=40, pixels_per_image=256, learning_rate=1e-2, held_out=0.05
    )
    return calibrate(fit_checkpoint(checkpoint.generator, latents, depths, Depth(), settings), num_samples=8)


def test_depth_of_rendered_faces_is_learned_where_it_is_known(fitted, depths, inversions):
    valid = depths.isfinite()
    assert 0.2 < valid.float().mean() < 0.9
    w_plus = torch.stack([read_latent(inversions / f"{i}.safetensors") for i in range(NUM_FACES)])
    features = fitted.generator.synthesis(w_plus).features
    labels, _ = Synthesizer(fitted, SynthesisOptions(), torch.device("cpu")).label("depth", features)
    assert labels.shape == (NUM_FACES, 1, SIZE, SIZE)
    assert F.mse_loss(labels[:, 0][valid], depths[valid]) < 0.5 * depths[valid].var()
    assert fitted.provenance["fit"]["held_out_loss"] < 0.75 * depths[valid].var()


def test_a_depth_is_streamed_as_one_channel_and_scored_by_its_variance(fitted):
    label = HandsOffStream(fitted, device="cpu")[0][1]
    assert label.shape == (1, SIZE, SIZE) and label.dtype == torch.float32
    assert fitted.calibration is not None and min(fitted.calibration.scores["sum"]) > 0


def test_a_depth_head_survives_a_file(fitted, tmp_path):
    save_checkpoint(tmp_path / "depth.safetensors", fitted)
    loaded = load_checkpoint(tmp_path / "depth.safetensors")
    assert loaded.heads["depth"].task == Depth()
    assert json.dumps(loaded.manifest()) == json.dumps(fitted.manifest())
    (_, one), (_, other) = HandsOffStream(fitted, device="cpu")[3], HandsOffStream(loaded, device="cpu")[3]
    assert torch.equal(one, other)
