"""Everything besides the checkpoint that decides what sample i is.

Knows names and ranges. Does not know networks, devices or streams.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

import torch

from handsoff_stream.filters import Filter
from handsoff_stream.precision import Precision
from handsoff_stream.shard import Shard
from handsoff_stream.uncertainty import ScoreKind

NoiseKind = Literal["const", "none", "random"]
KernelKind = Literal["auto", "triton", "torch"]
LabelKind = Literal["hard", "soft"]
IgnoreKind = Literal["none", "class-relative"]
FilterKind = Literal["rolling", "block", "threshold"]


ADDED = ("labels", "ignore", "ignore_factor")


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """Seed, truncation, noise, score, precision and kernel.

    Raises:
        ValueError: a value that is out of its range or has an unknown name.
    """

    seed: int = 0
    """Which stream; in [0, 2**64)."""
    truncation: float = 0.7
    """psi of the truncation trick, on all style inputs; in [0, 2]."""
    noise: NoiseKind = "const"
    """"const": the stored maps. "none": no noise. "random": fresh maps per index."""
    score: ScoreKind = "top10_mean"
    """Image score: "top10_mean" (published code), "sum" (HandsOff, section 3.3), or "class-relative", the mean over the
    classes in the image of (their mean uncertainty / their mean over the calibration samples)."""
    labels: LabelKind = "hard"
    """Labels of voting heads: "hard" class ids, or "soft", the mean of the ensemble's class probabilities."""
    ignore: IgnoreKind = "none"
    """Pixels to leave unlabelled, of voting heads: "none", or "class-relative", those whose uncertainty is above
    `ignore_factor` times the mean of their class over the calibration samples."""
    ignore_factor: float = 1.25
    """1.25 is FreeMask's; above 0."""
    precision: Precision = "exact"
    """Of images and labels: "exact" (float32) or "fast" (float16; bfloat16 on a CPU)."""
    kernel: KernelKind = "auto"
    """Labels of voting heads: "triton" (one fused CUDA kernel), "torch", or "auto". "auto" takes the fused kernel on
    CUDA at "fast" precision, for every head that fits it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.truncation <= 2.0:
            raise ValueError(f"truncation={self.truncation} is no psi; pass a value in [0, 2], 0.7 is usual")
        if not 0 < self.ignore_factor < math.inf:
            raise ValueError(f"ignore_factor={self.ignore_factor} ignores all or no pixels; pass a positive number")
        for name, kinds in (
            ("noise", NoiseKind),
            ("score", ScoreKind),
            ("labels", LabelKind),
            ("ignore", IgnoreKind),
            ("precision", Precision),
            ("kernel", KernelKind),
        ):
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; pass one of {list(known)}")

    def config(self) -> dict[str, Any]:
        """JSON-able. `ADDED` options are left out at their defaults: states that were saved before them still load."""
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in asdict(self).items() if k not in ADDED or v != defaults[k]}

    @property
    def relative_to_classes(self) -> list[str]:
        """The options that need the mean uncertainty of each class."""
        return [name for name in ("score", "ignore") if getattr(self, name) == "class-relative"]

    def calibrated_by(self) -> dict[str, Any]:
        """The options that change the distribution of scores; JSON-able."""
        return {"truncation": self.truncation, "noise": self.noise}


class StreamOptions(TypedDict, total=False):
    """Keyword arguments of `HandsOffStream`, for type checkers; what they mean is said there."""

    seed: int
    filter: FilterKind | Filter | None
    truncation: float | None
    epoch_size: int | None
    drop_last: bool
    indices: range | None
    device: str | torch.device | None
    output_device: str | torch.device | None
    transforms: Callable[..., Any] | None
    image_dtype: torch.dtype
    noise: NoiseKind
    score: ScoreKind
    labels: LabelKind
    ignore: IgnoreKind
    ignore_factor: float
    precision: Precision | None
    kernel: KernelKind
    chunk_size: int | None
    shard: Shard | None
    on_bad_sample: Literal["raise", "skip"]
    verify: bool
    graphs: bool
    synthesize: Callable[[Sequence[int]], Any] | None


def check_choices(
    batch_size: int | None,
    epoch_size: int | None,
    chunk_size: int | None,
    as_dict: bool,
    image_dtype: torch.dtype,
    on_bad_sample: str,
) -> None:
    """Options that do not decide a sample.

    Raises:
        ValueError: a value that is out of its range or has an unknown name.
    """
    for name, value in (("batch_size", batch_size), ("epoch_size", epoch_size), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} yields nothing; pass a positive integer or None")
    if as_dict and batch_size is not None:
        raise ValueError(
            f"as_dict=True is for samples, and batch_size={batch_size} makes batches, which carry uncertainty and "
            "indices already; pass one of the two"
        )
    if image_dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"image_dtype={image_dtype} is no form of an image; pass torch.float32 or torch.uint8")
    if on_bad_sample not in ("raise", "skip"):
        raise ValueError(f'on_bad_sample={on_bad_sample!r} is unknown; pass "raise" or "skip"')
