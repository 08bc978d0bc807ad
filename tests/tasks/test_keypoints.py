"""Keypoints: heatmaps from points, points from heatmaps, and a head that is fitted beside other heads."""

import json
import math

import pytest
import torch
from conftest import assert_resumes_exactly, assert_same, take
from torch import Tensor

from handsoff_stream import HandsOffStream
from handsoff_stream.checkpoint import Checkpoint, Head, load_checkpoint, save_checkpoint
from handsoff_stream.datasets.rendered_faces import LANDMARK_NAMES, RenderedFaces
from handsoff_stream.fitting import FeatureTable, FitSettings, calibrate, fit_label_generator
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Depth, Keypoints, decode_heatmaps, task_from_config
from handsoff_stream.uncertainty import image_score, variance

CPU = torch.device("cpu")
SIZE = (20, 30)
TASK = Keypoints(("left", "middle", "right"))


def random_points(images: int, seed: int = 0) -> Tensor:
    """(x, y) within `SIZE`, float32 [N, 3, 2]."""
    unit = torch.rand(images, 3, 2, generator=torch.Generator().manual_seed(seed))
    return unit * torch.tensor([SIZE[1] - 1.0, SIZE[0] - 1.0])


# Points => heatmaps => points


def test_a_heatmap_is_a_gaussian_of_height_10_around_its_point():
    points = random_points(2)
    heatmaps = TASK.heatmaps(points, torch.ones(2, 3, dtype=torch.bool), SIZE)
    assert heatmaps.shape == (2, *SIZE, 3) and heatmaps.dtype == torch.float32
    for n, y, x, k in ((0, 3, 7, 0), (1, 19, 0, 2), (1, 10, 15, 1)):
        px, py = points[n, k].tolist()
        expected = 10 * math.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 5.0))
        assert heatmaps[n, y, x, k].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_paper_says_variance_not_standard_deviation():
    body = Keypoints(("hip",), heatmap_variance=25.0)
    heatmap = body.heatmaps(torch.tensor([[[15.0, 10.0]]]), torch.ones(1, 1, dtype=torch.bool), SIZE)[0, ..., 0]
    assert heatmap[10, 15] == 10
    assert heatmap[10, 20].item() == pytest.approx(10 * math.exp(-0.5))  # at 5 pixels, one standard deviation


def test_decoding_finds_every_point_to_half_a_pixel():
    points = random_points(50)
    heatmaps = TASK.heatmaps(points, torch.ones(50, 3, dtype=torch.bool), SIZE)
    found, peaks = decode_heatmaps(heatmaps.permute(0, 3, 1, 2))
    assert found.shape == (50, 3, 2) and found.dtype == torch.float32
    assert torch.equal(found, points.round())
    assert (peaks > 10 * math.exp(-0.25 / 5)).all()


def test_one_sample_is_decoded_like_a_batch_and_ties_go_to_the_first_pixel():
    heatmaps = torch.zeros(2, 4, 5)
    heatmaps[0, 2, 1] = heatmaps[0, 3, 0] = 7
    points, peaks = decode_heatmaps(heatmaps)
    assert points.tolist() == [[1, 2], [0, 0]] and peaks.tolist() == [7, 0]


def test_a_point_that_is_not_visible_leaves_nothing_whatever_its_coordinates():
    points = random_points(1)
    points[0, 1] = torch.nan
    visible = torch.tensor([[True, False, True]])
    heatmaps = TASK.heatmaps(points, visible, SIZE)
    assert not heatmaps[..., 1].any() and heatmaps.isfinite().all()
    assert torch.equal(heatmaps[..., [0, 2]], TASK.heatmaps(random_points(1), visible, SIZE)[..., [0, 2]])


def test_a_point_outside_the_image_reaches_into_it():
    heatmap = Keypoints(("ear",)).heatmaps(torch.tensor([[[-1.0, 4.0]]]), torch.ones(1, 1, dtype=torch.bool), SIZE)
    assert heatmap[0, 4, 0, 0].item() == pytest.approx(10 * math.exp(-0.1))


def test_points_that_are_not_those_of_the_task_are_refused():
    seen = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="left"):
        TASK.heatmaps(torch.zeros(1, 2, 2), seen, SIZE)
    with pytest.raises(ValueError, match="no finite coordinates"):
        TASK.heatmaps(torch.full((1, 3, 2), torch.inf), seen, SIZE)


# The task


def test_the_loss_is_the_mean_squared_error_of_labelled_entries():
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, generator=random).requires_grad_()
    target = torch.randn(4, 3, generator=random)
    torch.testing.assert_close(TASK.loss(outputs, target), (outputs - target).square().mean())
    target[:, 1], target[0, 0] = torch.nan, torch.inf
    loss = TASK.loss(outputs, target)
    known = target.isfinite()
    torch.testing.assert_close(loss, (outputs[known] - target[known]).square().mean())
    loss.backward()
    assert outputs.grad is not None and torch.equal(outputs.grad != 0, known)


def test_a_minibatch_without_labels_has_loss_and_gradient_zero():
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = TASK.loss(outputs, torch.full((4, 3), torch.nan))
    loss.backward()
    assert loss.item() == 0 and outputs.grad is not None and not outputs.grad.any()


def test_targets_of_another_shape_are_refused_instead_of_broadcast():
    for shape in ((4,), (4, 1), (3, 4)):
        with pytest.raises(ValueError, match="as many numbers per pixel"):
            TASK.loss(torch.zeros(4, 3), torch.zeros(shape))


