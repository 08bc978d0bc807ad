"""The fused kernel in Triton's CPU interpreter gives the labels and divergences of the reference, for any geometry."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]

# Name: maps (C, h, w), output size, hidden widths, classes, members, images, crop.
CASES: dict[str, tuple[Any, ...]] = {
    "two_images": ([(40, 4, 4), (90, 8, 8), (6, 16, 16)], (16, 16), (32, 16), 5, 3, 2, None),
    "odd_sizes": ([(80, 3, 5), (20, 12, 20)], (9, 21), (16, 8), 19, 2, 1, None),
    "whole_positions_just_below": ([(90, 4, 4), (6, 44, 44)], (44, 44), (16, 8), 3, 3, 1, None),
    "whole_positions_at_8_to_104": ([(90, 8, 8), (6, 104, 104)], (104, 104), (16, 8), 3, 3, 1, None),
    "no_fine_map": ([(200, 4, 4)], (8, 32), (48, 20), 2, 1, 1, None),
    "crop_of_a_finer_image": ([(90, 8, 8), (6, 32, 32)], (12, 16), (64, 32), 64, 2, 1, ((4, 28), (0, 32))),
}


def compare(name: str, constant: bool, dtype: torch.dtype) -> dict[str, float]:
    """Share of changed labels, largest change of divergence and probabilities; runs where Triton interprets."""
    from test_label_generator import random_pyramid, randomized

    from handsoff_stream.label_generator.triton_head import FusedLabelHead
    from handsoff_stream.uncertainty import jensen_shannon_divergence, majority_vote, mean_probabilities

    shapes, size, hidden, classes, members, images, crop = CASES[name]
    pyramid = random_pyramid(shapes, images)
    first = pyramid.maps[0][0]
    if constant:
        pyramid = type(pyramid)((first.expand_as(pyramid.maps[0]), *pyramid.maps[1:]))
    pyramid = pyramid.crop(*crop) if crop else pyramid
    label_generator = randomized(pyramid.channels, hidden=hidden, num_outputs=classes, members=members)
    folded = label_generator.fold(constant_map=first if constant else None, dtype=dtype)
    labels, divergences, probabilities = FusedLabelHead(folded, pyramid, size, soft=True)(pyramid)
    for written, alone in zip((labels, divergences), FusedLabelHead(folded, pyramid, size)(pyramid), strict=True):
        assert torch.equal(written, alone)
    outputs_MPK = label_generator.reference(pyramid, size).permute(0, 1, 3, 4, 2).flatten(1, 3)
    wanted = majority_vote(outputs_MPK.argmax(-1), classes).view(labels.shape)
    error = (jensen_shannon_divergence(outputs_MPK).view(divergences.shape) - divergences).abs().max()
    soft = mean_probabilities(outputs_MPK).unflatten(0, labels.shape).movedim(-1, 1)
    changed, moved = (labels != wanted).float().mean(), (soft - probabilities).abs().max()
    return {"changed": float(changed), "divergence": float(error), "probabilities": float(moved)}


def divergences_of_nan() -> list[bool]:
    """Whether every divergence is NaN, for NaN in each layer."""
    from test_label_generator import random_pyramid, randomized

    from handsoff_stream.label_generator.triton_head import FusedLabelHead

    found = []
    for layer in ("linear1", "linear2", "linear3"):
        label_generator = randomized((3,), hidden=(16, 8), num_outputs=3, members=1).requires_grad_(False)
        getattr(label_generator, layer).weight.fill_(float("nan"))
        pyramid = random_pyramid([(3, 8, 8)], 1)
        _, divergences = FusedLabelHead(label_generator.fold(), pyramid, (8, 16))(pyramid)
        found.append(bool(divergences.isnan().all()))
    return found


def streamed() -> dict[str, Any]:
    """A synthesizer with the kernel against one without it, over chunks of two sizes, two heads that vote and one that
    does not."""
    from conftest import make_checkpoint
    from test_label_generator import randomized

    from handsoff_stream.checkpoint import Head
    from handsoff_stream.geometry import Rectangle
    from handsoff_stream.options import SynthesisOptions
    from handsoff_stream.synthesizer import Synthesizer
    from handsoff_stream.tasks import Depth

    checkpoint = make_checkpoint(num_calibration=1).cropped(Rectangle(2, 0, 14, 16))
    channels, task = checkpoint.generator.feature_channels, checkpoint.heads["segmentation"].task
    checkpoint.heads.clear()
    for seed, name in enumerate(("parts", "others")):
        checkpoint.heads[name] = Head(task, randomized(channels, seed, hidden=(16, 8), num_outputs=3, members=3))
    checkpoint.heads["depth"] = Head(Depth(), randomized(channels, 2, hidden=(16, 8), num_outputs=1, members=3))
    kernels, plain = (
        Synthesizer(checkpoint, SynthesisOptions(kernel=kernel), torch.device("cpu")) for kernel in ("triton", "torch")
    )
    soft, plain_soft = (
        Synthesizer(checkpoint, SynthesisOptions(kernel=kernel, labels="soft"), torch.device("cpu"))
        for kernel in ("triton", "torch")
    )
    one, other = soft(range(3)), plain_soft(range(3))
    moved = [float((one.labels[name] - other.labels[name]).abs().max()) for name in ("parts", "others")]
    errors = []
    for indices in (range(3), range(3, 5)):
        one, other = kernels(indices), plain(indices)
        errors += [float((one.labels[name] != other.labels[name]).float().mean()) for name in ("parts", "others")]
        errors.append(float((one.labels["depth"] - other.labels["depth"]).abs().max()))
        errors.append(float((one.uncertainty - other.uncertainty).abs().max()))
    try:
        kernels.label("parts", plain.generate([0])[1].crop((0, 4), (0, 16)))
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "errors": errors,
        "probabilities": moved,
        "refused": refused,
        "kernels": list(kernels.labeller.kernels),
    }


def rounded_down() -> dict[str, float]:
    """The largest change of the divergence, by case, if every ratio of sizes is one float too low, as on a GPU."""
    from handsoff_stream.label_generator import triton_head

    def below(native: Any, full: int) -> Any:
        return (native / full) * 0.99999994  # the float below 1

    names = [name for name in CASES if name.startswith("whole_positions")]
    before, triton_head._ratio = triton_head._ratio, below
    try:
        return {name: compare(name, False, torch.float32)["divergence"] for name in names}
    finally:
        triton_head._ratio = before


def launches() -> list[str]:
    """What happens around a launch, in order: the device that became current, the devices of operands, and the end."""
    from test_label_generator import random_pyramid, randomized

    from handsoff_stream.label_generator import triton_head

    events: list[str] = []

    @contextlib.contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        events.append(f"{device} is current")
        yield
        events.append("as before")

    def kernel(*operands: Any, **sizes: int) -> None:
        devices = {str(operand.device) for operand in operands if isinstance(operand, torch.Tensor)}
        events.append(f"launched with operands on {sorted(devices)}")

    pyramid = random_pyramid([(3, 8, 8)], 1)
    head = triton_head.FusedLabelHead(
        randomized((3,), hidden=(16, 8), num_outputs=3, members=1).fold(), pyramid, (8, 16)
    )
    before = triton_head.launching_on, triton_head._label_head
    triton_head.launching_on = recorded  # type: ignore[assignment]
    triton_head._label_head = {(1, 1): kernel}
    try:
        head(pyramid)
    finally:
        triton_head.launching_on, triton_head._label_head = before
    return events


def everything() -> dict[str, Any]:
    """All that needs the interpreter, in one process: starting it takes longer than the kernels."""
    variants = (("float32", False), ("float16", True))
    compared = {f"{n} {d}": compare(n, c, getattr(torch, d)) for n in CASES for d, c in variants}
    others = {"reasons": reasons(), "nan": divergences_of_nan(), "streamed": streamed()}
    return {**compared, **others, "rounded_down": rounded_down(), "launches": launches()}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """`everything`, from a process where Triton interprets its kernels on the CPU."""
    code = "import json, test_label_head_triton as t; t.torch.set_num_threads(1); print(json.dumps(t.everything()))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_in_float32_the_kernel_equals_the_reference(results: dict[str, Any], name: str) -> None:
    assert results[f"{name} float32"]["changed"] == 0
    assert results[f"{name} float32"]["divergence"] < 1e-5
    assert results[f"{name} float32"]["probabilities"] < 2**-11  # half a level of float16 below 1


@pytest.mark.parametrize("name", CASES)
def test_in_float16_the_kernel_moves_near_ties_only(results: dict[str, Any], name: str) -> None:
    assert results[f"{name} float16"]["changed"] < 0.01
    assert results[f"{name} float16"]["divergence"] < 1e-3
    assert results[f"{name} float16"]["probabilities"] < 0.02


def reasons() -> list[str | None]:
    from test_label_generator import random_pyramid, randomized

    from handsoff_stream.label_generator.triton_head import unsupported

    found = []
    for shapes, geometry, dtype in [
        ([(300, 8, 8)], {"hidden": (16, 8), "num_outputs": 3}, torch.float32),
        ([(3, 8, 8)], {"hidden": (20, 8), "num_outputs": 3}, torch.float32),
        ([(3, 8, 8)], {"hidden": (16, 256), "num_outputs": 3}, torch.float32),
        ([(3, 8, 8)], {"hidden": (16, 8), "num_outputs": 65}, torch.float32),
        ([(3, 8, 8)], {"hidden": (16, 8), "num_outputs": 3}, torch.bfloat16),
        ([(3, 8, 8)], {"hidden": (16, 8), "num_outputs": 3}, torch.float16),
    ]:
        pyramid = random_pyramid(shapes, 1)
        folded = randomized(pyramid.channels, members=2, **geometry).fold(dtype=dtype)
        found.append(unsupported(folded, pyramid, (8, 8)))
    return found


def test_what_does_not_fit_on_the_chip_is_refused_with_the_reason(results: dict[str, Any]) -> None:
    channels, hidden1, hidden2, classes, dtype, nothing = results["reasons"]
    assert "300 channels" in channels and "20 hidden units" in hidden1 and "256 units" in hidden2
    assert "65 classes" in classes and "bfloat16" in dtype and nothing is None


def test_a_synthesizer_gives_the_heads_that_vote_to_the_kernel(results: dict[str, Any]) -> None:
    assert results["streamed"]["kernels"] == ["parts", "others"]
    assert all(error < 1e-5 for error in results["streamed"]["errors"])
    assert all(moved < 1e-3 for moved in results["streamed"]["probabilities"])  # a level of float16
    assert "prepare another" in results["streamed"]["refused"]


def test_nan_in_any_layer_is_not_hidden(results: dict[str, Any]) -> None:
    assert results["nan"] == [True, True, True]


def test_without_a_gpu_the_kernel_is_refused_by_name() -> None:
    from test_label_generator import random_pyramid, randomized

    from handsoff_stream.label_generator.triton_head import FusedLabelHead

    pyramid = random_pyramid([(3, 8, 8)], 1)
    folded = randomized((3,), hidden=(16, 8), num_outputs=3, members=1).fold()
    with pytest.raises(ValueError, match='device is cpu.*kernel="torch"'):
        FusedLabelHead(folded, pyramid, (8, 8))


@pytest.mark.parametrize(("kib", "problem"), [(227, None), (99, "it takes 224 KiB .* the device has 99")])
def test_a_device_needs_the_shared_memory_that_tritons_driver_names(kib: int, problem: str | None) -> None:
    from triton.runtime import driver

    from handsoff_stream.label_generator.triton_device import unsuitable

    class Device:  # what the driver answers for compute capability 9.0 and 8.9, without such a device
        utils = SimpleNamespace(get_device_properties=lambda index: [{"max_shared_mem": kib << 10}][index])

    before = dict(vars(driver))  # reset_active would look for a GPU
    driver.set_active(Device())
    try:
        reason = unsuitable(torch.device("cuda", 0))
    finally:
        vars(driver).update(before)
    assert reason is None if problem is None else re.search(problem, reason or "")


def test_a_ratio_of_sizes_that_is_rounded_down_drops_no_sample(results: dict[str, Any]) -> None:
    """A position that is a whole number comes out just below it. Rounded down, it named a first sample under the tile
    that was one too low, and the last sample was missing; so the first sample is found in whole numbers."""
    assert len(results["rounded_down"]) == 2
    assert max(results["rounded_down"].values()) < 1e-5


def test_a_launch_happens_while_the_device_of_its_operands_is_current(results: dict[str, Any]) -> None:
    assert results["launches"] == ["cpu is current", "launched with operands on ['cpu']", "as before"]


def test_a_cuda_device_becomes_current_for_a_launch_and_a_cpu_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from handsoff_stream.label_generator.triton_device import launching_on

    events: list[str] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            events.append(str(self.device))

        def __exit__(self, *_: object) -> None:
            events.append("as before")

    monkeypatch.setattr(torch.cuda, "device", Current)
    for device in ("cuda:1", "cpu"):
        with launching_on(torch.device(device)):
            events.append("launch")
    assert events == ["cuda:1", "launch", "as before", "launch"]


@pytest.mark.gpu
def test_on_the_second_gpu_the_kernel_labels_as_on_the_first_whichever_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    from test_label_generator import random_pyramid, randomized

    from handsoff_stream.label_generator.triton_head import FusedLabelHead

    pyramid = random_pyramid([(40, 8, 8), (6, 16, 16)], 2)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=3, members=2)
    found = []
    for device in (torch.device("cuda:0"), torch.device("cuda:1")):
        there = pyramid.to(device)
        folded = label_generator.to(device).fold(dtype=torch.float16)
        found.append([tensor.cpu() for tensor in FusedLabelHead(folded, there, (16, 16))(there)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_triton_and_torch_name_the_same_shared_memory() -> None:
    from handsoff_stream.label_generator.triton_device import shared_memory

    properties = torch.cuda.get_device_properties(0)
    if not hasattr(properties, "shared_memory_per_block_optin"):
        pytest.skip("this version of PyTorch does not give it")
    assert shared_memory(torch.device("cuda")) == properties.shared_memory_per_block_optin


def test_importing_the_package_and_a_synthesizer_does_not_import_triton() -> None:
    code = "import sys, handsoff_stream, handsoff_stream.synthesizer; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
