"""Samples to annotate are written reproducibly, and fitting uses them without inversion."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_checkpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.datasets.labelled_images import UnlabelledImages
from handsoff_stream.fitting import (
    FeatureTable,
    FitSettings,
    InversionSettings,
    fit_checkpoint,
    fit_label_generator,
    invert,
    invert_images,
    read_latent,
    write_samples,
)
from handsoff_stream.fitting.annotation import sample as sample_for_annotation
from handsoff_stream.fitting.annotation.active_selection import select_actively
from handsoff_stream.fitting.annotation.sample import SAMPLE_KEY, regenerate
from handsoff_stream.fitting.inversion import latents as latents_module
from handsoff_stream.fitting.inversion.perceptual import Perceptual
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation

CPU = torch.device("cpu")
SMALL = FitSettings(hidden=(8, 4), members=2, epochs=1, pixels_per_image=128, batch_size=64)
TASK = Segmentation(("a", "b"), ((0, 0, 0), (255, 255, 255)))


class Gray(Perceptual):
    """A perceptual distance in one line."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "gray")

    def embed(self, images_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(images_BCHW.mean(dim=1, keepdim=True), 2).flatten(1) / 16


def contents(folder: Path) -> dict[str, bytes]:
    """All files that are not hidden."""
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def written(checkpoint, tmp_path) -> Path:
    return write_samples(checkpoint, tmp_path / "samples", num=3, seed=7, device="cpu").parent


# What is written


def test_the_manifest_names_an_image_a_latent_and_a_mask_to_draw_for_every_sample(written):
    assert rows(written) == [
        {"image": f"images/{n}.png", "label": f"masks/{n}.png", "latent": f"latents/{n}.safetensors"}
        for n in ("7-000000", "7-000001", "7-000002")
    ]
    assert set(contents(written)) == {
        "manifest.csv",
        "samples.json",
        *(row[kind] for row in rows(written) for kind in ("image", "latent")),
    }
    assert (written / "masks").is_dir()


def test_samples_are_those_of_a_stream_of_the_same_seed(checkpoint, written):
    stream = HandsOffStream(checkpoint, seed=7, device="cpu")
    for index, (_, image) in enumerate(UnlabelledImages(written / "images", size=(16, 16))):
        assert torch.equal(image, stream[index][0])


def test_the_latent_makes_the_image(checkpoint, written):
    for row in rows(written):
        w_plus = read_latent(written / row["latent"])
        assert w_plus.shape == (checkpoint.generator.num_ws, checkpoint.generator.w_dim)
        made = checkpoint.generator.synthesis(w_plus[None]).images[0].mul(127.5).add(128).floor().clamp(0, 255)
        difference = np.asarray(Image.open(written / row["image"])) - made.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 1  # alone it is computed in another shape than in its chunk


def test_record_and_latent_say_how_to_regenerate_a_sample_bit_for_bit(checkpoint, written):
    record = json.loads((written / "samples.json").read_text())
    latent = written / "latents" / "7-000002.safetensors"
    with safe_open(latent, framework="pt") as file:
        about = json.loads(file.metadata()[SAMPLE_KEY])
    fingerprint = Checkpoint(checkpoint.generator).manifest()["fingerprint"]
    assert record["generator"] == about["generator"] == fingerprint
    for index, told in ((record["indices"][2], record), (about["index"], about)):
        w_plus, _ = regenerate(checkpoint.generator, told["seed"], index, told["truncation"])
        assert torch.equal(w_plus, read_latent(latent))


def test_truncation_is_the_checkpoints_unless_told(checkpoint, tmp_path):
    for psi, expected in ((None, checkpoint.truncation), (0.0, 0.0)):
        folder = write_samples(checkpoint, tmp_path / str(psi), num=1, truncation=psi, device="cpu").parent
        w_plus, _ = regenerate(checkpoint.generator, 0, 0, expected)
        assert torch.equal(read_latent(folder / "latents" / "0-000000.safetensors"), w_plus)
    assert torch.equal(w_plus[0], checkpoint.generator.w_avg)


def test_images_have_the_generators_resolution_even_where_the_stream_has_not(checkpoint, tmp_path):
    smaller = Checkpoint(checkpoint.generator, checkpoint.heads, output_size=(8, 8))
    folder = write_samples(smaller, tmp_path / "samples", num=1, device="cpu").parent
    with Image.open(folder / rows(folder)[0]["image"]) as image:
        assert image.size == (16, 16)


def test_a_published_generator_file_can_be_sampled(tmp_path):
    source = Path(__file__).parents[2] / "data" / "rosinality_32.pt"
    folder = write_samples(source, tmp_path / "samples", num=1, device="cpu").parent
    with Image.open(folder / rows(folder)[0]["image"]) as image:
        assert image.size == (32, 32)


# Which samples


def test_with_candidates_the_samples_are_selected_actively_by_the_sum_of_uncertainties(checkpoint, tmp_path):
    folder = write_samples(checkpoint, tmp_path / "samples", num=2, candidates=30, seed=3, device="cpu").parent
    options = SynthesisOptions(seed=3, truncation=checkpoint.truncation, score="sum")
    indices, scores = select_actively(Synthesizer(checkpoint, options, CPU), 2, candidates=30)
    record = json.loads((folder / "samples.json").read_text())
    assert (record["indices"], record["scores"]) == (indices, scores)
    assert record["selected_by"] == checkpoint.manifest()["fingerprint"]
    assert [row["image"] for row in rows(folder)] == [f"images/3-{i:06d}.png" for i in indices]


def test_a_generator_without_head_cannot_select_and_leaves_no_folder(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="annotate some random samples first"):
        write_samples(Checkpoint(checkpoint.generator), tmp_path / "samples", num=1, candidates=20, device="cpu")
    assert not (tmp_path / "samples").exists()


# Writing again


@pytest.mark.parametrize("candidates", [None, 30])
def test_a_run_interrupted_at_any_write_is_continued_to_the_same_files(checkpoint, tmp_path, monkeypatch, candidates):
    request = {"num": 2, "candidates": candidates, "seed": 3, "device": "cpu"}
    write_samples(checkpoint, tmp_path / "whole", **request)
    whole = contents(tmp_path / "whole")
    real, writes = Path.replace, len(whole)
    for stop in range(writes):
        calls = iter(range(writes))

        def replace(partial, path, stop=stop, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt
            real(partial, path)

        folder = tmp_path / f"stopped at {stop}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", replace)
            write_samples(checkpoint, folder, **request)
        assert len(contents(folder)) == stop
        assert contents(folder).items() <= whole.items()
        write_samples(checkpoint, folder, **request)
        assert contents(folder) == whole


def test_a_selection_is_not_made_twice(checkpoint, tmp_path, monkeypatch):
    request = {"num": 1, "candidates": 20, "device": "cpu"}
    folder = write_samples(checkpoint, tmp_path / "samples", **request).parent
    (folder / "manifest.csv").unlink()
    monkeypatch.setattr(sample_for_annotation, "select_actively", None)
    assert write_samples(checkpoint, folder, **request).exists()


def test_a_finished_folder_is_left_as_its_annotator_made_it(checkpoint, written):
    (written / "masks" / "7-000000.png").write_bytes(b"a mask")
    (written / "images" / "7-000002.png").unlink()
    (written / "manifest.csv").write_text("image,label,latent\n")
    before = contents(written)
    write_samples(checkpoint, written, num=3, seed=7, device="cpu")
    assert contents(written) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num": 4}, "num"),
        ({"seed": 8}, "seed"),
        ({"truncation": 0.5}, "truncation"),
        ({"candidates": 50}, "candidates, selected_by"),
    ],
)
def test_another_request_in_the_same_folder_is_refused(checkpoint, written, change, named):
    before = contents(written)
    with pytest.raises(ValueError, match=f"differs in {named}; nothing was written"):
        write_samples(checkpoint, written, **{"num": 3, "seed": 7, "device": "cpu", **change})
    assert contents(written) == before


