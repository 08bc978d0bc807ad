"""The trainable ensemble: M small MLPs that map the hypercolumn of a pixel to outputs (HandsOff, section 3.2).

There are three ways to run the same function. `forward` takes the hypercolumns of sampled pixels, for training.
`reference` computes whole images in the obvious way: resize the feature maps, concatenate them, run one member after
another. `fold` gives the fast form for whole images, which never holds a hypercolumn (see `folded`). Knows the number
of outputs. Does not know what they mean, nor how members are trained.

Shape letters: M members, P pixels, C channels, K outputs, B batch, I O inputs and outputs of a layer, N units of a
layer, H W output size, h w native size of a feature map, D = M * (first hidden width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.features import FeaturePyramid
from handsoff_stream.geometry import Size
from handsoff_stream.label_generator.folded import FoldedLabelGenerator

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class StackedLinear(nn.Module):
    """M Linear layers: weight float32 [M, O, I], bias float32 [M, O], initialized as `nn.Linear` is.

    Args:
        members: M.
        inputs: I.
        outputs: O.
        generator: of the initial values.
    """

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, outputs, inputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(members, outputs).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [M, P, I], or [P, I] shared by all members => [M, P, O]."""
        if x.ndim == 2:
            shared = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
            return shared.unflatten(1, self.bias.shape).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


