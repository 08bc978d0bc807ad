"""Published label generators and latents give the numbers of the original code, or are refused clearly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint, import_generator, load_checkpoint, save_checkpoint
from handsoff_stream.errors import CheckpointError
from handsoff_stream.fitting import LatentSpace
from handsoff_stream.fitting.presets import HIDDEN_WIDTHS, hidden_widths
from handsoff_stream.fitting.published import read_experiment, read_label_generator, read_latents
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.tasks import Segmentation

DATA = Path(__file__).parents[1] / "data"
EXPERIMENT = DATA / "label_generator" / "exp.json"
EXPECTED = np.load(DATA / "label_generator" / "expected.npz")
CHANNELS = (32, 32, 24, 24, 20, 20, 12, 12)
IMAGES = ["image_0", "image_1", "image_2"]


def segmentation(num_classes: int = 5) -> Segmentation:
    return Segmentation([f"class {i}" for i in range(num_classes)], [(i, i, i) for i in range(num_classes)])


def expected(name: str) -> Tensor:
    return torch.from_numpy(EXPECTED[name])


@pytest.fixture(scope="module")
def imported() -> Checkpoint:
    """As a user makes it: the published generator's file and the published label generator's files."""
    base = import_generator(DATA / "rosinality_32.pt")
    return read_label_generator(EXPERIMENT, base.generator.feature_channels).attach_to(base, segmentation())


@pytest.fixture(scope="module")
def outputs(imported) -> Tensor:
    """[M, P, K] of the image that the expected values are about, from its latent on."""
    with np.load(DATA / "rosinality_32_expected.npz") as data:
        w_plus = torch.from_numpy(data["wplus"][:1])
    features = imported.generator.synthesis(w_plus).features
    label_generator = imported.heads["segmentation"].label_generator
    return label_generator.reference(features, imported.size)[:, 0].flatten(2).transpose(1, 2)


def edited(folder: Path, **changes: Any) -> Path:
    """The experiment's JSON with some entries changed; None removes one."""
    entries = json.loads(EXPERIMENT.read_text()) | changes
    path = folder / "exp.json"
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    return path


# Label generators


def test_logits_are_those_of_the_published_code(outputs):
    torch.testing.assert_close(outputs, expected("logits"), rtol=0, atol=1e-5)


def test_votes_labels_and_uncertainty_are_those_of_the_published_code(outputs):
    votes = outputs.argmax(dim=-1).unflatten(1, (16, 16)).permute(1, 2, 0)
    assert torch.equal(votes, expected("votes"))
    assert torch.equal(segmentation().decide(outputs).view(16, 16), expected("label_mode"))
    divergence = segmentation().disagreement(outputs).view(16, 16)
    torch.testing.assert_close(divergence, expected("js").float(), rtol=0, atol=1e-5)


def test_an_imported_label_generator_streams_after_a_trip_through_a_file(imported, tmp_path):
    save_checkpoint(tmp_path / "imported.safetensors", imported)
    loaded = load_checkpoint(tmp_path / "imported.safetensors")
    assert json.dumps(loaded.manifest()) == json.dumps(imported.manifest())
    image, label = next(iter(HandsOffStream(loaded, filter=None)))
    assert image.shape == (3, 16, 16) and label.shape == (16, 16) and int(label.max()) < 5


def test_the_checkpoint_says_which_files_it_was_made_of(imported):
    names = {"rosinality_32.pt", "exp.json", "model_0.pth", "model_1.pth", "model_2.pth"}
    assert set(imported.provenance["sources"]) == names
    assert all(len(digest) == 64 for digest in imported.provenance["sources"].values())


def test_members_may_lie_elsewhere_than_the_experiment(tmp_path):
    experiment = edited(tmp_path, ensemble_size=2)
    read = read_label_generator(experiment, CHANNELS, folder=EXPERIMENT.parent)
    assert read.label_generator.members == 2
    assert not read.label_generator.training and not any(p.requires_grad for p in read.label_generator.parameters())


def test_an_experiment_of_datasetgan_names_its_entries_differently(tmp_path):
    handsoff = read_experiment(EXPERIMENT)
    assert (handsoff.size, handsoff.num_channels, handsoff.members) == ((16, 16), 176, 3)
    assert handsoff.stylegan == "rosinality_32.pt"
    datasetgan = edited(tmp_path, domain=None, ensemble_size=None, category="face", model_num=3)
    assert read_experiment(datasetgan) == handsoff


