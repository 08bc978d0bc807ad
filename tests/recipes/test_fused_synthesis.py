"""Fused layers compute what the generator's layers compute, forward and backward, compiled or not."""

import pytest
import torch

import recipes.faces.fused_synthesis as fused_synthesis
from handsoff_stream.generators.stylegan2 import StyleGAN2


def outcome(generator: StyleGAN2, fused: bool) -> list[torch.Tensor]:
    """Image, gradients of all parameters and of the latents."""
    rng = torch.Generator().manual_seed(1)
    w_plus = torch.randn(3, generator.num_ws, generator.w_dim, generator=rng).requires_grad_()
    noise = [torch.randn(3, 1, *size, generator=rng) for size in generator.noise_shapes]
    folded = generator.fold()
    image = (fused_synthesis.fuse(folded) if fused else folded)(w_plus, noise).images
    generator.zero_grad()
    image.square().sum().backward()
    used = [p.grad for p in generator.parameters() if p.grad is not None]
    return [image.detach(), w_plus.grad, *used]


def generator(clamp: float | None = None) -> StyleGAN2:
    torch.manual_seed(0)
    made = StyleGAN2(channels=(8, 6, 5), z_dim=8, w_dim=8, mapping_layers=2, conv_clamp=clamp)
    for name, parameter in made.named_parameters():
        if name.endswith(("noise_strength", "bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) > 10
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_fused_layers_are_the_generators_own(clamp, monkeypatch):
    eager = (fused_synthesis.modulate, fused_synthesis.finish)
    monkeypatch.setattr(fused_synthesis, "compiled", lambda: eager)
    assert_same(outcome(generator(clamp), fused=True), outcome(generator(clamp), fused=False))


def test_without_noise_nothing_is_added():
    g = generator().requires_grad_(False)
    folded = g.fold()
    layer = next(layer for block in folded.blocks for layer in block.style_layers)
    x, w = torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    eager = fused_synthesis.modulate, fused_synthesis.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_synthesis, "compiled", lambda: eager)
        fused = fused_synthesis.FusedStyleLayer(**vars(layer))
        torch.testing.assert_close(fused(x, w, None), layer(x.clone(), w, None))


@pytest.mark.slow
def test_compiled_passes_are_the_eager_ones():
    assert fused_synthesis.compiled()[0] is not fused_synthesis.modulate, "this machine compiles nothing"
    assert_same(outcome(generator(), fused=True), outcome(generator(), fused=False))


def test_where_nothing_compiles_the_passes_run_eagerly(monkeypatch, capsys):
    def broken(function, **options):
        def fail(*arguments):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    fused_synthesis.compiled.cache_clear()
    try:
        assert fused_synthesis.compiled() == (fused_synthesis.modulate, fused_synthesis.finish)
    finally:
        fused_synthesis.compiled.cache_clear()
    assert "no working C++ compiler" in capsys.readouterr().out
