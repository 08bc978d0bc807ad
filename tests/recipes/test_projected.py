"""Heads on frozen ImageNet features: which parts are frozen, random and trained, and that no head becomes too good."""

import pytest
import torch

from recipes.faces.gan_networks import Settings
from recipes.faces.gan_trainer import Trainer
from recipes.faces.projected import ProjectedHeads, augment

CHANNELS = [24, 40, 112, 320]


def images(count: int = 4, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trainer(**changes) -> Trainer:
    settings = {
        "data": None,
        "stages": ((32, 1000),),
        "batch": 4,
        "channels": (8, 7, 6, 6),
        "z_dim": 8,
        "mapping_layers": 2,
        "lr": 0.002,
        "r1": 1.0,
        "r1_every": 4,
        "mixing": 0.5,
        "ema_images": 100.0,
        "seed": 0,
        "projected": 0.5,
    }
    return Trainer(Settings(**{**settings, **changes}), torch.device("cpu"), torch.float32)


def reals(step: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("changed", range(4))
def test_scales_are_mixed_from_coarse_to_fine(changed):
    heads = ProjectedHeads(size=64, width=8)
    maps = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate(CHANNELS)]
    before = heads.mix(maps)
    maps[changed] = maps[changed] + 1
    differs = [not torch.equal(a, b) for a, b in zip(before, heads.mix(maps), strict=True)]
    assert differs == [scale <= changed for scale in range(4)]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_there_is_one_logit_per_scale_and_image(size):
    heads = ProjectedHeads(size=size, width=8)
    maps = [torch.randn(3, c, (size // 4) >> i, (size // 4) >> i) for i, c in enumerate(CHANNELS)]
    assert heads(heads.mix(maps)).shape == (4, 3)
    assert not any(p.requires_grad for p in heads.projection.parameters())
    assert all(p.requires_grad for p in heads.heads.parameters())


def test_augmentation_cuts_shifts_and_recolors_each_image_by_itself():
    x = torch.ones(64, 3, 32, 32)
    out = augment(x, torch.Generator().manual_seed(0))
    kept = (out != 0).any(dim=1).float().mean(dim=(1, 2))
    assert 0.4 < kept.min() < kept.max() <= 1  # at most 1/3 x 1/3 is cut, and 1/8 of rows and columns leave the image
    brightness = torch.stack([image[:, mask].mean() for image, mask in zip(out, (out != 0).any(dim=1), strict=True)])
    assert 0.45 < brightness.min() < 0.6 and 1.4 < brightness.max() < 1.55
    assert torch.equal(out, augment(x, torch.Generator().manual_seed(0)))


def test_augmentation_passes_a_gradient_on_to_the_pixels_it_keeps():
    x = images(count=8).requires_grad_()
    augment(x, torch.Generator().manual_seed(0)).square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.6


def test_heads_learn_to_tell_real_images_from_generated_ones():
    t = trainer(discriminator_first=10**6, hinge_bound=0.0)
    steps = [t.step(torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)) for _ in range(25)]
    hinge = [sum(float(step[f"hinge_{stride}"]) for stride in (4, 8, 16, 32)) / 4 for step in steps]
    assert sum(hinge[-5:]) < 0.5 * sum(hinge[:5])


@pytest.mark.parametrize(("bound", "learns"), [(0.0, True), (1e6, False)])
def test_heads_whose_hinge_loss_is_under_the_bound_stay_as_they_are(bound, learns):
    t = trainer(hinge_bound=bound)
    before = [p.clone() for p in t.networks["heads"].parameters()]
    t.step(reals(0))
    assert same(before, list(t.networks["heads"].parameters())) is not learns


def test_the_random_projection_and_the_features_never_change():
    t = trainer()
    before = weights(t.features), weights(t.networks["heads"].projection)
    for step in range(3):
        t.step(reals(step))
    assert same(before[0], weights(t.features)) and same(before[1], weights(t.networks["heads"].projection))


def test_the_generator_learns_from_heads_and_own_discriminator_together():
    with_heads, without = trainer(), trainer(projected=0.0)
    assert same(weights(with_heads.networks["generator"]), weights(without.networks["generator"]))
    metrics = with_heads.step(reals(0))
    assert {"loss_d", "loss_g", "loss_heads"} <= metrics.keys() and "loss_heads" not in without.step(reals(0))
    assert not same(weights(with_heads.networks["generator"]), weights(without.networks["generator"]))


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_the_own_discriminator_sees_images_halved_as_often_as_asked(halvings):
    t = trainer(halvings=halvings)
    assert len(t.networks["discriminator"].blocks) == 3 - halvings
    assert t._coarse(images()).shape[-1] == 32 >> halvings
    assert t.step(reals(0))["r1"] > 0


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_with_heads_continues_bit_by_bit(stop):
    whole, first, second = trainer(), trainer(), trainer()
    for step in range(5):
        whole.step(reals(step))
    for step in range(stop):
        first.step(reals(step))
    second.load_state_dict(first.state_dict())
    for step in range(stop, 5):
        second.step(reals(step))
    assert all(same(weights(whole.networks[name]), weights(second.networks[name])) for name in whole.networks)


def test_rolled_back_a_run_goes_on_from_the_good_state_by_other_random_numbers(tmp_path):
    t = trainer()
    t.step(reals(0))
    good = {name: weights(network) for name, network in t.networks.items()}
    torch.save(t.state_dict(), tmp_path / "good.pt")
    t.step(reals(1))
    without_going_back = weights(t.networks["generator"])
    t.roll_back(torch.load(tmp_path / "good.pt", weights_only=True))
    assert (t.num_images, t.num_steps, t.num_rollbacks) == (4, 1, 1)
    assert all(same(good[name], weights(network)) for name, network in t.networks.items())
    t.step(reals(1))
    assert not same(without_going_back, weights(t.networks["generator"]))


def test_stages_that_are_smaller_than_the_coarsest_stride_have_no_heads():
    t = trainer(stages=((16, 8), (32, 16)))
    small = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    assert "heads" not in t.networks and "loss_heads" not in t.step(small)
    t.enter_stage(32)
    assert "loss_heads" in t.step(reals(0))
