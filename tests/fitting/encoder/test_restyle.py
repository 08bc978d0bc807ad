"""ReStyle encoders: published files give the published latents; other files are refused with one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, save_checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.fitting.encoder.backbones import PUBLISHED_UNITS, EncoderConfig, StyleEncoder
from handsoff_stream.fitting.encoder.files import MANIFEST_KEY, load_restyle, save_encoder
from handsoff_stream.fitting.encoder.restyle import crop_rows, encode, encode_images, iterate, resize_generated
from handsoff_stream.generators import Generator, StyleGAN2, load_generator

DATA = Path(__file__).parents[2] / "data"
FILES = ("restyle_psp_tiny", "restyle_e4e_cars_tiny")
PUBLISHED = {"widths": (64, 64, 128, 256, 512), "w_dim": 512, "image_size": (256, 256)}


def opened(name: str) -> tuple[StyleEncoder, Generator, Tensor, Any]:
    """Encoder, its generator, images in [0, 1], expected arrays."""
    expected = np.load(DATA / f"{name}_expected.npz")
    images = torch.from_numpy(expected["input_uint8"]).float() / 255
    return load_restyle(DATA / f"{name}.pt"), load_generator(DATA / f"{name}.pt"), images, expected


def small(**changes: Any) -> EncoderConfig:
    """Tiny widths, 16 x 16 latents of 8."""
    base = {"backbone": "resnet34", "widths": (4, 4, 5, 6, 7), "units": (1, 2, 1, 1), "num_ws": 6, "w_dim": 8}
    return EncoderConfig(**({**base, "image_size": (32, 32)} | changes))


def random_encoder(config: EncoderConfig) -> StyleEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = StyleEncoder(config)
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        encoder.latent_avg.copy_(torch.randn(config.w_dim).expand_as(encoder.latent_avg))
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_every_pass_gives_the_published_latents_and_images(name):
    encoder, generator, images, expected = opened(name)
    passes = list(iterate(encoder, generator, images))
    assert len(passes) == 5
    for number, (w_plus, made) in enumerate(passes):
        shown = crop_rows(made) if encoder.config.crop else made
        np.testing.assert_allclose(w_plus, expected["latents"][:, number], rtol=0, atol=1e-4)
        np.testing.assert_allclose(shown, expected["images"][:, number], rtol=0, atol=1e-4)
    average = resize_generated(encoder, generator.synthesis(encoder.latent_avg[None]).images)[0, :, ::16, ::16]
    np.testing.assert_allclose(average, expected["avg_image_small"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(encoder.latent_avg, expected["latent_avg"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(encode(encoder, generator, images), expected["latents"][:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_a_batch_gives_what_its_images_give_one_by_one(name):
    encoder, generator, images, _ = opened(name)
    named = [("left", images[0]), ("right", images[1])]
    together = encode_images(encoder, generator, named, batch_size=2)
    alone = encode_images(encoder, generator, named)
    assert list(together) == list(alone) == ["left", "right"]
    for name_, w_plus in together.items():
        assert w_plus.shape == (generator.num_ws, generator.w_dim)
        torch.testing.assert_close(w_plus, alone[name_], rtol=0, atol=1e-5)
    assert torch.equal(encode_images(encoder, generator, named[1:])["right"], alone["right"])


def test_cars_are_the_same_cropped_and_in_the_middle_of_a_square():
    encoder, generator, images, _ = opened("restyle_e4e_cars_tiny")
    square = F.pad(images, (0, 0, 32, 32), value=0.3)
    assert torch.equal(encode(encoder, generator, images), encode(encoder, generator, square))


def test_images_of_any_scale_are_encoded_much_alike():
    encoder, generator, _, _ = opened("restyle_psp_tiny")
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(coarse, (512, 512), mode="bilinear")
    large = encode(encoder, generator, smooth)
    little = encode(encoder, generator, F.avg_pool2d(smooth, 4))
    assert (large - little).norm() < 0.05 * (large - encoder.latent_avg).norm()


def test_gradients_reach_a_pass_through_its_own_step_only():
    encoder, generator, images, _ = opened("restyle_psp_tiny")
    encoder.requires_grad_(True)
    for w_plus, made in iterate(encoder, generator, images[:1], iterations=2):
        (gradient,) = torch.autograd.grad(made.sum(), encoder.styles[0].linear.bias, retain_graph=True)
        step_only = torch.autograd.grad(made.sum(), w_plus)[0][:, 0].sum(dim=0)
        torch.testing.assert_close(gradient, step_only)


@pytest.mark.parametrize(
    ("backbone", "num_ws", "tensors", "millions"), [("ir_se50", 18, 565, 205.6), ("resnet34", 16, 377, 176.5)]
)
def test_full_size_networks_have_the_published_tensors(backbone, num_ws, tensors, millions):
    with torch.device("meta"):
        encoder = StyleEncoder(
            EncoderConfig(backbone=backbone, units=PUBLISHED_UNITS[backbone], num_ws=num_ws, **PUBLISHED)
        )
    assert len(encoder.state_dict()) == tensors + 1  # and the average latent
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions


# The variants without a published fixture: names as in the released code, arithmetic spelt out.


def publish(path: Path, encoder: StyleEncoder, kind: str, **extra: Tensor) -> Path:
    """The encoder as the released code would save it."""
    stem = {"ir_se50": {"stem": "input_layer"}, "resnet34": {"stem.0": "conv1", "stem.1": "bn1", "stem.2": "relu"}}
    state = dict(encoder.state_dict())
    latent_avg = state.pop("latent_avg")
    for ours, theirs in stem[encoder.config.backbone].items():
        state = {k.replace(f"{ours}.", f"{theirs}.", 1) if k.startswith(f"{ours}.") else k: v for k, v in state.items()}
    options = {"encoder_type": kind, "dataset_type": "human_encode", "output_size": 16}
    whole = {**{f"encoder.{k}": v for k, v in state.items()}, **{f"decoder.{k}": v for k, v in extra.items()}}
    torch.save({"state_dict": whole, "opts": options, "latent_avg": latent_avg}, path)
    return path


def pyramid_codes(encoder: StyleEncoder, x: Tensor, taps: tuple[int, int, int]) -> list[Tensor]:
    """What the released pyramid encoders compute before they combine codes."""
    x, seen = encoder.stem(x), []
    for i, unit in enumerate(encoder.body):
        x = unit(x)
        if i in taps:
            seen.append(x)
    fine, middle, coarse = seen
    middle = F.interpolate(coarse, middle.shape[2:], mode="bilinear", align_corners=True) + encoder.latlayer1(middle)
    fine = F.interpolate(middle, fine.shape[2:], mode="bilinear", align_corners=True) + encoder.latlayer2(fine)
    maps = [coarse] * 3 + [middle] * 4 + [fine] * (len(encoder.styles) - 7)
    return [head(m) for head, m in zip(encoder.styles, maps, strict=True)]


@pytest.mark.parametrize(
    ("kind", "backbone", "taps", "convolutions"),
    [
        ("GradualStyleEncoder", "ir_se50", (6, 20, 23), (4, 5, 6)),
        ("ResNetGradualStyleEncoder", "resnet34", (6, 12, 15), (4, 5, 6)),
    ],
)
@torch.no_grad()
def test_pyramid_encoders_read_three_maps(tmp_path, kind, backbone, taps, convolutions):
    config = small(backbone=backbone, units=PUBLISHED_UNITS[backbone], num_ws=9, pyramid=True, image_size=(256, 256))
    encoder = random_encoder(config)
    loaded = load_restyle(publish(tmp_path / "encoder.pt", encoder, kind))
    assert loaded.config == config
    assert tuple(len(loaded.styles[j].convs) // 2 for j in (2, 6, 7)) == convolutions
    x = torch.randn(1, 6, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), torch.stack(pyramid_codes(encoder, x, taps), dim=1))


@torch.no_grad()
def test_an_encoder_of_the_image_alone_makes_one_pass_of_the_generators_proportions(tmp_path):
    config = small(
        backbone="ir_se50",
        units=PUBLISHED_UNITS["ir_se50"],
        num_ws=8,
        pyramid=True,
        offsets=True,
        input_channels=3,
        image_size=(256, 128),
        iterations=1,
    )
    encoder = random_encoder(config)
    path = publish(tmp_path / "e4e.pt", encoder, "Encoder4Editing", **{"input.input": torch.zeros(1, 6, 4, 2)})
    loaded = load_restyle(path)
    assert loaded.config == config
    generator = StyleGAN2(channels=(4, 4, 4, 4), constant_size=(4, 2), z_dim=8, w_dim=8, mapping_layers=1)
    images = torch.rand(1, 3, 256, 128, generator=torch.Generator().manual_seed(0))
    codes = torch.stack(pyramid_codes(encoder, images * 2 - 1, (6, 20, 23)), dim=1)
    codes[:, 1:] += codes[:, :1].clone()
    torch.testing.assert_close(encode(loaded, generator, images), encoder.latent_avg + codes)
    with pytest.raises(ValueError, match="iterations=2, but an encoder of 3 input channels makes 1 pass"):
        encode(loaded, generator, images, iterations=2)


def test_a_written_encoder_reads_back_the_same(tmp_path):
    encoder = random_encoder(small(offsets=True, iterations=2))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"images": 3})
    before = torch.get_rng_state()
    loaded = load_restyle(tmp_path / "encoder.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.config == encoder.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, values in encoder.state_dict().items():
        assert torch.equal(values, loaded.state_dict()[name])


# Refusals


def edited(tmp_path: Path, **changes: Any) -> Path:
    """The pSp fixture with other options or tensors; None deletes."""
    content = torch.load(DATA / "restyle_psp_tiny.pt", weights_only=True)
    for place, values in changes.items():
        content[place] = {k: v for k, v in (content[place] | values).items() if v is not None}
    torch.save(content, tmp_path / "edited.pt")
    return tmp_path / "edited.pt"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"opts": {"encoder_type": "SwinEncoder"}}, "SwinEncoder.*known are BackboneEncoder"),
        ({"opts": {"encoder_type": None}}, "known are"),
        ({"opts": {"encoder_type": "ResNetBackboneEncoder"}}, "conv1.weight"),
        ({"opts": {"encoder_type": "GradualStyleEncoder"}}, "latlayer1.*missing"),
        ({"state_dict": {"encoder.body.5.res_layer.1.weight": None}}, "body.5.*missing"),
        ({"state_dict": {"encoder.body.7.res_layer.1.weight": torch.zeros(5, 17, 3, 3)}}, "do not fit"),
        ({"state_dict": {"encoder.input_layer.0.weight": torch.zeros(16, 4, 3, 3)}}, "num_ws=|image_size="),
        ({"state_dict": {"encoder.styles.1.linear.bias": torch.full((16,), torch.nan)}}, "NaN"),
        ({"state_dict": {"encoder.styles.1.linear.bias": "text"}}, "needed a tensor"),
    ],
)
def test_a_published_file_that_is_not_what_it_says_is_refused(tmp_path, changes, says):
    path = edited(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"edited.pt: .*{says}"):
        load_restyle(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.pt", "no such file"),
        ("rosinality_32.pt", "no ReStyle encoder, but .*g_ema"),
        ("stylegan2ada_32.pkl", "no ReStyle encoder, but .*G_ema"),
        ("stylegan1_avg_latent.npy", "no ReStyle encoder, but ndarray"),
        ("evil/evil.pt", "system"),
        ("evil/evil_legacy.pt", "system"),
    ],
)
def test_files_without_an_encoder_and_hostile_files_are_refused(name, says):
    with pytest.raises(CheckpointError, match=says):
        load_restyle(DATA / name)


def test_damaged_and_foreign_files_of_our_own_format_are_refused(tmp_path, checkpoint):
    path = tmp_path / "encoder.safetensors"
    encoder = random_encoder(small())
    save_encoder(path, encoder, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        load_restyle(path)
    save_checkpoint(path, Checkpoint(checkpoint.generator))
    with pytest.raises(CheckpointError, match=f"without a readable {MANIFEST_KEY} manifest"):
        load_restyle(path)
    (tmp_path / "half.pt").write_bytes((DATA / "restyle_psp_tiny.pt").read_bytes()[:50_000])
    with pytest.raises(CheckpointError, match="half.pt"):
        load_restyle(tmp_path / "half.pt")


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ({"format_version": 2}, "format version 2, this release reads up to 1"),
        ({"config": {"num_ws": 10**9}}, "num_ws: .*1000000000 came"),
        ({"config": {"num_ws": 5000}}, "5000 style inputs; up to 22"),
        ({"config": {"image_size": [8000, 8000]}}, "image_size="),
        ({"config": {"backbone": "vit"}}, "backbone='vit'"),
        ({"config": {"widths": "wide!"}}, "widths: .*'wide!' came"),
        ({"config": {"w_dim": 9}}, "do not fit"),
        ({"config": {"unheard_of": 1}}, "unheard_of"),
    ],
)
def test_manifests_that_lie_are_refused(tmp_path, manifest, says):
    encoder = random_encoder(small())
    config = {**encoder.config.config(), **manifest.get("config", {})}
    lying = {"format_version": 1, **manifest, "config": config}
    tensors = {k: v.clone() for k, v in encoder.state_dict().items()}
    save_file(tensors, tmp_path / "lying.safetensors", metadata={MANIFEST_KEY: json.dumps(lying)})
    with pytest.raises(CheckpointError, match=says):
        load_restyle(tmp_path / "lying.safetensors")


def test_another_generator_and_images_that_do_not_fit_are_refused(checkpoint):
    encoder, generator, images, _ = opened("restyle_psp_tiny")
    with pytest.raises(ValueError, match="use the generator that the encoder was trained for"):
        encode(encoder, checkpoint.generator, images)
    with pytest.raises(ValueError, match="proportions of 16 x 16"):
        encode(encoder, generator, images[:, :, :192])
    for wrong in (images * 255, images[:, :1], images[0]):
        with pytest.raises(ValueError, match=r"pass \[B, 3, H, W\] with values in \[0, 1\]"):
            encode(encoder, generator, wrong)
    with pytest.raises(ValueError, match="1 or more passes"):
        encode(encoder, generator, images, iterations=0)


@pytest.mark.parametrize(
    "wrong", [{"widths": (4, 4)}, {"units": (1, 1, 1, 0)}, {"input_channels": 4}, {"image_size": (16, 16)}]
)
def test_geometries_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(ValueError, match="an encoder sees|describe no encoder"):
        replace(small(), **wrong)
