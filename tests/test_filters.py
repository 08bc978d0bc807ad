"""Filters keep the most certain nine tenths: the right share, the offline choice, and a warning if all is rejected."""

import json
import math
import warnings

import numpy as np
import pytest

from handsoff_stream.errors import StreamError
from handsoff_stream.filters import (
    BlockQuantile,
    Filter,
    KeepAll,
    RejectionMonitor,
    RollingPercentile,
    Threshold,
    make_filter,
)


def scores(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).gamma(2.0, 0.02, count).tolist()


def decisions(filter: Filter, values: list[float]) -> list[bool]:
    return [keep for value in values for keep in filter.push(value)]


def started(filter: Filter, calibration: list[float]) -> Filter:
    filter.start(calibration)
    return filter


def offline(values: list[float], share: float = 0.9) -> list[bool]:
    """Generate all, sort, drop the top tenth."""
    order = sorted(range(len(values)), key=values.__getitem__)
    kept = set(order[: math.ceil(len(values) * share)])
    return [i in kept for i in range(len(values))]


@pytest.mark.parametrize("seed", range(5))
def test_rolling_acceptance_stays_within_two_points_of_ninety_percent(seed):
    kept = decisions(started(RollingPercentile(90), scores(2000, seed=100)), scores(5000, seed))
    assert abs(np.mean(kept) - 0.9) <= 0.02
    for begin in range(0, 5000, 1000):
        assert abs(np.mean(kept[begin : begin + 1000]) - 0.9) <= 0.04


@pytest.mark.parametrize("seed", range(5))
def test_rolling_agrees_with_dropping_the_top_tenth_offline(seed):
    values = scores(5000, seed)
    kept = decisions(started(RollingPercentile(90), scores(2000, seed=100)), values)
    assert np.mean(np.array(kept) == np.array(offline(values))) >= 0.95


def test_rolling_threshold_is_the_percentile_of_the_last_window_scores():
    filter = started(RollingPercentile(80, window=10), [])
    values = scores(200)
    for i, value in enumerate(values):
        recent = sorted(values[max(0, i - 10) : i])
        expected = not recent or value <= recent[math.ceil(len(recent) * 0.8) - 1]
        assert filter.push(value) == [expected]


def test_rolling_follows_a_drift_of_the_scores():
    filter = started(RollingPercentile(90, window=500), scores(500))
    drifted = [10 * s for s in scores(3000, seed=1)]
    assert abs(np.mean(decisions(filter, drifted)[1000:]) - 0.9) <= 0.03


def test_the_first_decision_needs_no_warm_up():
    filter = started(RollingPercentile(90), [0.1] * 90 + [0.9] * 10)
    assert filter.push(0.5) == [False]
    assert filter.push(0.05) == [True]


def test_equal_scores_are_all_kept():
    filter = started(RollingPercentile(90), [1.0] * 100)
    assert all(decisions(filter, [1.0] * 50))


@pytest.mark.parametrize("block", [1, 7, 10, 100])
@pytest.mark.parametrize("percentile", [50, 90, 100])
def test_block_quantile_drops_the_worst_of_every_block(block, percentile):
    values = scores(block * 6)
    kept = decisions(started(BlockQuantile(percentile, block=block), []), values)
    for begin in range(0, len(values), block):
        assert kept[begin : begin + block] == offline(values[begin : begin + block], percentile / 100)


def test_block_quantile_decides_when_the_block_is_complete():
    filter = started(BlockQuantile(90, block=10), [])
    assert [len(filter.push(s)) for s in scores(20)] == ([0] * 9 + [10]) * 2


def test_threshold_is_the_percentile_of_the_calibration_scores():
    calibration = scores(1000)
    filter = started(Threshold(90), calibration)
    assert sum(decisions(filter, calibration)) == 900
    assert decisions(started(Threshold(value=0.5), []), [0.4, 0.5, 0.6]) == [True, True, False]


def test_threshold_without_calibration_says_what_to_do():
    with pytest.raises(ValueError, match=r"pass Threshold\(value="):
        Threshold(90).start([])


def test_a_state_of_a_window_holds_what_was_seen_since_the_calibration_and_no_more():
    filter = started(RollingPercentile(90, window=50), scores(80))
    assert filter.state_dict() == {}
    sizes = []
    for value in scores(200, seed=1):
        filter.push(value)
        sizes.append(len(filter.state_dict()["recent"]))
    assert sizes[0] == 12 and max(sizes) == sizes[-1] == 4 * math.ceil(50 * 8 / 3)


@pytest.mark.parametrize("make", [lambda: RollingPercentile(90, window=50), lambda: Threshold(90), KeepAll])
def test_a_restored_filter_continues_exactly_at_every_step(make):
    values, calibration = scores(120), scores(50, seed=9)
    whole = decisions(started(make(), calibration), values)
    for step in range(len(values)):
        first = started(make(), calibration)
        decisions(first, values[:step])
        second = started(make(), calibration)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert decisions(second, values[step:]) == whole[step:]


def test_names_make_the_default_filters():
    assert isinstance(make_filter("rolling"), RollingPercentile)
    assert isinstance(make_filter("block"), BlockQuantile)
    assert isinstance(make_filter("threshold"), Threshold)
    assert isinstance(make_filter(None), KeepAll)
    own = RollingPercentile(50)
    assert make_filter(own) is own
    with pytest.raises(ValueError, match="'sorted' is unknown"):
        make_filter("sorted")


@pytest.mark.parametrize("percentile", [0, -1, 100.5])
def test_a_percentile_out_of_range_is_refused(percentile):
    for kind in (RollingPercentile, BlockQuantile, Threshold):
        with pytest.raises(ValueError, match=r"pass a value in \(0, 100\]"):
            kind(percentile)


def test_windows_and_blocks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="remembers no score"):
        RollingPercentile(90, window=0)
    with pytest.raises(ValueError, match="holds no index"):
        BlockQuantile(90, block=0)


def test_the_monitor_counts_warns_once_and_then_raises():
    monitor = RejectionMonitor(Threshold(value=0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3 * monitor.WINDOW):
            monitor.count(i % 4 == 0)
    assert [str(w.message).split(" of the")[0] for w in caught] == ["75.0%"]
    assert (monitor.accepted, monitor.rejected) == (750, 2250)
    with pytest.raises(StreamError, match="100.0% of the last 1000 samples were rejected by .*threshold"):
        for _ in range(monitor.WINDOW):
            monitor.count(False)


def test_the_monitor_is_silent_at_the_usual_rate():
    monitor = RejectionMonitor(RollingPercentile(90))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(5000):
            monitor.count(i % 10 != 0)
