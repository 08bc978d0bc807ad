"""A latent is a function of (seed, index): the published test vectors, and nothing else."""

import numpy as np
import pytest
import torch

from handsoff_stream.noise import noise_maps, normal_on
from handsoff_stream.seeding import Stream, latents, normal, permutation, philox4x32, transform_seed


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known-answer vectors of the Random123 distribution, file kat_vectors, philox4x32 10 rounds.
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    got = philox4x32(np.array(counter, dtype=np.uint64)[:, None], key)
    assert got[:, 0].tolist() == words


def test_a_sample_does_not_depend_on_what_is_drawn_beside_it():
    together = latents(7, range(100, 164), 33)
    for row, index in enumerate(range(100, 164)):
        assert torch.equal(latents(7, [index], 33)[0], together[row])


def test_a_longer_latent_begins_with_the_shorter_one():
    assert torch.equal(latents(0, [5], 512)[:, :17], latents(0, [5], 17))


def test_seed_index_and_purpose_all_matter():
    base = normal(1, [2], 64, Stream.LATENT)
    for other in (
        normal(2, [2], 64, Stream.LATENT),
        normal(1, [3], 64, Stream.LATENT),
        normal(1, [2], 64, Stream.NOISE),
    ):
        assert not np.intersect1d(base, other).size


@pytest.mark.parametrize("index", [0, 2**32 - 1, 2**32, 2**62])
def test_every_index_up_to_63_bits_has_a_latent_of_its_own(index):
    assert not torch.equal(latents(0, [index], 8), latents(0, [index + 1], 8))
    assert torch.isfinite(latents(0, [index], 8)).all()


def test_latents_are_standard_normal():
    z = latents(3, range(400), 512).double()
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.05
    # Neighbouring indices and neighbouring components are uncorrelated.
    assert abs((z[1:] * z[:-1]).mean()) < 0.01
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 0.01


def test_the_global_generators_are_neither_read_nor_written():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = latents(0, [1, 2], 16)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(1)
    assert torch.equal(latents(0, [1, 2], 16), first)


def test_noise_maps_have_the_layers_shapes_and_belong_to_the_index():
    shapes = ((4, 4), (8, 6))
    maps = noise_maps(0, [10, 11, 12], shapes)
    assert [tuple(m.shape) for m in maps] == [(3, 1, 4, 4), (3, 1, 8, 6)]
    for one, many in zip(noise_maps(0, [11], shapes), maps, strict=True):
        assert torch.equal(one[0], many[1])


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (3, 7), (2**64 - 1, 2**40 + 5), (5, 2**62)])
def test_noise_drawn_on_a_device_has_the_bits_of_the_reference(seed, index):
    expected = normal(seed, [index], 200_003, Stream.NOISE)[0]
    assert torch.equal(normal_on("cpu", seed, index, 200_003), torch.from_numpy(expected))


def test_noise_does_not_depend_on_the_default_dtype():
    expected = normal_on("cpu", 1, 2, 50)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(normal_on("cpu", 1, 2, 50), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_noise():
    assert torch.equal(normal_on("cuda", 1, 2, 3_000_000).cpu(), normal_on("cpu", 1, 2, 3_000_000))


def test_transform_seeds_differ_by_index():
    assert len({transform_seed(0, i) for i in range(100)}) == 100


def test_samples_and_labelled_images_are_transformed_by_numbers_of_their_own():
    assert not {transform_seed(0, i) for i in range(100)} & {
        transform_seed(0, i, Stream.LABELLED_TRANSFORM) for i in range(100)
    }


def test_random_orders_hold_every_number_once_and_every_one_of_them_is_as_likely():
    orders = [permutation(0, number, 3) for number in range(1200)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert all(abs(orders.count(order) - 200) < 60 for order in set(orders)) and len(set(orders)) == 6
    assert permutation(0, 0, 50) != permutation(1, 0, 50) and sorted(permutation(1, 2**63 - 1, 50)) == list(range(50))


def test_an_order_is_the_same_in_every_release():
    assert permutation(7, 5, 8) == (7, 0, 2, 6, 1, 3, 5, 4)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0"])
def test_a_seed_that_addresses_no_stream_is_refused(seed):
    with pytest.raises(ValueError, match=r"integer in \[0, 2\*\*64\)"):
        latents(seed, [0], 4)