def test_samples_of_another_generator_are_refused(written):
    with pytest.raises(ValueError, match="differs in generator"):
        write_samples(make_checkpoint(seed=1), written, num=3, seed=7, device="cpu")


@pytest.mark.parametrize("name", ["photo.png", "samples.json"])
def test_a_folder_of_something_else_is_refused(checkpoint, tmp_path, name):
    (tmp_path / name).write_text("something")
    with pytest.raises(ValueError, match="choose another folder"):
        write_samples(checkpoint, tmp_path, device="cpu")
    assert contents(tmp_path) == {name: b"something"}


def test_no_samples_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="num=0"):
        write_samples(checkpoint, tmp_path, num=0)


# Fitting


def annotated(folder: Path) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor], Tensor]:
    """Named images, their latents, and masks that follow the images' brightness."""
    images = list(UnlabelledImages(folder / "images"))
    given = {name: read_latent(folder / "latents" / f"{name}.safetensors") for name, _ in images}
    gray = torch.stack([image.mean(dim=0) for _, image in images])
    return images, given, (gray > gray.median()).long()


def test_given_latents_are_fitted_on_without_any_inversion(checkpoint, written, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "load_perceptual", None)
    images, given, targets = annotated(written)
    found = invert(checkpoint.generator, images, tmp_path / "none", given=given)
    fitted = fit_checkpoint(checkpoint.generator, found, targets, TASK, SMALL)
    assert not (tmp_path / "none").exists()
    table = FeatureTable.collect(checkpoint.generator, torch.stack(list(given.values())), (16, 16))
    expected, _ = fit_label_generator(table, targets, TASK, SMALL)
    state = fitted.heads["segmentation"].label_generator.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert fitted.provenance["images"] == list(given)
    assert fitted.provenance["given_latents"]["psnr"].keys() == given.keys()
    assert min(fitted.provenance["given_latents"]["psnr"].values()) > 45
    assert "inversion" not in fitted.provenance and "perceptual" not in fitted.provenance


