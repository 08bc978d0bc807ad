"""Global settings of a training loop do not change samples, and making samples does not change those settings."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import assert_same, take

from handsoff_stream.isolation import isolated
from handsoff_stream.stream import HandsOffStream


@contextmanager
def changed(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "another default device": lambda: default_device("meta"),
    "fast products": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "no oneDNN": lambda: changed(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
}


def noise(image, label):
    """A transform that computes: a product, and numbers of the default kind."""
    size = image.shape[-1]
    return (image @ torch.rand(size, size) + torch.rand(size)).float(), label


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("transforms", [None, noise])
def test_no_setting_changes_a_sample_not_even_at_first_use(checkpoint_path, setting, transforms):
    def samples():
        stream = HandsOffStream(
            checkpoint_path, batch_size=3, device="cpu", noise="random", filter=None, transforms=transforms
        )
        return take(stream, 2)

    expected = samples()
    with SETTINGS[setting]():
        assert_same(samples(), expected)
    assert_same(samples(), expected)


def test_what_was_first_used_under_autocast_gives_the_same_later(checkpoint_path):
    stream = HandsOffStream(checkpoint_path, device="cpu", batch_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        stream[0]
    assert_same(stream[5:9], HandsOffStream(checkpoint_path, device="cpu")[5:9])


def settings_of_cuda():
    cudnn = torch.backends.cudnn
    convolutions = cudnn.conv.fp32_precision != "ieee" if hasattr(cudnn, "conv") else cudnn.allow_tf32
    return convolutions, cudnn.benchmark, cudnn.deterministic


def test_convolutions_on_cuda_are_ieee_float32_and_not_chosen_by_timing():
    torch.backends.cudnn.benchmark = True
    before = settings_of_cuda()
    try:
        with isolated():
            assert settings_of_cuda() == (False, False, True)
        assert settings_of_cuda() == before == (True, True, False)
    finally:
        torch.backends.cudnn.benchmark = False


def test_settings_are_restored_after_an_exception():
    before = torch.get_float32_matmul_precision(), torch.get_default_dtype(), settings_of_cuda()
    with changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"):
        with pytest.raises(KeyError), isolated():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.get_default_dtype(), settings_of_cuda()) == before


# Random numbers ----------------------------------------------------------------------------------------------------


def draws(image, label):
    """One number of each global generator, in the image's first pixels."""
    for place, number in enumerate((random.random(), np.random.rand(), float(torch.rand(())))):
        image[0, 0, place] = number
    return image, label


def test_every_global_generator_belongs_to_the_index_inside_a_transform_and_is_left_alone(checkpoint):
    def make():
        return HandsOffStream(checkpoint, device="cpu", transforms=draws)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    image, _ = make()[7]
    assert before[0] == random.getstate()
    assert (before[1] == np.random.get_state()[1]).all() and torch.equal(before[2], torch.get_rng_state())
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(make()[7][0], image)
    assert not torch.equal(make()[8][0][0, 0, :3], image[0, 0, :3])


def test_transforms_leave_the_generators_of_cuda_alone(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every CUDA device was seeded"))
    HandsOffStream(checkpoint, device="cpu", transforms=draws)[0]


def test_transforms_with_a_seed_of_their_own_get_the_samples_and_labels_come_back_as_int64(checkpoint):
    class OwnSeed:
        """As albumentations does it: a generator of its own, and masks of another kind."""

        def set_random_seed(self, seed):
            self.dice = np.random.default_rng(seed)

        def __call__(self, image, label):
            return image + float(self.dice.random()), label.int()

    stream = HandsOffStream(checkpoint, device="cpu", transforms=OwnSeed())
    image, label = stream[3]
    stream[4]
    assert torch.equal(stream[3][0], image) and label.dtype == torch.int64
