"""The perceptual distance is LPIPS, names its weights, and neither downloads nor changes global state."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import squeezenet1_1

from handsoff_stream.fitting.inversion import perceptual
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache without weights, and no way to fill it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("download"))
    return tmp_path


@pytest.fixture(scope="module")
def substitute() -> Perceptual:
    with pytest.warns(UserWarning, match="random backbone"):
        return load_perceptual("squeeze")


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.filterwarnings("ignore:LPIPS")
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_distance_is_that_of_the_lpips_package(net):
    ours = load_perceptual(net)
    a, b = images(2, 3, 64, 80), images(2, 3, 64, 80, seed=1)
    torch.testing.assert_close(ours.distance(a, b), ours.network(a, b).flatten(), rtol=1e-4, atol=1e-6)


def test_distance_of_an_image_to_itself_is_zero_and_grows_with_the_difference(substitute):
    a, noise = images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1)
    near, far = substitute.distance(a, a + 0.1 * noise), substitute.distance(a, a + 0.5 * noise)
    assert substitute.distance(a, a).item() == 0 < near.item() < far.item()


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (300, 260)])
def test_any_size_works_and_has_finite_gradients(substitute, size):
    a = images(1, 3, *size).requires_grad_()
    substitute.distance(a, images(1, 3, *size, seed=1)).sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all() and a.grad.abs().max() > 0


def test_a_black_image_has_finite_gradients(substitute):
    a = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    substitute.distance(a, images(1, 3, 64, 64)).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_the_substitute_is_announced_recorded_and_the_same_every_time(substitute):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="random backbone"):
        again = load_perceptual()
    assert torch.equal(state, torch.get_rng_state())
    assert "RANDOM" in again.description
    a, b = images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1)
    assert torch.equal(again.distance(a, b), substitute.distance(a, b))


def test_nothing_is_printed_and_no_weight_wants_a_gradient(capsys):
    with pytest.warns(UserWarning):
        loaded = load_perceptual("squeeze")
    assert capsys.readouterr().out == ""
    assert not any(p.requires_grad for p in loaded.parameters())


def test_weights_in_the_cache_are_used_without_a_warning(tmp_path, monkeypatch, recwarn):
    file = tmp_path / "squeeze.pth"
    backbone = squeezenet1_1().eval()
    torch.save(backbone.state_dict(), file)
    monkeypatch.setattr(perceptual, "weight_file", lambda net: file)
    loaded = load_perceptual("squeeze")
    assert not recwarn and "RANDOM" not in loaded.description and file.name in loaded.description
    x = images(1, 3, 64, 64)
    assert torch.equal(loaded.network.net(x)[-1], backbone.features(x))


def test_damaged_weights_are_refused(empty_cache):
    file = perceptual.weight_file("squeeze")
    file.parent.mkdir()
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="damaged"):
        load_perceptual("squeeze")


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="choose one of"):
        load_perceptual("resnet")
