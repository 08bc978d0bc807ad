"""Fitting: which pixels are sampled, what is learned, and that members trained together equal members trained alone."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.checkpoint import load_checkpoint, save_checkpoint
from handsoff_stream.fitting import FeatureTable, FitSettings, InversionSettings, calibrate, fit_checkpoint, invert
from handsoff_stream.fitting.feature_table import MEMORY_GB_ACCELERATOR, MEMORY_GB_CPU, keep_in_memory
from handsoff_stream.fitting.fit import fit_label_generator
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.fitting.pixel_sampler import MAX_HELD_OUT, PixelSampler
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
    return FeatureTable.collect(generator, w_plus)


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


LEVEL_BYTES = [2 * IMAGES * 2 * 8 * side**2 for side in (4, 8, 16, 32)]


@pytest.mark.parametrize("levels_in_memory", [0, 1, 3, 4])
def test_where_features_are_kept_changes_no_bit_of_them(generator, w_plus, table, levels_in_memory, tmp_path):
    memory_gb = sum(LEVEL_BYTES[:levels_in_memory]) / 1e9
    kept = FeatureTable.collect(generator, w_plus, memory_gb=memory_gb, cache_dir=tmp_path)
    assert kept.bytes_in_memory == sum(LEVEL_BYTES[:levels_in_memory])
    assert kept.bytes_in_files == sum(LEVEL_BYTES[levels_in_memory:])
    pixels = torch.randint(IMAGES * 32 * 32, (500,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(kept.rows(pixels), table.rows(pixels))
    assert torch.equal(kept.rows(pixels[:7]), table.rows(pixels[:7]))


def test_a_fit_from_files_is_the_fit_from_memory(generator, w_plus, table, targets, tmp_path):
    on_disk = FeatureTable.collect(generator, w_plus, memory_gb=0, cache_dir=tmp_path)
    assert table.bytes_in_files == 0 and on_disk.bytes_in_memory == 0
    few = replace(SMALL, epochs=1, pixels_per_image=64)
    one, other = (fit_label_generator(t, targets, segmentation(2), few)[0].state_dict() for t in (table, on_disk))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_feature_files_have_no_name_that_could_stay_behind(generator, w_plus, tmp_path):
    table = FeatureTable.collect(generator, w_plus, memory_gb=0, cache_dir=tmp_path)
    assert table.bytes_in_files > 0 and list(tmp_path.iterdir()) == []


class CountingGenerator(StyleGAN2):
    """Notes how many images are synthesized at once."""

    batches: ClassVar[list[int]] = []

    def synthesis(self, w_plus_BLD: Tensor, *args, **kwargs):
        self.batches.append(len(w_plus_BLD))
        return super().synthesis(w_plus_BLD, *args, **kwargs)


def test_features_of_one_image_at_a_time_are_computed(w_plus):
    generator = CountingGenerator(channels=(8, 8, 8, 8), z_dim=16, w_dim=16, mapping_layers=2)
    FeatureTable.collect(generator, w_plus, (16, 16))
    assert generator.batches == [1] * IMAGES


def test_fifty_images_of_the_largest_generator_fit_the_default_budgets():
    """6080 channels at labels of 512 x 512: what would be held where, without computing it."""
    channels = (1024, 1024, 1024, 1024, 1024, 512, 256, 192)
    needed = [2 * 50 * c * (4 << i) ** 2 for i, c in enumerate(channels)]
    assert sum(channels) == 6080 and sum(needed) == 8_108_441_600
    assert keep_in_memory(needed, MEMORY_GB_ACCELERATOR) == [True] * 8
    assert keep_in_memory(needed, MEMORY_GB_CPU) == [True] * 5 + [False] * 3


def test_a_folder_without_room_and_a_budget_without_sense_are_refused(generator, w_plus, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="0.0 GB free; pass another cache_dir"):
        FeatureTable.collect(generator, w_plus, memory_gb=0, cache_dir=tmp_path)
    assert FeatureTable.collect(generator, w_plus, cache_dir=tmp_path).bytes_in_files == 0
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="pass at least one latent"):
            FeatureTable.collect(generator, w_plus, memory_gb=wrong)
    with pytest.raises(ValueError, match="0 latents"):
        FeatureTable.collect(generator, w_plus[:0])


# Sampling


def sampler_of(targets: Tensor, num_outputs: int, settings: FitSettings) -> PixelSampler:
    """What a fit with these settings draws from."""
    names = ("members", "pixels_per_image", "batch_size", "held_out", "seed")
    return PixelSampler(targets, num_outputs, **{name: getattr(settings, name) for name in names})


def sampled(sampler: PixelSampler, epochs: int) -> Iterator[Tensor]:
    """[M, E] of each epoch."""
    for _ in range(epochs):
        yield torch.cat(list(sampler.epoch()), dim=1)


def test_every_region_is_seen_by_every_member_in_every_epoch():
    ids = torch.zeros(IMAGES, *SIZE, dtype=torch.int64)
    ids[0, 5, 5], ids[2, 7, 7], ids[3, 0, :3] = 1, 1, 2
    sampler = sampler_of(ids, 3, replace(SMALL, pixels_per_image=8, batch_size=16))
    image_and_id = torch.arange(IMAGES).repeat_interleave(32 * 32) * 3 + ids.flatten()
    for epoch in sampled(sampler, 3):
        for member in epoch:
            assert set(image_and_id[member].tolist()) == {0, 1, 3, 6, 7, 9, 11}


def test_unlabelled_and_held_out_pixels_are_never_trained_on(targets):
    ids = targets.clone()
    ids[:, :8] = 255
    sampler = sampler_of(ids, 2, replace(SMALL, held_out=0.1))
    seen = torch.cat([epoch.flatten() for epoch in sampled(sampler, 3)])
    assert not torch.isin(seen, sampler.held_out).any()
    assert (ids.flatten()[seen] != 255).all() and (ids.flatten()[sampler.held_out] != 255).all()
    assert len(sampler.held_out) == int(0.1 * (ids != 255).sum())


def test_pixels_without_a_finite_number_are_neither_trained_on_nor_held_out():
    """Depth has holes: what cannot count in the loss must not fill minibatches, nor dilute the held-out loss."""
    depth = torch.rand(IMAGES, *SIZE)
    depth[:, :16] = float("inf")
    depth[1, 20, 3] = float("nan")
    sampler = sampler_of(depth, 1, replace(SMALL, held_out=0.1))
    seen = torch.cat([epoch.flatten() for epoch in sampled(sampler, 3)])
    for pixels in (seen, sampler.held_out, sampler.pool):
        assert len(pixels) and depth.flatten()[pixels].isfinite().all()
    heatmaps = torch.full((1, 4, 4, 2), float("nan"))
    heatmaps[0, 0, 0, 1] = 1.0  # one known entry makes a pixel known
    assert sampler_of(heatmaps, 2, replace(SMALL, held_out=0.0)).pool.tolist() == [0]


def test_no_more_pixels_are_held_out_than_an_accuracy_needs():
    ids = torch.zeros(2, 512, 512, dtype=torch.int64)
    assert len(sampler_of(ids, 2, replace(SMALL, held_out=0.5)).held_out) == MAX_HELD_OUT


def test_members_see_pixels_of_their_own(targets):
    pixels_MP = next(sampler_of(targets, 2, SMALL).epoch())
    assert pixels_MP.shape == (3, 64)
    assert not torch.equal(pixels_MP[0], pixels_MP[1])


def test_pixels_are_drawn_evenly(targets):
    sampler = sampler_of(targets, 2, replace(SMALL, pixels_per_image=20_000, held_out=0))
    counts = torch.bincount(next(sampled(sampler, 1)).flatten(), minlength=IMAGES * 32 * 32)
    expected = 3 * 20_000 / (32 * 32)
    assert ((counts - expected).abs() < 6 * expected**0.5).all()


def test_too_few_pixels_for_the_regions_are_refused(targets):
    with pytest.raises(ValueError, match="raise pixels_per_image"):
        sampler_of(targets, 2, replace(SMALL, pixels_per_image=1, batch_size=4))


# Learning


def test_a_threshold_of_a_feature_is_learned(table, targets):
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
def test_float_targets_are_learned_without_change(table, outputs):
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
    steps = list(sampler_of(targets, 2, settings).epoch())
    assert len(steps) == 16
    for m in range(3):
        member = plain_member(start, m)
        optimizer = torch.optim.Adam(member.parameters(), lr=settings.learning_rate, fused=True)
        for pixels_MP in steps:
            optimizer.zero_grad()
            F.cross_entropy(member(table.rows(pixels_MP[m])), targets.flatten()[pixels_MP[m]]).backward()
            optimizer.step()
        torch.testing.assert_close(together.linear1.weight[m], member[0].weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.linear3.bias[m], member[6].bias, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.norm2.running_var[m], member[5].running_var, rtol=1e-4, atol=1e-5)


# Stopping early


def test_patience_keeps_the_best_epoch_and_says_which(table, targets):
    """Every run is a prefix of the longer one, so the weights of epoch e are those of the run of e epochs."""
    settings = replace(SMALL, epochs=40, learning_rate=0.1, cosine=False, held_out=0.05)
    stopped, report = fit_label_generator(table, targets, segmentation(2), replace(settings, patience=2))
    best = min(range(len(report.held_out_losses)), key=report.held_out_losses.__getitem__) + 1
    assert report.epoch == best
    assert len(report.losses) == len(report.held_out_losses) == best + 2 < 40
    assert report.held_out_loss == report.held_out_losses[best - 1]
    direct, _ = fit_label_generator(table, targets, segmentation(2), replace(settings, epochs=best))
    for name, value in direct.state_dict().items():
        assert torch.equal(value, stopped.state_dict()[name])


def test_without_patience_the_last_epoch_is_kept(table, targets):
    _, report = fit_label_generator(table, targets, segmentation(2), SMALL)
    assert report.epoch == len(report.losses) == SMALL.epochs and report.held_out_losses == []


def test_patience_that_does_not_run_out_still_keeps_the_best_epoch(table, targets):
    settings = replace(SMALL, epochs=5, learning_rate=0.1, held_out=0.05, patience=5)
    _, report = fit_label_generator(table, targets, segmentation(2), settings)
    assert len(report.losses) == 5
    assert report.held_out_loss == min(report.held_out_losses) == report.held_out_losses[report.epoch - 1]


def test_patience_with_nothing_held_out_is_refused(table, targets):
    ids = torch.full_like(targets, 255)
    ids[:, 0, :2] = 1
    with pytest.raises(ValueError, match="raise held_out"):
        fit_label_generator(table, ids, segmentation(2), replace(SMALL, patience=1))


def test_targets_that_do_not_fit_are_refused(table, targets):
    with pytest.raises(ValueError, match=r"need \[4, 32, 32\]"):
        fit_label_generator(table, targets[:, :16], segmentation(2), SMALL)
    with pytest.raises(ValueError, match="no pixel has a label"):
        fit_label_generator(table, torch.full_like(targets, 255), segmentation(2), SMALL)


@pytest.mark.parametrize(
    "wrong",
    [{"members": 0}, {"batch_size": 1}, {"held_out": 0.9}, {"learning_rate": 0}, {"patience": 0}]
    + [{"patience": 2, "held_out": 0}],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        FitSettings(**wrong)


# All of it


class Gray(Perceptual):
    """A perceptual distance in one line."""

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(images_BCHW.mean(dim=1, keepdim=True), 2).flatten(1) / 16


def test_images_and_labels_become_a_checkpoint_that_can_be_stored(generator, w_plus, targets, tmp_path):
    images = generator.synthesis(w_plus).images.add(1).div(2).clamp(0, 1)
    named = [(f"{i}", image) for i, image in enumerate(images)]
    distance, settings = Gray(nn.Identity(), "gray"), InversionSettings(steps=2, candidates=4)
    latents = invert(generator, named, tmp_path / "inversions", settings, perceptual=distance)
    about = {"sources": {"a.png": "00ff"}}
    checkpoint = fit_checkpoint(generator, latents, targets, segmentation(2), SMALL, about=about)
    checkpoint = calibrate(checkpoint, num_samples=6)
    save_checkpoint(tmp_path / "fitted.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "fitted.safetensors")
    assert json.dumps(loaded.manifest()) == json.dumps(checkpoint.manifest())
    assert loaded.calibration is not None and len(loaded.calibration.scores["sum"]) == 6
    assert loaded.provenance["perceptual"] == "gray" and loaded.provenance["sources"] == {"a.png": "00ff"}
    assert len(list((tmp_path / "inversions").iterdir())) == IMAGES
