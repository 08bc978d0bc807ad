"""Fresh noise maps of some samples, drawn where they are needed: the numbers of `seeding.normal` on any device.

A 1024 x 1024 generator takes 2.8 million normal numbers per image, too many for the training process to draw. Here the
same Philox words become numbers by whole operations on tensors, and all arithmetic is of the kind that IEEE 754 rounds
in one way only (no logarithm or cosine of a library), so a CPU and a GPU give the same bits.

Knows words, counters and polynomials. Does not know generators or chunks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from handsoff_stream.seeding import MULTIPLIERS, ROUNDS, WEYL, Stream, check_seed

MASK = 0xFFFFFFFF
CPU_BLOCKS = 1 << 15  # Philox blocks at once on a CPU: fewer are bound by calls, more by memory
DEVICE_BLOCKS = 1 << 20
LOG_TERMS = 8  # of 2 (s + s^3 / 3 + ...) with |s| < 0.172: 1e-13
SINE_TERMS = 9  # of the Taylor series on [-pi / 4, pi / 4]: 1e-17


def noise_maps(
    seed: int, indices: Sequence[int], shapes: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Fresh noise for every layer: one float32 [len(indices), 1, h, w] per shape, standard normal, on `device`."""
    sizes = [h * w for h, w in shapes]
    flat = torch.stack([normal_on(device, seed, index, sum(sizes)) for index in indices])
    parts = flat.split(sizes, dim=1)
    return [part.reshape(len(indices), 1, h, w) for part, (h, w) in zip(parts, shapes, strict=True)]


def normal_on(device: torch.device | str, seed: int, index: int, size: int) -> Tensor:
    """Standard normal numbers of one sample for its noise, float32 [size] on `device`; see `seeding.normal`."""
    check_seed(seed)
    blocks = -(-size // 4)
    values = torch.empty(blocks, 4, dtype=torch.float32, device=device)
    step = CPU_BLOCKS if values.device.type == "cpu" else DEVICE_BLOCKS
    for first in range(0, blocks, step):
        block = torch.arange(first, min(first + step, blocks), dtype=torch.int64, device=device)
        words = _philox(block, index, (seed & MASK, seed >> 32))
        for pair, (one, other) in enumerate((words[:2], words[2:])):
            radius, (cosine, sine) = _radius(one), _direction(other)
            values[first : first + step, 2 * pair] = radius * cosine
            values[first : first + step, 2 * pair + 1] = radius * sine
    return values.flatten()[:size]


def _philox(block: Tensor, index: int, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`seeding.philox4x32` for the noise of one sample: four words of 32 bits in int64 for each block.

    Products wrap around at 64 bits, which keeps their bits; a shift fills in the sign, which the mask takes away.
    """
    c0, c1 = block, torch.full_like(block, index & MASK)
    c2, c3 = torch.full_like(block, index >> 32), torch.full_like(block, int(Stream.NOISE))
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(MASK), product0.bitwise_and_(MASK)
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u), float64, for u = (word + 0.5) / 2**32."""
    mantissa, exponent = torch.frexp((word.double() + 0.5) * 2.0**-32)  # mantissa in [0.5, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    exponent = exponent - small.to(exponent.dtype)
    s = (mantissa - 1) / (mantissa + 1)
    logarithm = _odd_polynomial(s, [2 / (2 * k + 1) for k in range(LOG_TERMS)])
    return torch.sqrt((logarithm + exponent.double() * math.log(2)) * -2.0)


def _direction(word: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of 2 pi u, float64, for u = (word + 0.5) / 2**32: a quarter turn from the upper bits, the rest from
    the lower ones."""
    quarter = (word + (1 << 29)) >> 30  # the nearest one, 0 to 4
    rest = (word - (quarter << 30)).double() + 0.5
    angle = rest * (2 * math.pi * 2.0**-32)
    sine = _odd_polynomial(angle, [(-1) ** k / math.factorial(2 * k + 1) for k in range(SINE_TERMS)])
    cosine = _even_polynomial(angle, [(-1) ** k / math.factorial(2 * k) for k in range(SINE_TERMS)])
    odd, turned = quarter % 2 == 1, (quarter + 1) // 2 % 2 == 1
    one, other = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return torch.where(turned, -one, one), torch.where(quarter // 2 % 2 == 1, -other, other)


def _odd_polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    return _even_polynomial(x, coefficients).mul_(x)


def _even_polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum of c_k x^2k, by Horner; a product and a sum at a time, so that no compiler fuses them."""
    square = x * x
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total.mul_(square).add_(coefficient)
    return total
