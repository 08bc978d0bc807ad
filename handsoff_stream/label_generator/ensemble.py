"""The label generator: an ensemble of small MLPs from a pixel's hypercolumn to outputs.

Three ways to run the same function. `forward` takes hypercolumns of sampled pixels (training). `reference`
labels whole images the obvious way: resize, concatenate, one member after another. `fold().tiles` labels
whole images fast, with the same result, and never holds a hypercolumn (`folded_label_generator`). It sees
`num_outputs`, not what the outputs mean.

Shape letters: M members, P pixels, C channels, K outputs, B batch, H W output size; h w native size,
D = M * (first hidden width) in the folded form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handsoff_stream.features import FeaturePyramid, Size
from handsoff_stream.label_generator.folded import FoldedLabelGenerator

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class StackedLinear(nn.Module):
    """M Linear layers in one: weight [M, O, I], bias [M, O], initialised as `nn.Linear` does."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, outputs, inputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(members, outputs).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """[M, P, I], or [P, I] for all members => [M, P, O]."""
        if x.ndim == 2:
            shared = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
            return shared.unflatten(1, self.bias.shape).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


class StackedBatchNorm(nn.Module):
    """M BatchNorm1d layers in one: every member keeps statistics of its own, all fields are [M, width]."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))
        self.register_buffer("running_mean", torch.zeros(members, width))
        self.register_buffer("running_var", torch.ones(members, width))

    def forward(self, x_MPN: Tensor) -> Tensor:
        members, _, width = x_MPN.shape
        normalised = F.batch_norm(
            x_MPN.transpose(0, 1).flatten(1),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.flatten(),
            self.bias.flatten(),
            training=self.training,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )
        return normalised.unflatten(1, (members, width)).transpose(0, 1)

    def fold_into(self, linear: StackedLinear) -> tuple[Tensor, Tensor]:
        """(weight [M, I, O], bias [M, 1, O]) of `linear` after this layer in evaluation, as one Linear."""
        scale = self.weight * torch.rsqrt(self.running_var + BATCH_NORM_EPS)
        shift = self.bias - self.running_mean * scale
        weight_MIO = linear.weight.transpose(1, 2)
        return scale[:, :, None] * weight_MIO, torch.baddbmm(linear.bias[:, None], shift[:, None], weight_MIO)

    def range_scale(self) -> Tensor:
        """Powers of two [M, width] that bring inputs with the layer's statistics to at most 1 (root mean square).

        Scaling a unit by a power of two and undoing it behind the ReLU changes no bit of float32, and keeps
        float16 from overflowing.
        """
        size = (self.running_var + self.running_mean.square()).sqrt()
        return torch.exp2(-size.clamp(min=1).log2().ceil())