def test_images_without_a_latent_are_inverted_among_those_with_one(checkpoint, written, tmp_path):
    images, given, _ = annotated(written)
    missing = given.pop("7-000001")
    settings = InversionSettings(steps=1, candidates=4)
    folder = tmp_path / "inverted"
    found = invert(checkpoint.generator, images, folder, settings, given=given, perceptual=Gray())
    assert [f.name for f in (tmp_path / "inverted").iterdir()] == ["7-000001.safetensors"]
    assert torch.equal(found.w_plus[0], given["7-000000"]) and torch.equal(found.w_plus[2], given["7-000002"])
    assert torch.equal(found.w_plus[1], read_latent(tmp_path / "inverted" / "7-000001.safetensors"))
    assert not torch.equal(found.w_plus[1], missing)
    assert found.provenance["inversion"]["images"] == ["7-000001"]
    assert found.provenance["given_latents"]["psnr"].keys() == given.keys()


def test_an_encoder_sees_only_the_images_that_are_inverted(checkpoint, written, tmp_path):
    images, given, _ = annotated(written)
    start = given.pop("7-000001")
    asked: list[str] = []

    def encode(pending):
        asked.extend(name for name, _ in pending)
        return {"7-000001": start}

    settings = InversionSettings(steps=0)
    found = invert(checkpoint.generator, images, tmp_path, settings, given=given, perceptual=Gray(), encode=encode)
    assert asked == ["7-000001"] and torch.equal(found.w_plus[1], start)
    assert found.names == tuple(name for name, _ in images)


def test_a_stored_inversion_can_be_given_as_a_latent(checkpoint, written, tmp_path):
    images, _, _ = annotated(written)
    found = invert_images(checkpoint.generator, images[:1], tmp_path, Gray(), InversionSettings(steps=1, candidates=4))
    assert torch.equal(read_latent(tmp_path / "7-000000.safetensors"), found.w_plus[0])


def test_latents_that_do_not_make_their_images_are_warned_of_by_name(checkpoint, written, tmp_path):
    images, given, _ = annotated(written)
    given["7-000001"] = given["7-000001"] + 5
    with pytest.warns(UserWarning, match=r"average latent does: 7-000001 \([^,]*, the average[^,]*\)\. "):
        invert(checkpoint.generator, images, tmp_path, given=given)


def test_latents_of_the_average_image_itself_raise_no_warning(checkpoint, tmp_path, recwarn):
    folder = write_samples(checkpoint, tmp_path / "samples", num=1, truncation=0.0, device="cpu").parent
    images, given, _ = annotated(folder)
    invert(checkpoint.generator, images, tmp_path, given=given)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, given: given.update(other=given["7-000000"]), r"without an image: \['other'\]"),
        (lambda images, given: given.update({"7-000000": torch.zeros(3, 3)}), r"\[3, 3\], this generator takes"),
        (lambda images, given: given["7-000001"].fill_(torch.nan), "takes finite numbers"),
        (lambda images, given: images.append(images[0]), r"more than once: \['7-000000'\]"),
        (lambda images, given: images.__setitem__(0, (images[0][0], torch.zeros(3, 8, 8))), r"\[3, 8, 8\], its latent"),
        (lambda images, given: (images.clear(), given.clear()), "0 images"),
    ],
)
def test_latents_and_images_that_do_not_belong_together_are_refused(checkpoint, written, tmp_path, change, message):
    images, given, _ = annotated(written)
    change(images, given)
    with pytest.raises(ValueError, match=message):
        invert(checkpoint.generator, images, tmp_path, given=given)


@pytest.mark.parametrize("leading", [(), (1,)])
def test_latents_of_other_programs_are_read(tmp_path, leading):
    w_plus = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", w_plus.double().reshape(*leading, 6, 8).numpy())
    torch.save(w_plus.reshape(*leading, 6, 8), tmp_path / "a.pt")
    for suffix in ("npy", "pt"):
        assert torch.equal(read_latent(tmp_path / f"a.{suffix}"), w_plus)


def test_a_file_that_holds_no_latent_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no latent")
    np.save(tmp_path / "several.npy", np.zeros((2, 6, 8)))
    np.save(tmp_path / "ids.npy", np.zeros((6, 8), dtype=np.int64))
    save_file({"other": torch.zeros(6, 8)}, tmp_path / "other.safetensors")
    torch.save({"w_plus": torch.zeros(6, 8)}, tmp_path / "dict.pt")
    names = ["a.safetensors", "several.npy", "ids.npy", "other.safetensors", "dict.pt", "missing.safetensors"]
    for name in names:
        with pytest.raises(ValueError, match=name):
            read_latent(tmp_path / name)
