"""Published generator formats load and give the numbers of their reference implementations; other files are refused.

The files in data/ are small synthetic ones in the published formats; the tolerances are those of the publishers.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from handsoff_stream.checkpoint import Checkpoint, Head, import_generator, load_checkpoint, save_checkpoint
from handsoff_stream.cli import app
from handsoff_stream.errors import CheckpointError
from handsoff_stream.generators import Generator, StyleGAN1, StyleGAN2, load_generator
from handsoff_stream.generators.published import read_generator
from handsoff_stream.generators.published.assemble import assemble
from handsoff_stream.inspect import describe
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation

DATA = Path(__file__).parents[2] / "data"
IMAGE, LATENT = 1e-4, 1e-5
NVLABS = [
    "stylegan2ada_32",
    "stylegan2ada_32_cond",
    "stylegan2ada_16_resnet",
    "stylegan3repo_sg2_32",
    "stylegan_human_64x32",
]
# File => resolution, z, w, style inputs, sum of channels, condition, source.
GEOMETRY = {
    "rosinality_32.pt": (32, 32, 28, 28, 8, 176, 0, "rosinality/stylegan2-pytorch, g_ema, PyTorch file (zip"),
    "rosinality_train_8.pt": (8, 8, 10, 10, 4, 28, 0, "rosinality/stylegan2-pytorch, g_ema, PyTorch file (legacy"),
    "restyle_psp_tiny.pt": (16, 16, 16, 16, 6, 72, 0, "rosinality/stylegan2-pytorch, state_dict"),
    "restyle_e4e_cars_tiny.pt": (16, 16, 12, 12, 6, 72, 0, "rosinality/stylegan2-pytorch, state_dict"),
    "stylegan2ada_32.pkl": (32, 32, 20, 24, 8, 164, 0, "NVlabs/stylegan2-ada-pytorch, G_ema, pickle of protocol 3"),
    "stylegan2ada_32_cond.pkl": (32, 32, 20, 24, 8, 156, 5, "NVlabs/stylegan2-ada-pytorch, G_ema, pickle of"),
    "stylegan2ada_16_resnet.pkl": (16, 16, 12, 14, 6, 96, 0, "NVlabs/stylegan2-ada-pytorch"),
    "stylegan3repo_sg2_32.pkl": (32, 32, 20, 24, 8, 164, 0, "NVlabs/stylegan3 (StyleGAN2)"),
    "stylegan_human_64x32.pkl": (64, 32, 20, 24, 10, 182, 0, "StyleGAN-Human"),
    "stylegan1_128.pt": (128, 128, 18, 18, 18, 176, 0, "DatasetGAN's StyleGAN"),
}


def expected(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}_expected.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() < tolerance


def assert_no_payload_ran() -> None:
    assert not (Path(tempfile.gettempdir()) / "handsoff_pwned").exists()


@pytest.mark.parametrize("name", NVLABS)
def test_nvlabs_latents_images_and_feature_maps_match_the_reference(name):
    generator, want = load_generator(DATA / f"{name}.pkl"), expected(name)
    w = generator.mapping(want["z"], want.get("c"))
    assert_close(w, want["w"], LATENT)
    assert_close(generator.w_avg, want["w_avg"], LATENT)
    assert_close(generator.truncate(w), want["ws_z"], LATENT)
    assert_close(generator.truncate(w, 0.7), want["ws_trunc07"], LATENT)
    assert_close(generator.truncate(w, 0.5, cutoff=3), want["ws_trunc05_cutoff3"], LATENT)
    for latent, image in (("ws_z", "image_z"), ("ws_trunc07", "image_trunc07"), ("wplus", "image_wplus")):
        assert_close(generator.synthesis(want[latent]).images, want[image], IMAGE)
    assert_close(generator.synthesis(want["wplus"], "none").images, want["image_wplus_no_noise"], IMAGE)
    features = generator.synthesis(want["wplus"]).features
    assert len(features.maps) == sum(key.startswith("feat_") for key in want)
    for i, feature in enumerate(features.maps):
        assert_close(feature[:1], want[f"feat_{i:02d}"], IMAGE)


def test_8_bit_images_of_nvlabs_files_match_the_reference():
    generator, want = load_generator(DATA / "stylegan2ada_32.pkl"), expected("stylegan2ada_32")
    images = generator.synthesis(want["wplus"]).images.permute(0, 2, 3, 1)
    levels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert (levels.int() - want["image_wplus_uint8"].int()).abs().max() <= 1


def test_the_clamp_of_a_clamped_file_is_reached():
    generator, want = load_generator(DATA / "stylegan2ada_32_cond.pkl"), expected("stylegan2ada_32_cond")
    maps = generator.synthesis(want["wplus"]).features.maps
    assert max(float(m.abs().max()) for m in maps[1:]) == 1.5


def test_a_training_snapshot_in_the_legacy_container_gives_its_running_average():
    generator, want = load_generator(DATA / "rosinality_train_8.pt"), expected("rosinality_train_8")
    assert_close(generator.truncate(generator.mapping(want["z"])), want["wplus_z"], LATENT)
    assert_close(generator.synthesis(want["wplus_z"]).images, want["image_z"], IMAGE)
    assert generator.w_avg.abs().max() > 0  # the file stores none: estimated


@pytest.mark.parametrize(("name", "rows"), [("restyle_psp_tiny", slice(None)), ("restyle_e4e_cars_tiny", slice(2, 14))])
def test_the_decoder_of_an_encoder_file_is_its_generator(name, rows):
    generator, want = load_generator(DATA / f"{name}.pt"), expected(name)
    assert_close(generator.w_avg, want["latent_avg"][0], LATENT)
    images = generator.synthesis(want["latents"].flatten(0, 1)).images[:, :, rows]
    assert_close(images, want["images"].flatten(0, 1), IMAGE)


@pytest.fixture(scope="module")
def stylegan1() -> Generator:
    return load_generator(DATA / "stylegan1_128.pt", average_latent=DATA / "stylegan1_avg_latent.npy")


def test_stylegan1_matches_the_reference(stylegan1):
    want = expected("stylegan1_128")
    assert isinstance(stylegan1, StyleGAN1)
    w = stylegan1.mapping(want["z"])
    assert_close(w, want["w_mapped"], LATENT)
    assert_close(stylegan1.truncate(w, 0.7, cutoff=8), want["w_truncated"], LATENT)
    noise = [want[f"noise_{i:02d}"].float() for i in range(12)]
    synthesis = stylegan1.synthesis(want["wplus"], noise)
    assert_close(synthesis.images, want["image_wplus"], IMAGE)
    for i, feature in enumerate(synthesis.features.maps):
        sampled = feature if feature.shape[-1] <= 32 else feature[:, :, 1::4, 2::4]
        assert_close(sampled, want[f"feat_{i:02d}"], 2 * IMAGE)
    truncated = stylegan1.synthesis(want["w_truncated"], noise).images[:, :, 1::4, 2::4]
    assert_close(truncated, want["image_trunc_sub"], IMAGE)


def test_stylegan1_geometry_is_that_of_datasetgan(stylegan1):
    assert stylegan1.feature_channels == (20, 20, 20, 20, 20, 20, 16, 16, 8, 8, 4, 4)
    assert len(stylegan1.noise_shapes) == 12 and stylegan1.noise_shapes[-1] == (128, 128)
    published = StyleGAN1(channels=[512, 512, 512, 512, 256, 128, 64, 32, 16], z_dim=4, w_dim=4, mapping_layers=1)
    assert published.resolution == (1024, 1024) and sum(published.feature_channels) == 5088
    assert StyleGAN1(**stylegan1.config()).config() == stylegan1.config()


def test_stylegan1_without_its_average_latent_file_estimates_it():
    first, second = (load_generator(DATA / "stylegan1_128.pt").w_avg for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0


def test_stylegan1_can_be_labelled_although_its_first_map_is_not_constant(stylegan1):
    torch.manual_seed(0)
    labels = LabelGenerator(stylegan1.feature_channels, hidden=(6, 5), num_outputs=3, members=2).eval()
    head = Head(Segmentation(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2))), labels)

    checkpoint = Checkpoint(stylegan1, {"segmentation": head}, output_size=(32, 32))
    synthesizer = Synthesizer(checkpoint, SynthesisOptions(), torch.device("cpu"))
    _, features = synthesizer.generate([0, 1])
    with torch.no_grad():
        slow_MBKHW = labels.reference(features, (32, 32))
        for rows, outputs_MPK in synthesizer.labeller.folded["segmentation"].tiles(features, (32, 32)):
            want = slow_MBKHW[..., rows, :].permute(0, 1, 3, 4, 2).flatten(1, 3)
            assert_close(outputs_MPK, want, IMAGE)


@pytest.mark.parametrize("shape", [(17,), (18, 17), ()])
def test_an_average_latent_of_another_size_is_refused(tmp_path, shape):
    np.save(tmp_path / "mean.npy", np.zeros(shape, np.float32))
    with pytest.raises(CheckpointError, match=r"mean.npy: .*average latent"):
        load_generator(DATA / "stylegan1_128.pt", average_latent=tmp_path / "mean.npy")


def test_an_average_latent_that_differs_between_layers_is_refused(tmp_path):
    np.save(tmp_path / "mean.npy", np.arange(36, dtype=np.float32).reshape(2, 18))
    with pytest.raises(CheckpointError, match="differs between style inputs"):
        load_generator(DATA / "stylegan1_128.pt", average_latent=tmp_path / "mean.npy")


def wrapped(content: dict, key: str) -> dict:
    """The same generator in the ways that other tools write it."""
    state = content["g_ema"]
    return {
        "g": {"g": state},
        "bare": state,
        "module": {"g_ema": {f"module.{k}": v for k, v in state.items()}},
        "bare module": {f"module.{k}": v for k, v in state.items()},
        "decoder": {"state_dict": {f"decoder.{k}": v for k, v in state.items()}},
        "module decoder": {"state_dict": {f"module.decoder.{k}": v for k, v in state.items()}},
        "float16": {"g_ema": {k: v.half() for k, v in state.items()}},
    }[key]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["g", "bare", "module", "bare module", "decoder", "module decoder", "float16"])
def test_wrappers_and_prefixes_of_a_state_dict_make_no_difference(tmp_path, key, legacy):
    content = torch.load(DATA / "rosinality_32.pt", weights_only=True)
    torch.save(wrapped(content, key), tmp_path / "file", _use_new_zipfile_serialization=not legacy)
    got = load_generator(tmp_path / "file").synthesis(expected("rosinality_32")["wplus"]).images
    assert_close(got, expected("rosinality_32")["image_wplus"], 0.05 if key == "float16" else IMAGE)


@pytest.mark.parametrize("name", GEOMETRY)
def test_inspect_prints_the_geometry_and_the_source(name):
    height, width, z, w, num_ws, channels, label_dim, source = GEOMETRY[name]
    facts = describe(DATA / name)
    family = "stylegan1" if "stylegan1_" in name else "stylegan2"
    assert facts["generator"].startswith(f"{family}, {height} x {width} (height x width)")
    condition = f"conditional on {label_dim} numbers" if label_dim else "unconditional"
    assert facts["latents"] == f"z {z}, w {w}, {num_ws} style inputs, {condition}"
    assert facts["hypercolumn"].startswith(f"{channels} channels from ")
    assert source in facts["file"]


def test_formats_are_told_apart_by_content_not_by_name(tmp_path):
    for name in GEOMETRY:
        (tmp_path / "file.jpg").write_bytes((DATA / name).read_bytes())
        assert read_generator(tmp_path / "file.jpg").source == read_generator(DATA / name).source


@pytest.mark.parametrize("name", GEOMETRY)
def test_convert_keeps_every_number_and_names_its_source(name, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(DATA / name), str(tmp_path / "out.safetensors")])
    assert result.exit_code == 0
    before, written = load_generator(DATA / name), load_checkpoint(tmp_path / "out.safetensors")
    assert written.generator.config() == before.config()
    for key, tensor in before.state_dict().items():
        assert torch.equal(written.generator.state_dict()[key], tensor)
    assert list(written.provenance["sources"]) == [name] and len(written.provenance["sources"][name]) == 64


def test_a_checkpoint_of_ours_is_not_converted_again(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", import_generator(DATA / "rosinality_32.pt"))
    with pytest.raises(CheckpointError, match="nothing to convert"):
        import_generator(tmp_path / "a.safetensors")


def test_a_conditional_generator_says_that_it_needs_a_label():
    generator = load_generator(DATA / "stylegan2ada_32_cond.pkl")
    assert generator.label_dim == 5
    for label in (None, torch.zeros(1, 4)):
        with pytest.raises(ValueError, match=r"conditional: pass float32 \[1, 5\]"):
            generator.mapping(torch.zeros(1, 20), label)


def test_plain_residual_and_conditional_geometries_survive_their_config():
    torch.manual_seed(0)
    for options in ({"architecture": "orig"}, {"architecture": "resnet", "mapping_hidden": 9}, {"label_dim": 3}):
        generator = StyleGAN2(channels=(6, 5, 4), z_dim=4, w_dim=7, mapping_layers=3, **options)
        again = StyleGAN2(**generator.config())
        again.load_state_dict(generator.state_dict())
        assert again.config() == generator.config()
        images = again.synthesis(torch.randn(2, 6, 7)).images
        assert images.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="architecture='dense' is unknown"):
        StyleGAN2(channels=(4,), architecture="dense")


def test_a_plain_generator_is_a_skip_generator_of_which_only_the_last_image_counts():
    torch.manual_seed(0)
    skip, plain = (
        StyleGAN2(channels=(6, 5, 4), z_dim=4, w_dim=7, mapping_layers=1, architecture=a) for a in ("skip", "orig")
    )
    state = skip.state_dict()
    for name in state.keys() - plain.state_dict().keys():
        assert ".to_rgb." in name
        state[name].zero_()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    w_plus = torch.randn(2, 6, 7)
    assert torch.equal(plain.synthesis(w_plus).images, skip.synthesis(w_plus).images)


def test_a_usual_generator_has_the_config_and_the_weights_it_always_had():
    generator = StyleGAN2(channels=(6, 4), z_dim=4, w_dim=4, mapping_layers=1)
    assert set(generator.config()) == {
        *("channels", "constant_size", "z_dim", "w_dim"),
        *("mapping_layers", "mapping_lr_multiplier", "conv_clamp", "image_channels"),
    }
    assert {name.split(".")[0] for name in generator.state_dict()} == {"constant", "mapping_network", "blocks", "w_avg"}


def test_stylegan3_is_refused_in_a_sentence():
    with pytest.raises(CheckpointError, match=r"alias-free \(StyleGAN3\) generator, which is not supported"):
        load_generator(DATA / "stylegan3_16_unsupported.pkl")


def test_swagan_is_refused_in_a_sentence(tmp_path):
    content = torch.load(DATA / "rosinality_32.pt", weights_only=True)
    content["g_ema"]["to_rgb1.bias"] = torch.zeros(1, 12, 1, 1)
    torch.save(content, tmp_path / "swagan.pt")
    with pytest.raises(CheckpointError, match="SWAGAN .* is not supported"):
        load_generator(tmp_path / "swagan.pt")


def test_a_label_generator_and_an_array_are_no_generators():
    with pytest.raises(CheckpointError, match="no StyleGAN2 generator of a known kind, but the keys"):
        load_generator(DATA / "label_generator" / "model_0.pth")
    with pytest.raises(CheckpointError, match="no StyleGAN2 generator of a known kind, but ndarray"):
        load_generator(DATA / "stylegan1_avg_latent.npy")


def test_a_missing_weight_a_nan_and_a_foreign_filter_are_named(tmp_path):
    def saved(change) -> Path:
        content = torch.load(DATA / "rosinality_32.pt", weights_only=True)
        change(content["g_ema"])
        torch.save(content, tmp_path / "file.pt")
        return tmp_path / "file.pt"

    with pytest.raises(CheckpointError, match=r"file.pt: convs.1.activate.bias is NoneType, needed a tensor"):
        load_generator(saved(lambda state: state.pop("convs.1.activate.bias")))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_generator(saved(lambda state: state["input.input"].fill_(torch.nan)))
    with pytest.raises(CheckpointError, match=r"not the filter \[1, 3, 3, 1\]"):
        load_generator(saved(lambda state: state["convs.0.conv.blur.kernel"].mul_(2)))
    with pytest.raises(CheckpointError, match="do not fit the geometry"):
        load_generator(saved(lambda state: state.update({"style.3.bias": torch.zeros(3)})))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"channels": [8192] * 10}, "tensors do not fit the geometry: blocks.0.conv.bias is missing"),
        ({"channels": [4] * 12}, "12 channels in its geometry; up to 11"),
        ({"channels": [4] * 9, "constant_size": [32, 32]}, "images of .* at most 4096 pixels per side"),
        ({"channels": [10**9]}, "channels.0: .*less than or equal to 8192"),
        ({"channels": [4], "mapping_layers": 8000}, "8000 mapping_layers in its geometry; up to 64"),
        ({"channels": [4], "depth": 3}, "depth: extra inputs are not permitted"),
    ],
)
def test_an_absurd_geometry_is_refused_before_it_is_allocated(config, match):
    with pytest.raises(CheckpointError, match=match):
        assemble(StyleGAN2, config, {})


HOSTILE = {
    "evil.pkl": "posix.system",
    "evil_extra_slot.pkl": "posix.system",
    "evil_storage.pkl": "posix.system",
    "evil_dotted.pkl": "torch.serialization.os.system",
    "evil_builtin_eval.pkl": "builtins.eval",
    "evil.pt": "posix.system",
    "evil_legacy.pt": "posix.system",
    "evil_model_0.pth": "posix.system",
    "evil_latents.npy": "posix.system",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_name_of_what_they_call(name):
    for read in (load_generator, describe):
        with pytest.raises(CheckpointError, match=f"blocked global '{HOSTILE[name]}'"):
            read(DATA / "evil" / name)
    assert_no_payload_ran()


def test_program_text_in_a_valid_file_is_ignored():
    generator, want = load_generator(DATA / "evil" / "evil_persistence.pkl"), expected("evil/evil_persistence")
    assert_close(generator.truncate(generator.mapping(want["z"])), want["ws_z"], LATENT)
    assert_close(generator.synthesis(want["ws_z"]).images, want["image_z"], IMAGE)
    assert_close(generator.synthesis(want["wplus"]).images, want["image_wplus"], IMAGE)
    assert_no_payload_ran()


def test_every_hostile_file_in_the_folder_is_accounted_for():
    names = {p.name for p in (DATA / "evil").iterdir() if p.suffix != ".npz"}
    assert names == HOSTILE.keys() | {"evil_persistence.pkl"}
