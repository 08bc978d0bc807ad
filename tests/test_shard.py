"""Shards divide the lanes of the index line: each belongs to exactly one shard, for any number of shards."""

import pytest

from handsoff_stream.shard import Shard, detect, detect_worker


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("lanes", [8, 24, 840])
def test_shards_partition_the_lanes_of_the_index_line(count, lanes):
    parts = [Shard(i, count).lanes(lanes) for i in range(count)]
    assert sorted(lane for part in parts for lane in part) == list(range(lanes))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_splitting_a_rank_among_workers_gives_each_pair_its_own_shard():
    shards = {Shard(rank, 3).split(worker, 2) for rank in range(3) for worker in range(2)}
    assert shards == {Shard(i, 6) for i in range(6)}


def test_detection_reads_the_launchers_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert detect() == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert detect() == Shard(2, 4)
    assert detect_worker() is None


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(index, count):
    with pytest.raises(ValueError, match="does not exist"):
        Shard(index, count)
