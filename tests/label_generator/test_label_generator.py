"""The label generator: published numbers, training equal to separate MLPs, fast path equal to the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.geometry import Size
from handsoff_stream.label_generator import FoldedLabelGenerator, LabelGenerator, join
from handsoff_stream.label_generator import rows as label_rows
from handsoff_stream.label_generator.tiles import project_first
from handsoff_stream.uncertainty import jensen_shannon_divergence, majority_vote

DATA = Path(__file__).parents[1] / "data"
EXPECTED = np.load(DATA / "label_generator" / "expected.npz")
CHANNELS = (32, 32, 24, 24, 20, 20, 12, 12)


def published_states() -> list[dict[str, Tensor]]:
    paths = [DATA / "label_generator" / f"model_{i}.pth" for i in range(3)]
    return [torch.load(path, weights_only=True)["model_state_dict"] for path in paths]


def published_pyramid() -> FeaturePyramid:
    with np.load(DATA / "rosinality_32_expected.npz") as data:
        return FeaturePyramid(tuple(torch.from_numpy(data[f"feat_{i:02d}"]) for i in range(8)))


def randomized(channels: tuple[int, ...], seed: int = 0, **geometry: object) -> LabelGenerator:
    """In eval mode, with BatchNorm layers that have seen data: a forgotten term shows."""
    generator = torch.Generator().manual_seed(seed)
    label_generator = LabelGenerator(channels, generator=generator, **geometry)  # type: ignore[arg-type]
    for norm in (label_generator.norm1, label_generator.norm2):
        for field, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
            nn.init.uniform_(getattr(norm, field), low, high, generator=generator)
        norm.running_mean.uniform_(-0.5, 1.0, generator=generator)
        norm.running_var.uniform_(0.1, 2.0, generator=generator)
    return label_generator.eval()


def random_pyramid(shapes: list[tuple[int, int, int]], batch: int, seed: int = 0) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(seed)
    return FeaturePyramid(tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes))


def outputs_of(folded: FoldedLabelGenerator, pyramid: FeaturePyramid, size: Size, memory: int | None = None) -> Tensor:
    """Outputs of whole images, float32 [M, B, K, H, W], from strips."""
    strips = [
        outputs_MPK.unflatten(1, (pyramid.batch_size, rows.stop - rows.start, size[1]))
        for rows, outputs_MPK in folded.tiles(pyramid, size, memory=memory)
    ]
    return torch.cat(strips, dim=2).permute(0, 1, 4, 2, 3)


def plain_member(label_generator: LabelGenerator, m: int) -> nn.Sequential:
    """Member `m` as anyone would write it."""
    parts: list[nn.Module] = []
    for linear, norm in (
        (label_generator.linear1, label_generator.norm1),
        (label_generator.linear2, label_generator.norm2),
        (label_generator.linear3, None),
    ):
        _, outputs, inputs = linear.weight.shape
        plain = nn.Linear(inputs, outputs)
        plain.load_state_dict({key: value[m] for key, value in linear.state_dict().items()})
        parts.append(plain)
        if norm is not None:
            plain_norm = nn.BatchNorm1d(outputs)
            state = {key: value[m] for key, value in norm.state_dict().items()}
            plain_norm.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
            parts += [nn.ReLU(), plain_norm]
    return nn.Sequential(*parts)


def assert_equivalent(fast: Tensor, slow: Tensor) -> None:
    """[M, B, K, H, W] each: the promise of the fast path."""
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)
    fast_MPK, slow_MPK = (x.permute(0, 1, 3, 4, 2).flatten(1, 3) for x in (fast, slow))
    labels, expected = (majority_vote(x.argmax(-1), x.shape[-1]) for x in (fast_MPK, slow_MPK))
    assert (labels != expected).sum() <= max(1, labels.numel() // 10_000)
    divergences = (jensen_shannon_divergence(x) for x in (fast_MPK, slow_MPK))
    torch.testing.assert_close(*divergences, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", ["reference", "fold", "forward"])
def test_every_path_matches_the_published_code(path: str) -> None:
    label_generator = LabelGenerator.from_published_state_dicts(published_states(), CHANNELS)
    pyramid = published_pyramid()
    if path == "forward":
        outputs_MPK = label_generator(pyramid.rows_at(torch.arange(256), (16, 16))).detach()
    else:
        fast = outputs_of(label_generator.fold(), pyramid, (16, 16))
        outputs = label_generator.reference(pyramid, (16, 16)) if path == "reference" else fast
        outputs_MPK = outputs[:, 0].permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(outputs_MPK, torch.from_numpy(EXPECTED["logits"]), atol=1e-5, rtol=0)
    votes = outputs_MPK.argmax(-1)
    assert torch.equal(votes, torch.from_numpy(EXPECTED["votes"]).flatten(0, 1).T)
    assert torch.equal(majority_vote(votes, 5), torch.from_numpy(EXPECTED["label_mode"]).flatten())


def test_published_names_are_read_with_and_without_the_module_prefix() -> None:
    bare = [{k.removeprefix("module."): v for k, v in state.items()} for state in published_states()]
    one = LabelGenerator.from_published_state_dicts(bare, CHANNELS).state_dict()
    other = LabelGenerator.from_published_state_dicts(published_states(), CHANNELS).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_published_members_that_do_not_fit_are_refused() -> None:
    states = published_states()
    with pytest.raises(ValueError, match=r"expected \(16, 175\)"):
        LabelGenerator.from_published_state_dicts(states, (*CHANNELS[:-1], 11))
    with pytest.raises(ValueError, match="member 1: layers.3.bias"):
        LabelGenerator.from_published_state_dicts(
            [states[0], states[1] | {"module.layers.3.bias": torch.zeros(9)}], CHANNELS
        )
    with pytest.raises(ValueError, match=r"member 0: missing \[\], unknown \['layers.8.weight'\]"):
        LabelGenerator.from_published_state_dicts([states[0] | {"layers.8.weight": torch.zeros(1)}], CHANNELS)
    with pytest.raises(ValueError, match="member 0: missing .*layers.5.running_var"):
        gap = {key: value for key, value in states[0].items() if key != "module.layers.5.running_var"}
        LabelGenerator.from_published_state_dicts([gap], CHANNELS)
    with pytest.raises(ValueError, match="layers.6"):
        LabelGenerator.from_published_state_dicts([], CHANNELS)


@pytest.mark.parametrize("shared", [False, True])
def test_training_equals_training_each_member_on_its_own(shared: bool) -> None:
    ours = LabelGenerator((3, 4), (6, 5), 4, members=3, generator=torch.Generator().manual_seed(3))
    plain = [plain_member(ours, m) for m in range(3)]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (ours, *plain)]
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        rows = torch.randn(*(() if shared else (3,)), 16, 7, generator=generator)
        target = torch.randint(4, (16,), generator=generator)
        outputs = ours(rows)
        loss = sum(nn.functional.cross_entropy(outputs[m], target) for m in range(3))
        losses = [
            nn.functional.cross_entropy(module(rows if shared else rows[m]), target) for m, module in enumerate(plain)
        ]
        torch.testing.assert_close(loss, sum(losses))
        for optimizer, value in zip(optimizers, [loss, *losses], strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for m in range(3):
        expected = plain_member(ours, m).state_dict()
        for key, value in plain[m].state_dict().items():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(expected[key], value, atol=1e-6, rtol=1e-5)


def test_initialization_is_a_function_of_the_generator() -> None:
    def weights(seed: int) -> Tensor:
        return LabelGenerator((5,), (4, 3), generator=torch.Generator().manual_seed(seed)).linear1.weight

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert weights(1).abs().max() <= 5**-0.5 and not torch.equal(weights(1)[0], weights(1)[1])


def test_reference_equals_plain_modules() -> None:
    pyramid = random_pyramid([(3, 4, 4), (2, 8, 8)], batch=2)
    label_generator = randomized((3, 2), hidden=(6, 5), num_outputs=4, members=3)
    rows = pyramid.hypercolumn((8, 8)).permute(0, 2, 3, 1).flatten(0, 2)
    expected = torch.stack([plain_member(label_generator, m).eval()(rows) for m in range(3)])
    outputs = label_generator.reference(pyramid, (8, 8)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    torch.testing.assert_close(outputs, expected.detach())


def test_config_rebuilds_the_geometry() -> None:
    label_generator = LabelGenerator((3, 2), (6, 5), 4, 3)
    rebuilt = LabelGenerator(**label_generator.config())
    rebuilt.load_state_dict(label_generator.state_dict())
    assert rebuilt.config() == label_generator.config()
    with pytest.raises(ValueError, match="at least 1"):
        LabelGenerator((3, 2), (6, 0), 4, 3)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    height, width = draw(st.sampled_from([(4, 4), (4, 2), (3, 5)]))
    shapes = [(draw(st.integers(1, 60)), height, width)]
    for level in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 2))):
            shapes.append((draw(st.integers(1, 60)), height << level, width << level))
    top, left = shapes[-1][1], shapes[-1][2]
    numerator, denominator = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (3, 2)]))
    size = (max(1, top * numerator // denominator), max(1, left * numerator // denominator))
    return {
        "shapes": shapes,
        "size": draw(st.sampled_from([size, (size[0], size[1] + 1), (17, 23)])),
        "batch": draw(st.integers(1, 3)),
        "members": draw(st.integers(1, 16)),
        "hidden": (draw(st.integers(1, 24)), draw(st.integers(1, 12))),
        "num_outputs": draw(st.sampled_from([2, 5, 19, 64])),
        "memory": draw(st.sampled_from([1, 10_000, 100_000, None])),
        "projected_pixels": draw(st.sampled_from([1, 40, 512])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "constant": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@given(cases())
@settings(max_examples=60, deadline=None)
def test_tiles_equal_the_reference_for_any_geometry(case: dict) -> None:  # type: ignore[type-arg]
    pyramid = random_pyramid(case["shapes"], case["batch"], case["seed"])
    geometry = {key: case[key] for key in ("members", "hidden", "num_outputs")}
    label_generator = randomized(pyramid.channels, case["seed"], **geometry)
    constant = None
    if case["constant"]:
        constant = pyramid.maps[0][0]
        pyramid = FeaturePyramid((pyramid.maps[0][:1].expand_as(pyramid.maps[0]), *pyramid.maps[1:]))
    folded = label_generator.fold(constant_map=constant, dtype=case["dtype"])
    slow = label_generator.reference(pyramid, case["size"])
    with patch.object(label_rows, "_PROJECTED_PIXELS", case["projected_pixels"]):
        fast = outputs_of(folded, pyramid, case["size"], memory=case["memory"])
    if case["dtype"] == torch.float32:
        assert_equivalent(fast, slow)
    else:
        assert_close_in_16_bits(fast, slow, case["dtype"])


def assert_close_in_16_bits(fast: Tensor, slow: Tensor, dtype: torch.dtype) -> None:
    """Root mean square error within a few roundings of the largest output."""
    assert fast.dtype == torch.float32
    assert (fast - slow).square().mean().sqrt() < 8 * torch.finfo(dtype).eps * slow.abs().max()


@pytest.mark.parametrize(("hidden", "members", "classes"), [((128, 32), 16, 64), ((2048, 64), 1, 2)])
def test_the_narrowest_and_the_widest_published_members_are_exact(
    hidden: tuple[int, int], members: int, classes: int
) -> None:
    pyramid = random_pyramid([(40, 4, 6), (120, 8, 12), (20, 16, 24)], batch=1)
    label_generator = randomized(pyramid.channels, hidden=hidden, num_outputs=classes, members=members)
    slow = label_generator.reference(pyramid, (16, 24))
    assert_equivalent(outputs_of(label_generator.fold(), pyramid, (16, 24)), slow)


def test_float16_does_not_overflow_where_activations_leave_its_range() -> None:
    pyramid = random_pyramid([(40, 4, 4), (30, 8, 8), (6, 16, 16)], batch=1)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=5, members=4)
    with torch.no_grad():
        label_generator.linear1.weight.mul_(1e6)
        label_generator.norm1.running_mean.mul_(1e6)
        label_generator.norm1.running_var.mul_(1e12)
    slow = label_generator.reference(pyramid, (16, 16))
    fast = outputs_of(label_generator.fold(dtype=torch.float16), pyramid, (16, 16))
    assert (label_generator.linear1(pyramid.rows_at(torch.arange(256), (16, 16))).max() > 65504).item()
    assert_close_in_16_bits(fast, slow, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", ["linear1", "linear2", "linear3"])
def test_nan_reaches_the_outputs_from_every_layer(layer: str, dtype: torch.dtype) -> None:
    pyramid = random_pyramid([(40, 4, 4), (6, 16, 16)], batch=1)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=5, members=2)
    with torch.no_grad():
        getattr(label_generator, layer).weight.fill_(float("nan"))
    assert outputs_of(label_generator.fold(dtype=dtype), pyramid, (16, 16)).isnan().all()


def test_weights_beyond_float16_are_refused_and_exact_in_float32() -> None:
    pyramid = random_pyramid([(5, 4, 4), (3, 8, 8)], batch=1)
    label_generator = randomized(pyramid.channels, hidden=(6, 5), num_outputs=4, members=2)
    with torch.no_grad():
        label_generator.linear3.weight.mul_(1e6)
    with pytest.raises(ValueError, match='precision="exact"'):
        label_generator.fold(dtype=torch.float16)
    slow = label_generator.reference(pyramid, (8, 8))
    torch.testing.assert_close(outputs_of(label_generator.fold(), pyramid, (8, 8)), slow, rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("memory", [1, 300_000, None])
def test_heads_that_share_their_first_product_give_what_each_gives_alone(memory: int | None) -> None:
    pyramid = random_pyramid([(5, 4, 4), (4, 8, 8), (3, 32, 32)], batch=3)
    geometries = [((16, 8), 3, 4), ((7, 5), 10, 1), ((32, 16), 1, 10)]
    heads = [
        randomized(pyramid.channels, seed, hidden=hidden, num_outputs=outputs, members=members)
        for seed, (hidden, outputs, members) in enumerate(geometries)
    ]
    joined = join([head.fold() for head in heads])
    assert joined.first.weight1_CD.shape == (12, 4 * 16 + 7 + 10 * 32)
    strips = list(joined.tiles(pyramid, (32, 32), memory=memory))
    assert [rows.start for rows, _ in strips] == sorted(rows.start for rows, _ in strips)
    for n, head in enumerate(heads):
        together = [outputs[n].unflatten(1, (3, -1, 32)) for _, outputs in strips]
        assert_equivalent(torch.cat(together, dim=2).permute(0, 1, 4, 2, 3), head.reference(pyramid, (32, 32)))


def test_heads_of_different_generators_are_not_joined() -> None:
    one, other = (randomized(channels).fold() for channels in ((5, 4, 3), (5, 3, 4)))
    with pytest.raises(ValueError, match="read the same maps"):
        join([one, other])


@pytest.mark.parametrize("size", [(24, 32), (48, 64), (12, 16)])
def test_tiles_of_a_crop_equal_the_region_of_the_uncropped_reference(size: tuple[int, int]) -> None:
    pyramid = random_pyramid([(40, 4, 4), (40, 8, 8), (30, 16, 16), (6, 32, 32)], batch=2)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=5, members=4)
    cropped = pyramid.crop((4, 28), (0, 32))
    scale = size[1] // 16
    whole = label_generator.reference(pyramid, (16 * scale, 16 * scale))
    expected = whole[..., 2 * scale : 14 * scale, :]
    assert_equivalent(outputs_of(label_generator.fold(), cropped, size), expected)
    narrow = outputs_of(label_generator.fold(), pyramid.crop((0, 32), (4, 28)), (size[1], size[0]))
    assert_equivalent(narrow, whole[..., 2 * scale : 14 * scale])


def test_tiles_cover_the_rows_once_from_top_to_bottom_in_the_promised_order() -> None:
    pyramid = random_pyramid([(40, 4, 4), (8, 16, 16)], batch=3)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=5, members=4)
    slow = label_generator.reference(pyramid, (32, 32))
    tiles = list(label_generator.fold().tiles(pyramid, (32, 32), memory=200_000))
    assert len(tiles) > 1 and [row for rows, _ in tiles for row in range(rows.start, rows.stop)] == list(range(32))
    for rows, outputs_MPK in tiles:
        expected = slow[:, :, :, rows].permute(0, 1, 3, 4, 2).flatten(1, 3)
        torch.testing.assert_close(outputs_MPK, expected, atol=1e-4, rtol=0)


def test_yielded_tiles_stay_valid_while_later_ones_are_computed() -> None:
    pyramid = random_pyramid([(40, 4, 4), (8, 16, 16)], batch=2)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=5, members=4)
    kept, copied = [], []
    for rows, outputs in label_generator.fold().tiles(pyramid, (32, 32), memory=1):
        assert rows.stop - rows.start == 1
        kept.append(outputs)
        copied.append(outputs.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copied, strict=True))


def test_a_folded_label_generator_is_a_snapshot() -> None:
    pyramid = random_pyramid([(5, 4, 4), (3, 8, 8)], batch=1)
    label_generator = randomized(pyramid.channels, hidden=(6, 5), num_outputs=4, members=2)
    before = label_generator.reference(pyramid, (8, 8))
    folded, original = label_generator.fold(), copy.deepcopy(label_generator)
    with torch.no_grad():
        for tensor in (*label_generator.parameters(), *label_generator.buffers()):
            tensor.add_(0.5)
    torch.testing.assert_close(outputs_of(folded, pyramid, (8, 8)), before, atol=1e-5, rtol=0)
    refolded = outputs_of(label_generator.fold(), pyramid, (8, 8))
    assert_equivalent(refolded, label_generator.reference(pyramid, (8, 8)))
    assert not torch.allclose(refolded, original.reference(pyramid, (8, 8)), atol=1e-2)


def test_training_mode_does_not_change_how_images_are_labelled() -> None:
    pyramid = random_pyramid([(5, 4, 4), (3, 8, 8)], batch=2)
    label_generator = randomized(pyramid.channels, hidden=(6, 5), num_outputs=4, members=2)
    expected = label_generator.reference(pyramid, (8, 8))
    label_generator.train()
    assert torch.equal(label_generator.reference(pyramid, (8, 8)), expected)
    assert_equivalent(outputs_of(label_generator.fold(), pyramid, (8, 8)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_labelled_in_float32(dtype: torch.dtype) -> None:
    pyramid = random_pyramid([(40, 4, 4), (30, 8, 8), (6, 16, 16), (4, 32, 32)], batch=2).to(dtype=dtype)
    label_generator = randomized(pyramid.channels, hidden=(16, 8), num_outputs=5, members=4)
    assert_equivalent(
        outputs_of(label_generator.fold(), pyramid, (16, 16)), label_generator.reference(pyramid, (16, 16))
    )


def test_pyramids_of_another_generator_are_refused() -> None:
    label_generator = randomized((5, 3), hidden=(6, 5), num_outputs=4, members=2)
    with pytest.raises(ValueError, match="another generator"):
        outputs_of(label_generator.fold(), random_pyramid([(5, 4, 4), (4, 8, 8)], batch=1), (8, 8))
    with pytest.raises(ValueError, match="constant_map"):
        label_generator.fold(constant_map=torch.zeros(4, 4, 4))
    with pytest.raises(ValueError, match="fold it for this generator"):
        folded = label_generator.fold(constant_map=torch.zeros(5, 2, 2))
        outputs_of(folded, random_pyramid([(5, 4, 4), (3, 8, 8)], batch=1), (8, 8))


def test_cost_model_projects_wide_coarse_maps_first_and_never_fine_ones() -> None:
    assert project_first((4, 4), 1024, (512, 512)) and project_first((256, 256), 256, (512, 512))
    assert not project_first((512, 512), 128, (512, 512)) and not project_first((1024, 1024), 64, (512, 512))
    assert not project_first((64, 64), 8, (128, 128))
