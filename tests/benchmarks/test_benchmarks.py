"""Benchmarks compare what they claim to compare, and end with one line of JSON without paths of the machine."""

import argparse
import copy
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import take

from benchmarks import (
    common,
    fitting,
    geometries,
    label_head,
    memory,
    overlap,
    processes,
    stages,
    synthesis,
    throughput,
)
from benchmarks.reference import published_generation as published
from benchmarks.report.tables import rows_of
from handsoff_stream.checkpoint import load_checkpoint
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.stream import HandsOffStream
from handsoff_stream.uncertainty import image_score, jensen_shannon_divergence

CPU = torch.device("cpu")


# The published loop --------------------------------------------------------------------------------------------


def trained_like(checkpoint):
    """A copy whose batch normalizations have statistics, as training leaves them."""
    copied, random = copy.deepcopy(checkpoint), torch.Generator().manual_seed(0)
    for name, tensor in copied.heads["segmentation"].label_generator.state_dict().items():
        if "norm" in name:
            tensor.copy_(torch.empty_like(tensor).uniform_(0.5, 1.5, generator=random))
    return copied


def test_the_published_loop_labels_as_the_reference_path_does(checkpoint):
    checkpoint = trained_like(checkpoint)
    loop = published.PublishedGeneration(checkpoint, device=CPU)
    head = checkpoint.heads["segmentation"]
    generator = checkpoint.generator
    random = torch.Generator().manual_seed(0)
    for w_1D in torch.randn(5, 1, generator.w_dim, generator=random):
        w_plus = generator.truncate(w_1D, 0.7)
        features = generator.synthesis(w_plus).features
        label, divergence, score = loop.label(features)
        outputs_MPK = head.label_generator.reference(features, (16, 16)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        assert torch.equal(torch.from_numpy(label).long().flatten(), head.task.decide(outputs_MPK))
        expected_P = jensen_shannon_divergence(outputs_MPK)
        assert torch.allclose(torch.from_numpy(divergence).flatten(), expected_P, atol=1e-6)
        assert math.isclose(score, float(image_score(expected_P.view(1, 16, 16), "top10_mean")), abs_tol=1e-6)


def test_pair_i_of_the_published_loop_is_sample_i_of_the_stream(checkpoint):
    checkpoint = trained_like(checkpoint)
    loop = published.PublishedGeneration(checkpoint, device=CPU, seed=3)
    stream = HandsOffStream(checkpoint, seed=3, filter=None, batch_size=8, device="cpu")
    (batch,) = take(stream, 1)
    pairs = [loop(index) for index in range(8)]
    images = torch.from_numpy(np.stack([pair.image for pair in pairs])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.stack([pair.label for pair in pairs]))
    # A batch of four adds in another order than one image: now and then a value falls on the next 8-bit level.
    assert (images - batch.images * 255).abs().max() <= 1
    assert (labels == batch.labels).float().mean() > 0.999
    assert torch.allclose(torch.tensor([pair.score for pair in pairs]), batch.uncertainty, atol=1e-5)


def test_the_hypercolumn_is_the_same_wherever_it_is_allocated(checkpoint):
    here, host = (published.PublishedGeneration(checkpoint, device=CPU, host_buffer=h) for h in (False, True))
    assert np.array_equal(here(0).divergence, host(0).divergence)


def test_votes_that_tie_go_to_the_smallest_class():
    votes_MP = np.array([[2, 1, 0], [1, 1, 2], [2, 0, 1], [1, 0, 2]])
    assert published.majority(votes_MP, classes=3).tolist() == [1, 0, 2]


def test_the_published_loop_drops_the_most_uncertain_tenth_of_what_it_wrote(checkpoint, tmp_path):
    loop = published.PublishedGeneration(checkpoint, device=CPU)
    published.write_pairs(loop, tmp_path, count=20)
    kept = published.WrittenPairs(tmp_path)
    scores = {f"{i:012d}": loop(i).score for i in range(20)}
    worst = sorted(scores, key=scores.__getitem__)[-2:]
    assert sorted([*kept.stems, *worst]) == sorted(scores)
    image, label = kept[0]
    assert np.array_equal((image * 255).byte().permute(1, 2, 0).numpy(), loop(int(kept.stems[0])).image)
    assert label.dtype == torch.int64 and label.shape == (16, 16)


# Geometries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution, channels", [(256, 5888), (512, 6016), (1024, 6080)])
def test_config_f_has_the_hypercolumns_of_the_published_generators(resolution, channels):
    with torch.device("meta"):
        generator = StyleGAN2(channels=geometries.config_f_channels(resolution))
    assert generator.resolution == (resolution, resolution)
    assert sum(generator.feature_channels) == channels


def test_a_head_is_described_for_random_weights_only(tmp_path):
    parser = common.parser("", name="x")
    geometries.add_arguments(parser)
    path = geometries.checkpoint_path(parser.parse_args(["--checkpoint", "config-f-8", "--hidden", "5", "4"]), tmp_path)
    (head,) = geometries.describe(load_checkpoint(path))["heads"].values()
    assert head["hidden"] == [5, 4] and head["members"] == 10 and head["num_outputs"] == 19
    with pytest.raises(ValueError, match="has its own"):
        geometries.checkpoint_path(parser.parse_args(["--members", "3"]), tmp_path)
    with pytest.raises(ValueError, match="names no geometry"):
        geometries.checkpoint_path(parser.parse_args(["--checkpoint", "config-f-100"]), tmp_path)


# Benchmarks of a stream ------------------------------------------------------------------------------------------


@pytest.fixture
def run(checkpoint_path, tmp_path, monkeypatch, capsys):
    """Run a benchmark's smallest configuration; returns the result that it prints and writes."""

    def run(module: types.ModuleType, *arguments: str) -> dict:
        name = module.__name__.split(".")[-1]
        options = ("--checkpoint", str(checkpoint_path), "--device", "cpu", *arguments)
        monkeypatch.setattr(common, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__file__, *options])
        module.main()
        last = capsys.readouterr().out.splitlines()[-1]
        result = json.loads(last)
        assert json.loads((tmp_path / f"{name}.json").read_text()) == result
        assert {"date", "command", "commit", "versions", "cpu", "gpu"} <= result["machine"].keys()
        assert result["machine"]["command"].startswith(f"python -m {module.__name__} --checkpoint tiny.safetensors")
        assert str(checkpoint_path.parent) not in last and str(common.ROOT) not in last
        assert rows_of(tmp_path / f"{name}.json", result)
        return result

    return run


