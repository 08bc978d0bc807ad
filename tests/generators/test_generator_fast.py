"""The folded StyleGAN2 computes what the paper states, in every precision, without waiting for the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.reference.plain_stylegan2 import filtered, plain_synthesis, zero_inserted
from handsoff_stream.generators import StyleGAN1, StyleGAN2
from handsoff_stream.generators.layers import upsample
from handsoff_stream.generators.stylegan2.style_layers import FLOAT16_CLAMP, StyleLayer

HALVES = [torch.bfloat16, torch.float16]
READS_ON_THE_HOST = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")


def make_generator(channels=(8, 7, 6, 5), *, seed=0, **options) -> StyleGAN2:
    """Random weights, noise and biases that matter, styles around 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = StyleGAN2(channels=channels, z_dim=6, w_dim=6, mapping_layers=1, **options)
        for name, parameter in generator.named_parameters():
            if name.endswith(("noise_strength", "bias")):
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return generator.eval().requires_grad_(False)


def styles(generator, batch=2, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, generator.num_ws, generator.w_dim, generator=random)


def stored_noise(generator):
    return generator.fold().noise_const


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def assert_same_synthesis(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.images, want.images, rtol=0, atol=tolerance)
    for mine, theirs in zip(got.features.maps, want.features.maps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


# The same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"architecture": "resnet", "conv_clamp": 1.5},
        {"architecture": "orig", "conv_clamp": 0.7},
        {"constant_size": (4, 2), "image_channels": 1},
        {"constant_size": (3, 5), "channels": (6, 4)},
    ],
)
@pytest.mark.parametrize("noise", ["const", "none", "random"])
def test_synthesis_is_what_per_sample_weights_give(options, noise):
    generator = make_generator(**options)
    w_plus = styles(generator, batch=3)
    maps = {
        "const": stored_noise(generator),
        "none": [None] * (generator.num_ws - 1),
        "random": [
            torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(2)) for size in generator.noise_shapes
        ],
    }[noise]
    got = generator.synthesis(w_plus, maps if noise == "random" else noise)
    assert_same_synthesis(got, plain_synthesis(generator, w_plus, maps))


def test_the_epsilon_of_demodulation_survives_folding():
    generator = make_generator(architecture="resnet")
    for layer in generator._style_layers():
        layer.conv.weight.mul_(1e-4)  # the energy of a channel is then of the size of epsilon
    w_plus = styles(generator)
    assert_same_synthesis(generator.synthesis(w_plus), plain_synthesis(generator, w_plus, stored_noise(generator)))


