"""Linear layers with an elastic low-rank adapter: the training forward of LoRA, SparsePEFT and QA-SparsePEFT.

The formulas are those of `sparseport.merge`, in torch float32; a property test holds the two together. They cannot be
equal to the last bit (a float32 matrix product depends on the BLAS build, the merge does not), so codes that land on a
rounding edge may differ: they are counted after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseport.errors import BadInput
from sparseport.nls.linears import decoder_linears
from sparseport.weights.linear import LowRankBranch, Mask, QuantizedWeight


@dataclass(frozen=True)
class Grid:
    """A frozen INT4 grid, with the products that every step needs.

    scales       float32 [out, groups, 1]
    zero_points  float32 [out, groups, 1]
    offsets      zero_points * scales, rounded in the scales' own dtype as SQFT does, float32 [out, groups, 1]
    group_size   columns per group
    """

    scales: Tensor
    zero_points: Tensor
    offsets: Tensor
    group_size: int

    @staticmethod
    def of(weight: QuantizedWeight) -> Grid:
        """The grid of a quantised base weight.

        Raises:
            BadInput: the weight has an act-order permutation, which the training forward does not know.
        """
        if weight.input_order is not None:
            raise BadInput("training on an act-order base is not supported", fix="quantise the base without desc_act")
        offsets = np.multiply(weight.zero_points.astype(weight.scales.dtype), weight.scales)
        scales, zero_points, offsets = (
            torch.from_numpy(array.astype("float32"))[:, :, None]
            for array in (weight.scales, weight.zero_points, offsets)
        )
        return Grid(scales, zero_points, offsets, weight.group_size)

    def cut(self, rows: int, columns: int) -> Grid:
        """The grid of the first rows and columns; groups that the cut goes through are split, as in the merge."""
        part = math.gcd(self.group_size, columns)
        repeat = self.group_size // part

        def first(values: Tensor) -> Tensor:
            kept = values[:rows]
            kept = kept if repeat == 1 else kept.repeat_interleave(repeat, dim=1)
            return kept[:, : columns // part]

        return replace(
            self,
            scales=first(self.scales),
            zero_points=first(self.zero_points),
            offsets=first(self.offsets),
            group_size=part,
        )

    def codes(self, values: Tensor) -> Tensor:
        """Codes as float32 [out, groups, group]: clamp(round((w + z s) / s), 0, 15), rounding rule `sqft`."""
        grouped = values.reshape(values.shape[0], -1, self.group_size)
        return (grouped + self.offsets).div_(self.scales).round_().clamp_(0, 15)

    def snap(self, values: Tensor) -> Tensor:
        """Values rounded to the grid: scales * (codes - zero_points), float32 [out, in]."""
        return self.codes(values).sub_(self.zero_points).mul_(self.scales).reshape(values.shape)


class _MergedLinear(torch.autograd.Function):
    """y = x @ Q(W + scaling * (B A) * M)^T, with the gradient straight through Q.

    Written by hand so that neither the merged weight nor its steps are kept for the backward pass: only what the next
    step changes (A, B) and the merged weight itself. The weight is merged in float32 and takes the dtype of x after.
    """

    @staticmethod
    def forward(ctx, x, a, b, base, mask, scaling, grid):  # type: ignore[no-untyped-def,override]
        with torch.autocast(x.device.type, enabled=False):
            merged = merged_weight(a, b, base, mask, scaling, grid).to(x.dtype)
            ctx.save_for_backward(x, a, b, mask, merged)
            ctx.scaling = scaling
            return x @ merged.T

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, a, b, mask, merged = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ merged).reshape(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        if mask is not None:
            grad_weight *= mask
        grad_weight *= ctx.scaling
        return grad_x, b.T @ grad_weight, grad_weight @ a.T, None, None, None, None


def merged_weight(a: Tensor, b: Tensor, base: Tensor, mask: Tensor | None, scaling: float, grid: Grid | None) -> Tensor:
    """The merged weight float32 [out, in] of a layer at the rank of `a` and `b`, by the rules of `sparseport.merge`."""
    delta = (b @ a).mul_(scaling)
    if mask is not None:
        delta *= mask
    merged = delta.add_(base)
    return merged if grid is None else grid.snap(merged)


class ElasticLinear(nn.Module):
    """A frozen linear layer with a LoRA adapter; rank, rows and columns in use can change from step to step.

    The leading `active_rank` rows of A and columns of B take part; the scaling stays alpha / r_max (SQFT, section 3.3).
    The leading `active_rows` rows and `active_columns` columns of the weight, with their part of A and B, are the
    layer's width (LoNAS, section 3). No weight is copied for it.

    Without a mask the adapter is dense and stays a branch of its own (LoRA, Shears, SQFT); with one the weights are
    merged in the forward pass (SparsePEFT), and with a grid they are rounded to INT4 as well (QA-SparsePEFT).
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        mask: Mask | None = None,
        quantized: QuantizedWeight | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if quantized is not None and mask is None:
            raise BadInput("QA-SparsePEFT needs a mask", fix="train on a sparse base")
        self.base = base.requires_grad_(False)
        self.rank = self.active_rank = rank
        self.active_rows, self.active_columns = base.out_features, base.in_features
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        # Buffers, so that they go where the layer goes; not in state_dict, which holds what was trained.
        self.register_buffer("mask", None if mask is None else torch.from_numpy(mask), False)
        grid = None if quantized is None else Grid.of(quantized)
        self.group_size = None if grid is None else grid.group_size
        for name in ("scales", "zero_points", "offsets"):
            self.register_buffer(name, None if grid is None else getattr(grid, name), False)
        generator = torch.Generator().manual_seed(seed)
        # Kaiming uniform with a = sqrt(5) for A and zeros for B, as PEFT starts LoRA.
        bound = base.in_features**-0.5
        self.a = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the whole layer."""
        return self.base.out_features, self.base.in_features

    @property
    def grid(self) -> Grid | None:
        """The INT4 grid of the whole layer, or None."""
        if self.group_size is None:
            return None
        return Grid(self.scales, self.zero_points, self.offsets, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., active_columns] -> [..., active_rows] with the active sub-adapter."""
        a, b = self._adapter()
        weight, bias = _cut(self.base, self.active_rows, self.active_columns)
        if self.mask is None:
            low = functional.linear(functional.linear(self.dropout(x), a), b)
            return functional.linear(x, weight, bias) + low * self.scaling
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _MergedLinear.apply(self.dropout(x), a, b, weight, self._mask(), self.scaling, self._grid())
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def codes(self) -> Tensor | None:
        """The INT4 codes that the training forward uses now, uint8 [active_rows, active_columns]; None if no grid."""
        grid = self._grid()
        if grid is None:
            return None
        weight, _ = _cut(self.base, self.active_rows, self.active_columns)
        merged = merged_weight(*self._adapter(), weight, self._mask(), self.scaling, None)
        return grid.codes(merged).reshape(merged.shape).to(torch.uint8)

    def branch(self, gathered: Callable[[Tensor], Tensor] = Tensor.detach) -> LowRankBranch:
        """The whole trained adapter, at full rank and width; `gathered` brings a parameter's parts together."""
        a, b = (gathered(parameter).cpu().numpy().copy() for parameter in (self.a, self.b))
        return LowRankBranch(a, b, self.scaling)

    def _adapter(self) -> tuple[Tensor, Tensor]:
        return self.a[: self.active_rank, : self.active_columns], self.b[: self.active_rows, : self.active_rank]

    def _mask(self) -> Tensor | None:
        return None if self.mask is None else self.mask[: self.active_rows, : self.active_columns]

    def _grid(self) -> Grid | None:
        grid = self.grid
        if grid is None or (self.active_rows, self.active_columns) == self.shape:
            return grid
        return grid.cut(self.active_rows, self.active_columns)


class ElasticWidthLinear(nn.Linear):
    """A frozen linear layer without an adapter whose leading rows and columns can be taken alone."""

    def __init__(self, base: nn.Linear) -> None:
        # The weight comes from `base`: nothing is allocated here.
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.active_rows, self.active_columns = base.out_features, base.in_features

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the whole layer."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., active_columns] -> [..., active_rows]."""
        return functional.linear(x, *_cut(self, self.active_rows, self.active_columns))


def _cut(linear: nn.Linear, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Views of the leading part of a layer's weight and bias."""
    return linear.weight[:rows, :columns], None if linear.bias is None else linear.bias[:rows]


def elastic_layers(model: nn.Module) -> Iterator[tuple[str, ElasticLinear]]:
    """All layers with an adapter, with their module names in the base model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ElasticLinear))


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear layer inside the decoder layers, with an adapter or without, by module name."""
    adapted = {name: layer.shape for name, layer in elastic_layers(model)}
    shapes = {}
    for name, linear in decoder_linears(model):
        outer = name.removesuffix(".base")  # an adapter's own layer is known by the adapter's name
        shapes[outer if outer in adapted else name] = (linear.out_features, linear.in_features)
    return shapes
