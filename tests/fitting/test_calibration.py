"""Calibration scores are those of a synthesizer, of both kinds, for a separate seed."""

import pytest
import torch

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.fitting.calibration import CALIBRATION_SEED, calibrate
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.source import CheckpointSource
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Segmentation

TASK = Segmentation(("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(channels=(8, 8, 8), z_dim=16, w_dim=16, mapping_layers=2).eval()
    label_generator = LabelGenerator(generator.feature_channels, (8, 4), 3, members=3).eval()
    return Checkpoint(generator.requires_grad_(False), {"segmentation": Head(TASK, label_generator)}, truncation=0.6)


@pytest.mark.parametrize("kind", ["sum", "top10_mean"])
def test_scores_are_the_synthesizers(checkpoint, kind):
    calibrated = calibrate(checkpoint, num_samples=10, chunk=4)
    options = SynthesisOptions(seed=CALIBRATION_SEED, truncation=0.6, score=kind)
    synthesizer = Synthesizer(checkpoint, options, torch.device("cpu"))
    expected = torch.cat([synthesizer(range(i, min(i + 4, 10))).uncertainty for i in (0, 4, 8)])
    assert calibrated.calibration is not None
    assert calibrated.calibration.scores[kind] == expected.tolist()


def test_a_stream_with_the_checkpoints_options_finds_the_scores_and_another_does_not(checkpoint):
    source = CheckpointSource(calibrate(checkpoint, num_samples=5))
    assert len(source.calibration_scores(SynthesisOptions(truncation=0.6, seed=3))) == 5
    assert source.calibration_scores(SynthesisOptions(truncation=0.7)) == []


def test_calibration_samples_are_not_those_of_a_stream_of_seed_0(checkpoint):
    ours = calibrate(checkpoint, num_samples=4).calibration
    streamed = calibrate(checkpoint, num_samples=4, seed=0).calibration
    assert ours is not None and streamed is not None
    assert not set(ours.scores["sum"]) & set(streamed.scores["sum"])


def test_only_the_calibration_changes(checkpoint):
    calibrated = calibrate(checkpoint, num_samples=2)
    assert checkpoint.calibration is None
    assert calibrated.manifest()["fingerprint"] == checkpoint.manifest()["fingerprint"]


def test_nothing_to_score_is_refused(checkpoint):
    with pytest.raises(ValueError, match="fit a head first"):
        calibrate(Checkpoint(checkpoint.generator))
    with pytest.raises(ValueError, match="num_samples=0"):
        calibrate(checkpoint, num_samples=0)