def test_throughput_times_the_stream_the_published_loop_and_the_export(run):
    result = run(
        throughput,
        "--batches",
        "2",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "1",
        "--loop-candidates",
        "3",
        "--rounds",
        "1",
    )
    sides = result["sides"]
    assert list(sides) == ["stream, 0 workers", "stream, 1 workers", "published loop", "export, then read"]
    for name, side in sides.items():
        assert side["pairs"] == 8 and 0 < side["first_batch_s"] <= side["all_batches_s"]
        assert (side["bytes_on_disk"] == 0) == name.startswith("stream")
    assert sides["published loop"]["measured_candidates"] == 3
    ours, loop = sides["stream, 0 workers"], sides["published loop"]
    ratio = result["ratios"]["stream, 0 workers against published loop"]["all_batches"]
    assert math.isclose(ratio, ours["pairs_per_s"] / loop["pairs_per_s"])


def test_a_loop_that_makes_all_it_needs_is_not_scaled_up(run):
    result = run(throughput, "--batches", "2", "--batch-size", "4", "--loop-candidates", "9")
    assert result["sides"]["published loop"]["measured_candidates"] is None


def test_a_side_that_stops_early_is_no_result():
    with pytest.raises(RuntimeError, match="1 of 2 batches came"):
        throughput.consume([(torch.zeros(1), torch.zeros(1))], 2, CPU)


def test_stages_cover_a_pair_and_stand_beside_the_roofline(run):
    result = run(stages, "--repeats", "1", "--matrix", "32", "--copy-mb", "1")
    table = result["stages"]
    assert list(table) == ["mapping", "synthesis", "label head", "filter", "hand-over", "published label path"]
    assert all(stage["bytes"] > 0 and stage["operators"] > 0 for stage in table.values())
    measured = {name: stage["ms"] for name, stage in table.items() if name != "synthesis"}  # that is a difference
    assert min(measured.values()) > 0
    assert table["hand-over"]["flops"] == table["filter"]["flops"] == 0 < table["synthesis"]["flops"]
    pixels, channels, (h1, h2), outputs, members = 16 * 16, 30, (7, 5), 3, 3
    widths = channels * h1 + h1 * h2 + h2 * outputs
    assert table["published label path"]["flops"] == 2 * pixels * members * widths
    assert table["label head"]["flops"] > 0


