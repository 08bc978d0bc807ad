"""From files to a report, through the command line, with a kill in between; numbers are counted again by hand."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from handsoff_stream.checking import CheckOptions, check_files
from handsoff_stream.checkpoint import load_checkpoint, save_checkpoint
from handsoff_stream.cli import app
from handsoff_stream.datasets.labelled_images import ClassMap
from handsoff_stream.datasets.rendered_faces import RenderedFaces
from handsoff_stream.fitting import FeatureTable, FitSettings, InversionSettings, fit_label_generator
from handsoff_stream.fitting.from_files import InversionOptions
from handsoff_stream.fitting.labelled_files import LabelledFiles
from handsoff_stream.tasks import Segmentation

NUM_IMAGES = 6
CLASSES = ("background", "skin", "rest", "nowhere")
pytestmark = pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """Six 16x16 renders with masks in three of four classes, and a generator of that size."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    faces = RenderedFaces("train", num_images=NUM_IMAGES, size=16)
    for i in range(NUM_IMAGES):
        face = faces.scene(i)
        Image.fromarray(face.image).save(folder / "images" / f"{i}.png")
        Image.fromarray(np.minimum(face.mask, 2)).save(folder / "masks" / f"{i}.png")
    save_checkpoint(folder / "g.safetensors", make_checkpoint(seed=3))
    return folder


