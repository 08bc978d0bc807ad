"""The comparison is fair: the same classes in all arms, no test face in a training, shares of the gap per seed."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from benchmarks import common
from benchmarks.downstream import batches, comparison, teacher
from benchmarks.downstream.arms import ARMS, Outcome, run
from benchmarks.report.tables import rows_of
from handsoff_stream.checkpoint import Checkpoint, Head, load_checkpoint, save_checkpoint
from handsoff_stream.datasets.rendered_faces import (
    CLASS_NAMES,
    FINE_CLASS_NAMES,
    FINE_PALETTE,
    labelled_faces,
)
from handsoff_stream.downstream import SegmentationScores
from handsoff_stream.fitting import FitSettings
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.tasks import Segmentation


def faces_checkpoint(folder: Path, names: tuple[str, ...]) -> str:
    """A tiny checkpoint of random weights that labels 16 x 16 images with these classes."""
    base = make_checkpoint()
    torch.manual_seed(1)
    labels = LabelGenerator(base.generator.feature_channels, hidden=(7, 5), num_outputs=len(names), members=2)
    head = Head(Segmentation(names, FINE_PALETTE[: len(names)]), labels.eval().requires_grad_(False))
    path = folder / f"{len(names)}.safetensors"
    save_checkpoint(path, Checkpoint(base.generator, {"segmentation": head}))
    return str(path)


@pytest.fixture(scope="module", params=[CLASS_NAMES, FINE_CLASS_NAMES], ids=["coarse", "fine"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> batches.Experiment:
    folder = tmp_path_factory.mktemp("experiment")
    return batches.Experiment(
        checkpoint=faces_checkpoint(folder, request.param),
        truncation=None,
        class_names=request.param,
        labelled=2,
        size=16,
        varied=False,
        backbone="efficientnet-lite0",
        pretrained=True,
        steps=5,
        batch=2,
        lr=1e-3,
        schedule="cosine",
        warmup=1,
        dtype=None,
        test_images=3,
        validation_images=2,
        curve=(2, 5),
        teacher=str(folder / "teacher.pt"),
        sampled=str(folder / "sampled.safetensors"),
    )


@pytest.fixture(scope="module")
def taught(experiment: batches.Experiment) -> batches.Experiment:
    teacher.train_teacher(experiment, 2)
    teacher.fit_on_samples(experiment, fit=FitSettings(members=2, epochs=1), calibration_samples=20)
    return experiment


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_is_scored_in_the_checkpoints_classes(arm: str, taught: batches.Experiment) -> None:
    outcome = run(taught, arm, 0)
    assert outcome.scores.class_names == taught.class_names and outcome.scores.num_images == 3
    assert [step for step, _ in outcome.curve] == [2, 5]
    assert json.dumps(outcome.record(), allow_nan=False)


def test_the_phases_of_an_arm_fill_its_steps_and_the_labelled_images_come_last_at_a_tenth_of_the_rate() -> None:
    for arm in ARMS.values():
        assert sum(phase.share for phase in arm.phases) == pytest.approx(1)
    first, last = ARMS["stream-then-labelled"].phases
    assert (first.batches, last.batches) == (batches.stream, batches.labelled)
    assert (first.rate, last.rate, last.share) == (1.0, 0.1, 0.2)
    assert [name for name, arm in ARMS.items() if arm.frozen] == ["transfer"]


def test_half_of_a_mixed_batch_is_the_stream_and_half_the_labelled_images(experiment: batches.Experiment) -> None:
    four = replace(experiment, batch=4)
    shown = []
    alone = batches.stream_of(four, four.checkpoint, 0, 2)
    for batch, synthetic in itertools.islice(zip(batches.mixed(four, 0, 4), alone, strict=True), 4):
        assert torch.equal(batch.images[:2], synthetic.images) and torch.equal(batch.labels[:2], synthetic.labels)
        shown += (-1 - batch.indices[2:]).tolist()
    assert set(shown) == set(range(four.labelled))


def test_unlimited_annotation_repeats_no_face_and_shares_none_with_other_seeds_or_the_labelled(
    experiment: batches.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ordinary_augmentation", lambda names: lambda image, label: (image, label))
    images = [image for seed in (0, 1) for batch in batches.unlimited(experiment, seed, 3) for image in batch[0]]
    images += [labelled_faces(batches.MOST_LABELLED, size=16)[i][0] for i in range(batches.MOST_LABELLED)]
    assert len({image.numpy().tobytes() for image in images}) == 2 * 3 * 2 + batches.MOST_LABELLED


def test_teacher_labelled_pairs_are_the_streams_images_with_the_teachers_labels(
    taught: batches.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ordinary_augmentation", lambda names: lambda image, label: (image, label))
    labelled, plain = (next(iter(arm(taught, 0, 1))) for arm in (batches.teacher_labelled, batches.stream))
    assert torch.equal(labelled.images, plain.images)
    network = batches.load_teacher(taught)
    expected = [batches.labels_of(network, image[None]) for image in plain.images]
    assert torch.equal(labelled.labels, torch.cat(expected))


def test_datasetgan_is_fitted_on_samples_of_the_streams_own_generator(taught: batches.Experiment) -> None:
    original, sampled = (load_checkpoint(path) for path in (taught.checkpoint, taught.sampled))
    assert sampled.provenance["images"] == ["sample-00", "sample-01"]
    assert sampled.truncation == original.truncation and sampled.calibration is not None
    for name, tensor in original.generator.state_dict().items():
        torch.testing.assert_close(sampled.generator.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)  # float16


def test_classes_are_those_of_the_checkpoint_and_others_are_refused(
    tmp_path: Path, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = faces_checkpoint(tmp_path, CLASS_NAMES)

    def made(*options: str) -> batches.Experiment:
        monkeypatch.setattr(sys, "argv", ["downstream", "--checkpoint", coarse, *options])
        return comparison.experiment_of(comparison.arguments(), str(tmp_path))

    assert made().class_names == CLASS_NAMES
    assert made("--arms", "labelled", "unlimited", "--classes", "fine").class_names == FINE_CLASS_NAMES
    with pytest.raises(ValueError, match="leave --classes out"):
        made("--arms", "labelled", "stream", "--classes", "fine")
    with pytest.raises(ValueError, match="of that domain"):
        batches.class_names_of(str(checkpoint_path))


def outcome(arm: str, seed: int, miou: float) -> Outcome:
    scores = SegmentationScores(miou, (miou, miou), miou, ("a", "b"), 1)
    return Outcome(arm, seed, 1.0, 0.5, 0.1, (), scores)


def test_the_gap_closed_is_counted_for_each_seed_between_the_labelled_images_and_unlimited_annotation() -> None:
    outcomes = [
        *(outcome("labelled", seed, miou) for seed, miou in enumerate((0.5, 0.6, 0.7))),
        *(outcome("unlimited", seed, miou) for seed, miou in enumerate((0.9, 0.8, 0.7))),
        *(outcome("mixed", seed, miou) for seed, miou in enumerate((0.7, 0.55, 0.7))),
    ]
    closed = comparison.gap_closed(outcomes)
    assert closed["mixed"] == pytest.approx({0: 0.5, 1: -0.25})  # seed 2 has no gap
    assert closed["labelled"] == pytest.approx({0: 0, 1: 0}) and closed["unlimited"] == pytest.approx({0: 1, 1: 1})
    assert comparison.summary(outcomes)["mixed"]["gap_closed_mean"] == pytest.approx(0.125)
    assert comparison.gap_closed(outcomes[3:]) == {}


def test_the_benchmark_writes_arms_gap_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    options = "--arms labelled stream unlimited --labelled 2 --steps 2 --batch 2 --size 16 --test-images 2 --seeds 0"
    checkpoint = faces_checkpoint(tmp_path, CLASS_NAMES)
    monkeypatch.setattr(sys, "argv", ["downstream", "--checkpoint", checkpoint, *options.split()])
    comparison.main()
    last = capsys.readouterr().out.splitlines()[-1]
    result = json.loads(last)
    assert [one["arm"] for one in result["runs"]] == ["labelled", "stream", "unlimited"]
    assert result["settings"]["fingerprint"] and result["settings"]["class_names"] == list(CLASS_NAMES)
    assert len(rows_of(tmp_path / "downstream.json", result)) == 2
    assert str(tmp_path) not in last