def test_operators_are_counted_with_what_they_read_and_write_and_views_are_not():
    left, right, out = torch.zeros(4, 8), torch.zeros(8, 2), torch.zeros(4, 2)
    work = stages.count(lambda: torch.mm(left, right.t().t(), out=out), pairs=2)
    assert work == stages.Work(flops=4 * 8 * 2, bytes=(32 + 16 + 8) * 4 / 2, operators=0.5)
    assert stages.count(lambda: out.addmm_(left, right), pairs=1).flops == 2 * 4 * 8 * 2
    assert stages.count(lambda: out.copy_(torch.ones(1)[0]), pairs=1).operators == 2


def test_kernel_launches_are_what_the_profiler_names_so():
    events = {"cudaLaunchKernel": 5, "cudaGraphLaunch": 2, "cudaMemcpyAsync": 9, "aten::mm": 7}
    averages = [types.SimpleNamespace(key=key, count=count) for key, count in events.items()]
    assert stages.count_launches(averages) == 7
    assert stages.launches(lambda: torch.ones(2, 2) @ torch.ones(2, 2), 1, CPU) == 0


def test_overlap_trains_on_the_stream_and_on_its_parts(run):
    result = run(overlap, "--steps", "1", "--rounds", "2", "--batch-size", "2")
    parts = [result[f"{name}_ms"] for name in ("training", "generation", "both")]
    assert all(ms > 0 for ms in parts)
    assert result["settings"]["backbone"] == "resnet18"


def test_bubbles_are_what_both_take_beyond_the_parts():
    found = overlap.bubbles({"training": [1.0, 1.0, 9.0], "generation": [0.5, 0.5, 0.5], "both": [2.0, 1.6, 9.5]})
    assert math.isclose(found["bubbles_ms"], 100.0) and math.isclose(found["bubbles_share"], 0.05)
    assert math.isclose(found["bubbles_spread_ms"], 500.0) and math.isclose(found["slowdown"], 2.0)


def test_memory_is_read_in_equal_windows_to_the_last_pair(run):
    result = run(memory, "--pairs", "40", "--batch-size", "4", "--windows", "5")
    assert [window["pairs"] for window in result["windows"]] == [8] * 5
    assert result["pairs"] == 40 and result["host_peak_mb"] > 50 and result["published_pair"]["host_peak_mb"] > 50
    assert result["host_mb_per_1000_pairs"]["confidence_95"] >= 0


def test_a_soak_ends_when_its_minutes_have_passed():
    batches = ((torch.zeros(2), None) for _ in iter(int, 1))
    windows = memory.measure_windows(batches, 5, lambda pairs: min(pairs / 20, 1.0), CPU)
    assert [window.pairs for window in windows] == [4] * 5


def test_the_peak_of_the_device_is_reset_with_each_reading(monkeypatch):
    peaks, reset = iter([3e6, 2e6]), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    cuda = torch.device("cuda", 1)
    assert [processes.device_peak_mb(cuda), processes.device_peak_mb(cuda)] == [3.0, 2.0]
    assert reset == [cuda, cuda] and processes.device_peak_mb(CPU) == 0.0


def test_the_peak_of_the_host_includes_freed_memory_until_it_is_reset():
    processes.reset_peak()
    before = processes.peak_mb()
    held = torch.ones(64 << 18)
    del held
    assert processes.peak_mb() > before + 50
    processes.reset_peak()
    assert processes.peak_mb() < before + 50


def test_slopes_come_with_the_confidence_of_a_straight_line():
    exact = memory.fit_slope([1.0, 3.0, 5.0, 7.0])
    assert math.isclose(exact.per_window, 2.0) and abs(exact.half_width) < 1e-9
    # By hand: slope 0.6, residuals 0.3, -0.9, 0.9, -0.3, so sqrt(1.8 / 2 / 5) * 4.303.
    noisy = memory.fit_slope([1.0, 0.4, 2.8, 2.2])
    assert math.isclose(noisy.per_window, 0.6) and math.isclose(noisy.half_width, 0.4243 * 4.303, rel_tol=0.01)


