"""Everything besides the checkpoint that decides what sample i is.

Knows names and ranges. Does not know networks, devices or streams.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from handsoff_stream.precision import Precision
from handsoff_stream.uncertainty import ScoreKind

NoiseKind = Literal["const", "none", "random"]
KernelKind = Literal["auto", "triton", "torch"]
FilterKind = Literal["rolling", "block", "threshold"]


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
    """Image score: "top10_mean" (published code) or "sum" (HandsOff, section 3.3)."""
    precision: Precision = "exact"
    """Of images and labels: "exact" (float32) or "fast" (float16; bfloat16 on a CPU)."""
    kernel: KernelKind = "auto"
    """Labels of voting heads: "triton" (one fused CUDA kernel), "torch", or "auto". "auto" takes the fused kernel on
    CUDA at "fast" precision, for every head that fits it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.truncation <= 2.0:
            raise ValueError(f"truncation={self.truncation} is no psi; pass a value in [0, 2], 0.7 is usual")
        for name, kinds in (
            ("noise", NoiseKind),
            ("score", ScoreKind),
            ("precision", Precision),
            ("kernel", KernelKind),
        ):
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; pass one of {list(known)}")

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def calibrated_by(self) -> dict[str, Any]:
        """The options that change the distribution of scores; JSON-able."""
        return {"truncation": self.truncation, "noise": self.noise}
