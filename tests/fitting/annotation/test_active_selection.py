"""Active selection chooses a few samples that are uncertain but intact, and represent all candidates."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from handsoff_stream.checkpoint import Checkpoint
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.fitting.annotation.active_selection import (
    k_center_greedy,
    mean_hypercolumn,
    select_actively,
    uncertainty_band,
)
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.synthesizer import Synthesizer

CPU = torch.device("cpu")


def points(count: int, seed: int, dimensions: int = 2) -> Tensor:
    """On a coarse grid, so that equal distances and equal points occur."""
    return torch.randint(0, 6, (count, dimensions), generator=torch.Generator().manual_seed(seed)).float()


# The band


def test_the_band_lies_between_the_10_and_the_20_percent_most_uncertain():
    scores = torch.arange(40.0).roll(7)  # 39 is the most uncertain
    assert scores[uncertainty_band(scores)].tolist() == [35.0, 34.0, 33.0, 32.0]


@pytest.mark.parametrize("count", [0, 5, 10, 19, 99, 1000])
def test_the_band_is_what_sorting_gives(count):
    scores = torch.rand(count, generator=torch.Generator().manual_seed(count))
    ranked = sorted(range(count), key=lambda i: -scores[i].item())
    assert uncertainty_band(scores).tolist() == ranked[count // 10 : count // 5]


def test_of_equal_scores_the_earlier_sample_is_taken_as_more_uncertain():
    assert uncertainty_band(torch.ones(30)).tolist() == [3, 4, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_rank_nothing_are_refused(value):
    with pytest.raises(ValueError, match="samples cannot be ranked"):
        uncertainty_band(torch.tensor([1.0, value]))


# The coreset


def test_centers_are_the_middle_then_the_farthest_and_the_first_of_equally_far_ones():
    line = torch.tensor([[0.0], [10.0], [4.0], [5.0], [6.0], [1.0]])
    assert k_center_greedy(line, 5).tolist() == [2, 1, 0, 4, 3]


def greedy_by_hand(features: Tensor, num: int) -> list[int]:
    """The same rule, one distance after another."""
    rows = features.tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    chosen = [min(range(len(rows)), key=lambda i: math.dist(rows[i], mean) ** 2)]
    while len(chosen) < num:
        rest = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(math.dist(rows[i], rows[c]) for c in chosen)))
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_centers_are_those_of_the_rule_taken_literally(seed):
    features = points(12, seed)
    assert k_center_greedy(features, 6).tolist() == greedy_by_hand(features, 6)


def radius(features: Tensor, centers: list[int] | tuple[int, ...]) -> float:
    """Largest distance of a sample to its nearest center."""
    return torch.cdist(features, features[list(centers)]).min(dim=1).values.max().item()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_radius_is_at_most_twice_the_best_of_all_choices(seed, num):
    features = points(10, seed, dimensions=3)
    best = min(radius(features, centers) for centers in itertools.combinations(range(10), num))
    assert radius(features, k_center_greedy(features, num).tolist()) <= 2 * best + 1e-5


def test_no_sample_is_chosen_twice_even_if_all_are_equal():
    assert sorted(k_center_greedy(torch.ones(5, 3), 5).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num", [0, 4])
def test_centers_that_do_not_exist_are_refused(num):
    with pytest.raises(ValueError, match="3 samples"):
        k_center_greedy(torch.zeros(3, 2), num)


# Features and the whole


def test_mean_hypercolumns_are_means_of_hypercolumns():
    random = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(2, c, s, s, generator=random) for c, s in ((3, 4), (5, 8), (2, 16)))
    pyramid = FeaturePyramid(maps)
    torch.testing.assert_close(mean_hypercolumn(pyramid), pyramid.hypercolumn((16, 16)).mean(dim=(2, 3)))


def synthesizer(checkpoint: Checkpoint) -> Synthesizer:
    return Synthesizer(checkpoint, SynthesisOptions(seed=5, score="sum"), CPU)


def test_a_selection_is_band_and_coreset_of_what_the_synthesizer_says(checkpoint):
    source = synthesizer(checkpoint)
    indices, scores = select_actively(source, 3, candidates=60)
    everything = source(range(60))
    band = sorted(range(60), key=lambda i: -everything.uncertainty[i].item())[6:12]
    hypercolumns = source.generate(band)[1].hypercolumn((16, 16)).mean(dim=(2, 3))
    assert indices == [band[i] for i in greedy_by_hand(hypercolumns, 3)]
    torch.testing.assert_close(torch.tensor(scores), everything.uncertainty[indices])


def test_a_generator_alone_has_no_uncertainty_to_select_by(checkpoint):
    with pytest.raises(ValueError, match="annotate some random samples first"):
        select_actively(synthesizer(Checkpoint(checkpoint.generator)), 1, candidates=10)


@pytest.mark.parametrize(("num", "candidates"), [(1, 9), (3, 29), (12, 0)])
def test_too_few_candidates_are_refused_with_the_number_that_suffices(checkpoint, num, candidates):
    with pytest.raises(ValueError, match=f"pass {10 * num} or more"):
        select_actively(synthesizer(checkpoint), num, candidates=candidates)


def test_the_mean_of_a_crop_is_that_of_the_native_pixels_it_touches():
    pyramid = FeaturePyramid((torch.arange(8.0).view(1, 1, 4, 2), torch.arange(32.0).view(1, 1, 8, 4)))
    assert mean_hypercolumn(pyramid).tolist() == [[3.5, 15.5]]
    assert mean_hypercolumn(pyramid.crop((4, 8), (0, 4))).tolist() == [[5.5, 23.5]]
    assert mean_hypercolumn(pyramid.crop((5, 6), (0, 2))).tolist() == [[4.0, 20.5]]
