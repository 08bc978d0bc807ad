"""Indices => LabelledBatch: the only place where generator, label generators and tasks meet.

    index => z => w => w+ => image and feature maps => outputs of each head's ensemble => label, uncertainty

Does not know streams, filters, shards or files. The same indices in the same chunk give the same bits.

Shape letters: B batch, M ensemble members, P pixels, K outputs, H W image size.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from handsoff_stream.batch import LabelledBatch
from handsoff_stream.features import FeaturePyramid, Window
from handsoff_stream.folded_label_generator import JoinedLabelGenerators, join
from handsoff_stream.generators import Generator
from handsoff_stream.label_generator import LabelGenerator
from handsoff_stream.precision import PRECISIONS, label_dtype
from handsoff_stream.seeding import latents, noise_maps
from handsoff_stream.tasks import Segmentation, Task
from handsoff_stream.uncertainty import ScoreKind, image_score

Labeller = Callable[[FeaturePyramid], tuple[Tensor, Tensor]]
"""Feature maps => labels and uncertainty of one head."""
NOISES = ("const", "none", "random")
KERNELS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class Head:
    """What to predict, and the ensemble that predicts it."""

    task: Task
    label_generator: LabelGenerator


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """Everything besides the checkpoint that decides what sample i is."""

    seed: int = 0
    truncation: float = 0.7
    """psi of the truncation trick, on all style inputs."""
    noise: str = "const"
    """"const": the stored maps; "none"; "random": fresh maps per index."""
    score: str = "top10_mean"
    """Image score: "top10_mean" (published code) or "sum" (HandsOff, section 3.3)."""
    precision: str = "exact"
    """Of images and labels: "exact" (float32) or "fast" (float16; bfloat16 on a CPU)."""
    kernel: str = "auto"
    """Labels of voting heads: "triton" (one fused CUDA kernel), "torch", or "auto": the fused one where it is meant
    to be faster, which is on CUDA at "fast" precision, as far as the heads fit it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.truncation <= 2.0:
            raise ValueError(f"truncation={self.truncation} is no psi; pass a value in [0, 2], 0.7 is usual")
        if self.noise not in NOISES:
            raise ValueError(f"noise={self.noise!r} is unknown; pass one of {list(NOISES)}")
        if self.score not in get_args(ScoreKind):
            raise ValueError(f"score={self.score!r} is unknown; pass one of {list(get_args(ScoreKind))}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; pass one of {list(PRECISIONS)}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r} is unknown; pass one of {list(KERNELS)}")

    def config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def calibrated_by(self) -> dict[str, Any]:
        """The part that changes the distribution of scores."""
        return {"truncation": self.truncation, "noise": self.noise}


class CheckpointLike(Protocol):
    """What a synthesizer needs of a checkpoint."""

    @property
    def generator(self) -> Generator: ...
    @property
    def heads(self) -> dict[str, Head]: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def crop(self) -> Window | None: ...


