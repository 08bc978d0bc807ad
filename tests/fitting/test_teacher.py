"""A teacher labels samples: which samples, which pixels, and how much the label generator learns from them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CLASSES
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.downstream import build_deeplab
from handsoff_stream.downstream.deeplab import load_deeplab
from handsoff_stream.errors import CheckpointError
from handsoff_stream.fitting import (
    FeatureTable,
    FitSettings,
    FoundLatents,
    SampleSettings,
    Teacher,
    TeacherSettings,
    fit_checkpoint,
    label_samples,
    mean_probabilities,
    train_teacher,
)
from handsoff_stream.fitting.annotation.sample import regenerate
from handsoff_stream.fitting.labelled_samples import SAMPLES_SEED, at_size
from handsoff_stream.fitting.pixel_sampler import PixelSampler
from handsoff_stream.generators import Generator
from handsoff_stream.geometry import Rectangle
from handsoff_stream.provenance import sha256
from handsoff_stream.tasks import Segmentation

SIZE = (16, 16)
CPU = torch.device("cpu")
TINY = TeacherSettings(members=2, steps=3, batch_size=2)


@pytest.fixture(scope="module")
def generator(checkpoint: Checkpoint) -> Generator:
    return checkpoint.generator


def by_brightness(images: Tensor) -> Tensor:
    """Two classes, dark and bright: the brightness is the probability of the second one."""
    bright = images.mean(dim=1)
    return torch.stack([1 - bright, bright], dim=1)


# Labels of samples


def test_the_samples_are_those_of_a_stream_and_only_certain_pixels_have_a_label(generator: Generator) -> None:
    settings = SampleSettings(samples=6, confidence=0.6, seed=3)  # 6 is no multiple of a chunk
    found = label_samples(generator, by_brightness, 2, SIZE, settings, truncation=0.5)
    assert found.w_plus.shape == (6, generator.num_ws, generator.w_dim) and found.targets.shape == (6, *SIZE)
    for index in range(6):
        w_plus, image = regenerate(generator, 3, index, 0.5)
        assert torch.equal(found.w_plus[index], w_plus)
        bright = image.mean(dim=0)
        expected = torch.where(bright > 0.6, 1, torch.where(1 - bright > 0.6, 0, 255))
        assert torch.equal(found.targets[index], expected)
    assert {0, 1, 255} == set(found.targets.unique().tolist())
    assert found.provenance["pixels_per_class"] == [int((found.targets == k).sum()) for k in (0, 1)]
    assert (found.provenance["seed"], found.provenance["truncation"]) == (3, 0.5)


def test_a_higher_confidence_labels_a_subset_of_the_pixels_with_the_same_classes(generator: Generator) -> None:
    low, high = (
        label_samples(generator, by_brightness, 2, SIZE, SampleSettings(samples=4, confidence=c)).targets
        for c in (0.5, 0.6)
    )
    kept = high != 255
    assert torch.equal(low[kept], high[kept]) and 0 < int(kept.sum()) < int((low != 255).sum())


def test_labels_may_be_smaller_than_images_and_nothing_outside_the_covered_part_has_one(generator: Generator) -> None:
    settings, rows = SampleSettings(samples=2, confidence=0.5), Rectangle(4, 0, 12, 16)
    found = label_samples(generator, by_brightness, 2, (8, 8), settings, covered=rows)
    everywhere = label_samples(generator, by_brightness, 2, (8, 8), settings)
    assert torch.equal(found.targets[:, 2:6], everywhere.targets[:, 2:6])
    assert (found.targets[:, :2] == 255).all() and (found.targets[:, 6:] == 255).all()
    assert (everywhere.targets[:, :2] != 255).any()


def test_networks_that_give_no_probabilities_of_every_class_are_refused(generator: Generator) -> None:
    one = SampleSettings(samples=1)
    with pytest.raises(ValueError, match="wrap networks that return logits with `mean_probabilities`"):
        label_samples(generator, lambda images: 10 * by_brightness(images), 2, SIZE, one)
    with pytest.raises(ValueError, match=r"gives \[1, 2, 16, 16\] for 1 images, but \[1, 3, 16, 16\]"):
        label_samples(generator, by_brightness, 3, SIZE, one)
    with pytest.raises(ValueError, match="lower the confidence"):
        label_samples(generator, lambda images: by_brightness(images) * 0 + 0.5, 2, SIZE, one)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"confidence": 1.0}, {"confidence": -0.1}, {"labelled_share": 1.0}])
def test_settings_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="pass 1 to"):
        SampleSettings(**wrong)  # type: ignore[arg-type]


def test_the_mean_of_the_members_probabilities_is_not_that_of_their_logits() -> None:
    sure, unsure = (torch.nn.Conv2d(3, 2, 1) for _ in range(2))
    for network, bias in ((sure, (10.0, 0.0)), (unsure, (0.0, 0.5))):
        torch.nn.init.zeros_(network.weight)
        network.bias.data = torch.tensor(bias)
    mean = mean_probabilities([sure, unsure])(torch.rand(1, 3, 2, 2))
    expected = (torch.tensor([10.0, 0.0]).softmax(0) + torch.tensor([0.0, 0.5]).softmax(0)) / 2
    torch.testing.assert_close(mean[0, :, 1, 1], expected)


# How much is learned from them


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_labelled_images_are_drawn_as_often_as_without_samples_and_have_their_share(share: float) -> None:
    images, samples = 4, 10
    targets = torch.randint(0, 3, (images + samples, *SIZE), generator=torch.Generator().manual_seed(0))
    sampler = PixelSampler(
        targets, 3, members=2, pixels_per_image=512, batch_size=64, held_out=0.1, seed=0,
        num_samples=samples, labelled_share=share,
    )  # fmt: skip
    drawn = torch.cat(list(sampler.epoch()), dim=1)
    from_images = (drawn < images * 256).sum(dim=1)
    assert (from_images >= share * drawn.shape[1]).all() and (from_images < share * drawn.shape[1] + 1).all()
    assert (from_images >= images * 512).all()
    assert (sampler.held_out < images * 256).all() and len(sampler.held_out) == int(0.1 * images * 256)
    image_and_id = torch.arange(images + samples).repeat_interleave(256) * 3 + targets.flatten()
    for member in drawn:
        assert len(image_and_id[member].unique()) == 3 * (images + samples)


def test_samples_without_room_for_their_regions_are_refused() -> None:
    targets = torch.randint(0, 3, (9, *SIZE), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="24 labelled regions do not fit into the 7 pixels"):
        PixelSampler(
            targets, 3, members=1, pixels_per_image=64, batch_size=8, held_out=0, seed=0,
            num_samples=8, labelled_share=0.9,
        )  # fmt: skip


def test_a_class_that_no_labelled_image_shows_is_learned_from_samples(generator: Generator) -> None:
    w_plus = generator.truncate(generator.mapping(torch.randn(3, 8, generator=torch.Generator().manual_seed(5))))
    latents = FoundLatents(("a", "b", "c"), w_plus, {})
    images = generator.synthesis(w_plus).images.add(1).div(2).clamp(0, 1)
    dark = torch.where(by_brightness(images)[:, 0] > 0.5, 0, 255)
    assert (dark == 0).any()
    task = Segmentation(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))
    settings = FitSettings(hidden=(16, 8), members=2, epochs=8, pixels_per_image=512, batch_size=64, learning_rate=1e-2)
    samples = label_samples(generator, by_brightness, 2, SIZE, SampleSettings(samples=4, confidence=0.5))
    without = fit_checkpoint(generator, latents, dark, task, settings)
    taught = fit_checkpoint(generator, latents, dark, task, settings, samples=samples)
    rows = FeatureTable.collect(generator, w_plus).rows(torch.arange(3 * 256))
    truth = by_brightness(images).argmax(dim=1).flatten()
    for fitted, low, high in ((without, 0.0, 0.0), (taught, 0.5, 1.0)):
        found = task.decide(fitted.heads["segmentation"].label_generator(rows))
        recall = float((found[truth == 1] == 1).float().mean())
        assert low <= recall <= high
    assert taught.provenance["samples"]["samples"] == 4 and taught.provenance["images"] == ["a", "b", "c"]
    assert "samples" not in without.provenance


# The ensemble


@pytest.fixture(scope="module")
def labelled() -> tuple[list[Tensor], Tensor]:
    images = list(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return images, torch.stack([(at_size(image[None], SIZE)[0].mean(0) > 0.5).long() for image in images])


def test_members_differ_and_the_seed_decides_them_and_the_global_generator_nothing(
    labelled: tuple[list[Tensor], Tensor],
) -> None:
    state = torch.get_rng_state()
    first, again = (train_teacher(*labelled, ("a", "b"), TINY, device=CPU) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert not one.training
    a, b = (next(reversed(list(network.parameters()))) for network in first)
    assert not torch.equal(a, b)


def test_a_teacher_trains_labels_and_says_what_it_was(
    generator: Generator, labelled: tuple[list[Tensor], Tensor]
) -> None:
    teacher = Teacher(samples=SampleSettings(samples=2, confidence=0.1), training=TINY)
    teacher.check(2, SIZE)
    found = teacher.label(generator, *labelled, ("a", "b"), truncation=0.7)
    assert found.provenance["teacher"]["steps"] == 3 and found.provenance["seed"] == SAMPLES_SEED
    networks = train_teacher(*labelled, ("a", "b"), TINY, device=CPU)
    expected = label_samples(generator, mean_probabilities(networks), 2, SIZE, teacher.samples)
    assert torch.equal(found.targets, expected.targets)


def test_a_size_or_settings_that_networks_cannot_take_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        Teacher().check(2, (20, 16))
    with pytest.raises(ValueError, match="backbone='none'"):
        Teacher(training=TeacherSettings(backbone="none")).check(2, SIZE)
    with pytest.raises(ValueError, match="at least 1 member"):
        replace(TINY, members=0)


# A network of the user's own


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "resnet18", "mobilenet_v3_large"])
def test_a_network_is_read_with_the_backbone_that_it_was_saved_with(backbone: str, tmp_path: Path) -> None:
    saved = build_deeplab(3, backbone=backbone, seed=5).eval()
    torch.save(saved.state_dict(), tmp_path / "network.pt")
    read = load_deeplab(tmp_path / "network.pt", 3).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(images), saved(images))
    with pytest.raises(CheckpointError, match="for 4 classes; pass a file that"):
        load_deeplab(tmp_path / "network.pt", 4)


def test_a_file_or_a_function_may_be_the_teacher(
    generator: Generator, labelled: tuple[list[Tensor], Tensor], tmp_path: Path
) -> None:
    network = build_deeplab(len(CLASSES), backbone="resnet18", seed=5)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    few = SampleSettings(samples=2, confidence=0.0)
    from_file = Teacher(samples=few, network=tmp_path / "network.pt")
    from_file.check(len(CLASSES), SIZE)
    of_function = Teacher(samples=few, network=mean_probabilities([network]))
    one, other = (teacher.label(generator, *labelled, CLASSES, truncation=0.7) for teacher in (from_file, of_function))
    assert torch.equal(one.targets, other.targets) and torch.equal(one.w_plus, other.w_plus)
    assert one.provenance["teacher"] == {"network.pt": sha256(tmp_path / "network.pt")}
    with pytest.raises(CheckpointError, match="no such file|cannot be read|not"):
        Teacher(network=tmp_path / "missing.pt").check(2, SIZE)
