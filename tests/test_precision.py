"""Precision is named, chosen by the user, part of a stream's identity, and refused on devices without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from handsoff_stream import precision
from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.options import SynthesisOptions
from handsoff_stream.precision import compute_dtype, cpu_multiplies_bfloat16, default_precision, fastest_precision
from handsoff_stream.synthesizer import Synthesizer
from handsoff_stream.tasks import Depth

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_exact_is_float32_everywhere_and_fast_what_the_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    assert {compute_dtype("exact", device) for device in (CPU, CUDA)} == {torch.float32}
    assert compute_dtype("fast", CPU) == torch.bfloat16 and compute_dtype("fast", CUDA) == torch.float16
    assert default_precision(CPU) == "exact" and default_precision(CUDA) == "fast"


def test_fast_is_refused_on_a_cpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match='bfloat16.*pass precision="exact"'):
        compute_dtype("fast", CPU)


def test_whether_a_cpu_multiplies_bfloat16_is_known() -> None:
    assert cpu_multiplies_bfloat16() in (True, False)


def test_the_fastest_precision_is_one_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda has=has: has)
        assert fastest_precision(CPU) == ("fast" if has else "exact") and fastest_precision(CUDA) == "fast"
        compute_dtype(fastest_precision(CPU), CPU)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="precision='half'.*exact.*fast"):
        SynthesisOptions(precision="half")
    with pytest.raises(ValueError, match="precision='half'.*exact.*fast"):
        compute_dtype("half", CPU)
    with pytest.raises(ValueError, match="kernel='cuda'.*auto.*triton.*torch"):
        SynthesisOptions(kernel="cuda")


def test_precision_and_kernel_are_part_of_what_a_sample_is_but_not_of_its_calibration() -> None:
    options = SynthesisOptions(precision="fast", kernel="torch")
    assert options.config().items() >= {"precision": "fast", "kernel": "torch"}.items()
    assert options.calibrated_by() == SynthesisOptions().calibrated_by()


def test_fast_labels_are_those_of_exact_but_for_near_ties(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    exact, fast = (Synthesizer(checkpoint, SynthesisOptions(precision=p), CPU)(range(4)) for p in ("exact", "fast"))
    assert isinstance(exact.labels, torch.Tensor) and isinstance(fast.labels, torch.Tensor)
    assert torch.equal(exact.images, fast.images) and (exact.labels != fast.labels).float().mean() < 0.05
    assert not torch.equal(exact.uncertainty, fast.uncertainty)
    torch.testing.assert_close(exact.uncertainty, fast.uncertainty, rtol=0.1, atol=1e-4)


def test_the_fused_kernel_where_it_cannot_run_is_refused(checkpoint: Checkpoint) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match='device is cpu.*kernel="auto"'):
        Synthesizer(checkpoint, SynthesisOptions(kernel="triton"), CPU)([0])


def test_a_kernel_for_heads_that_vote_is_refused_where_there_is_none(checkpoint: Checkpoint) -> None:
    head = Head(Depth(), LabelGenerator(checkpoint.generator.feature_channels, hidden=(7, 5), num_outputs=1, members=2))
    depth = replace(checkpoint, heads={"depth": head})
    with pytest.raises(ValueError, match=r"none of \['depth'\] does"):
        Synthesizer(depth, SynthesisOptions(kernel="triton"), CPU)
