"""The command line in real processes: plain sentences, exit codes, no tracebacks."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from PIL import Image
from typer.testing import CliRunner

from handsoff_stream.checkpoint import load_checkpoint, save_checkpoint
from handsoff_stream.cli import app
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.downstream import build_deeplab
from handsoff_stream.geometry import Rectangle
from handsoff_stream.synthesizer import quantize

VERBS = (
    "check", "convert", "demo", "export", "fit", "import-labels", "inspect", "invert", "preview", "sample", "train",
    "train-encoder",
)  # fmt: skip


def run(*arguments) -> tuple[int, str]:
    """Exit code, and what was printed to stdout and stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_the_installed_command_runs_as_a_process():
    done = subprocess.run([sys.executable, "-m", "handsoff_stream.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    code, text = run(verb, "--help")
    assert code == 0
    assert f"Example: handsoff-stream {verb}" in text


def test_a_users_mistake_is_one_sentence_without_a_traceback_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "handsoff_stream.cli", "inspect", str(tmp_path / "missing.pt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("handsoff-stream: ") and "no such file" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_inspect_prints_the_geometry_of_a_checkpoint_and_of_a_published_file(checkpoint_path):
    code, text = run("inspect", checkpoint_path)
    assert code == 0
    for part in ("stylegan2, 16 x 16", "z 8, w 8, 6 style inputs", "30 channels from 6 maps", "3 members", "hair"):
        assert part in text
    code, text = run("inspect", "tests/data/rosinality_32.pt")
    assert code == 0 and "stylegan2, 32 x 32" in text and "rosinality" in text


def test_preview_writes_a_picture(checkpoint_path, tmp_path):
    code, text = run("preview", checkpoint_path, tmp_path / "sheet.png", "--num", 4)
    assert code == 0 and "wrote" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 100


def test_export_writes_shards_and_refuses_another_seed_in_the_same_folder(checkpoint_path, tmp_path):
    arguments = ("export", checkpoint_path, tmp_path, "--num", 6, "--shard-size", 4, "--device", "cpu")
    assert run(*arguments)[0] == 0
    assert len(list(tmp_path.glob("*.tar"))) == 2
    code, text = run(*arguments, "--seed", 1)
    assert code == 2 and "saved with seed=0" in text


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four 16x16 renders with masks in three classes, and a generator of that size, as files."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    faces = RenderedFaces("train", num_images=4, size=16)
    for i in range(4):
        face = faces.scene(i)
        Image.fromarray(face.image).save(folder / "images" / f"{i}.png")
        Image.fromarray(np.minimum(face.mask, 2)).save(folder / "masks" / f"{i}.png")
    save_checkpoint(folder / "generator.safetensors", make_checkpoint(seed=3))
    return folder


def fit_arguments(labelled, out, **changes):
    options = {
        "images": labelled / "images",
        "labels": labelled / "masks",
        "classes": "background,skin,rest",
        "out": out,
        "steps": 2,
        "epochs": 1,
        "device": "cpu",
        **changes,
    }
    return ["fit", labelled / "generator.safetensors", *(x for k, v in options.items() for x in (f"--{k}", v))]


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_fit_goes_from_folders_to_a_checkpoint_that_streams(labelled, tmp_path):
    out = tmp_path / "mine.safetensors"
    code, text = run(*fit_arguments(labelled, out))
    assert code == 0 and "accuracy on held-out pixels of the labelled images" in text
    fitted = load_checkpoint(out)
    assert fitted.heads["segmentation"].task.class_names == ("background", "skin", "rest")
    assert len(fitted.calibration.scores["top10_mean"]) == 2000
    assert len(list((tmp_path / "mine.latents").iterdir())) == 4
    assert set(fitted.provenance["sources"]) >= {"images/0.png", "masks/0.png", "masks/3.png"}


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_fit_with_a_teacher_learns_from_samples_too_and_the_checkpoint_says_so(labelled, tmp_path):
    out, options = tmp_path / "taught.safetensors", ("--teacher-samples", 3, "--teacher-confidence", 0.05)
    common = fit_arguments(labelled, out, **{"calibration-samples": 20})
    code, _ = run(*common, "--teacher", *options, "--teacher-members", 1, "--teacher-steps", 2)
    assert code == 0
    told = load_checkpoint(out).provenance["samples"]
    assert (told["samples"], told["confidence"]) == (3, 0.05) and told["teacher"]["steps"] == 2
    assert sum(told["pixels_per_class"]) > 0
    torch.save(build_deeplab(3, backbone="resnet18").state_dict(), tmp_path / "network.pt")
    assert run(*common, "--teacher-network", tmp_path / "network.pt", *options)[0] == 0
    assert list(load_checkpoint(out).provenance["samples"]["teacher"]) == ["network.pt"]


def test_options_of_a_teacher_without_one_and_a_network_of_other_classes_are_refused(labelled, tmp_path):
    common = fit_arguments(labelled, tmp_path / "x.safetensors")
    code, text = run(*common, "--teacher-steps", 5)
    assert code == 2 and "--teacher-steps belongs to a teacher; pass --teacher too" in text
    torch.save(build_deeplab(5, backbone="resnet18").state_dict(), tmp_path / "network.pt")
    code, text = run(*common, "--teacher-network", tmp_path / "network.pt")
    assert code == 2 and "for 3 classes; pass a file that" in text
    code, text = run(*common, "--teacher-network", tmp_path / "network.pt", "--teacher-members", 2)
    assert code == 2 and "leave out --teacher-members" in text
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_fit_learns_from_augmented_images_too(labelled, tmp_path):
    out = tmp_path / "mine.safetensors"
    augmented = {"augmentations": 1, "any-color": "skin", "calibration-samples": 0}
    code, text = run(*fit_arguments(labelled, out, **augmented), "--flip")
    assert code == 0, text
    provenance = load_checkpoint(out).provenance
    assert provenance["augmentation"]["any_color"] == [1] and provenance["augmentation"]["flip"]
    assert provenance["images"][4:] == [f"{i}.augmented-00" for i in range(4)]
    assert len(list((tmp_path / "mine.latents").iterdir())) == 8


def test_settings_of_augmentations_that_mean_nothing_are_refused(labelled, tmp_path):
    out = tmp_path / "mine.safetensors"
    code, text = run(*fit_arguments(labelled, out, augmentations=2), "--any-color", "skin,hat")
    assert code == 2 and "no class is named 'hat'; pass some of background, skin, rest" in " ".join(text.split())
    code, text = run(*fit_arguments(labelled, out), "--flip")
    assert code == 2 and "there are no augmentations to flip" in " ".join(text.split())
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_color_masks_of_another_size_and_a_class_map_of_ones_own(labelled, tmp_path):
    """Images of 24 x 20 and masks in colors, cropped to the generator's 16 x 16; one class never occurs."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(2):
        Image.open(labelled / "images" / f"{i}.png").resize((20, 24)).save(images / f"{i}.png")
        ids = Image.open(labelled / "masks" / f"{i}.png").resize((20, 24), Image.Resampling.NEAREST)
        Image.fromarray(np.array([[0, 0, 0], [250, 0, 0], [0, 0, 250]], np.uint8)[np.asarray(ids)]).save(
            masks / f"{i}.png"
        )
    (tmp_path / "map.yaml").write_text(
        "classes:\n  0: {name: nothing, from_colors: [[0, 0, 0]]}\n"
        "  1: {name: person, from_colors: [[250, 0, 0], [0, 0, 250]]}\n  2: {name: dog, from_colors: [[9, 9, 9]]}\n"
    )
    arguments = [
        "fit", labelled / "generator.safetensors", "--images", images, "--labels", masks, "--class-map",
        tmp_path / "map.yaml", "--resize", "crop", "--label-size", 8, "--out", tmp_path / "mine.safetensors",
        "--steps", 1, "--epochs", 1, "--device", "cpu",
    ]  # fmt: skip
    code, text = run(*arguments)
    assert code == 0 and "no labelled image shows dog" in text
    fitted = load_checkpoint(tmp_path / "mine.safetensors")
    assert fitted.heads["segmentation"].task.class_names == ("nothing", "person", "dog") and fitted.size == (8, 8)
    assert fitted.provenance["class_map"]["from_colors"][2] == [[0, 0, 250], 1]
    assert run(*arguments, "--classes", "a,b")[1].count("given once") == 1


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_images_wider_than_the_generators_are_padded_and_their_bars_are_not_streamed(labelled, tmp_path):
    """The cars of StyleGAN2: images of 3 : 4 in the middle rows of a square."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.open(labelled / kind / f"{i}.png").crop((0, 2, 16, 14)).save(tmp_path / kind / f"{i}.png")
    out = tmp_path / "folder that is made" / "mine.safetensors"
    changes = {"images": tmp_path / "images", "labels": tmp_path / "masks", "resize": "pad", "calibration-samples": 0}
    code, text = run(*fit_arguments(labelled, out, **changes, augmentations=1))
    assert code == 2 and "an augmentation of a padded image would move the bars" in " ".join(text.split())
    assert run(*fit_arguments(labelled, out, **changes))[0] == 0
    fitted = load_checkpoint(out)
    assert fitted.crop == (2, 0, 14, 16) and fitted.size == (12, 16) and fitted.calibration is None
    assert "12 x 16, rows 2:14, columns 0:16 of the image" in " ".join(run("inspect", out)[1].split())


def test_what_was_labelled_on_samples_of_a_cropped_checkpoint_keeps_its_crop(labelled, tmp_path):
    """Latents z of two samples, in one array, as DatasetGAN kept them; the samples are whole images."""
    source = make_checkpoint(seed=3).cropped(Rectangle(2, 0, 14, 16))
    save_checkpoint(tmp_path / "cropped.safetensors", source)
    z_ND = torch.randn(2, source.generator.z_dim, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "z.npy", z_ND.numpy())
    w_plus = source.generator.truncate(source.generator.mapping(z_ND), 0.7, 1)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(quantize(source.generator.synthesis(w_plus, "const").images, (16, 16))):
        Image.fromarray(image.mul(255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "masks").mkdir()
    for i in range(2):
        shutil.copy(labelled / "masks" / f"{i}.png", tmp_path / "masks")
    options = {
        "--images": tmp_path / "images", "--labels": tmp_path / "masks", "--classes": "background,skin,rest",
        "--out": tmp_path / "new" / "mine.safetensors", "--epochs": 1, "--device": "cpu", "--calibration-samples": 0,
        "--latent-space": "z", "--latent-truncation": 0.7, "--latent-cutoff": 1,
    }  # fmt: skip
    arguments = ["fit", tmp_path / "cropped.safetensors", *(x for pair in options.items() for x in pair)]
    code, text = run(*arguments)
    assert code != 0 and "latents z, but none are given" in " ".join(text.split())
    code, text = run(*arguments, "--given-latents", tmp_path / "z.npy", "--augmentations", 1)
    assert code == 2 and "images with given latents are not" in " ".join(text.split())
    code, text = run(*arguments, "--given-latents", tmp_path / "z.npy")
    assert code == 0, text
    fitted = load_checkpoint(tmp_path / "new" / "mine.safetensors")
    assert fitted.crop == (2, 0, 14, 16) and fitted.size == (12, 16)
    assert fitted.provenance["latent_space"] == {"name": "z", "truncation": 0.7, "cutoff": 1}
    assert min(fitted.provenance["given_latents"]["psnr"].values()) > 45  # 8 bits: these latents made these images


def test_samples_are_written_annotated_and_fitted_without_inversion(labelled, tmp_path):
    code, text = run(
        "sample", labelled / "generator.safetensors", tmp_path / "to_annotate", "--num", 3, "--device", "cpu"
    )
    assert code == 0 and "draw masks into" in text
    for image in (tmp_path / "to_annotate" / "images").iterdir():
        gray = np.asarray(Image.open(image).convert("L"))
        Image.fromarray((gray > np.median(gray)).astype(np.uint8)).save(tmp_path / "to_annotate" / "masks" / image.name)
    code, text = run(
        "fit", labelled / "generator.safetensors", "--images", tmp_path / "to_annotate" / "manifest.csv",
        "--classes", "dark,bright", "--out", tmp_path / "mine.safetensors", "--epochs", 1, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, text
    assert not (tmp_path / "mine.latents").exists()
    assert len(load_checkpoint(tmp_path / "mine.safetensors").provenance["given_latents"]["psnr"]) == 3


@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_invert_reports_each_image_and_continues(labelled, tmp_path):
    arguments = (
        "invert", labelled / "generator.safetensors", labelled / "images", tmp_path, "--steps", 2, "--device", "cpu",
    )  # fmt: skip
    code, text = run(*arguments)
    assert code == 0 and "PSNR" in text
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(before) == 4
    assert run(*arguments)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_every_problem_of_a_labelled_set_is_reported_before_any_work(labelled, tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    Image.new("RGB", (16, 16)).save(images / "a.png")
    Image.new("L", (8, 12)).save(masks / "a.png")
    Image.new("RGB", (16, 16)).save(images / "b.png")
    Image.new("L", (16, 16), 7).save(masks / "b.png")
    (images / "c.png").write_text("not an image")
    Image.new("L", (16, 16)).save(masks / "c.png")
    code, text = run(*fit_arguments(labelled, tmp_path / "out.safetensors", images=images, labels=masks))
    assert code == 2
    for part in ("a.png", "12 x 8", "id 7 (256 pixels)", "c.png: cannot be read"):
        assert part in text
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "out.latents").exists()


def test_zero_labelled_images_are_refused(labelled, tmp_path):
    (tmp_path / "empty").mkdir()
    empty = {"images": tmp_path / "empty", "labels": tmp_path / "empty"}
    code, text = run(*fit_arguments(labelled, tmp_path / "out.safetensors", **empty))
    assert code == 2 and "no labelled image; one is needed" in text


def test_train_saves_a_state_dict_and_scores_it(checkpoint_path, labelled, tmp_path):
    out = tmp_path / "deeplab.pt"
    code, text = run(
        "train", checkpoint_path, out, "--steps", 2, "--batch-size", 2, "--device", "cpu",
        "--test-images", labelled / "images", "--test-labels", labelled / "masks",
    )  # fmt: skip
    assert code == 0 and "IoU on test images" in text
    assert all(isinstance(v, torch.Tensor) for v in torch.load(out, weights_only=True).values())


def test_an_unknown_option_names_itself(checkpoint_path, tmp_path):
    code, text = run("preview", checkpoint_path, tmp_path / "x.png", "--trunkation", "0.5")
    assert code == 2 and "--trunkation" in text