class StackedBatchNorm(nn.Module):
    """M BatchNorm1d layers with separate statistics; every parameter and buffer is float32 [M, width]."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))
        self.register_buffer("running_mean", torch.zeros(members, width))
        self.register_buffer("running_var", torch.ones(members, width))

    def forward(self, x_MPN: Tensor) -> Tensor:
        """Normalize [M, P, N] over P.

        In training mode by the statistics of the minibatch, which also update the running averages; in eval mode by
        those averages.
        """
        members, _, width = x_MPN.shape
        normalized = F.batch_norm(
            x_MPN.transpose(0, 1).flatten(1),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.flatten(),
            self.bias.flatten(),
            training=self.training,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )
        return normalized.unflatten(1, (members, width)).transpose(0, 1)

    def fold_into(self, linear: StackedLinear) -> tuple[Tensor, Tensor]:
        """Weight [M, I, O] and bias [M, 1, O] of one Linear that equals this layer in eval mode, then `linear`."""
        scale = self.weight * torch.rsqrt(self.running_var + BATCH_NORM_EPS)
        shift = self.bias - self.running_mean * scale
        weight_MIO = linear.weight.transpose(1, 2)
        return scale[:, :, None] * weight_MIO, torch.baddbmm(linear.bias[:, None], shift[:, None], weight_MIO)

    def range_scale(self) -> Tensor:
        """Powers of two [M, width] that scale inputs with this layer's statistics to a root mean square of at most 1.

        Scaling a unit by a power of two before its ReLU and undoing it afterwards changes no bit in float32, and keeps
        float16 from overflowing.
        """
        size = (self.running_var + self.running_mean.square()).sqrt()
        return torch.exp2(-size.clamp(min=1).log2().ceil())


class LabelGenerator(nn.Module):
    """M members with stacked parameters, each Linear, ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear.

    Args:
        feature_channels: channels of each map of the feature pyramids that it reads, in their order.
        hidden: the two hidden widths.
        num_outputs: K.
        members: M.
        generator: of the initial weights, which are those of `nn.Linear`; None: one with a fixed seed.

    Raises:
        ValueError: a width or count below 1.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        hidden: tuple[int, int] = (128, 32),
        num_outputs: int = 2,
        members: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.feature_channels = tuple(feature_channels)
        self.hidden = (hidden[0], hidden[1])
        self.num_outputs = num_outputs
        self.members = members
        if min(*self.feature_channels, *self.hidden, num_outputs, members) < 1:
            raise ValueError(f"{self.config()} describes no label generator; all widths and counts must be at least 1")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.linear1 = StackedLinear(members, sum(self.feature_channels), hidden[0], generator)
        self.norm1 = StackedBatchNorm(members, hidden[0])
        self.linear2 = StackedLinear(members, hidden[0], hidden[1], generator)
        self.norm2 = StackedBatchNorm(members, hidden[1])
        self.linear3 = StackedLinear(members, hidden[1], num_outputs, generator)

    def config(self) -> dict[str, Any]:
        """The geometry: keyword arguments of the constructor, JSON-able."""
        return {
            "feature_channels": list(self.feature_channels),
            "hidden": list(self.hidden),
            "num_outputs": self.num_outputs,
            "members": self.members,
        }

    @classmethod
    def from_published_state_dicts(
        cls, states: Sequence[Mapping[str, Tensor]], feature_channels: Sequence[int]
    ) -> LabelGenerator:
        """A label generator from the state dicts of published members (HandsOff, DatasetGAN), in eval mode.

        Args:
            states: one state dict per member, with the names `[module.]layers.{0,2,3,5,6}.*`.
            feature_channels: channels of each map of the generator that the members read.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape, or the members differ in geometry.
        """
        named = [{key.removeprefix("module."): value for key, value in state.items()} for state in states]
        first = named[0].get("layers.0.weight") if named else None
        second = named[0].get("layers.3.weight") if named else None
        third = named[0].get("layers.6.weight") if named else None
        if first is None or second is None or third is None or 0 in (first.ndim, second.ndim, third.ndim):
            raise ValueError(
                f"got state dicts with {[sorted(state) for state in named[:1]]}, but a published label generator has "
                "layers.0, layers.3 and layers.6 in every member; pass one `model_state_dict` per member"
            )
        hidden = (first.shape[0], second.shape[0])
        with torch.device("meta"):  # sizes are compared before anything is allocated
            expected = cls(feature_channels, hidden, third.shape[0], members=len(named))
        for member, state in enumerate(named):
            expected._published_targets(member, state)
        label_generator = cls(feature_channels, hidden, third.shape[0], members=len(named))
        for member, state in enumerate(named):
            label_generator._load_published(member, state)
        return label_generator.eval()

    @torch.no_grad()
    def _load_published(self, member: int, state: Mapping[str, Tensor]) -> None:
        for key, target in self._published_targets(member, state).items():
            target.copy_(state[key])

    def _published_targets(self, member: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published name => the part of this class's tensors that holds the member; refuses tensors that do not fit."""
        layers = {0: self.linear1, 2: self.norm1, 3: self.linear2, 5: self.norm2, 6: self.linear3}
        targets = {
            f"layers.{position}.{name}": stacked[member]
            for position, layer in layers.items()
            for name, stacked in layer.state_dict(keep_vars=True).items()
        }
        unknown = {key for key in state if not key.endswith("num_batches_tracked")} - set(targets)
        if unknown or set(targets) - set(state):
            raise ValueError(
                f"member {member}: missing {sorted(set(targets) - set(state))}, unknown {sorted(unknown)}; this is no "
                "published label generator of Linear, ReLU and BatchNorm layers; pass one that is"
            )
        for key, target in targets.items():
            if state[key].shape != target.shape:
                raise ValueError(
                    f"member {member}: {key} is {tuple(state[key].shape)}, expected {tuple(target.shape)} for "
                    f"{sum(self.feature_channels)} feature channels and hidden widths {self.hidden}; pass members of "
                    "one geometry, and the feature channels of the generator that they read"
                )
        return targets

    def forward(self, rows: Tensor) -> Tensor:
        """Outputs float32 [M, P, K] of hypercolumns.

        In training mode, BatchNorm uses the statistics of each member's minibatch and updates its averages.

        Args:
            rows: hypercolumns float32 [M, P, C], a minibatch per member, or [P, C], shared by all members.
        """
        x_MPh = self.norm1(F.relu(self.linear1(rows)))
        x_MPh = self.norm2(F.relu(self.linear2(x_MPh)))
        return self.linear3(x_MPh)

    @torch.no_grad()
    def reference(self, pyramid: FeaturePyramid, size: Size) -> Tensor:
        """Outputs float32 [M, B, K, H, W] in eval mode, in the obvious way; holds the hypercolumns of all pixels.

        Args:
            pyramid: feature maps of B images.
            size: (H, W) of the outputs; small, for the hypercolumns are large.
        """
        rows_PC = pyramid.hypercolumn(size).permute(0, 2, 3, 1).flatten(0, 2)
        outputs = []
        for m in range(self.members):
            x = rows_PC
            for linear, norm in ((self.linear1, self.norm1), (self.linear2, self.norm2)):
                x = F.relu(F.linear(x, linear.weight[m], linear.bias[m]))
                mean, var = norm.running_mean[m], norm.running_var[m]
                x = F.batch_norm(x, mean, var, norm.weight[m], norm.bias[m], eps=BATCH_NORM_EPS)
            outputs.append(F.linear(x, self.linear3.weight[m], self.linear3.bias[m]))
        shape = (pyramid.batch_size, *size)
        return torch.stack(outputs).unflatten(1, shape).permute(0, 1, 4, 2, 3)

    @torch.no_grad()
    def fold(self, *, constant_map: Tensor | None = None, dtype: torch.dtype = torch.float32) -> FoldedLabelGenerator:
        """The fast form for whole images: a snapshot of the weights, which later updates do not change.

        Hidden units are scaled by powers of two, so that float16 does not overflow.

        Args:
            constant_map: float [C_0, h, w], the constant input of the generator, if it is the first map of every
                pyramid to come; its share of the first layer is then computed once, here.
            dtype: of weights and activations; outputs are float32. float32 is exact; float16 and bfloat16 change
                labels that are close to a tie.

        Raises:
            ValueError: a weight is too large for `dtype`, or `constant_map` has another shape.
        """
        scale1_MI, scale2_MO = self.norm1.range_scale(), self.norm2.range_scale()
        weight_CD = self.linear1.weight.flatten(0, 1).t() * scale1_MI.flatten()
        base_hwD = (self.linear1.bias * scale1_MI).reshape(1, 1, -1)
        if constant_map is not None:
            if constant_map.ndim != 3 or constant_map.shape[0] != self.feature_channels[0]:
                raise ValueError(
                    f"constant_map has shape {list(constant_map.shape)}, but the first feature map has "
                    f"{self.feature_channels[0]} channels; pass [{self.feature_channels[0]}, h, w]"
                )
            constant_hwC = constant_map.to(weight_CD.dtype).permute(1, 2, 0)
            base_hwD = base_hwD + constant_hwC @ weight_CD[: len(constant_map)]
        weight2_MIO, bias2_M1O = self.norm1.fold_into(self.linear2)
        weight3_MOK, bias3_M1K = self.norm2.fold_into(self.linear3)
        snapshot = {
            "weight1_CD": weight_CD,
            "base_hwD": base_hwD,
            "weight2_MIO": weight2_MIO / scale1_MI[:, :, None] * scale2_MO[:, None],
            "bias2_M1O": bias2_M1O * scale2_MO[:, None],
            "weight3_MOK": weight3_MOK / scale2_MO[:, :, None],
            "bias3_M1K": bias3_M1K,
        }
        frozen = {name: t.to(dtype).clone(memory_format=torch.contiguous_format) for name, t in snapshot.items()}
        if any((frozen[name].isfinite() != t.isfinite()).any() for name, t in snapshot.items()):
            raise ValueError(
                f'some weights of the label generator exceed the range of {dtype}; label with precision="exact"'
            )
        return FoldedLabelGenerator(self.feature_channels, constant_map is not None, **frozen)
