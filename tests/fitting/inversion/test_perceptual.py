"""The perceptual distance is LPIPS or that of ImageNet features; it names its weights, and downloads nothing."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import squeezenet1_1

from handsoff_stream.fitting.inversion import perceptual
from handsoff_stream.fitting.inversion.descent import InversionSettings, invert_batch
from handsoff_stream.fitting.inversion.perceptual import Perceptual, load_perceptual
from handsoff_stream.generators import StyleGAN2
from handsoff_stream.imagenet import FrozenFeatures


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache without weights, and no way to fill it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("download"))
    return tmp_path


@pytest.fixture(scope="module")
def imagenet() -> Perceptual:
    return load_perceptual("efficientnet-lite0")


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
        again = load_perceptual("squeeze")
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


def test_the_imagenet_distance_is_the_mean_over_four_layers_of_unit_activations(imagenet):
    a, b = images(2, 3, 64, 96), images(2, 3, 64, 96, seed=1)
    features = FrozenFeatures((2, 4, 8, 16))
    layers = [F.normalize(x, dim=1) - F.normalize(y, dim=1) for x, y in zip(features(a), features(b), strict=True)]
    expected = torch.stack([d.square().sum(dim=1).mean(dim=(1, 2)) for d in layers]).mean(dim=0)
    assert [d.shape[1] for d in layers] == [16, 24, 40, 112]
    torch.testing.assert_close(imagenet.distance(a, b), expected, rtol=1e-4, atol=1e-6)
    assert (expected > 0).all() and (expected < 4).all() and torch.equal(imagenet.distance(a, a), torch.zeros(2))


def test_the_imagenet_distance_says_which_features_and_weights_it_has(imagenet):
    assert imagenet.description == (
        "efficientnet-lite0, ImageNet features of strides 2, 4, 8, 16, unit activations, layers averaged, "
        "efficientnet-lite0-57934424.pth, sha256 57934424"
    )
    assert not any(p.requires_grad for p in imagenet.parameters())


@pytest.mark.parametrize("kind", ["imagenet", "substitute"])
def test_the_difference_lies_where_the_images_differ_and_its_mean_is_the_distance(kind, request):
    distance = request.getfixturevalue(kind)
    a = images(1, 3, 128, 128)
    b = a.clone()
    b[:, :, 80:112, 80:112] = images(1, 3, 32, 32, seed=1)
    difference = distance.difference(a, b)
    assert difference.shape == (1, 128, 128) and difference.min() >= 0
    assert float(difference.mean()) == pytest.approx(distance.distance(a, b).item(), rel=0.1)
    assert difference[:, 84:108, 84:108].mean() > 20 * difference[:, :48, :48].mean()


@pytest.mark.parametrize(
    ("vgg", "packages", "chosen"),
    [
        (True, True, "net=vgg"),
        (True, False, "net=vgg"),
        (False, True, "efficientnet-lite0"),
        (False, False, "net=squeeze, RANDOM"),
    ],
)
@pytest.mark.filterwarnings("ignore:LPIPS has no trained backbone")
def test_the_default_is_the_papers_backbone_then_imagenet_features_then_a_random_one(
    monkeypatch, tmp_path, vgg, packages, chosen
):
    file = tmp_path / "vgg.pth"
    if vgg:
        file.touch()
    monkeypatch.setattr(perceptual, "weight_file", lambda net: file if net == "vgg" else tmp_path / "nothing")
    monkeypatch.setattr(perceptual, "is_installed", lambda: packages)
    # VGG16 has half a gigabyte: only the choice is tested here.
    monkeypatch.setattr(perceptual, "_network", lambda net: torch.nn.Sequential(OrderedDict(net=torch.nn.Identity())))
    monkeypatch.setattr(perceptual, "_load_backbone", lambda backbone, file: None)
    assert chosen in load_perceptual().description


def test_a_distance_without_maps_says_so():
    class Pixels(Perceptual):
        def embed(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.flatten(1)

    with pytest.raises(NotImplementedError, match="pixels: this distance has no maps"):
        Pixels(torch.nn.Identity(), "pixels").difference(images(1, 3, 8, 8), images(1, 3, 8, 8))


def test_descent_in_imagenet_features_brings_a_sample_nearer(imagenet):
    torch.manual_seed(0)
    generator = StyleGAN2(channels=(8, 8, 8, 8), z_dim=8, w_dim=8, mapping_layers=1).eval().requires_grad_(False)
    made = generator.synthesis(generator.truncate(generator.mapping(torch.randn(1, 8)))).images
    target = made.add(1).div(2).clamp(0, 1)
    start, end = (
        invert_batch(generator, target, imagenet, InversionSettings(steps=steps, candidates=0)) for steps in (0, 15)
    )
    assert end.perceptual.item() < 0.75 * start.perceptual.item()