def test_labels_of_the_middle_rows_crop_the_images_to_them(tmp_path):
    cars = edited(tmp_path, dim=[12, 16, 176])
    base = import_generator(DATA / "rosinality_32.pt")
    read = read_label_generator(cars, CHANNELS, folder=EXPERIMENT.parent)
    checkpoint = read.attach_to(base, segmentation())
    assert checkpoint.size == (12, 16) and checkpoint.crop == (4, 0, 28, 32)  # at half the scale of 32 x 32 images
    image, label = HandsOffStream(checkpoint, filter=None, device="cpu")[0]
    all_image, all_label = HandsOffStream(
        replace(checkpoint, crop=None, output_size=(16, 16)), filter=None, device="cpu"
    )[0]
    assert torch.equal(image, all_image[:, 2:14]) and torch.equal(label, all_label[2:14])
    tall = edited(tmp_path, dim=[20, 16, 176])
    with pytest.raises(ValueError, match="20 x 16 are not the middle rows of images of 32 x 32"):
        read_label_generator(tall, CHANNELS, folder=EXPERIMENT.parent).attach_to(base, segmentation())


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"176 channels, the generator's have 32; .*rosinality_32\.pt"):
        read_label_generator(EXPERIMENT, (16, 16))
    with pytest.raises(CheckpointError, match=r"model_3\.pth"):
        read_label_generator(edited(tmp_path, ensemble_size=4), CHANNELS, folder=EXPERIMENT.parent)
    with pytest.raises(ValueError, match="5 outputs, the task takes 4"):
        base = import_generator(DATA / "rosinality_32.pt")
        read_label_generator(EXPERIMENT, CHANNELS).attach_to(base, segmentation(4))


def test_members_of_another_geometry_are_refused(tmp_path):
    states = [torch.load(EXPERIMENT.parent / f"model_{i}.pth", weights_only=True) for i in range(3)]
    states[1]["model_state_dict"]["module.layers.6.bias"] = torch.zeros(6)
    for i, state in enumerate(states):
        torch.save(state, tmp_path / f"model_{i}.pth")
    with pytest.raises(CheckpointError, match=r"member 1: layers\.6\.bias"):
        read_label_generator(EXPERIMENT, CHANNELS, folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "", '{"dim": [16, 16, 176]}', '{"dim": 3, "model_num": 2}', '{"dim": [16, 16, 176], "model_num": 0}']
    + ['{"dim": [16, 16, 176], "model_num": Infinity}', '{"dim": [16, -1, 176], "model_num": 3}'],
)
def test_a_json_that_is_no_experiment_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"other\.json"):
        read_experiment(tmp_path / "other.json")


def test_hostile_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "model_0.pth").write_bytes((DATA / "evil" / "evil_model_0.pth").read_bytes())
    with pytest.raises(CheckpointError, match=r"model_0\.pth: .*system"):
        read_label_generator(EXPERIMENT, CHANNELS, folder=tmp_path)
    with pytest.raises(CheckpointError, match="system"):
        read_latents(DATA / "evil" / "evil_latents.npy", IMAGES)
    (tmp_path / "model_0.pth").write_bytes((DATA / "rosinality_32.pt").read_bytes())
    with pytest.raises(CheckpointError, match="no member of a label generator.*g_ema"):
        read_label_generator(EXPERIMENT, CHANNELS, folder=tmp_path)


# Latents


def test_both_kinds_of_published_latents_give_an_image_the_same_latent():
    by_name = read_latents(DATA / "label_generator" / "restyle_latents.npy", [f"{name}.jpg" for name in IMAGES])
    by_number = read_latents(DATA / "label_generator" / "latents_formatted.npy", IMAGES)
    formatted = np.load(DATA / "label_generator" / "latents_formatted.npy")
    for i, name in enumerate(IMAGES):
        assert by_number[name].dtype == torch.float32 and by_number[name].shape == (8, 28)
        assert torch.equal(by_number[name], torch.from_numpy(formatted[i]).float())
        assert torch.equal(by_name[f"{name}.jpg"], by_number[name])