def arguments(user: Path, out: Path, **changes: object) -> list[str]:
    options = {
        "images": user / "images",
        "labels": user / "masks",
        "classes": ",".join(CLASSES),
        "out": out,
        "steps": 2,
        "epochs": 1,
        "members": 2,
        "network-steps": 2,
        "device": "cpu",
        **changes,
    }
    return ["check", str(user / "g.safetensors"), *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def run(*given: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(given))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def checked(user, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a report, and what was printed."""
    out = tmp_path_factory.mktemp("out") / "check"
    code, text = run(*arguments(user, out))
    assert code == 0, text
    return out, text


def read_masks(user: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(user / "masks" / f"{i}.png")) for i in range(NUM_IMAGES)])


def stored_labels(out: Path, name: str, tensor: str) -> np.ndarray:
    """Labels of all images, put together from the files of the folds."""
    folds = json.loads((out / "report.json").read_text())["folds"]
    labels = np.full((NUM_IMAGES, 16, 16), 99)
    for f, fold in enumerate(folds):
        labels[[int(image) for image in fold]] = load_file(out / "folds" / f"fold-{f}.{name}.safetensors")[tensor]
    return labels


def test_the_folder_holds_the_page_the_numbers_and_a_picture_of_every_image(checked):
    out, text = checked
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", "pictures", "latents", "folds"}
    for i in range(NUM_IMAGES):
        with Image.open(out / "pictures" / f"{i}.png") as picture:
            assert picture.width > 5 * 192
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == NUM_IMAGES and "nowhere" in page
    assert "a mean IoU of" in text and "IoU on held-out images" in text and f"wrote {out}/report.html" in text


def test_every_image_is_held_out_once_and_halves_are_of_the_other_images(checked):
    report = json.loads((checked[0] / "report.json").read_text())
    assert sorted(name for fold in report["folds"] for name in fold) == [str(i) for i in range(NUM_IMAGES)]
    for fold, half in zip(report["folds"], report["halves"], strict=True):
        assert not set(fold) & set(half) and len(half) == (NUM_IMAGES - len(fold) + 1) // 2


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("labels", "labels"),
        ("labels_half", "labels_half"),
        ("network", "network"),
        ("network", "network_on_reconstruction"),
    ],
)
def test_the_ious_of_the_report_are_those_counted_pixel_by_pixel(user, checked, name, tensor):
    labels, masks = stored_labels(checked[0], name, tensor), read_masks(user)
    report = json.loads((checked[0] / "report.json").read_text())
    ious = []
    for k, found in enumerate(report["classes"]):
        both = either = 0
        for label, mask in zip(labels.flat, masks.flat, strict=True):
            both += label == k and mask == k
            either += label == k or mask == k
        assert found[tensor] == (None if either == 0 else pytest.approx(both / either))
        if found["compared"]:
            ious.append(both / either)
    assert report["summary"][tensor]["value"] == pytest.approx(np.mean(ious))
    assert [found["compared"] for found in report["classes"]] == [True, True, True, False]


def test_the_labels_of_a_fold_are_those_of_a_label_generator_fitted_without_it(user, checked):
    out = checked[0]
    report = json.loads((out / "report.json").read_text())
    held_out = [int(name) for name in report["folds"][1]]
    train = [i for i in range(NUM_IMAGES) if i not in held_out]
    generator = load_checkpoint(user / "g.safetensors").generator
    w_plus = torch.cat([load_file(out / "latents" / f"{i}.safetensors")["w_plus"] for i in range(NUM_IMAGES)])
    masks = torch.from_numpy(read_masks(user)).long()
    task = Segmentation(CLASSES, [(0, 0, 0)] * 4)
    table = FeatureTable.collect(generator, w_plus[train])
    fitted, _ = fit_label_generator(table, masks[train], task, FitSettings(members=2, epochs=1))
    with torch.no_grad():
        features = generator.synthesis(w_plus[held_out], "const").features
        outputs_MPK = fitted.reference(features, (16, 16)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        expected = task.decide(outputs_MPK).view(len(held_out), 16, 16)
    stored = stored_labels(out, "labels", "labels")[held_out]
    assert (stored == expected.numpy()).mean() > 0.999


def test_nothing_in_the_report_names_a_place_on_this_machine(user, checked):
    for name in ("report.json", "report.html"):
        text = (checked[0] / name).read_text()
        assert str(user) not in text and str(checked[0]) not in text


def test_a_fit_reuses_the_inversions(user, checked, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in (checked[0] / "latents").iterdir()}
    given = arguments(user, tmp_path / "mine.safetensors", latents=checked[0] / "latents")
    given = given[: given.index("--members")] + ["--device", "cpu", "--calibration-samples", "0"]
    given += ["--latents", str(checked[0] / "latents")]
    code, text = run("fit", *given[1:])
    assert code == 0, text
    assert {path.name: path.stat().st_mtime_ns for path in (checked[0] / "latents").iterdir()} == before
    inversion = load_checkpoint(tmp_path / "mine.safetensors").provenance["inversion"]
    report = json.loads((checked[0] / "report.json").read_text())
    clamped_is_nearer = [image["psnr"] - psnr for image, psnr in zip(report["images"], inversion["psnr"], strict=True)]
    assert min(clamped_is_nearer) >= -1e-3


def test_a_check_that_is_killed_and_continued_ends_with_the_same_report(user, checked, tmp_path):
    out = tmp_path / "check"
    given = arguments(user, out, latents=checked[0] / "latents")
    command = [sys.executable, "-m", "handsoff_stream.cli", *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(out.glob("folds/fold-0.network.safetensors")):
            assert process.poll() is None, "the check ended before its first fold was stored"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (out / "folds").glob("*.safetensors")}
    assert 0 < len(finished) < 12 and not (out / "report.json").exists()
    code, text = run(*given)
    assert code == 0, text
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for name in ("report.json", "report.html"):
        assert (out / name).read_bytes() == (checked[0] / name).read_bytes()


def test_results_of_other_settings_and_damaged_results_are_computed_again(user, checked, tmp_path):
    out = tmp_path / "check"
    files = LabelledFiles(images=user / "images", labels=user / "masks", class_map=ClassMap.of_ids(CLASSES))

    def check(learning_rate: float) -> bytes:
        fit = FitSettings(members=1, epochs=1, pixels_per_image=64, learning_rate=learning_rate)
        inversion = InversionOptions(settings=InversionSettings(steps=2))
        options = CheckOptions(
            inversion=inversion, latents_folder=checked[0] / "latents", fit=fit, network=None, device="cpu"
        )
        check_files(user / "g.safetensors", files, out, options)
        return (out / "folds" / "fold-0.labels.safetensors").read_bytes()

    first, report = check(0.001), (out / "report.json").read_bytes()
    assert check(0.1) != first
    (out / "folds" / "fold-0.labels.safetensors").write_bytes(first[:-7])
    assert check(0.001) == first and (out / "report.json").read_bytes() == report


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_image(user, tmp_path) -> Path:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes((user / name / "0.png").read_bytes())
    return tmp_path


def test_too_few_images_are_refused_before_the_work(user, one_image, tmp_path):
    given = arguments(user, tmp_path / "check", images=one_image / "images", labels=one_image / "masks")
    code, text = run(*given)
    assert code == 2 and "1 labelled image(s) are too few for 4 folds" in text and "label at least 4" in text
    assert not (tmp_path / "check").exists()


def test_classes_of_one_fold_each_cannot_be_checked(user, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for i in range(4):
            pixels = np.full((16, 16), i, np.uint8)
            Image.fromarray(pixels if name == "masks" else np.stack([pixels] * 3, -1)).save(
                tmp_path / name / f"{i}.png"
            )
    code, text = run(*arguments(user, tmp_path / "check", images=tmp_path / "images", labels=tmp_path / "masks"))
    assert code == 2 and "every class is shown by images of one fold only" in text
    assert not (tmp_path / "check").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": "images"}, "holds images, masks or inversions"),
        ({"out": "masks"}, "holds images, masks or inversions"),
        ({"out": "file"}, "is no folder"),
        ({"out": "check", "latents": "check"}, "holds images, masks or inversions"),
        ({"out": "check", "folds": 1}, "1 folds hold nothing out"),
        ({"out": "check", "folds": 10}, "6 labelled image(s) are too few for 10 folds"),
        ({"out": "check", "device": "gpu"}, "device 'gpu' is unknown"),
        ({"out": "check", "encoder": "missing.pt"}, "missing.pt"),
    ],
)
def test_mistakes_are_said_before_the_work(user, tmp_path, changes, said):
    (tmp_path / "file").write_text("text")
    places = {"images": user / "images", "masks": user / "masks"}
    given = {k: places.get(v, tmp_path / v) if k in ("out", "latents", "encoder") else v for k, v in changes.items()}
    before = sorted(tmp_path.rglob("*"))
    code, text = run(*arguments(user, **given))
    assert code == 2 and said in text
    assert sorted(tmp_path.rglob("*")) == before
