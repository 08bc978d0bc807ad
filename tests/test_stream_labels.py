"""Soft labels, pixels left unlabelled, and the score relative to the classes: exact, and functions of the index."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from conftest import CLASSES, assert_resumes_exactly, assert_same, make_checkpoint, take
from torch import Tensor
from torchvision import tv_tensors

from benchmarks.gpu.operator_tape import record_on_tape
from handsoff_stream.batch import LabelledBatch
from handsoff_stream.checkpoint import Calibration, Checkpoint, Head, load_checkpoint, save_checkpoint
from handsoff_stream.downstream import ordinary_augmentation, train_segmentation
from handsoff_stream.downstream.repeated import RandomMirror
from handsoff_stream.errors import CheckpointError
from handsoff_stream.fitting.calibration import calibrate
from handsoff_stream.graphs import GraphedSynthesizer
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.mixture import mix
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.outlets.loader import HandsOffLoader
from handsoff_stream.outlets.meter import StreamMeter
from handsoff_stream.outlets.webdataset import write_shards
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Depth
from handsoff_stream.uncertainty import class_relative_score, class_totals, image_score

CPU = torch.device("cpu")
RELATIVE: list[dict[str, Any]] = [
    {"labels": "soft"},
    {"ignore": "class-relative"},
    {"score": "class-relative"},
    {"labels": "soft", "ignore": "class-relative", "ignore_factor": 0.8, "score": "class-relative"},
]


def varied_checkpoint() -> Checkpoint:
    """Every class occurs, with a mean uncertainty of its own."""
    checkpoint = make_checkpoint(num_calibration=1)
    random, label_generator = torch.Generator().manual_seed(0), checkpoint.heads["segmentation"].label_generator
    for linear, spread in ((label_generator.linear1, 0.5), (label_generator.linear3, 1.0)):
        linear.weight.normal_(std=spread, generator=random)
        linear.bias.zero_()
    return checkpoint


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    return calibrate(varied_checkpoint(), num_samples=60)


@pytest.fixture(scope="module")
def two_heads(calibrated: Checkpoint) -> Checkpoint:
    """Depth beside the segmentation."""
    torch.manual_seed(1)
    depth = LabelGenerator(calibrated.generator.feature_channels, hidden=(7, 5), num_outputs=1, members=2)
    heads = {**calibrated.heads, "depth": Head(Depth(), depth.eval().requires_grad_(False))}
    return calibrate(Checkpoint(calibrated.generator, heads), num_samples=8)


def synthesized(checkpoint: Checkpoint, indices: range, **options: Any) -> LabelledBatch:
    return Synthesizer(checkpoint, SynthesisOptions(seed=3, **options), CPU)(indices)


def maps(checkpoint: Checkpoint, indices: range) -> tuple[Tensor, Tensor]:
    """Class ids and uncertainty of every pixel, with no option applied."""
    synthesizer = Synthesizer(checkpoint, SynthesisOptions(seed=3), CPU)
    return synthesizer.label("segmentation", synthesizer.generate(indices)[1])


def class_means(checkpoint: Checkpoint) -> Tensor:
    assert checkpoint.calibration is not None
    return torch.tensor(checkpoint.calibration.class_uncertainty["segmentation"])


# Exactness


def test_soft_labels_are_the_mean_probabilities_of_the_reference_to_half_a_level_of_float16(
    calibrated: Checkpoint,
) -> None:
    soft, hard = (synthesized(calibrated, range(6), labels=kind) for kind in ("soft", "hard"))
    assert isinstance(soft.labels, Tensor) and soft.labels.dtype == torch.float16
    assert torch.equal(soft.images, hard.images) and torch.equal(soft.uncertainty, hard.uncertainty)
    synthesizer = Synthesizer(calibrated, SynthesisOptions(seed=3), CPU)
    features = synthesizer.generate(range(6))[1]
    outputs = calibrated.heads["segmentation"].label_generator.reference(features, calibrated.size)
    expected = outputs.softmax(dim=2).mean(dim=0)
    torch.testing.assert_close(soft.labels.float(), expected, rtol=0, atol=2**-11)
    assert ((soft.labels.float().sum(dim=1) - 1).abs() < 2**-9).all()


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_pixel_is_ignored_exactly_if_it_is_more_uncertain_than_the_factor_times_its_classs_mean(
    calibrated: Checkpoint, factor: float
) -> None:
    ids, uncertainty = maps(calibrated, range(5))
    ignored = uncertainty > factor * class_means(calibrated)[ids]
    assert 0.05 < ignored.float().mean() < 0.9
    chosen = {"ignore": "class-relative", "ignore_factor": factor}
    hard, soft = (synthesized(calibrated, range(5), labels=kind, **chosen) for kind in ("hard", "soft"))
    assert torch.equal(hard.labels, torch.where(ignored, 255, ids))
    full = synthesized(calibrated, range(5), labels="soft").labels
    assert torch.equal(soft.labels, torch.where(ignored[:, None], 0, full))
    assert torch.equal(hard.uncertainty, image_score(uncertainty, "top10_mean"))  # of all pixels


def test_the_score_compares_the_classes_of_an_image_with_their_means(calibrated: Checkpoint) -> None:
    ids, uncertainty = maps(calibrated, range(5))
    scores = synthesized(calibrated, range(5), score="class-relative").uncertainty
    for image in range(5):
        present = ids[image].unique().tolist()
        ratios = [uncertainty[image][ids[image] == k].mean() / class_means(calibrated)[k] for k in present]
        assert float(scores[image]) == pytest.approx(float(sum(ratios)) / len(present), rel=1e-4)


def test_calibration_measures_the_mean_over_all_pixels_of_a_class_and_the_scores_of_its_own_sample(
    calibrated: Checkpoint,
) -> None:
    again = calibrate(calibrated, num_samples=7, chunk=4, seed=3)
    parts = [maps(calibrated, range(4)), maps(calibrated, range(4, 7))]
    ids, uncertainty = (torch.cat(part) for part in zip(*parts, strict=True))
    for k, mean in enumerate(class_means(again).tolist()):
        assert mean == pytest.approx(float(uncertainty[ids == k].mean()), rel=1e-5)
    assert again.calibration is not None
    expected = class_relative_score(*class_totals(uncertainty, ids, 3), class_means(again))
    assert again.calibration.scores["class-relative"] == expected.tolist()
    chunks = [synthesized(again, part, score="class-relative").uncertainty for part in (range(4), range(4, 7))]
    assert torch.equal(torch.cat(chunks), expected)


def test_a_class_that_no_sample_shows_has_no_mean(calibrated: Checkpoint) -> None:
    never = varied_checkpoint()
    never.heads["segmentation"].label_generator.linear3.bias[..., 2] = -1e6
    never = calibrate(never, num_samples=4)
    assert never.calibration is not None
    assert never.calibration.class_uncertainty["segmentation"][2] is None
    batch = synthesized(never, range(3), score="class-relative", ignore="class-relative")
    assert batch.uncertainty.isfinite().all()


# A function of the index


@pytest.mark.parametrize("options", RELATIVE, ids=str)
def test_a_sample_is_the_same_alone_in_batches_in_workers_and_in_a_second_pass_over_its_indices(
    calibrated: Checkpoint, options: dict[str, Any]
) -> None:
    samples = HandsOffStream(calibrated, device="cpu", as_dict=True, **options)
    found = take(samples, 9)
    for one in found:
        again = samples[one["index"]]
        assert_same([again["image"], again["label"]], [one["image"], one["label"]])
    batches = HandsOffStream(calibrated, device="cpu", batch_size=3, **options)
    expected = [torch.stack([one[k] for one in found]) for k in ("image", "label", "uncertainty")]
    read = take(batches, 3)
    assert_same(expected, [torch.cat([getattr(b, k) for b in read]) for k in ("images", "labels", "uncertainty")])
    assert found[0]["label"].dtype == (torch.float32 if "labels" in options else torch.int64)


@pytest.mark.parametrize("options", RELATIVE, ids=str)
def test_a_saved_position_is_resumed_exactly(calibrated: Checkpoint, options: dict[str, Any]) -> None:
    assert_resumes_exactly(lambda: HandsOffStream(calibrated, device="cpu", batch_size=2, **options), 4)


@pytest.mark.parametrize("options", RELATIVE, ids=str)
def test_a_replayed_graph_has_the_bits_of_the_plain_synthesizer(
    calibrated: Checkpoint, options: dict[str, Any]
) -> None:
    plain = Synthesizer(calibrated, SynthesisOptions(**options), CPU)
    graphed = GraphedSynthesizer(plain, record_on_tape)
    for chunk in (range(4), range(8, 12)):
        assert_same(graphed(chunk), plain(chunk).packed())


@pytest.mark.parametrize("options", [*RELATIVE, {"ignore": "class-relative", "ignore_factor": 2.0}], ids=str)
def test_the_options_are_part_of_the_identity_and_older_states_without_them_still_load(
    calibrated: Checkpoint, options: dict[str, Any]
) -> None:
    plain, other = (HandsOffStream(calibrated, device="cpu", **chosen) for chosen in ({}, options))
    assert not {"labels", "ignore", "ignore_factor"} & plain.state_dict()["stream"].keys()
    other.load_state_dict(json.loads(json.dumps(other.state_dict())))
    with pytest.raises(ValueError, match=f"saved with ({'|'.join(options)})="):
        plain.load_state_dict(other.state_dict())


def test_the_rolling_windows_start_from_scores_of_the_same_kind(calibrated: Checkpoint) -> None:
    assert calibrated.calibration is not None
    relative, usual = (HandsOffStream(calibrated, device="cpu", score=s) for s in ("class-relative", "top10_mean"))
    for stream, kind in ((relative, "class-relative"), (usual, "top10_mean")):
        assert stream._source.calibration_scores(stream.options) == calibrated.calibration.scores[kind]


# Several heads


def test_heads_without_classes_are_left_as_they_are(two_heads: Checkpoint) -> None:
    plain, chosen = (synthesized(two_heads, range(3), **options) for options in ({}, RELATIVE[-1]))
    assert isinstance(plain.labels, dict) and isinstance(chosen.labels, dict)
    assert torch.equal(plain.labels["depth"], chosen.labels["depth"])
    assert chosen.labels["segmentation"].shape == (3, len(CLASSES), 16, 16)


def test_what_needs_classes_is_refused_where_there_are_none(two_heads: Checkpoint) -> None:
    only = Checkpoint(two_heads.generator, {"depth": two_heads.heads["depth"]})
    for options in RELATIVE:
        with pytest.raises(ValueError, match=r"none of \['depth'\] has any; leave it out"):
            HandsOffStream(only, device="cpu", **options)
    first = calibrate(Checkpoint(two_heads.generator, dict(reversed(two_heads.heads.items()))), num_samples=4)
    with pytest.raises(ValueError, match="'depth' has no classes"):
        HandsOffStream(first, device="cpu", score="class-relative")
    HandsOffStream(first, device="cpu", ignore="class-relative")


# Checkpoints


def test_the_means_survive_a_file_and_leave_older_files_as_they_were(calibrated: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new.safetensors", calibrated)
    assert load_checkpoint(tmp_path / "new.safetensors").calibration == calibrated.calibration
    older = make_checkpoint(num_calibration=3)
    save_checkpoint(tmp_path / "old.safetensors", older)
    assert set(load_checkpoint(tmp_path / "old.safetensors").manifest()["calibration"]) == {"options", "scores"}


@pytest.mark.parametrize("options", RELATIVE[1:3], ids=str)
def test_a_checkpoint_without_the_means_or_with_those_of_another_truncation_is_refused_with_the_remedy(
    calibrated: Checkpoint, options: dict[str, Any]
) -> None:
    old = make_checkpoint(num_calibration=3)
    for checkpoint, truncation in ((old, 0.7), (replace(old, calibration=None), 0.7), (calibrated, 0.5)):
        with pytest.raises(ValueError, match=f"truncation={truncation}.*calibrate it with .*calibrate.* and save it"):
            HandsOffStream(checkpoint, device="cpu", truncation=truncation, **options)
    HandsOffStream(old, device="cpu", labels="soft")


@pytest.mark.parametrize("means", [{"segmentation": [0.1, 0.2]}, {"other": [0.1, 0.2, 0.3]}])
def test_means_that_belong_to_no_head_are_refused(
    calibrated: Checkpoint, means: dict[str, list[float | None]], tmp_path: Path
) -> None:
    assert calibrated.calibration is not None
    wrong = replace(calibrated, calibration=Calibration(calibrated.calibration.options, {}, means))
    save_checkpoint(tmp_path / "wrong.safetensors", wrong)
    with pytest.raises(CheckpointError, match="no head with so many; calibrate it again"):
        load_checkpoint(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    "wrong", [{"labels": "smooth"}, {"ignore": "all"}, {"ignore_factor": 0.0}, {"ignore_factor": float("nan")}], ids=str
)
def test_unknown_values_are_refused(calibrated: Checkpoint, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*pass"):
        HandsOffStream(calibrated, device="cpu", **wrong)


# Ways out


def test_soft_labels_are_exported_without_loss(calibrated: Checkpoint, tmp_path: Path) -> None:
    stream = HandsOffStream(calibrated, device="cpu", batch_size=2, labels="soft", ignore="class-relative")
    (shard,) = write_shards(stream, tmp_path, num_samples=3, shard_size=3)
    expected = take(HandsOffStream(calibrated, device="cpu", labels="soft", ignore="class-relative"), 3)
    for read, (_, label) in zip(webdataset.WebDataset(str(shard), shardshuffle=False).decode(), expected, strict=True):
        assert np.array_equal(read["label.npy"], label.numpy())


@pytest.mark.parametrize("names", [CLASSES, ("background", "left hair", "right hair")])
def test_augmentation_moves_soft_labels_as_it_moves_class_ids_and_fills_with_no_label(
    calibrated: Checkpoint, names: tuple[str, ...]
) -> None:
    def one_hot(batch: LabelledBatch) -> LabelledBatch:
        return replace(batch, labels=torch.nn.functional.one_hot(batch.labels, 3).movedim(-1, 1).float())  # type: ignore[arg-type]

    plain = Synthesizer(calibrated, SynthesisOptions(), CPU)
    options: dict[str, Any] = {"device": "cpu", "filter": None, "transforms": ordinary_augmentation(names)}
    ids = take(HandsOffStream(calibrated, synthesize=plain, **options), 8)
    soft = take(HandsOffStream(calibrated, synthesize=lambda indices: one_hot(plain(indices)), **options), 8)
    for (image, label), (same, moved) in zip(ids, soft, strict=True):
        assert torch.equal(image, same)
        assert torch.equal(moved.sum(dim=0), (label != 255).float())
        assert torch.equal(moved.argmax(dim=0)[label != 255], label[label != 255])
    assert any((label == 255).any() for _, label in ids)


def test_a_mirror_swaps_the_probabilities_of_the_sides_and_leaves_other_numbers_alone() -> None:
    mirror, mirrored = RandomMirror(("left ear", "nose", "right ear")), {"mirror": True}
    soft, depth = torch.rand(3, 4, 5), torch.rand(1, 4, 5)
    assert torch.equal(mirror.transform(tv_tensors.Mask(soft), mirrored), soft[[2, 1, 0]].flip(2))
    assert torch.equal(mirror.transform(tv_tensors.Mask(depth), mirrored), depth.flip(2))


def test_soft_labels_and_class_ids_are_not_mixed(calibrated: Checkpoint) -> None:
    labelled = [(torch.rand(3, 16, 16), torch.zeros(16, 16, dtype=torch.int64))]
    with pytest.raises(ValueError, match='build the stream with labels="hard"'):
        mix(HandsOffStream(calibrated, device="cpu", labels="soft"), labelled)


def test_a_meter_counts_soft_labels_as_shares_of_pixels(calibrated: Checkpoint) -> None:
    loader = HandsOffLoader(HandsOffStream(calibrated, device="cpu", batch_size=4, labels="soft"))
    meter = StreamMeter(loader)
    batches = take(loader, 3)
    for batch in batches:
        meter.update(batch)
    values, mean = meter.values(), torch.cat([batch.labels for batch in batches]).mean(dim=(0, 2, 3))
    for name, share in zip(CLASSES, mean.tolist(), strict=True):
        assert values[f"stream/share/{name}"] == pytest.approx(share, abs=0.001)


# Training


def losses(labels: Tensor) -> tuple[float, ...]:
    """Of three steps on the same images, from the same weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1))
    images = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    return train_segmentation(model, [(images, labels)], steps=3, device="cpu", dtype=torch.float32).losses


