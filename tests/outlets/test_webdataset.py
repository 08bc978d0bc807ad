"""An export contains the streamed samples in complete shards; an interrupted export ends with the same bytes."""

import gc
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from conftest import take
from PIL import Image

from handsoff_stream.errors import CheckpointError, OutputError
from handsoff_stream.mixture import mix
from handsoff_stream.outlets import webdataset as exporter
from handsoff_stream.outlets.webdataset import write_shards
from handsoff_stream.stream import HandsOffStream


@pytest.fixture
def make(checkpoint):
    return lambda **options: HandsOffStream(checkpoint, batch_size=5, device="cpu", **options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_reading_the_shards_back_gives_the_streamed_tensors(make, tmp_path):
    paths = write_shards(make(), tmp_path, num_samples=23, shard_size=10)
    assert [p.name for p in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    dataset = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)
    read = list(dataset)
    del dataset
    gc.collect()
    assert len(read) == 23
    batches = take(make(), 5)
    images = torch.cat([b.images for b in batches])
    labels = torch.cat([b.labels for b in batches])
    indices = torch.cat([b.indices for b in batches]).tolist()
    for row, sample in enumerate(read):
        assert sample["__key__"] == f"{indices[row]:012d}"
        about = json.loads(sample["json"])
        assert about["index"] == indices[row]
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(sample["image.png"]))))
        assert torch.equal(pixels.permute(2, 0, 1).float() / 255, images[row])
        mask = torch.from_numpy(np.array(Image.open(io.BytesIO(sample["label.png"]))))
        assert torch.equal(mask.long(), labels[row])


def test_an_interrupted_export_continues_and_ends_with_the_same_bytes(make, tmp_path, monkeypatch):
    said: list[int] = []
    whole = write_shards(make(), tmp_path / "whole", num_samples=20, shard_size=6, progress=said.append)
    assert said == list(range(1, 21)), "progress is that of samples, not of shards"

    original, written = exporter._fields, []

    def fail_at_the_ninth(batch):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(batch)
        return original(batch)

    monkeypatch.setattr(exporter, "_fields", fail_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        write_shards(make(), tmp_path / "cut", num_samples=20, shard_size=6)
    assert [p.name for p in sorted((tmp_path / "cut").glob("*.tar"))] == ["shard-000000.tar"]

    leftover = tmp_path / "cut" / ".shard-000001.tar.k1ll3d.partial"  # as SIGKILL leaves it
    leftover.mkdir()
    (leftover / "shard-000001.tar").write_bytes(b"half a shard")
    monkeypatch.setattr(exporter, "_fields", original)
    said.clear()
    resumed = write_shards(make(), tmp_path / "cut", num_samples=20, shard_size=6, progress=said.append)
    assert said == list(range(7, 21))
    assert [p.read_bytes() for p in resumed] == [p.read_bytes() for p in whole]
    assert not list((tmp_path / "cut").glob("*.partial"))
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_float_labels_are_stored_as_arrays(make, tmp_path):
    batch = take(make(), 1)[0].select([0])
    fields = exporter._label("depth", torch.rand(1, 4, 4))
    assert list(fields) == ["depth.npy"]
    assert np.load(io.BytesIO(fields["depth.npy"]), allow_pickle=False).shape == (1, 4, 4)
    assert set(exporter._fields(batch)) == {"__key__", "image.png", "label.png", "json"}


def test_every_name_in_a_shard_has_one_key(make, tmp_path):
    (path,) = write_shards(make(), tmp_path, num_samples=3, shard_size=10)
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert len(names) == len(set(names)) == 9
    assert {name.split(".", 1)[1] for name in names} == {"image.png", "label.png", "json"}


def test_another_streams_export_in_the_folder_is_not_continued(make, tmp_path):
    write_shards(make(), tmp_path, num_samples=4, shard_size=2)
    with pytest.raises(ValueError, match="saved with seed=0"):
        write_shards(make(seed=1), tmp_path, num_samples=4, shard_size=2)
    with pytest.raises(ValueError, match="an export with other counts"):
        write_shards(make(), tmp_path, num_samples=8, shard_size=2)


def test_an_export_says_what_its_shards_hold(make, tmp_path):
    paths = write_shards(make(), tmp_path, num_samples=5, shard_size=2)
    record = json.loads((tmp_path / "export.json").read_text())
    assert [shard["samples"] for shard in record["shards"]] == [2, 2, 1]
    for path, shard in zip(paths, record["shards"], strict=True):
        content = path.read_bytes()
        assert shard["file"] == path.name and shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1024]),
    "empty": lambda path: path.write_bytes(b""),
    "exchanged": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("number", "finished"), [(0, True), (1, True), (1, False)])
