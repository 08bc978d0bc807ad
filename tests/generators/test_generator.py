"""StyleGAN2 reproduces the numbers of the reference implementation, and reads its files without executing them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators import StyleGAN2, load_generator

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    with np.load(DATA / "rosinality_32_expected.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    generator = load_generator(DATA / "rosinality_32.pt")
    assert isinstance(generator, StyleGAN2)
    return generator


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() < tolerance


def test_geometry_is_read_off_the_tensors(generator):
    assert generator.resolution == (32, 32)
    assert (generator.num_ws, generator.z_dim, generator.w_dim) == (8, 28, 28)
    assert generator.feature_channels == (32, 32, 24, 24, 20, 20, 12, 12)
    assert generator.noise_shapes == ((4, 4), (8, 8), (8, 8), (16, 16), (16, 16), (32, 32), (32, 32))


def test_mapping_and_truncation_match_the_reference(generator, expected):
    w = generator.mapping(expected["z"])
    assert_close(w, expected["w"], 1e-5)
    assert_close(generator.truncate(w), expected["wplus_z"], 1e-5)
    assert_close(generator.truncate(w, 0.7), expected["wplus_trunc07"], 1e-5)


def test_truncation_cutoff_leaves_later_layers_alone(generator, expected):
    w = generator.mapping(expected["z"])
    mixed = generator.truncate(w, 0.7, cutoff=3)
    assert torch.equal(mixed[:, :3], generator.truncate(w, 0.7)[:, :3])
    assert torch.equal(mixed[:, 3:], generator.truncate(w)[:, 3:])


@pytest.mark.parametrize(("latent", "image"), [("wplus_z", "image_z"), ("wplus_trunc07", "image_trunc07")])
def test_images_of_mapped_latents_match_the_reference(generator, expected, latent, image):
    assert_close(generator.synthesis(expected[latent]).images, expected[image])


def test_every_feature_map_matches_the_reference(generator, expected):
    synthesis = generator.synthesis(expected["wplus"])
    assert_close(synthesis.images, expected["image_wplus"])
    assert len(synthesis.features.maps) == 8
    for i, feature in enumerate(synthesis.features.maps):
        want = expected[f"feat_{i:02d}"]
        assert_close(feature[0], want.reshape(feature[0].shape))


def test_hypercolumn_matches_the_reference(generator, expected):
    features = generator.synthesis(expected["wplus"]).features
    assert_close(features.hypercolumn((16, 16))[0], expected["hypercolumn16_bilinear"][0])


def test_noise_can_be_left_out_or_given(generator, expected):
    without = generator.synthesis(expected["wplus"], "none").images
    assert_close(without, expected["image_wplus_zero_noise"])
    maps = [expected[f"ext_noise_{i}"] for i in range(7)]
    assert_close(generator.synthesis(expected["wplus"], maps).images, expected["image_wplus_ext_noise"])


def test_noise_of_the_wrong_sizes_is_refused(generator, expected):
    maps = [expected[f"ext_noise_{i}"] for i in range(7)]
    with pytest.raises(ValueError, match=r"one \[1 or B, 1, h, w\] tensor for each"):
        generator.synthesis(expected["wplus"], maps[1:])
    with pytest.raises(ValueError, match="noise=loud does not fit"):
        generator.synthesis(expected["wplus"], "loud")


def test_a_batch_gives_what_its_samples_give_alone(generator, expected):
    together = generator.synthesis(expected["wplus"]).images
    alone = torch.cat([generator.synthesis(w[None]).images for w in expected["wplus"]])
    assert_close(together, alone, 1e-5)


@pytest.mark.parametrize(
    ("constant_size", "channels"), [((4, 4), (8,)), ((4, 2), (8, 6, 4)), ((3, 5), (6, 4)), ((8, 8), (4, 4))]
)
def test_any_constant_shape_and_channel_table_can_be_built(constant_size, channels):
    generator = StyleGAN2(channels=channels, constant_size=constant_size, z_dim=5, w_dim=7, mapping_layers=2)
    synthesis = generator.synthesis(generator.truncate(generator.mapping(torch.ones(2, 5))))
    scale = 2 ** (len(channels) - 1)
    assert synthesis.images.shape == (2, 3, constant_size[0] * scale, constant_size[1] * scale)
    assert synthesis.features.channels == generator.feature_channels
    assert len(synthesis.features.maps) == generator.num_ws == 2 * len(channels)
    assert StyleGAN2(**generator.config()).config() == generator.config()


def test_conv_clamp_bounds_every_feature_map():
    torch.manual_seed(0)
    generator = StyleGAN2(channels=(8, 6, 4), z_dim=4, w_dim=4, mapping_layers=1, conv_clamp=0.5)
    features = generator.synthesis(torch.randn(2, 6, 4)).features
    for feature in features.maps[1:]:
        assert feature.abs().max() == 0.5


def test_half_precision_convolutions_stay_close_to_float32(generator, expected):
    exact = generator.synthesis(expected["wplus"])
    half = generator.synthesis(expected["wplus"], dtype=torch.bfloat16)
    assert half.features.maps[-1].dtype == torch.bfloat16
    assert half.images.dtype == torch.float32
    assert (half.images - exact.images).abs().mean() < 0.02 * exact.images.abs().mean()


def test_latents_of_the_wrong_shape_and_labels_are_refused(generator):
    with pytest.raises(ValueError, match=r"this generator takes \[B, 8, 28\]"):
        generator.synthesis(torch.zeros(2, 7, 28))
    with pytest.raises(ValueError, match="unconditional"):
        generator.mapping(torch.zeros(1, 28), label=torch.zeros(1, 5))


def test_a_geometry_of_nothing_is_refused():
    with pytest.raises(ValueError, match="describe no generator"):
        StyleGAN2(channels=())


def test_a_loaded_generator_is_frozen_and_in_eval_mode(generator):
    assert not generator.training
    assert not any(p.requires_grad for p in generator.parameters())


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    load_generator(DATA / "rosinality_32.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_stored_mean_latent_the_mean_is_estimated_once_and_for_all(tmp_path):
    content = torch.load(DATA / "rosinality_32.pt", weights_only=True)
    del content["latent_avg"]
    torch.save(content, tmp_path / "no_mean.pt")
    first, second = (load_generator(tmp_path / "no_mean.pt").w_avg for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() > 0


def test_a_file_without_stored_noise_maps_loads_with_zero_maps(tmp_path, expected):
    content = torch.load(DATA / "rosinality_32.pt", weights_only=True)
    content["g_ema"] = {k: v for k, v in content["g_ema"].items() if not k.startswith("noises.")}
    torch.save(content, tmp_path / "old.pt")
    images = load_generator(tmp_path / "old.pt").synthesis(expected["wplus"]).images
    assert_close(images, expected["image_wplus_zero_noise"])


def test_a_missing_file_a_truncated_file_and_a_foreign_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_generator(tmp_path / "nothing.pt")
    whole = (DATA / "rosinality_32.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated, or another format"):
        load_generator(tmp_path / "half.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no StyleGAN2 generator"):
        load_generator(tmp_path / "other.pt")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_file_that_would_execute_code_is_refused_and_executes_none(tmp_path):
    torch.save({"g_ema": Payload(tmp_path / "pwned")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="blocked global"):
        load_generator(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()
