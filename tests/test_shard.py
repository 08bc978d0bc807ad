"""Shards divide all indices: each index belongs to exactly one shard, for any number of shards."""

from itertools import takewhile

import pytest

from handsoff_stream.shard import Shard, detect, detect_worker


def indices(shard: Shard, span: int, stop: int, start: int = 0) -> list[int]:
    spans = takewhile(lambda s: s.start < stop, shard.spans(start, span))
    return [i for s in spans for i in s]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("span", [1, 4, 16, 100])
def test_shards_partition_the_index_line(count, span):
    stop = span * count * 7
    parts = [indices(Shard(i, count), span, stop) for i in range(count)]
    assert sorted(i for part in parts for i in part) == list(range(stop))
    for number, part in enumerate(parts):
        assert part == sorted(part)
        assert all(Shard(number, count).owns(i, span) for i in part)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11, 12, 23])
def test_spans_begin_with_the_one_that_holds_or_follows_the_start(start):
    shard, span = Shard(1, 3), 4
    first = next(shard.spans(start, span))
    assert shard.owns(first.start, span)
    assert first.stop > start
    before = range(start // span * span, first.start)
    assert not any(shard.owns(i, span) for i in before)


def test_splitting_a_rank_among_workers_gives_each_pair_its_own_shard():
    shards = {Shard(rank, 3).split(worker, 2) for rank in range(3) for worker in range(2)}
    assert shards == {Shard(i, 6) for i in range(6)}


@pytest.mark.parametrize(("total", "count"), [(10, 3), (9, 3), (2, 5), (0, 2), (1001, 8)])
def test_shares_differ_by_at_most_one_and_add_up(total, count):
    shares = [Shard(i, count).share(total) for i in range(count)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


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