def test_a_damaged_shard_is_found_and_made_again(make, tmp_path, damage, number, finished):
    paths = write_shards(make(), tmp_path, num_samples=8, shard_size=3)
    whole = [path.read_bytes() for path in paths]
    if not finished:
        _forget_last_shard(tmp_path, make(), paths)
    DAMAGE[damage](paths[number])
    with pytest.warns(UserWarning, match=f"shard-00000{number}.tar is missing or was changed"):
        write_shards(make(), tmp_path, num_samples=8, shard_size=3)
    assert [path.read_bytes() for path in paths] == whole


def _forget_last_shard(folder, stream, paths) -> None:
    """As if the run had been killed while it wrote the last shard."""
    write_shards(stream, folder / "shorter", num_samples=6, shard_size=3)
    record = json.loads((folder / "shorter" / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**record, "num_samples": 8}))
    paths[-1].unlink()


def test_a_shard_that_comes_out_differently_is_refused(make, tmp_path):
    paths = write_shards(make(), tmp_path, num_samples=4, shard_size=2)
    record = json.loads((tmp_path / "export.json").read_text())
    record["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "export.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="written again, but with other bytes"):
        write_shards(make(), tmp_path, num_samples=4, shard_size=2)
    assert paths[1].exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 9000, '{"shards": 3}', '{"format_version": 1, "shards": 1}'])
def test_a_damaged_record_is_named(make, tmp_path, content):
    write_shards(make(), tmp_path, num_samples=2, shard_size=2)
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"export\.json"):
        write_shards(make(), tmp_path, num_samples=2, shard_size=2)


def test_shards_of_another_origin_are_left_alone(make, tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="shard-000000.tar does not belong to this export"):
        write_shards(make(), tmp_path, num_samples=2, shard_size=2)
    (tmp_path / "shard-000000.tar").rename(tmp_path / "shard-000007.tar")
    with pytest.raises(ValueError, match="shard-000007.tar does not belong to this export"):
        write_shards(make(), tmp_path, num_samples=2, shard_size=2)
    assert [p.read_bytes() for p in tmp_path.glob("*.tar")] == [b"somebody's"]


def test_a_run_killed_between_a_shard_and_its_record_goes_on(make, tmp_path):
    paths = write_shards(make(), tmp_path, num_samples=6, shard_size=3)
    whole = [path.read_bytes() for path in paths]
    write_shards(make(), tmp_path / "shorter", num_samples=3, shard_size=3)
    record = json.loads((tmp_path / "shorter" / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps({**record, "num_samples": 6}))
    write_shards(make(), tmp_path, num_samples=6, shard_size=3)
    assert [path.read_bytes() for path in paths] == whole


def test_more_than_the_disk_holds_is_refused_after_one_sample(make, tmp_path):
    with pytest.raises(OutputError, match="GB free, about .* GB needed"):
        write_shards(make(), tmp_path, num_samples=10**12, shard_size=10**9)
    assert not list(tmp_path.glob("*.tar"))
    with pytest.raises(ValueError, match="at most 1000000 shards"):
        write_shards(make(), tmp_path, num_samples=10**12, shard_size=1)


def test_a_mixture_is_refused_because_its_labelled_images_exist_already(make, tmp_path):
    labelled = [(torch.zeros(3, 16, 16), torch.zeros(16, 16, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"mixture with Companions\(1 labelled images, share=1/5\).*stream alone"):
        write_shards(mix(make(), labelled, 0.2), tmp_path, num_samples=2)


def test_streams_of_samples_and_empty_exports_are_refused(checkpoint, make, tmp_path):
    with pytest.raises(ValueError, match="build the stream with batch_size"):
        write_shards(HandsOffStream(checkpoint, device="cpu"), tmp_path, num_samples=1)
    with pytest.raises(ValueError, match="num_samples=0"):
        write_shards(make(), tmp_path, num_samples=0)
