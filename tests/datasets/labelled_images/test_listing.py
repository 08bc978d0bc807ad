"""Images and masks are paired by folder or by manifest; all pairing errors are reported together."""

import json
from pathlib import Path

import pytest

from handsoff_stream.datasets.labelled_images.listing import Entry, list_labelled


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files by name only: nothing here opens them."""
    for name in ("photos/b.jpg", "photos/a.PNG", "masks/a.png", "masks/b.npy", "latents/b.npy", "other/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def manifest(root: Path, content: str | list, name: str = "set.csv"):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / name).write_text(text, encoding="utf-8")
    return list_labelled(root / name)


def entries(root: Path, latent: Path | None) -> tuple[Entry, ...]:
    return (
        Entry("a", root / "photos/a.PNG", root / "masks/a.png"),
        Entry("b", root / "photos/b.jpg", root / "masks/b.npy", latent),
    )


def test_two_folders_are_paired_by_name(root):
    listing = list_labelled(root / "photos", root / "masks")
    assert listing.entries == entries(root, None) and listing.problems == ()


def test_a_csv_manifest_pairs_files_relative_to_itself(root):
    content = "image,label,latent\nphotos/b.jpg,masks/b.npy,latents/b.npy\n\nphotos/a.PNG,masks/a.png,\n"
    listing = manifest(root, content)
    assert listing.problems == () and listing.entries == entries(root, root / "latents/b.npy")
    assert manifest(root, "\ufeff" + content).entries == listing.entries
    assert manifest(root, content.replace("\n", "\r\n")).entries == listing.entries


def test_a_json_manifest_says_the_same(root):
    rows = [
        {"image": "photos/b.jpg", "label": "masks/b.npy", "latent": "latents/b.npy"},
        {"image": str(root / "photos/a.PNG"), "label": "masks/a.png", "latent": None},
    ]
    listing = manifest(root, rows, "set.json")
    assert listing.problems == () and listing.entries == entries(root, root / "latents/b.npy")


def test_images_of_one_file_name_need_names_of_their_own(root):
    content = "image,label,name\nphotos/b.jpg,masks/b.npy,\nother/b.jpg,masks/a.png,{}\n"
    (problem,) = manifest(root, content.format("")).problems
    assert "line 3: a second 'b'" in problem and "column name" in problem
    assert [entry.name for entry in manifest(root, content.format("c")).entries] == ["b", "c"]


def test_every_bad_row_is_named_with_its_line(root):
    listing = manifest(
        root,
        "image,label,latent\n"
        "photos/b.jpg,masks/b.npy,latents/none.npy\n"
        "photos/c.jpg,masks/b.jpg,\n"
        ",masks/a.png,\n"
        "photos/a.PNG,masks/a.png,latents/b.txt\n",
    )
    found = [problem.removeprefix(f"{root / 'set.csv'}, ") for problem in listing.problems]
    assert found == [
        f"line 2: no such latent: {root / 'latents/none.npy'}",
        f"line 3: no such image: {root / 'photos/c.jpg'}",
        "line 3: label masks/b.jpg is none of .bmp, .npy, .png, .tif, .tiff",
        "line 4: no image; each row needs an image and a label",
        "line 5: latent latents/b.txt is none of .npy, .pt, .safetensors",
    ]


def test_what_has_no_partner_is_handed_on_to_be_checked_as_well(root):
    listing = manifest(root, "image,label\nphotos/b.jpg,masks/none.png\n")
    assert listing.entries == () and listing.unpaired == ((root / "photos/b.jpg", None),)
    (root / "masks/b.npy").unlink()
    assert list_labelled(root / "photos", root / "masks").unpaired == ((root / "photos/b.jpg", None),)


@pytest.mark.parametrize("name", ["../x", "a/b", "/", "."])
def test_a_name_becomes_a_file_name(root, name):
    (problem,) = manifest(root, f"image,label,name\nphotos/b.jpg,masks/b.npy,{name}\n").problems
    assert "write one without slashes" in problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", "image;label\na;b\n", "the first line names the columns"),
        ("set.csv", "image,label,mask\n", "the first line names the columns"),
        ("set.csv", "photos/a.PNG,masks/a.png\n", "the first line names the columns"),
        ("set.csv", "", "the first line names the columns"),
        ("set.csv", "image,label\n", "no labelled image"),
        ("set.csv", 'image,label\n"photos/a.PNG,masks', "cannot be read"),
        ("set.csv", "image,label\nphotos/a.PNG,masks/a.png,more\n", "no such column"),
        ("set.json", "{}", "a list of objects"),
        ("set.json", "[1]", "a list of objects"),
        ("set.json", "[", "cannot be read"),
        ("set.json", '[{"image": "photos/a.PNG", "label": "masks/a.png", "mask": 1}]', "no such column: ['mask']"),
        ("set.json", '[{"image": 1, "label": "masks/a.png"}]', "no image"),
        ("set.txt", "", "not a manifest (.csv, .json)"),
    ],
)
def test_what_is_no_manifest_is_named(root, name, content, message):
    (problem,) = manifest(root, content, name).problems
    assert message in problem and str(root / name) in problem


def test_a_missing_manifest_is_named(root):
    (problem,) = list_labelled(root / "none.csv").problems
    assert "none.csv: cannot be read" in problem