def test_members_are_averaged_and_their_variance_is_the_disagreement():
    outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[5.0, 6.0]]])
    pair = Keypoints(("a", "b"))
    assert pair.decide(outputs).tolist() == [[3.0, 2.0]]
    torch.testing.assert_close(pair.disagreement(outputs), torch.tensor([(8 / 3 + 8) / 2]))


def test_the_task_survives_json():
    task = Keypoints(["a", "b"], heatmap_variance=25.0)
    assert task_from_config(json.loads(json.dumps(task.config()))) == task
    assert task.num_outputs == 2


@pytest.mark.parametrize(
    ("names", "variance_", "message"),
    [
        ((), 5.0, "tell the points apart"),
        (("a", "a"), 5.0, "tell the points apart"),
        (("a",), 0.0, "no Gaussian"),
        (("a",), math.nan, "no Gaussian"),
    ],
)
def test_impossible_keypoints_are_refused(names, variance_, message):
    with pytest.raises(ValueError, match=message):
        Keypoints(names, heatmap_variance=variance_)


# Beside other heads


@pytest.fixture(scope="module")
def several(checkpoint) -> Checkpoint:
    """The tiny checkpoint with two more heads of random weights."""
    channels = checkpoint.generator.feature_channels
    heads = dict(checkpoint.heads)
    for seed, task in enumerate((TASK, Depth())):
        random = torch.Generator().manual_seed(seed)
        ensemble = LabelGenerator(channels, (7, 5), task.num_outputs, members=3, generator=random)
        heads[task.name] = Head(task, ensemble.eval().requires_grad_(False))
    return calibrate(Checkpoint(checkpoint.generator, heads), num_samples=20)


def stream(source, **options) -> HandsOffStream:
    return HandsOffStream(source, device="cpu", filter=None, **options)


def test_several_heads_give_a_dict_of_labels(several):
    image, labels = take(stream(several), 1)[0]
    assert image.shape == (3, 16, 16)
    assert {name: (label.dtype, tuple(label.shape)) for name, label in labels.items()} == {
        "segmentation": (torch.int64, (16, 16)),
        "keypoints": (torch.float32, (3, 16, 16)),
        "depth": (torch.float32, (1, 16, 16)),
    }


def test_every_head_labels_as_its_ensemble_does(several):
    synthesizer = Synthesizer(several, SynthesisOptions(), CPU)
    _, features = synthesizer.generate(range(3))
    labels = synthesizer(range(3)).labels
    for name in ("keypoints", "depth"):
        outputs_MBKHW = several.heads[name].label_generator.reference(features, (16, 16))
        torch.testing.assert_close(labels[name], outputs_MBKHW.mean(dim=0))
        outputs_MPK = outputs_MBKHW.permute(0, 1, 3, 4, 2).flatten(1, 3)
        _, uncertainty = synthesizer.label(name, features)
        torch.testing.assert_close(uncertainty.flatten(), variance(outputs_MPK), rtol=1e-4, atol=1e-8)


def test_the_first_head_gives_the_score(several):
    reordered = Checkpoint(several.generator, dict(reversed(several.heads.items())))
    synthesizer = Synthesizer(reordered, SynthesisOptions(), CPU)
    _, uncertainty = synthesizer.label("depth", synthesizer.generate(range(3))[1])
    assert torch.equal(synthesizer(range(3)).uncertainty, image_score(uncertainty, "top10_mean"))


def test_several_heads_survive_a_file_and_resume_exactly(several, tmp_path):
    save_checkpoint(tmp_path / "several.safetensors", several)
    loaded = load_checkpoint(tmp_path / "several.safetensors")
    assert {name: head.task for name, head in loaded.heads.items()} == {
        name: head.task for name, head in several.heads.items()
    }
    assert list(loaded.heads) == list(several.heads)  # the first one gives the score
    assert_same(take(stream(loaded, batch_size=3), 2), take(stream(several, batch_size=3), 2))
    assert_resumes_exactly(lambda: stream(loaded, batch_size=2), steps=3)


# Learning


def test_landmarks_of_rendered_faces_are_learned_and_streamed(checkpoint):
    generator = checkpoint.generator
    faces = [RenderedFaces("train", num_images=6, size=16).scene(i) for i in range(6)]
    points = torch.stack([torch.from_numpy(face.landmarks) for face in faces])
    visible = torch.stack([torch.from_numpy(face.visible) for face in faces])
    task = Keypoints(LANDMARK_NAMES, heatmap_variance=2.0)
    targets = task.heatmaps(points, visible, (16, 16))
    z = torch.randn(6, generator.z_dim, generator=torch.Generator().manual_seed(0))
    table = FeatureTable.collect(generator, generator.truncate(generator.mapping(z)), (16, 16))
    settings = FitSettings(hidden=(32, 16), members=3, epochs=40, pixels_per_image=256, learning_rate=1e-2)
    ensemble, report = fit_label_generator(table, targets, task, settings)
    assert report.accuracy is None and report.held_out_loss < 0.5 * targets.var()
    fitted = Checkpoint(generator, {"keypoints": Head(task, ensemble)}, output_size=(16, 16))
    _, heatmaps = take(stream(fitted), 1)[0]
    found, _ = decode_heatmaps(heatmaps)
    usual = points[visible.all(dim=1)].mean(dim=0)
    assert (found - usual).norm(dim=1).max() < 4