class Synthesizer:
    """The networks on their device, prepared once; calling it with indices is cheap.

    Args:
        checkpoint: generator, heads, output size and crop.
        options: what decides a sample.
        device: where to compute; the networks of `checkpoint` are moved there.

    Raises:
        ValueError: a precision or a kernel that this device cannot run; an output size that would cut pixels at the
            edge of the crop.
    """

    def __init__(self, checkpoint: CheckpointLike, options: SynthesisOptions, device: torch.device):
        self.options = options
        self.device = device
        self.size = checkpoint.size
        height, width = checkpoint.generator.resolution
        self.crop = checkpoint.crop
        part = self.crop or Window(0, height, 0, width)
        self._whole_size, self._corner = part.placement(self.size, (height, width))
        self._dtype = label_dtype(options.precision, device)
        self.generator = checkpoint.generator.to(device)
        self._synthesis = self.generator.fold(self._dtype)
        self.tasks = {name: head.task for name, head in checkpoint.heads.items()}
        constant_map = self._constant_map()
        self._folded = {
            name: head.label_generator.to(device).fold(constant_map=constant_map, dtype=self._dtype)
            for name, head in checkpoint.heads.items()
        }
        self._joined: dict[tuple[str, ...], JoinedLabelGenerators] = {}
        self._kernels: dict[str, Labeller | None] = {}
        self._triton = device.type == "cuda" and self._dtype == torch.float16 and find_spec("triton") is not None

    @torch.no_grad()
    def _constant_map(self) -> Tensor | None:
        """[C, h, w], the first feature map of every image; None of a generator whose first map varies."""
        if not self.generator.constant_input:
            return None
        w_plus = self.generator.truncate(self.generator.w_avg[None], 0.0)
        return self.generator.synthesis(w_plus).features.maps[0][0]

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> LabelledBatch:
        """Synthesise and label the samples of these indices; tensors lie on `device`."""
        images, features = self.generate(indices)
        found = self.labels(features)
        labels = {name: label for name, (label, _) in found.items()}
        _, uncertainty_BHW = next(iter(found.values()))
        return LabelledBatch(
            images=images,
            labels=labels if len(labels) > 1 else next(iter(labels.values())),
            uncertainty=image_score(uncertainty_BHW, self.options.score),  # type: ignore[arg-type]
            indices=torch.tensor(indices, dtype=torch.int64),
            next_index=indices[-1] + 1,
        )

    @torch.no_grad()
    def generate(self, indices: Sequence[int]) -> tuple[Tensor, FeaturePyramid]:
        """Images float32 [B, 3, H, W] in [0, 1] on 8-bit levels, and the feature maps behind them."""
        z = self._upload(latents(self.options.seed, indices, self.generator.z_dim))
        w_plus = self.generator.truncate(self.generator.mapping(z), self.options.truncation)
        if self.options.noise == "random":
            maps = noise_maps(self.options.seed, indices, self.generator.noise_shapes)
            synthesis = self._synthesis(w_plus, [self._upload(n) for n in maps])
        else:
            synthesis = self._synthesis(w_plus, self.options.noise)
        return self._output(synthesis.images, synthesis.features)

    def _output(self, images_BCHW: Tensor, features: FeaturePyramid) -> tuple[Tensor, FeaturePyramid]:
        """What is streamed of an image in [-1, 1], and the features of that part."""
        images_BCHW = quantize(images_BCHW, self._whole_size)
        if self.crop is None:
            return images_BCHW, features
        (top, left), (height, width) = self._corner, self.size
        images_BCHW = images_BCHW[..., top : top + height, left : left + width].contiguous()
        return images_BCHW, features.crop(self.crop[:2], self.crop[2:])

    def _upload(self, tensor: Tensor) -> Tensor:
        """To the device without making the host wait: only from pinned memory is a copy asynchronous."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def label(self, name: str, features: FeaturePyramid) -> tuple[Tensor, Tensor]:
        """Labels [B, H, W] or [B, K, H, W] of one head, and its uncertainty float32 [B, H, W]."""
        return self.labels(features, [name])[name]

    @torch.no_grad()
    def labels(self, features: FeaturePyramid, names: Sequence[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """`label` of some heads, by default of all; they share their first layer's product.

        Raises KeyError for a head that the checkpoint does not have.
        """
        names = list(self.tasks) if names is None else names
        kernels = {name: self._kernel(name, features) for name in names}
        found = {name: kernel(features) for name, kernel in kernels.items() if kernel is not None}
        others = tuple(name for name in names if name not in found)
        if others:
            found |= self._tiled_labels(others, features)
        return {name: found[name] for name in names}

    def _tiled_labels(self, names: tuple[str, ...], features: FeaturePyramid) -> dict[str, tuple[Tensor, Tensor]]:
        joined = self._joined.get(names) or join([self._folded[name] for name in names])
        if len(names) > 1 and names not in self._joined:
            # The same weights as before, now as a share of the joint ones: none are held twice.
            self._joined = {names: joined}
            self._folded |= zip(names, joined.parts, strict=True)
        labels: dict[str, list[Tensor]] = {name: [] for name in names}
        uncertainty: dict[str, list[Tensor]] = {name: [] for name in names}
        for rows, outputs in joined.tiles(features, self.size):
            shape = (features.batch_size, rows.stop - rows.start, self.size[1])
            for name, outputs_MPK in zip(names, outputs, strict=True):
                labels[name].append(self.tasks[name].decide(outputs_MPK).unflatten(0, shape))
                uncertainty[name].append(self.tasks[name].disagreement(outputs_MPK).unflatten(0, shape))
        return {name: (_whole_label(labels[name]), torch.cat(uncertainty[name], dim=1)) for name in names}

    def _kernel(self, name: str, features: FeaturePyramid) -> Labeller | None:
        """The fused kernel that labels this head, None if there is none; prepared for the first features that come."""
        if name not in self._kernels:
            self._kernels[name] = self._prepare_kernel(name, features)
        return self._kernels[name]

    def _prepare_kernel(self, name: str, features: FeaturePyramid) -> Labeller | None:
        """Imports Triton only where it may run."""
        wanted, auto = self.options.kernel == "triton", self.options.kernel == "auto" and self._triton
        if not isinstance(self.tasks[name], Segmentation) or not (wanted or auto):
            return None
        from handsoff_stream.label_head_triton import FusedLabelHead, unsupported

        if auto and unsupported(self._folded[name], features, self.size) is not None:
            return None
        return FusedLabelHead(self._folded[name], features, self.size)


def _whole_label(strips: list[Tensor]) -> Tensor:
    """[B, rows, W] or [B, rows, W, K] of each strip => [B, H, W] or [B, K, H, W]."""
    label = torch.cat(strips, dim=1)
    return label.permute(0, 3, 1, 2).contiguous() if label.ndim == 4 else label


def quantize(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Generator output in [-1, 1] => float32 in [0, 1] on 8-bit levels, resized to `size` if it differs.

    Resizing is bilinear without antialiasing, as the published code does; level = floor(127.5 x + 128), clamped to
    0 .. 255, as the published PNG writers do. What is exported as 8-bit files later equals what was streamed.
    """
    if tuple(images_BCHW.shape[2:]) != tuple(size):
        images_BCHW = F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False)
    return images_BCHW.mul(127.5).add(128).floor().clamp(0, 255).div(255)
