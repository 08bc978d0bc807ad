"""(seed, index) => latent and noise, by a counter-based generator: no state, no global RNG, no order of calls.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 128-bit counter and a
64-bit key into 128 random bits. The counter is (block, index low, index high, stream), the key is the seed, so value
k of sample i is the same whoever asks for it: any rank, worker, batch size, before or after a restart.

Knows integers and normal numbers. Does not know generators, devices or chunks: results are float32 on the CPU, the
same bits on every machine whose libm rounds float64 log, sin and cos alike. The millions of numbers of noise maps are
drawn on the device instead (`noise.py`).
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: the key schedule
ROUNDS = 10
MASK_32 = np.uint64(0xFFFFFFFF)
BITS_32 = np.uint64(32)
MAX_SEED = 2**64
MAX_INDEX = 2**63  # indices travel as int64


class Stream(IntEnum):
    """Independent uses of one (seed, index); a new use takes a new number, never an old one."""

    LATENT = 0
    NOISE = 1
    TRANSFORM = 2
    ORDER = 3
    LABELLED_TRANSFORM = 4


def philox4x32(counter_4N: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10, vectorised.

    Args:
        counter_4N: uint64 [4, N] holding 32-bit words, least significant first.
        key: two 32-bit words.

    Returns:
        uint64 [4, N] of random 32-bit words.
    """
    c0, c1, c2, c3 = counter_4N
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c2 = (product1 >> BITS_32) ^ c1 ^ np.uint64(k0), (product0 >> BITS_32) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & MASK_32, product0 & MASK_32
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def check_seed(seed: int) -> int:
    """The seed itself; ValueError unless 0 <= seed < 2**64."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed={seed!r} addresses no stream; pass an integer in [0, 2**64)")
    return seed


def _words(seed: int, indices: Sequence[int], num_blocks: int, stream: Stream) -> NDArray[np.uint64]:
    """Random words [4, len(indices) * num_blocks] of some samples."""
    check_seed(seed)
    index = np.asarray(indices, dtype=np.uint64)
    counter = np.empty((4, len(index), num_blocks), dtype=np.uint64)
    counter[0] = np.arange(num_blocks, dtype=np.uint64)
    counter[1] = (index & MASK_32)[:, None]
    counter[2] = (index >> BITS_32)[:, None]
    counter[3] = int(stream)
    return philox4x32(counter.reshape(4, -1), (seed & 0xFFFFFFFF, seed >> 32))


def normal(seed: int, indices: Sequence[int], size: int, stream: Stream) -> NDArray[np.float32]:
    """Standard normal numbers of some samples, by the Box-Muller transform in float64.

    Args:
        seed: the stream's seed, in [0, 2**64).
        indices: global sample indices, each in [0, 2**63).
        size: numbers a sample.
        stream: what the numbers are for.

    Returns:
        float32 [len(indices), size]; row r depends on (seed, indices[r], stream) only.
    """
    words = _words(seed, indices, -(-size // 4), stream)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32  # in (0, 1): the logarithm stays finite
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * np.pi * uniform[1::2]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)])  # [2, 2, samples * blocks]
    values = values.transpose(2, 1, 0).reshape(len(indices), -1)
    return values[:, :size].astype(np.float32)


def latents(seed: int, indices: Sequence[int], z_dim: int) -> Tensor:
    """Latents z of some samples: float32 [len(indices), z_dim], standard normal."""
    return torch.from_numpy(normal(seed, indices, z_dim, Stream.LATENT))


def transform_seed(seed: int, index: int, stream: Stream = Stream.TRANSFORM) -> int:
    """Seed in [0, 2**32) for the random transforms of one sample."""
    return int(_words(seed, [index], 1, stream)[0, 0])


@lru_cache(maxsize=16)
def permutation(seed: int, number: int, size: int) -> tuple[int, ...]:
    """Random order `number`, in [0, 2**63), of the integers below `size`."""
    words = _words(seed, [number], -(-size // 4), Stream.ORDER)
    return tuple(np.argsort(words.T.reshape(-1)[:size], kind="stable").tolist())
