"""Feature maps => labels and uncertainty of every head of a checkpoint.

Built once for one generator, one output size and one device: the ensembles are folded, the heads that share a first
product are joined, and kernels are prepared. Nothing changes while it runs, so several threads may label at once. Knows
heads, feature maps and kernels. Does not know latents, images or indices.

Shape letters: B batch, C channels, M ensemble members, P pixels, K outputs, H W label size, h w native size.
"""

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from handsoff_stream.checkpoint import Checkpoint, Head
from handsoff_stream.features import FeaturePyramid
from handsoff_stream.label_generator import FoldedLabelGenerator, join
from handsoff_stream.options import KernelKind
from handsoff_stream.tasks import Segmentation

M = TypeVar("M", bound=nn.Module)


class Labelled(NamedTuple):
    """What one head says of B images."""

    label: Tensor
    """int64 [B, H, W], or float32 [B, K, H, W] of a head without classes."""
    uncertainty: Tensor
    """float32 [B, H, W]."""
    probabilities: Tensor | None = None
    """float16 [B, K, H, W], the mean of the ensemble's class probabilities; None unless soft labels are wanted."""


Kernel = Callable[[FeaturePyramid], tuple[Tensor, ...]]


class Labeller:
    """The heads of a checkpoint, prepared for whole images.

    Args:
        checkpoint: its heads, and the generator, output size and crop that the feature maps will have.
        device: where feature maps will lie.
        dtype: of weights and activations up to the outputs; torch.float32 is exact.
        kernel: see `SynthesisOptions.kernel`.
        soft: whether heads that vote give class probabilities, too.

    Raises:
        ValueError: `kernel="triton"`, and a voting head that the fused kernel cannot label, or no voting head; weights
            beyond the range of `dtype`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        kernel: KernelKind = "auto",
        soft: bool = False,
    ) -> None:
        if kernel == "triton" and not any(isinstance(head.task, Segmentation) for head in checkpoint.heads.values()):
            raise ValueError(
                f'kernel="triton" labels heads that vote, and none of {sorted(checkpoint.heads)} does; pass '
                'kernel="auto", or "torch"'
            )
        self.size, self._soft = checkpoint.size, soft
        self.tasks = {name: head.task for name, head in checkpoint.heads.items()}
        constant_map = checkpoint.generator.constant_map
        folded = {
            name: _fold(head, constant_map, device=device, dtype=dtype) for name, head in checkpoint.heads.items()
        }
        example = _example(checkpoint)
        self.kernels = {
            name: fused
            for name, head in checkpoint.heads.items()
            if (fused := _fused_kernel(head, folded[name], example, self.size, kernel, device, soft)) is not None
        }
        """The heads that the fused kernel labels."""
        tiled = [name for name in folded if name not in self.kernels]
        self._joined = join([folded[name] for name in tiled]) if tiled else None
        parts = self._joined.parts if self._joined is not None else ()
        # After joining, each head is a share of the joint weights: none are held twice.
        self.folded: dict[str, FoldedLabelGenerator] = folded | dict(zip(tiled, parts, strict=True))
        """The ensemble of every head in its fast form."""

    @torch.no_grad()
    def __call__(self, features: FeaturePyramid, names: Sequence[str] | None = None) -> dict[str, Labelled]:
        """Label some heads, by default all; those that no kernel labels share the product of their first layers.

        Args:
            features: maps of the checkpoint's generator and crop, for B images.
            names: of heads.

        Returns:
            What each head says, in the order of `names`.

        Raises:
            KeyError: a head that the checkpoint does not have.
            ValueError: feature maps of another geometry.
        """
        names = list(self.tasks) if names is None else list(names)
        found = {name: Labelled(*self.kernels[name](features)) for name in names if name in self.kernels}
        tiled = [name for name in names if name not in found]
        if tiled:
            found |= self._tiled(tiled, features)
        return {name: found[name] for name in names}

    def _tiled(self, names: Sequence[str], features: FeaturePyramid) -> dict[str, Labelled]:
        if self._joined is not None and len(names) == len(self._joined.parts):
            joined, order = self._joined, [name for name in self.tasks if name in names]
        else:
            joined, order = join([self.folded[name] for name in names]), list(names)
        labels: dict[str, list[Tensor]] = {name: [] for name in order}
        uncertainty: dict[str, list[Tensor]] = {name: [] for name in order}
        soft: dict[str, list[Tensor]] = {name: [] for name in order}
        for rows, outputs in joined.tiles(features, self.size):
            shape = (features.batch_size, rows.stop - rows.start, self.size[1])
            for name, outputs_MPK in zip(order, outputs, strict=True):
                task = self.tasks[name]
                labels[name].append(task.decide(outputs_MPK).unflatten(0, shape))
                uncertainty[name].append(task.disagreement(outputs_MPK).unflatten(0, shape))
                if self._soft and (probabilities_PK := task.probabilities(outputs_MPK)) is not None:
                    soft[name].append(probabilities_PK.half().unflatten(0, shape))
        return {
            name: Labelled(
                _whole_label(labels[name]),
                torch.cat(uncertainty[name], dim=1),
                _whole_label(soft[name]) if soft[name] else None,
            )
            for name in order
        }


def on_device(module: M, device: torch.device) -> M:
    """The module itself if it lies there, otherwise a copy: `Module.to` would move the caller's."""
    where = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    return module if where <= {torch.empty(0, device=device).device} else copy.deepcopy(module).to(device)


def _fold(head: Head, constant_map: Tensor | None, *, device: torch.device, dtype: torch.dtype) -> FoldedLabelGenerator:
    constant_map = None if constant_map is None else constant_map.to(device)
    return on_device(head.label_generator, device).fold(constant_map=constant_map, dtype=dtype)


def _example(checkpoint: Checkpoint) -> FeaturePyramid:
    """A pyramid of the geometry to come, with one image and without memory."""
    generator = checkpoint.generator
    shapes = zip(generator.feature_channels, generator.feature_sizes, strict=True)
    maps = tuple(torch.empty(1, channels, *size, device="meta") for channels, size in shapes)
    pyramid = FeaturePyramid(maps)
    return pyramid if checkpoint.crop is None else pyramid.crop(checkpoint.crop.rows, checkpoint.crop.columns)


def _fused_kernel(
    head: Head,
    folded: FoldedLabelGenerator,
    example: FeaturePyramid,
    size: tuple[int, int],
    kernel: KernelKind,
    device: torch.device,
    soft: bool,
) -> Kernel | None:
    """The fused kernel that labels this head; None if there is none. Imports Triton only where it may run."""
    half_on_cuda = device.type == "cuda" and folded.weight1_CD.dtype == torch.float16
    auto = kernel == "auto" and half_on_cuda and find_spec("triton") is not None
    if not isinstance(head.task, Segmentation) or not (auto or kernel == "triton"):
        return None
    from handsoff_stream.label_generator.triton_head import FusedLabelHead, unsupported

    if auto and unsupported(folded, example, size) is not None:
        return None
    return FusedLabelHead(folded, example, size, soft=soft)


def _whole_label(strips: Sequence[Tensor]) -> Tensor:
    """[B, rows, W] or [B, rows, W, K] of each strip => [B, H, W] or [B, K, H, W]."""
    label = torch.cat(list(strips), dim=1)
    return label.permute(0, 3, 1, 2).contiguous() if label.ndim == 4 else label
