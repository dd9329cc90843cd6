"""Linear layers with an elastic low-rank adapter: the training forward of LoRA, SparsePEFT and QA-SparsePEFT.

The formulas are those of `sparseport.merge`, in torch float32; a property test holds the two together. They cannot be
equal to the last bit (a float32 matrix product depends on the BLAS build, the merge does not), so codes that land on a
rounding edge may differ: they are counted after training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparseport.errors import BadInput
from sparseport.weights.linear import LowRankBranch, Mask, QuantizedWeight

METHODS = ("lora", "sparse_peft", "qa_sparse_peft")


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
    step changes (A, B) and the merged weight itself.
    """

    @staticmethod
    def forward(ctx, x, a, b, base, mask, scaling, grid):  # type: ignore[no-untyped-def,override]
        merged = merged_weight(a, b, base, mask, scaling, grid)
        ctx.save_for_backward(x, a, b, mask, merged)
        ctx.scaling = scaling
        return x @ merged.T

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, a, b, mask, merged = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = (rows @ merged).reshape(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1])
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
    """A frozen linear layer with a LoRA adapter whose active rank can change from step to step.

    The leading `active_rank` rows of A and columns of B take part; the scaling stays alpha / r_max (SQFT, section 3.3).
    Without a mask the adapter is dense and stays a branch of its own (LoRA, Shears); with one the weights are merged in
    the forward pass (SparsePEFT), and with a grid they are rounded to INT4 as well (QA-SparsePEFT).
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
        self.rank = rank
        self.active_rank = rank
        self.scaling = alpha / rank
        self.grid = None if quantized is None else Grid.of(quantized)
        self.register_buffer("mask", None if mask is None else torch.from_numpy(mask).to(base.weight.dtype), False)
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(seed)
        # Kaiming uniform with a = sqrt(5) for A and zeros for B, as PEFT starts LoRA.
        bound = base.in_features**-0.5
        self.a = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., in] -> [..., out] with the active sub-adapter."""
        a, b = self.a[: self.active_rank], self.b[:, : self.active_rank]
        if self.mask is None:
            return self.base(x) + (self.dropout(x) @ a.T @ b.T) * self.scaling
        y = _MergedLinear.apply(self.dropout(x), a, b, self.base.weight, self.mask, self.scaling, self.grid)
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()
    def codes(self) -> Tensor | None:
        """The INT4 codes that the training forward uses now, uint8 [out, in]; None without a grid."""
        if self.grid is None:
            return None
        a, b = self.a[: self.active_rank], self.b[:, : self.active_rank]
        merged = merged_weight(a, b, self.base.weight, self.mask, self.scaling, None)
        return self.grid.codes(merged).reshape(merged.shape).to(torch.uint8)

    def branch(self) -> LowRankBranch:
        """The whole trained adapter, at full rank."""
        return LowRankBranch(self.a.detach().cpu().numpy().copy(), self.b.detach().cpu().numpy().copy(), self.scaling)


def set_ranks(model: nn.Module, ranks: dict[str, int]) -> None:
    """Activate a sub-adapter: module name -> rank; layers that are not named get their full rank."""
    for name, module in elastic_layers(model):
        module.active_rank = ranks.get(name, module.rank)


def elastic_layers(model: nn.Module) -> Iterable[tuple[str, ElasticLinear]]:
    """All elastic layers with their module names in the base model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ElasticLinear))
