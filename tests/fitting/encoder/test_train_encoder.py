"""An encoder learns to invert real images; an interrupted training gives the same result as an uninterrupted one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoder_inputs import Recorded, small_generator
from torch import Tensor, nn

from handsoff_stream.errors import CheckpointError
from handsoff_stream.fitting.encoder.files import load_restyle
from handsoff_stream.fitting.encoder.restyle import encode
from handsoff_stream.fitting.encoder.train import EncoderSettings, encoder_config, state_path, train_encoder
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.generators import StyleGAN2

SETTINGS = EncoderSettings(steps=6, batch_size=2, iterations=2, seed=3)


class Blurred(Perceptual):
    """A perceptual distance in one line; stops the program at the `calls`-th embedding."""

    def __init__(self, calls: int = 10**9) -> None:
        super().__init__(nn.Identity(), "blurred")
        self.calls = calls

    def embed(self, images_BCHW: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return F.avg_pool2d(images_BCHW, 4).flatten(1) / 10


generator = pytest.fixture(scope="module")(small_generator)


@pytest.fixture(scope="module")
def images(generator) -> list[tuple[str, Tensor]]:
    z = torch.randn(40, generator.z_dim, generator=torch.Generator().manual_seed(1))
    made = generator.synthesis(generator.truncate(generator.mapping(z))).images
    return [(f"image {i}", image) for i, image in enumerate(made.add(1).div(2).clamp(0, 1))]


def error(generator: StyleGAN2, w_plus: Tensor, images: Tensor) -> float:
    return float(F.mse_loss(generator.synthesis(w_plus).images, images * 2 - 1))


def test_an_encoder_comes_nearer_than_the_average_latent_and_each_pass_comes_nearer(generator, images, tmp_path):
    settings = EncoderSettings(steps=40, batch_size=4, iterations=2)
    encoder = train_encoder(generator, images[8:], Blurred(), tmp_path / "encoder.safetensors", settings)
    unseen = torch.stack([image for _, image in images[:8]])
    average = error(generator, encoder.latent_avg.expand(8, -1, -1), unseen)
    first = error(generator, encode(encoder, generator, unseen, iterations=1), unseen)
    last = error(generator, encode(encoder, generator, unseen), unseen)
    assert last < first < average and last < 0.75 * average


def test_the_file_holds_the_encoder_and_says_where_it_comes_from(generator, images, tmp_path):
    out = tmp_path / "encoder.safetensors"
    encoder = train_encoder(generator, images, Blurred(), out, SETTINGS)
    loaded = load_restyle(out)
    assert loaded.config == encoder.config and loaded.config.iterations == 2
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    batch = images[0][1][None]
    assert torch.equal(encode(loaded, generator, batch), encode(encoder, generator, batch))
    assert torch.equal(loaded.latent_avg, generator.w_avg.expand(8, -1))
    assert b'\\"perceptual\\": \\"blurred\\"' in out.read_bytes() and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_an_interrupted_training_continues_to_the_same_bits(generator, images, tmp_path, stop):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train_encoder(generator, images, Blurred(), whole, SETTINGS)
    calls_per_step = 1 + SETTINGS.iterations
    with pytest.raises(KeyboardInterrupt):
        train_encoder(generator, images, Blurred(calls_per_step * stop + 1), parts, SETTINGS, save_every=2)
    assert state_path(parts).exists() == (stop >= 2) and not parts.exists()
    done = stop // 2 * 2
    train_encoder(generator, images, Blurred(calls_per_step * (6 - done)), parts, SETTINGS, save_every=2)
    assert parts.read_bytes() == whole.read_bytes()
    assert not state_path(parts).exists()


@pytest.mark.parametrize("changed", ["settings", "images", "generator", "perceptual"])
def test_a_state_of_another_training_is_refused(generator, images, tmp_path, changed):
    out, perceptual, settings = tmp_path / "encoder.safetensors", Blurred(10), SETTINGS
    with pytest.raises(KeyboardInterrupt):
        train_encoder(generator, images, perceptual, out, settings, save_every=2)
    if changed == "settings":
        settings = EncoderSettings(steps=7, batch_size=2, iterations=2, seed=3)
    if changed == "images":
        images = images[1:]
    if changed == "generator":
        generator = StyleGAN2(**generator.config()).eval().requires_grad_(False)
    perceptual.description = "sharp" if changed == "perceptual" else "blurred"
    with pytest.raises(CheckpointError, match=f"with another {changed}; delete it to start again"):
        train_encoder(generator, images, perceptual, out, settings)


def test_a_damaged_state_is_refused(generator, images, tmp_path):
    out = tmp_path / "encoder.safetensors"
    state_path(out).write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="encoder.training.safetensors: damaged .*download it again"):
        train_encoder(generator, images, Blurred(), out, SETTINGS)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_the_seed(generator, images, tmp_path):
    seen = []
    for seed in (0, 0, 1):
        few = Recorded(images[:5])
        settings = EncoderSettings(steps=5, batch_size=2, iterations=1, seed=seed)
        train_encoder(generator, few, Blurred(), tmp_path / "encoder.safetensors", settings)
        seen.append(few.read[1:])  # the first is read to identify the set
    names = sorted(name for name, _ in images[:5])
    assert sorted(seen[0][:5]) == sorted(seen[0][5:]) == names
    assert seen[0] == seen[1] != seen[2]


def test_the_generator_and_the_global_random_numbers_are_left_alone(generator, images, tmp_path):
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    state = torch.get_rng_state()
    train_encoder(generator, images, Blurred(), tmp_path / "encoder.safetensors", SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "constant", "architecture", "expected"),
    [
        ((4, 4, 4), (4, 4), "small", (32, 32)),
        ((4,) * 6, (4, 4), "small", (128, 128)),
        ((4,) * 7, (4, 2), "small", (128, 64)),
        ((4,) * 9, (4, 4), "resnet34", (256, 256)),
        ((4,) * 5, (4, 2), "ir_se50", (64, 32)),
    ],
)
def test_an_encoder_sees_the_generators_proportions(channels, constant, architecture, expected):
    with torch.device("meta"):
        model = StyleGAN2(channels=channels, constant_size=constant, z_dim=4, w_dim=4, mapping_layers=1)
    config = encoder_config(model, EncoderSettings(architecture=architecture))
    assert config.image_size == expected and config.num_ws == model.num_ws


def test_what_cannot_be_trained_is_refused_before_the_first_step(generator, images, tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        train_encoder(generator, [], Blurred(0), tmp_path / "encoder.safetensors")
    with pytest.raises(FileNotFoundError, match="create it first"):
        train_encoder(generator, images, Blurred(0), tmp_path / "no folder" / "encoder.safetensors")
    wide = [("wide", torch.zeros(3, 16, 32))]
    with pytest.raises(ValueError, match="proportions of 32 x 32"):
        train_encoder(generator, wide, Blurred(0), tmp_path / "encoder.safetensors")


def test_a_training_that_diverges_stops_and_says_so(generator, images, tmp_path):
    class Broken(Blurred):
        def embed(self, images_BCHW: Tensor) -> Tensor:
            return super().embed(images_BCHW) * torch.nan

    with pytest.raises(FloatingPointError, match="step 0 is nan; lower learning_rate=0.001"):
        train_encoder(generator, images, Broken(), tmp_path / "encoder.safetensors", SETTINGS)
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"architecture": "vit"}, {"steps": 0}, {"batch_size": 0}, {"learning_rate": 0}, {"pixel_weight": -1}]
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="pass|must be"):
        EncoderSettings(**wrong)