@pytest.mark.parametrize("freedom, quantile", [(2, 4.303), (5, 2.571), (18, 2.101), (1000, 1.962)])
def test_students_quantiles_are_those_of_the_tables(freedom, quantile):
    assert math.isclose(memory.student_quantile(freedom), quantile, rel_tol=0.01)


# Options and results -------------------------------------------------------------------------------------------


def test_options_reach_the_stream_as_json_or_text():
    parser = common.parser("", name="x")
    common.add_stream_options(parser)
    args = parser.parse_args(["--option", "chunk_size=8", "--option", "filter=block"])
    assert common.stream_options(args) == {"chunk_size": 8, "filter": "block"}
    with pytest.raises(ValueError, match="KEY=VALUE"):
        common.stream_options(parser.parse_args(["--option", "chunk_size"]))


def test_results_of_another_device_have_a_name_of_their_own():
    parser = common.parser("", name="stages")
    names = [common.result_name(parser.parse_args(["--device", device])) for device in ("cpu", "cuda", "cuda:1")]
    assert names == ["stages", "stages-cuda", "stages-cuda"]
    assert common.result_name(parser.parse_args(["--device", "cpu", "--name", "stages-1024"])) == "stages-1024"


def test_no_folder_of_this_machine_is_recorded(tmp_path):
    parser = common.parser("", name="x")
    common.add_stream_options(parser)
    geometries.add_arguments(parser)
    inside = common.PACKAGE / "common.py"
    args = parser.parse_args(["--checkpoint", str(tmp_path / "mine.safetensors"), "--option", f"checkpoint={inside}"])
    recorded = common.settings(args)
    assert recorded["checkpoint"] == "mine.safetensors" and recorded["option"] == ["checkpoint=benchmarks/common.py"]


@pytest.mark.parametrize(
    "program, recorded",
    [
        (common.PACKAGE / "throughput.py", "-m benchmarks.throughput"),
        (common.PACKAGE / "report" / "__main__.py", "-m benchmarks.report"),
        (common.ROOT / "examples" / "train_deeplabv3.py", "examples/train_deeplabv3.py"),
        ("/elsewhere/script.py", "script.py"),
    ],
)
def test_the_recorded_command_can_be_given_from_the_root_of_the_repository(program, recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program), "--name", "x"])
    assert common.command() == f"python {recorded} --name x"


# Benchmarks without a stream -------------------------------------------------------------------------------------


def test_label_paths_are_compared_with_the_published_one(checkpoint_path):
    published_run, ours = (label_head.run(path, str(checkpoint_path), "cpu", 1) for path in ("published", "exact"))
    found = label_head.compare(ours, published_run)
    assert found["labels_changed"] == 0 and found["divergence_error"] < 1e-5 and found["output_error"] < 1e-4
    assert found["ratio"] == published_run.seconds / ours.seconds > 0
    assert label_head.compare(published_run, published_run)["memory_ratio"] == 1.0


def test_synthesis_is_timed_in_every_variant_and_exact_is_the_plain_one(run):
    result = run(synthesis, "--geometries", "8", "--batch", "1", "--repeats", "1", "--samples", "2")
    (case,) = result["speed"]
    assert case["images_per_s"].keys() == {"plain", "exact", "fast"} and case["times_plain"]["plain"] == 1.0
    assert case["exact_max_difference"] < 1e-3 and result["precision"]["samples"] == 2


def test_both_fits_learn_the_same_labels(tmp_path, checkpoint_path):
    args = argparse.Namespace(
        checkpoint=str(checkpoint_path),
        images=2,
        held_out=2,
        members=2,
        hidden=(8, 8),
        epochs=(1, 2),
        published_epochs=2,
    )
    theirs, ours = fitting.run_published(args), fitting.run_ours(args)
    assert [point["epochs"] for point in theirs["curve"]] == [point["epochs"] for point in ours["curve"]] == [1, 2]
    assert theirs["steps"] == args.members * args.published_epochs * 2 * 16 * 16 / 64
    result = fitting.compare(theirs, ours)
    best = [max(point["accuracy"] for point in side["curve"]) for side in (theirs, ours)]
    assert result["accuracy"] == min(best) > 1 / 3
    assert rows_of(tmp_path / "fitting.json", {"settings": {"images": 2}, "published": theirs, "ours": ours, **result})
