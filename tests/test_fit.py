"""Fitting: what is sampled, what is learnt, and that learning together is learning alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.checkpoint import load_checkpoint, save_checkpoint
from handsoff_stream.fitting import FeatureTable, FitSettings, InversionSettings, fit_checkpoint
from handsoff_stream.fitting.fit import PixelSampler, fit_label_generator
from handsoff_stream.fitting.perceptual import Perceptual
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.tasks import Segmentation, Task

IMAGES, SIZE = 4, (32, 32)
SMALL = FitSettings(hidden=(16, 8), members=3, epochs=2, pixels_per_image=256, batch_size=64)


@dataclass(frozen=True)
class Regression(Task):
    """Float targets: what keypoint heatmaps and depth will look like from here."""

    outputs: int
    name: ClassVar[str] = "regression"

    @property
    def num_outputs(self) -> int:
        return self.outputs

    def loss(self, outputs_PK: Tensor, target_P: Tensor) -> Tensor:
        return F.mse_loss(outputs_PK, target_P.reshape(outputs_PK.shape))

    def decide(self, outputs_MPK: Tensor) -> Tensor:
        return outputs_MPK.mean(dim=0)

    def disagreement(self, outputs_MPK: Tensor) -> Tensor:
        return outputs_MPK.var(dim=0).mean(dim=-1)


def segmentation(num_classes: int) -> Segmentation:
    return Segmentation([f"class {i}" for i in range(num_classes)], [(i, i, i) for i in range(num_classes)])


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StyleGAN2(channels=(8, 8, 8, 8), z_dim=16, w_dim=16, mapping_layers=2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def w_plus(generator) -> Tensor:
    z = torch.randn(IMAGES, 16, generator=torch.Generator().manual_seed(1))
    return generator.truncate(generator.mapping(z))


@pytest.fixture(scope="module")
def table(generator, w_plus) -> FeatureTable:
    return FeatureTable.collect(generator, w_plus, batch_size=3)


@pytest.fixture(scope="module")
def targets(table) -> Tensor:
    """Ids 0 and 1 by the sign of a feature that varies in every image, [N, H, W]."""
    rows = table.rows(torch.arange(IMAGES * 32 * 32))
    return (rows[:, 50] > rows[:, 50].median()).long().view(IMAGES, *SIZE)


# Features


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (16, 16)])
def test_table_rows_are_hypercolumns_up_to_float16(generator, w_plus, size):
    pyramid = generator.synthesis(w_plus).features
    expected = pyramid.hypercolumn(size).permute(0, 2, 3, 1).flatten(0, 2)
    pixels = torch.randint(len(expected), (200,), generator=torch.Generator().manual_seed(2))
    rows = FeatureTable.collect(generator, w_plus, size).rows(pixels)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected[pixels], rtol=0, atol=2e-3 * expected.abs().max().item())


# Sampling


def sampled(sampler: PixelSampler, epochs: int) -> Iterator[Tensor]:
    """[M, E] of each epoch."""
    for _ in range(epochs):
        yield torch.cat(list(sampler.epoch()), dim=1)


def test_every_region_is_seen_by_every_member_in_every_epoch():
    ids = torch.zeros(IMAGES, *SIZE, dtype=torch.int64)
    ids[0, 5, 5], ids[2, 7, 7], ids[3, 0, :3] = 1, 1, 2
    sampler = PixelSampler(ids, 3, replace(SMALL, pixels_per_image=8, batch_size=16))
    image_and_id = torch.arange(IMAGES).repeat_interleave(32 * 32) * 3 + ids.flatten()
    for epoch in sampled(sampler, 3):
        for member in epoch:
            assert set(image_and_id[member].tolist()) == {0, 1, 3, 6, 7, 9, 11}


def test_unlabelled_and_held_out_pixels_are_never_trained_on(targets):
    ids = targets.clone()
    ids[:, :8] = 255
    sampler = PixelSampler(ids, 2, replace(SMALL, held_out=0.1))
    seen = torch.cat([epoch.flatten() for epoch in sampled(sampler, 3)])
    assert not torch.isin(seen, sampler.held_out).any()
    assert (ids.flatten()[seen] != 255).all() and (ids.flatten()[sampler.held_out] != 255).all()
    assert len(sampler.held_out) == int(0.1 * (ids != 255).sum())


def test_members_see_pixels_of_their_own(targets):
    pixels_MP = next(PixelSampler(targets, 2, SMALL).epoch())
    assert pixels_MP.shape == (3, 64)
    assert not torch.equal(pixels_MP[0], pixels_MP[1])


def test_pixels_are_drawn_evenly(targets):
    sampler = PixelSampler(targets, 2, replace(SMALL, pixels_per_image=20_000, held_out=0))
    counts = torch.bincount(next(sampled(sampler, 1)).flatten(), minlength=IMAGES * 32 * 32)
    expected = 3 * 20_000 / (32 * 32)
    assert ((counts - expected).abs() < 6 * expected**0.5).all()


def test_too_few_pixels_for_the_regions_are_refused(targets):
    with pytest.raises(ValueError, match="raise pixels_per_image"):
        PixelSampler(targets, 2, replace(SMALL, pixels_per_image=1, batch_size=4))


# Learning


def test_a_threshold_of_a_feature_is_learnt(table, targets):
    settings = replace(SMALL, epochs=16, learning_rate=1e-2, held_out=0.1)
    label_generator, report = fit_label_generator(table, targets, segmentation(2), settings)
    assert report.accuracy is not None and report.accuracy > 0.95
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert not label_generator.training and not any(p.requires_grad for p in label_generator.parameters())


def test_the_fitted_label_generator_labels_pyramids(generator, w_plus, table, targets):
    settings = replace(SMALL, epochs=16, learning_rate=1e-2)
    label_generator, _ = fit_label_generator(table, targets, segmentation(2), settings)
    outputs = label_generator.reference(generator.synthesis(w_plus).features, SIZE)
    assert (outputs.mean(dim=0).argmax(dim=1) == targets).float().mean() > 0.95


@pytest.mark.parametrize("outputs", [1, 2])
def test_float_targets_are_learnt_without_change(table, outputs):
    rows = table.rows(torch.arange(IMAGES * 32 * 32))
    values = rows[:, 50 : 50 + outputs].view(IMAGES, *SIZE, outputs)
    values = values.squeeze(-1) if outputs == 1 else values
    settings = replace(SMALL, epochs=16, learning_rate=1e-2)
    _, report = fit_label_generator(table, values, Regression(outputs), settings)
    assert report.accuracy is None
    assert report.held_out_loss < 0.1 * values.var()


def test_the_seed_decides_everything_and_the_global_rng_nothing(table, targets):
    state = torch.get_rng_state()
    one, other, third = (
        fit_label_generator(table, targets, segmentation(2), replace(SMALL, seed=seed))[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["linear1.weight"], third["linear1.weight"])


def test_members_differ(table, targets):
    label_generator, _ = fit_label_generator(table, targets, segmentation(2), SMALL)
    outputs_MPK = label_generator(table.rows(torch.arange(100)))
    assert (outputs_MPK[0] - outputs_MPK[1]).abs().max() > 0.01


def plain_member(stacked: LabelGenerator, m: int) -> nn.Sequential:
    """Member m out of ordinary modules; the published order of layers."""
    parts: list[nn.Module] = []
    for linear, norm in ((stacked.linear1, True), (stacked.linear2, True), (stacked.linear3, False)):
        plain = nn.Linear(linear.weight.shape[2], linear.weight.shape[1])
        plain.load_state_dict({"weight": linear.weight[m], "bias": linear.bias[m]})
        parts += [plain, nn.ReLU(), nn.BatchNorm1d(plain.out_features)] if norm else [plain]
    return nn.Sequential(*parts)


def test_learning_together_is_learning_one_after_another(table, targets):
    settings = replace(SMALL, cosine=False, epochs=1)
    together, _ = fit_label_generator(table, targets, segmentation(2), settings)
    start = LabelGenerator(table.feature_channels, (16, 8), 2, 3, generator=torch.Generator().manual_seed(0))
    steps = list(PixelSampler(targets, 2, settings).epoch())
    assert len(steps) == 16
    for m in range(3):
        member = plain_member(start, m)
        optimizer = torch.optim.Adam(member.parameters(), lr=settings.learning_rate)
        for pixels_MP in steps:
            optimizer.zero_grad()
            F.cross_entropy(member(table.rows(pixels_MP[m])), targets.flatten()[pixels_MP[m]]).backward()
            optimizer.step()
        torch.testing.assert_close(together.linear1.weight[m], member[0].weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.linear3.bias[m], member[6].bias, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.norm2.running_var[m], member[5].running_var, rtol=1e-4, atol=1e-5)


def test_targets_that_do_not_fit_are_refused(table, targets):
    with pytest.raises(ValueError, match=r"need \[4, 32, 32\]"):
        fit_label_generator(table, targets[:, :16], segmentation(2), SMALL)
    with pytest.raises(ValueError, match="no pixel has a label"):
        fit_label_generator(table, torch.full_like(targets, 255), segmentation(2), SMALL)


@pytest.mark.parametrize("wrong", [{"members": 0}, {"batch_size": 1}, {"held_out": 0.9}, {"learning_rate": 0}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        FitSettings(**wrong)


# All of it


class Grey(Perceptual):
    """A perceptual distance in one line."""

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(images_BCHW.mean(dim=1, keepdim=True), 2).flatten(1) / 16


def test_images_and_labels_become_a_checkpoint_that_can_be_stored(generator, w_plus, targets, tmp_path):
    images = generator.synthesis(w_plus).images.add(1).div(2).clamp(0, 1)
    checkpoint = fit_checkpoint(
        generator,
        [(f"{i}", image) for i, image in enumerate(images)],
        targets,
        segmentation(2),
        tmp_path / "inversions",
        inversion=InversionSettings(steps=2, candidates=4),
        fit=SMALL,
        perceptual=Grey(nn.Identity(), "grey"),
        calibration_samples=6,
        sources={"a.png": "00ff"},
    )
    save_checkpoint(tmp_path / "fitted.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "fitted.safetensors")
    assert json.dumps(loaded.manifest()) == json.dumps(checkpoint.manifest())
    assert loaded.calibration is not None and len(loaded.calibration.scores["sum"]) == 6
    assert loaded.provenance["perceptual"] == "grey" and loaded.provenance["sources"] == {"a.png": "00ff"}
    assert len(list((tmp_path / "inversions").iterdir())) == IMAGES