def test_gradients_are_those_of_per_sample_weights():
    generator = make_generator(conv_clamp=1.5).requires_grad_(True)
    w_plus = styles(generator).requires_grad_(True)
    wanted = [w_plus, *(p for name, p in generator.named_parameters() if "mapping" not in name)]
    got = torch.autograd.grad(generator.synthesis(w_plus).images.square().mean(), wanted)
    plain = plain_synthesis(generator, w_plus, stored_noise(generator)).images
    for mine, theirs in zip(got, torch.autograd.grad(plain.square().mean(), wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_noise_maps_can_be_optimized_while_the_weights_are_frozen():
    generator = make_generator(conv_clamp=1.5)
    w_plus, maps = styles(generator), [n.clone().requires_grad_(True) for n in stored_noise(generator)]
    got = torch.autograd.grad(generator.synthesis(w_plus, maps).images.square().mean(), maps)
    plain = plain_synthesis(generator, w_plus, maps).images
    for mine, theirs in zip(got, torch.autograd.grad(plain.square().mean(), maps), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("up", [False, True])
def test_a_style_layer_can_be_differentiated_twice(up):
    random = torch.Generator().manual_seed(0)
    layer = StyleLayer(2, 3, 2, up=up, size=(4, 4) if up else (2, 2), clamp=2.0).double()
    x = torch.randn(2, 2, 2, 2, generator=random, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, generator=random, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 1, *layer.size, generator=random, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, w: layer.fold(torch.float64)(x, w, noise), (x, w))
    torch.autograd.gradgradcheck(lambda x, w: layer.fold(torch.float64)(x, w, noise), (x, w))


def test_upsampling_is_zero_insertion_and_filter():
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(upsample(x), filtered(zero_inserted(x), pad=(2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_generator_folded_once_gives_the_bits_of_synthesis(dtype):
    generator = make_generator()
    w_plus = styles(generator)
    assert_same_synthesis(generator.fold(dtype)(w_plus), generator.synthesis(w_plus, dtype=dtype), tolerance=0)


def test_a_family_without_a_folded_form_folds_into_its_synthesis():
    generator = StyleGAN1(channels=(4, 3), z_dim=4, w_dim=4, mapping_layers=1).requires_grad_(False)
    w_plus = styles(generator)
    assert_same_synthesis(generator.fold()(w_plus, "none"), generator.synthesis(w_plus, "none"), tolerance=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_thread_and_two_give_the_same_bits(dtype):
    generator = make_generator(channels=(32, 32, 24, 24))
    folded, w_plus = generator.fold(dtype), styles(generator, batch=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = folded(w_plus)
        torch.set_num_threads(2)
        two = folded(w_plus)
    finally:
        torch.set_num_threads(before)
    assert_same_synthesis(one, two, tolerance=0)


def test_the_inputs_survive():
    generator = make_generator(conv_clamp=1.0)
    w_plus, maps = styles(generator), [n.clone() for n in stored_noise(generator)]
    state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    first, second = (generator.synthesis(w_plus, maps) for _ in range(2))
    assert_same_synthesis(first, second, tolerance=0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in generator.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(maps, stored_noise(generator), strict=True))


def test_feature_maps_are_channels_last():
    generator = make_generator()
    for feature_map in generator.synthesis(styles(generator)).features.maps[1:]:
        assert feature_map.is_contiguous(memory_format=torch.channels_last)


# Half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_half_precision_stays_close_to_float32(dtype, tolerance, architecture):
    generator = make_generator(channels=(24, 20, 16, 12, 8), architecture=architecture)
    w_plus = styles(generator)
    exact, half = generator.synthesis(w_plus), generator.synthesis(w_plus, dtype=dtype)
    assert half.images.dtype == torch.float32
    assert relative(half.images, exact.images) < tolerance
    for got, want in zip(half.features.maps, exact.features.maps, strict=True):
        assert relative(got, want) < tolerance


def test_bfloat16_leaves_the_coarsest_maps_as_they_are():
    generator = make_generator(channels=(8, 8, 8, 8))
    w_plus = styles(generator)
    exact, half = generator.synthesis(w_plus), generator.synthesis(w_plus, dtype=torch.bfloat16)
    assert [m.dtype for m in half.features.maps] == [torch.float32] * 6 + [torch.bfloat16] * 2
    for got, want in zip(half.features.maps[:6], exact.features.maps[:6], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("weights", "affines"), [(1e5, 1.0), (1e-5, 1.0), (1.0, 1e5), (1.0, 1e-3), (1e3, 1e3)])
def test_weights_and_styles_of_any_size_fit_into_float16(weights, affines):
    generator = make_generator(channels=(32, 16, 8))
    for layer in generator._style_layers():
        layer.conv.weight.mul_(weights)
        layer.conv.affine.weight.mul_(affines)
        layer.conv.affine.bias.mul_(affines)
    w_plus = styles(generator)
    exact, half = generator.synthesis(w_plus), generator.synthesis(w_plus, dtype=torch.float16)
    for got, want in zip(half.features.maps, exact.features.maps, strict=True):
        assert relative(got, want) < 3e-3


def test_float16_saturates_where_the_network_leaves_its_range():
    generator = make_generator(channels=(512, 512))
    for layer in generator._style_layers():
        layer.conv.weight.copy_(layer.conv.weight.abs())  # nothing cancels: outputs grow by sqrt(fan_in) per layer
        layer.conv.affine.weight.zero_()
    half = generator.synthesis(styles(generator), dtype=torch.float16)
    assert all(torch.isfinite(m).all() for m in (half.images, *half.features.maps))
    assert half.features.maps[-1].abs().max() == FLOAT16_CLAMP


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_layer_of_zeros_gives_zeros(dtype):
    generator = make_generator()
    for layer in generator._style_layers():
        layer.conv.weight.zero_()
        layer.conv.affine.bias.zero_()
        layer.conv.affine.weight.zero_()
        layer.bias.zero_()
    for feature_map in generator.synthesis(styles(generator), "none", dtype=dtype).features.maps[1:]:
        assert not feature_map.any()


def test_channels_that_only_read_what_the_style_switches_off_stay_finite_in_float16():
    layer = StyleLayer(4, 3, 2, up=False, size=(4, 4), clamp=None).requires_grad_(False)
    layer.conv.weight[:, 1:] = 0
    layer.conv.affine.weight.zero_()
    layer.conv.affine.bias.copy_(torch.tensor([0.0, 1e4, 1e4, 1e4]))
    assert not layer.fold(torch.float16)(torch.ones(1, 4, 4, 4), torch.ones(1, 2), None).any()


# The host never waits ------------------------------------------------------------------------------------------


class NothingReadOnTheHost(TorchDispatchMode):
    """Fails at every operation that would bring a value from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in READS_ON_THE_HOST, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_watch_notices_a_value_read_on_the_host():
    with NothingReadOnTheHost(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_neither_mapping_nor_folding_nor_synthesis_reads_a_value_on_the_host(dtype):
    generator = make_generator(channels=(8, 7, 6, 5), conv_clamp=256.0)
    z = torch.randn(2, generator.z_dim, generator=torch.Generator().manual_seed(0))
    with NothingReadOnTheHost():
        generator.synthesis(generator.truncate(generator.mapping(z), 0.7), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_no_shape_depends_on_a_value(dtype):
    with FakeTensorMode(), torch.random.fork_rng():
        generator = StyleGAN2(channels=(8, 7, 6, 5), z_dim=6, w_dim=6, mapping_layers=1).requires_grad_(False)
        w_plus = generator.truncate(generator.mapping(torch.empty(2, 6)), 0.7)
        synthesis = generator.fold(dtype)(w_plus)
    assert synthesis.images.shape == (2, 3, 32, 32)
    assert [m.shape[2] for m in synthesis.features.maps] == [4, 4, 8, 8, 16, 16, 32, 32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cuda_graph_of_the_folded_network_gives_its_bits(dtype):
    generator = make_generator(channels=(16, 16, 8), conv_clamp=256.0).cuda()
    folded, w_plus, other = generator.fold(dtype), styles(generator).cuda(), styles(generator, seed=2).cuda()
    want = folded(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        folded(w_plus)  # libraries allocate their workspaces before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = folded(w_plus)
    w_plus.copy_(other)
    graph.replay()
    assert_same_synthesis(replayed, want, tolerance=0)