def test_the_order_of_names_does_not_matter_and_a_suffix_neither():
    path = DATA / "label_generator" / "restyle_latents.npy"
    forward, backward = read_latents(path, IMAGES), read_latents(path, IMAGES[::-1])
    assert list(backward) == IMAGES[::-1]
    assert all(torch.equal(forward[name], backward[name]) for name in IMAGES)
    assert torch.equal(read_latents(path, ["image_1.png"])["image_1.png"], forward["image_1"])


@pytest.mark.parametrize(
    ("file", "names", "message"),
    [
        ("restyle_latents.npy", ["image_0", "portrait"], r"no latent for \['portrait'\]"),
        ("latents_formatted.npy", ["image_3"], r"for \['image_3'\]"),
        ("latents_formatted.npy", ["portrait"], r"for \['portrait'\]"),
        ("latents_formatted.npy", ["image_1", "1_copy"], r"several images: \['1_copy', 'image_1'\]"),
        ("model_0.pth", ["image_0"], "no latent"),
    ],
)
def test_images_without_a_latent_of_their_own_are_named(file, names, message):
    with pytest.raises(CheckpointError, match=message):
        read_latents(DATA / "label_generator" / file, names)


def test_latents_of_one_vector_an_image_are_its_rows(tmp_path):
    z_ND = np.random.default_rng(0).normal(size=(3, 28))
    np.save(tmp_path / "z.npy", z_ND)
    read = read_latents(tmp_path / "z.npy", IMAGES)
    assert all(torch.equal(read[name], torch.from_numpy(z_ND[i]).float()) for i, name in enumerate(IMAGES))


def test_an_array_of_anything_else_is_refused(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((3, 4, 4, 3)))
    with pytest.raises(CheckpointError, match=r"an array \[3, 4, 4, 3\], not latents"):
        read_latents(tmp_path / "images.npy", IMAGES)


@pytest.mark.parametrize(("psi", "cutoff"), [(1.0, None), (0.7, None), (0.7, 3)])
def test_latents_z_and_w_become_those_that_made_the_image(imported, psi, cutoff):
    generator = imported.generator
    z_D = torch.randn(generator.z_dim, generator=torch.Generator().manual_seed(0))
    w_D = generator.mapping(z_D[None])[0]
    expected_LD = generator.truncate(w_D[None], psi, cutoff)[0]
    for name, latent in {"z": z_D, "w": w_D}.items():
        space = LatentSpace(name=name, truncation=psi, cutoff=cutoff)
        assert torch.equal(space.w_plus(generator, {"a": latent})["a"], expected_LD)
    assert torch.equal(LatentSpace().w_plus(generator, {"a": expected_LD})["a"], expected_LD)


def test_a_latent_space_that_cannot_be_is_refused(imported):
    with pytest.raises(ValueError, match=r"space 's' is unknown; pass one of w\+, w, z"):
        LatentSpace(name="s")
    with pytest.raises(ValueError, match="used as they are"):
        LatentSpace(truncation=0.7)
    with pytest.raises(ValueError, match="cutoff=-1 is not a number of style inputs"):
        LatentSpace(name="z", cutoff=-1)
    with pytest.raises(ValueError, match=r"\['a'\] are single vectors, not w\+ \[L, D\]; say whether they are z or w"):
        LatentSpace().w_plus(imported.generator, {"a": torch.zeros(28)})
    with pytest.raises(ValueError, match=r"latent 'a' is \[8, 28\], z of this generator has 28 numbers"):
        LatentSpace(name="z").w_plus(imported.generator, {"a": torch.zeros(8, 28)})


# Widths


def test_widths_are_those_of_the_paper():
    assert hidden_widths("faces") == (256, 32)
    assert hidden_widths("faces", num_images=16) == (512, 64)
    assert hidden_widths("cars", num_images=16) == hidden_widths("cars") == (512, 256)
    assert hidden_widths("full-bodies-10", num_images=10) == (2048, 128)
    assert hidden_widths("full-bodies", "keypoints") == (512, 128)
    assert hidden_widths("streets", "depth") == (512, 256)


def test_widths_that_were_not_published_are_refused_with_those_that_were():
    with pytest.raises(ValueError, match="cats.*faces segmentation.*streets depth"):
        hidden_widths("cats")
    assert all(min(pair) > 0 for widths in HIDDEN_WIDTHS.values() for pair in widths)
