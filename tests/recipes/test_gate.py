"""The gate detects dropped modes and lost attributes, remembers its readings, and makes a run roll back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handsoff_stream.generators import load_generator
from handsoff_stream.generators.stylegan2 import StyleGAN2
from recipes.faces.gate import MIN_RECALL, MIN_SHARE, Gate, Reading, samples
from recipes.faces.quality import (
    LONG_TAIL,
    NEIGHBORS,
    Quality,
    Teacher,
    look_at,
    measure,
    open_teacher,
    precision_and_recall,
)
from recipes.faces.train_generator import MAX_ROLLBACKS

ROOT = Path(__file__).parents[2]
SHARES = {"glasses": 0.2, "hat": 0.1}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher().eval().requires_grad_(False)


def generator(seed: int = 0) -> StyleGAN2:
    torch.manual_seed(seed)
    return StyleGAN2(channels=(8, 8, 8), z_dim=8, w_dim=8, mapping_layers=2).requires_grad_(False)


def quality(*, recall: float = 0.5, distance: float = 0.1, glasses: float = 0.2, hat: float = 0.1) -> Quality:
    return Quality(distance, 0.5, recall, {"glasses": glasses, "hat": hat})


def gate(path: Path, *passed: Quality) -> Gate:
    rows = [{"images": i, "quality": vars(q), "reason": None} for i, q in enumerate(passed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Gate(path, Teacher(), torch.zeros(8, 2048), SHARES)


def points(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None]


def brute_force_share(inside: torch.Tensor, of: torch.Tensor) -> float:
    """Equation 1 of the paper, point by point."""
    hits = 0
    for point in inside:
        for i, center in enumerate(of):
            others = sorted(float((center - other).norm()) for j, other in enumerate(of) if j != i)
            if float((point - center).norm()) <= others[NEIGHBORS - 1]:
                hits += 1
                break
    return hits / len(inside)


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_are_the_papers(seed):
    rng = torch.Generator().manual_seed(seed)
    real, generated = torch.randn(12, 3, generator=rng), 1.5 * torch.randn(12, 3, generator=rng) + 0.5
    expected = brute_force_share(generated, real), brute_force_share(real, generated)
    assert precision_and_recall(real, generated) == pytest.approx(expected)


def test_the_same_set_has_all_and_a_far_one_nothing():
    real = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 100) == (0, 0)


def test_a_dropped_mode_costs_recall_and_no_precision():
    real = points(0.0, 1, 2, 3, 4, 100, 101, 102, 103, 104)
    generated = points(0.5, 1.5, 2.5, 3.5, 0.2, 1.2, 2.2, 3.2, 0.7, 1.7)
    precision, recall = precision_and_recall(real, generated)
    assert precision == 1 and recall == 0.5


def test_too_few_images_for_neighbors_are_refused():
    with pytest.raises(ValueError, match="3 real and 8 generated images do not all have 3 neighbors"):
        precision_and_recall(torch.zeros(3, 2), torch.zeros(8, 2))


def test_the_teacher_counts_the_images_on_which_it_sees_a_class(teacher):
    batches = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(4)
    features, shares = look_at(batches, teacher)
    assert features.shape == (12, 2048) and shares.keys() == set(LONG_TAIL)
    together, _ = look_at([torch.cat(batches)], teacher)
    torch.testing.assert_close(features, together)
    assert torch.equal(teacher.look(batches[0])[1], teacher(batches[0]).argmax(dim=1))


def test_images_of_any_size_are_labelled_at_the_teachers_own(teacher):
    large = torch.rand(2, 3, 64, 64).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(teacher(large), teacher(large[:, :, ::2, ::2]))


def test_a_generator_that_makes_one_image_only_does_not_pass(teacher, tmp_path):
    varied, collapsed = generator(), generator()
    for layer in collapsed.mapping_network:
        layer.weight.zero_()
    reference, shares = look_at(samples(generator(), 24), teacher)
    gate = Gate(tmp_path / "gate.jsonl", teacher, reference, shares)
    first, second = gate.read(varied, 0), gate.read(collapsed, 1000)
    assert first.reason is None and first.quality.recall == 1
    assert second.reason is not None and second.reason.startswith("recall fell from")
    assert gate.is_best(first) and not gate.is_best(second)


def test_the_distance_of_a_generator_from_itself_is_nothing_and_from_another_something(teacher):
    # Of distinct latents: the unbiased estimate leaves out pairs of the same index, not pairs of the same image.
    ours = torch.cat(list(samples(generator(), 64)))
    reference, _ = look_at([ours[:32]], teacher)
    same, other = measure([ours[32:]], teacher, reference), measure(samples(generator(seed=1), 32), teacher, reference)
    assert abs(same.distance) < 0.2 * other.distance


@pytest.mark.parametrize("recall", [0.0, 0.99 * MIN_RECALL * 0.8, 1.01 * MIN_RECALL * 0.8, 0.9])
def test_recall_is_compared_with_the_best_that_passed(recall, tmp_path):
    reason = gate(tmp_path / "gate.jsonl", quality(recall=0.8), quality(recall=0.6)).objection(quality(recall=recall))
    assert (reason is None) == (recall >= MIN_RECALL * 0.8)


@pytest.mark.parametrize("usual", [0.04, 0.2, 0.4])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_an_attribute_is_compared_with_its_best_share_but_never_asked_for_more_than_renders_have(
    usual, factor, tmp_path
):
    bound = MIN_SHARE * min(usual, SHARES["glasses"])
    reason = gate(tmp_path / "gate.jsonl", quality(glasses=usual)).objection(quality(glasses=factor * bound))
    assert (reason is None) == (factor > 1)
    assert reason is None or reason.startswith("glasses: on ")


def test_the_first_reading_passes_whatever_it_is(tmp_path):
    assert gate(tmp_path / "gate.jsonl").objection(quality(recall=0, glasses=0, hat=0)) is None


def test_readings_that_did_not_pass_are_no_measure(tmp_path):
    g = gate(tmp_path / "gate.jsonl", quality(recall=0.5))
    g.readings.append(Reading(9, quality(recall=0.99), "hat: gone"))
    assert g.objection(quality(recall=0.4)) is None


def test_readings_outlive_the_process(teacher, tmp_path):
    reference, shares = look_at(samples(generator(seed=1), 8), teacher)
    first = Gate(tmp_path / "gate.jsonl", teacher, reference, shares)
    first.read(generator(), 40)
    assert Gate(tmp_path / "gate.jsonl", teacher, reference, shares).readings == first.readings


def test_the_teacher_is_trained_once_and_then_read(tmp_path):
    first = open_teacher(tmp_path / "teacher.safetensors", 2, torch.device("cpu"), varied=True)
    written = (tmp_path / "teacher.safetensors").read_bytes()
    second = open_teacher(tmp_path / "teacher.safetensors", 2, torch.device("cpu"), varied=True)
    assert (tmp_path / "teacher.safetensors").read_bytes() == written
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(first(x), second(x))
    assert not first.training and not second.training


@pytest.mark.slow
def test_a_run_keeps_what_passes_and_goes_back_when_modes_are_lost(tmp_path):
    """The second start finds in its past a recall that no generator can have."""
    out = tmp_path / "run"
    options = ["--resolution", 16, "--batch", 4, "--channels", 8, 7, 6, "--z-dim", 8, "--mapping-layers", 2]
    options += ["--workers", 0, "--device", "cpu", "--gate", 8, "--gate-samples", 8, "--teacher-steps", 2]

    def run(images: int, lr: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recipes.faces.train_generator", out, "--images", images, "--lr", lr, *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    assert run(8, lr=1e-9).stdout.count("; passes") == 2  # at the start and after 8 images
    assert load_generator(out / "best.safetensors").resolution == (16, 16)
    good = torch.load(out / "good.pt", weights_only=True)
    assert good["position"][0] == 8
    rows = (out / "gate.jsonl").read_text().splitlines()
    past = json.loads(rows[-1])
    past["quality"]["recall"] = 2.0
    (out / "gate.jsonl").write_text("\n".join([*rows, json.dumps(past)]) + "\n")
    collapsed = run(20, lr=0.002)
    assert "resuming at 8 images" in collapsed.stdout
    # From 8 to 16 by other random numbers each time, until there is no point in going on.
    readings = [json.loads(line) for line in (out / "gate.jsonl").read_text().splitlines()][3:]
    assert [reading["images"] for reading in readings] == [16] * (MAX_ROLLBACKS + 1)
    assert all(reading["reason"].startswith("recall fell from 2.00") for reading in readings)
    assert len({reading["quality"]["distance"] for reading in readings}) == len(readings)
    assert collapsed.returncode == 1 and f"collapsed {MAX_ROLLBACKS + 1} times" in collapsed.stderr
