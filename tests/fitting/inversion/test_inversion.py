"""Inversion finds latents for each image independently, within its radius, and continues after interruptions."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.files import tensors
from handsoff_stream.fitting.inversion.descent import (
    PUBLISHED_STEPS,
    InversionSettings,
    invert_batch,
    learning_rate_at,
    project_to_ball,
)
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.fitting.inversion.store import invert_images
from handsoff_stream.generators import StyleGAN2


class Blurred(Perceptual):
    """A perceptual distance in one line: images at a quarter of the size."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "blurred")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(images_BCHW, 4).flatten(1) / 10


class Interrupted(Blurred):
    """Stops the program at the `calls`-th embedding."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def embed(self, images_BCHW: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().embed(images_BCHW)


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StyleGAN2(channels=(8, 8, 8, 8), z_dim=16, w_dim=16, mapping_layers=2)
    for block in model.blocks:
        block.to_rgb.conv.weight.data.mul_(0.05)  # images inside [-1, 1], as those of a trained generator
    return model.eval().requires_grad_(False)


def latents(generator: StyleGAN2, count: int, seed: int = 0) -> Tensor:
    z = torch.randn(count, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    return generator.truncate(generator.mapping(z))


def pictures(generator: StyleGAN2, w_plus: Tensor) -> Tensor:
    """In [0, 1]."""
    return generator.synthesis(w_plus).images.add(1).div(2).clamp(0, 1)


def perturbed(w_plus: Tensor, size: float = 0.05) -> Tensor:
    noise = torch.randn(w_plus.shape, generator=torch.Generator().manual_seed(9))
    return w_plus + size * noise


class Spy:
    """Records the latents that a generator is asked for."""

    def __init__(self, generator: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        synthesis = generator.synthesis

        def record(w_plus, *args, **kwargs):
            self.seen.append(w_plus.detach().clone())
            return synthesis(w_plus, *args, **kwargs)

        monkeypatch.setattr(generator, "synthesis", record)


def loss_of(generator: StyleGAN2, w_plus: Tensor, images: Tensor, pixel_weight: float = 0.1) -> Tensor:
    got = generator.synthesis(w_plus).images
    mse = F.mse_loss(got, images * 2 - 1, reduction="none").mean(dim=(1, 2, 3))
    return Blurred().distance(got, images * 2 - 1) + pixel_weight * mse


def test_a_generated_image_is_recovered_from_its_perturbed_latent(generator):
    truth = latents(generator, 2)
    images, encoding = pictures(generator, truth), perturbed(truth)
    found = invert_batch(
        generator, images, Blurred(), InversionSettings(steps=100, learning_rate=0.02), encoding=encoding
    )
    assert (found.loss < 0.02 * loss_of(generator, encoding, images)).all()
    assert (found.psnr > 40).all()


def test_reported_losses_are_those_of_the_returned_latents(generator):
    images = pictures(generator, latents(generator, 2))
    found = invert_batch(generator, images, Blurred(), InversionSettings(steps=10, candidates=8, pixel_weight=0.3))
    torch.testing.assert_close(found.loss, loss_of(generator, found.w_plus, images, 0.3))
    torch.testing.assert_close(found.loss, found.perceptual + 0.3 * found.mse)
    levels = (generator.synthesis(found.w_plus).images + 1) / 2
    mse = (levels - images).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.psnr, -10 * mse.log10())


def test_latents_stay_in_the_ball_at_every_step(generator, monkeypatch):
    encoding = perturbed(latents(generator, 3), 0.3)
    images = pictures(generator, latents(generator, 3))
    spy = Spy(generator, monkeypatch)
    invert_batch(generator, images, Blurred(), InversionSettings(steps=20, radius=0.25), encoding=encoding)
    distances = torch.stack([(w - encoding).square().sum(dim=(1, 2)) for w in spy.seen])
    assert len(distances) == 21
    assert (distances <= 0.25).all()
    assert (distances[-1] > 0.24).any()


def test_without_a_radius_an_encoding_is_only_the_start(generator):
    encoding = latents(generator, 2, seed=1)
    images = pictures(generator, latents(generator, 2))
    start = invert_batch(generator, images, Blurred(), InversionSettings(steps=0, radius=None), encoding=encoding)
    assert torch.equal(start.w_plus, encoding)
    bound, free = (
        invert_batch(generator, images, Blurred(), InversionSettings(steps=20, radius=radius), encoding=encoding)
        for radius in (0.5, None)
    )
    assert ((free.w_plus - encoding).square().sum(dim=(1, 2)) > 0.5).all() and (free.loss < bound.loss).all()


def test_projection_is_the_nearest_point_and_leaves_the_inside_alone():
    center = torch.zeros(2, 3, 4)
    w = torch.stack([torch.full((3, 4), 2.0), torch.full((3, 4), 0.01)])
    projected = project_to_ball(w, center, 0.5)
    assert torch.equal(projected[1], w[1])
    torch.testing.assert_close(projected[0], w[0] / w[0].norm() * math.sqrt(0.5))


def test_the_best_iterate_of_each_image_is_kept(generator, monkeypatch):
    truth = latents(generator, 3)
    images, encoding = pictures(generator, truth), perturbed(truth)
    settings = InversionSettings(steps=20, learning_rate=3.0, radius=1e6)  # jumps about
    spy = Spy(generator, monkeypatch)
    found = invert_batch(generator, images, Blurred(), settings, encoding=encoding)
    monkeypatch.undo()
    losses = torch.stack([loss_of(generator, w, images) for w in spy.seen])
    torch.testing.assert_close(found.loss, losses.min(dim=0).values)
    assert (losses[-1] > 1.5 * found.loss).all()


def test_an_image_alone_gives_the_same_as_in_a_batch(generator):
    images = pictures(generator, latents(generator, 3, seed=4))
    settings = InversionSettings(steps=15, candidates=20)
    together = invert_batch(generator, images, Blurred(), settings)
    alone = invert_batch(generator, images[1:2], Blurred(), settings)
    torch.testing.assert_close(together.w_plus[1:2], alone.w_plus, rtol=1e-3, atol=1e-3)


def test_descent_starts_at_the_best_candidate(generator):
    images = pictures(generator, latents(generator, 4, seed=5))
    average = invert_batch(generator, images, Blurred(), InversionSettings(steps=0, candidates=0))
    best = invert_batch(generator, images, Blurred(), InversionSettings(steps=0, candidates=200))
    assert torch.equal(average.w_plus, generator.truncate(generator.w_avg[None], 0.0).expand(4, -1, -1))
    assert (best.loss <= average.loss).all() and (best.loss < average.loss).any()


def test_generator_weights_and_global_rng_are_left_alone(generator):
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    state = torch.get_rng_state()
    generator.requires_grad_(True)
    invert_batch(generator, pictures(generator, latents(generator, 1)).detach(), Blurred(), InversionSettings(steps=3))
    assert all(p.grad is None for p in generator.parameters())
    generator.requires_grad_(False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())


def test_the_learning_rate_rises_over_a_twentieth_and_falls_over_a_quarter():
    rates = [learning_rate_at(step, 100, 0.1) for step in range(101)]
    assert rates[0] == 0 and rates[5:75] == [0.1] * 70 and rates[100] == pytest.approx(0)
    assert rates[:6] == sorted(rates[:6]) and rates[75:] == sorted(rates[75:], reverse=True)


@pytest.mark.parametrize("wrong", ["size", "range", "encoding"])
def test_what_does_not_fit_is_refused(generator, wrong):
    images = torch.full((2, 3, 32, 32), 0.5)
    encoding = latents(generator, 2)
    if wrong == "size":
        images = images[..., :16]
    if wrong == "range":
        images = images * 255
    if wrong == "encoding":
        encoding = encoding[:1]
    with pytest.raises(ValueError, match="resize|divide|one w\\+ each"):
        invert_batch(generator, images, Blurred(), InversionSettings(steps=1), encoding=encoding)


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"learning_rate": 0}, {"radius": 0}, {"pixel_weight": -1}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="pass"):
        InversionSettings(**wrong)


def test_domains_differ_in_their_steps_only():
    assert PUBLISHED_STEPS == {"cars": 300, "faces": 500, "full-bodies": 2000, "streets": 500}
    for domain, steps in PUBLISHED_STEPS.items():
        assert InversionSettings.for_domain(domain) == InversionSettings(steps=steps, radius=0.5, pixel_weight=0.1)
    with pytest.raises(ValueError, match="cars.*or steps"):
        InversionSettings.for_domain("bedrooms")


# Results on disk

SETTINGS = InversionSettings(steps=6, candidates=4)


@pytest.fixture(scope="module")
def named(generator) -> list[tuple[str, Tensor]]:
    images = pictures(generator, latents(generator, 3, seed=6))
    return [(f"image {i}", image) for i, image in enumerate(images)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_interrupted_run_resumes_to_the_same_files_and_skips_what_is_done(generator, named, tmp_path):
    whole = invert_images(generator, named, tmp_path / "whole", Blurred(), SETTINGS, batch_size=1)
    calls_per_image = 1 + 1 + SETTINGS.steps + 1  # target, candidates, steps, last iterate
    with pytest.raises(KeyboardInterrupt):
        stopping = Interrupted(2 * calls_per_image + 3)
        invert_images(generator, named, tmp_path / "parts", stopping, SETTINGS, batch_size=1)
    assert len(contents(tmp_path / "parts")) == 2
    rest = Interrupted(calls_per_image)
    resumed = invert_images(generator, named, tmp_path / "parts", rest, SETTINGS, batch_size=1)
    assert rest.calls == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert torch.equal(resumed.w_plus, whole.w_plus) and torch.equal(resumed.loss, whole.loss)
    read = invert_images(generator, named[::-1], tmp_path / "parts", Interrupted(0), SETTINGS)
    assert torch.equal(read.w_plus, whole.w_plus.flip(0))


@pytest.mark.parametrize("changed", ["settings", "image", "generator", "encoding"])
def test_results_of_other_inputs_are_computed_again_with_a_warning(generator, named, tmp_path, changed):
    first = invert_images(generator, named, tmp_path, Blurred(), SETTINGS)
    settings, images, encodings, other = SETTINGS, named, None, generator
    if changed == "settings":
        settings = InversionSettings(steps=7, candidates=4)
    if changed == "image":
        images = [(name, image * 0.9) for name, image in named]
    if changed == "encoding":
        encodings = {name: first.w_plus[i] for i, (name, _) in enumerate(named)}
    if changed == "generator":
        other = StyleGAN2(**generator.config()).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match=f"another {changed}; it is computed again"):
        again = invert_images(other, images, tmp_path, Blurred(), settings, encodings=encodings)
    assert not torch.equal(again.loss, first.loss)


def test_a_damaged_result_is_computed_again(generator, named, tmp_path):
    first = invert_images(generator, named, tmp_path, Blurred(), SETTINGS)
    (tmp_path / "image 1.safetensors").write_bytes(b"damage")
    with pytest.warns(UserWarning, match="not a readable inversion"):
        again = invert_images(generator, named, tmp_path, Blurred(), SETTINGS)
    torch.testing.assert_close(again.w_plus, first.w_plus, rtol=1e-3, atol=1e-3)


def test_a_failed_write_leaves_no_file(generator, named, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        invert_images(generator, named, tmp_path, Blurred(), SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a/b"], ["same", "same"], [".."], []])
def test_names_that_are_no_file_names_are_refused(generator, tmp_path, names):
    images = [(name, torch.zeros(3, 32, 32)) for name in names]
    with pytest.raises(ValueError, match="unique name"):
        invert_images(generator, images, tmp_path, Blurred(), SETTINGS)