def test_certain_soft_labels_train_as_class_ids_do_and_unlabelled_pixels_of_any_form_do_not_count() -> None:
    ids = torch.randint(0, 3, (4, 6, 5), generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.one_hot(ids, 3).movedim(-1, 1).float()
    assert losses(soft) == pytest.approx(losses(ids))
    ids[:, 2:4] = 255
    for unlabelled in (0.0, 255.0):
        soft[:, :, 2:4] = unlabelled
        assert losses(soft) == pytest.approx(losses(ids))
    assert losses(torch.zeros_like(soft)) == (0.0, 0.0, 0.0)


def test_the_loss_of_an_uncertain_pixel_is_the_cross_entropy_of_its_distribution() -> None:
    even = losses(torch.full((4, 3, 6, 5), 1 / 3))[0]
    classes = [losses(torch.full((4, 6, 5), k))[0] for k in range(3)]
    assert even == pytest.approx(sum(classes) / 3)


def test_a_network_is_trained_on_a_stream_of_soft_labels(calibrated: Checkpoint) -> None:
    stream = HandsOffStream(
        calibrated, batch_size=4, device="cpu", labels="soft", transforms=ordinary_augmentation(CLASSES)
    )
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1))
    report = train_segmentation(model, stream, steps=30, lr=0.05, device="cpu")
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