class LabelGenerator(nn.Module):
    """M members, each Linear - ReLU - BatchNorm - Linear - ReLU - BatchNorm - Linear, as stacked parameters.

    `feature_channels`: channels of each map of the pyramids to come. `hidden`: the two hidden widths.
    Initialisation is that of `nn.Linear`, drawn from `generator` (a fixed seed by default).
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
            raise ValueError(f"All widths and counts of a label generator must be at least 1, got {self.config()}.")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.linear1 = StackedLinear(members, sum(self.feature_channels), hidden[0], generator)
        self.norm1 = StackedBatchNorm(members, hidden[0])
        self.linear2 = StackedLinear(members, hidden[0], hidden[1], generator)
        self.norm2 = StackedBatchNorm(members, hidden[1])
        self.linear3 = StackedLinear(members, hidden[1], num_outputs, generator)

    def config(self) -> dict[str, Any]:
        """JSON-able geometry: the keyword arguments of the constructor."""
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
        """From one state dict per member, published names `[module.]layers.{0,2,3,5,6}.*`; in eval mode.

        Raises ValueError if a tensor is missing or unknown, or if the members differ in geometry.
        """
        named = [{key.removeprefix("module."): value for key, value in state.items()} for state in states]
        first = named[0].get("layers.0.weight") if named else None
        second = named[0].get("layers.3.weight") if named else None
        third = named[0].get("layers.6.weight") if named else None
        if first is None or second is None or third is None:
            raise ValueError(
                "A published label generator has layers.0, layers.3 and layers.6 in every member, "
                f"got {[sorted(state) for state in named[:1]]}; pass one `model_state_dict` per member."
            )
        hidden = (first.shape[0], second.shape[0])
        label_generator = cls(feature_channels, hidden, third.shape[0], members=len(named))
        for member, state in enumerate(named):
            label_generator._load_published(member, state)
        return label_generator.eval()

    @torch.no_grad()
    def _load_published(self, member: int, state: Mapping[str, Tensor]) -> None:
        layers = {0: self.linear1, 2: self.norm1, 3: self.linear2, 5: self.norm2, 6: self.linear3}
        targets = {
            f"layers.{position}.{name}": stacked[member]
            for position, layer in layers.items()
            for name, stacked in layer.state_dict(keep_vars=True).items()
        }
        unknown = {key for key in state if not key.endswith("num_batches_tracked")} - set(targets)
        if unknown or set(targets) - set(state):
            raise ValueError(
                f"Member {member}: missing {sorted(set(targets) - set(state))}, unknown {sorted(unknown)}; "
                "this is not a published label generator of Linear, ReLU and BatchNorm layers."
            )
        for key, target in targets.items():
            if state[key].shape != target.shape:
                raise ValueError(
                    f"Member {member}: {key} is {tuple(state[key].shape)}, expected "
                    f"{tuple(target.shape)} for {sum(self.feature_channels)} feature channels and hidden "
                    f"widths {self.hidden}; members share one geometry, and feature_channels are those of "
                    "the generator they read."
                )
            target.copy_(state[key])

    def forward(self, rows: Tensor) -> Tensor:
        """Hypercolumns => outputs [M, P, K]. `rows`: [M, P, C], a minibatch per member, or [P, C] for all.

        In training mode BatchNorm uses and updates the statistics of each member's own minibatch.
        """
        x_MPh = self.norm1(F.relu(self.linear1(rows)))
        x_MPh = self.norm2(F.relu(self.linear2(x_MPh)))
        return self.linear3(x_MPh)

    @torch.no_grad()
    def reference(self, pyramid: FeaturePyramid, size: Size) -> Tensor:
        """Outputs [M, B, K, H, W] in evaluation, the obvious way. Holds the hypercolumn: for small sizes."""
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
        """The fast form for whole images: a snapshot, which later updates of the parameters do not reach.

        `constant_map`: [C_0, h, w], the generator's constant input, if the first map of every pyramid is
        going to be this map; it is then projected once, here. `dtype`: precision of everything up to the
        outputs; float32 is exact, the 16-bit types move near ties. Hidden units are scaled by powers of two, so
        that float16 does not overflow.

        Raises ValueError if a weight is too large for `dtype`.
        """
        scale1_MI, scale2_MO = self.norm1.range_scale(), self.norm2.range_scale()
        weight_CD = self.linear1.weight.flatten(0, 1).t() * scale1_MI.flatten()
        base_hwD = (self.linear1.bias * scale1_MI).reshape(1, 1, -1)
        if constant_map is not None:
            if constant_map.ndim != 3 or constant_map.shape[0] != self.feature_channels[0]:
                raise ValueError(
                    f"constant_map is [{self.feature_channels[0]}, h, w], got {tuple(constant_map.shape)}."
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
                f'Some weights of the label generator leave the range of {dtype}; label with precision="exact".'
            )
        return FoldedLabelGenerator(self.feature_channels, constant_map is not None, **frozen)

    def tiles(
        self, pyramid: FeaturePyramid, size: Size, *, memory: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """`fold().tiles(...)`: fold once yourself when there is more than one pyramid to label."""
        return self.fold().tiles(pyramid, size, memory=memory)
