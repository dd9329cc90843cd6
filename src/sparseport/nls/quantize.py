"""INT4 quantisation of a sparse base that keeps every pruned weight at zero: round-to-nearest and masked GPTQ.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) moves the error of a quantised column to the columns after it, pruned
entries included, so a plain run revives a part of them. Here the mask is held: the feedback never reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseport.errors import BadInput, FidelityError, UsageError
from sparseport.nls.calibration import evaluating, observe_inputs, propagate, trace_layers
from sparseport.nls.linears import decoder_layers, layer_linears
from sparseport.nls.wanda import Progress
from sparseport.weights.linear import F32, Array, Mask, QuantizedWeight
from sparseport.weights.mask import revived
from sparseport.weights.rounding import RoundingRule, choose_qparams_minmax, dequantize, quantize_to_grid

if TYPE_CHECKING:
    from torch import Tensor, nn

METHODS = ("rtn", "gptq")


class HessianSum:
    """The Hessian of a linear layer's squared output error: 2 / n * X^T X over n calibration tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take the inputs of a linear layer, [..., in]."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        product = rows.T @ rows
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.tokens += rows.shape[0]

    def value(self, where: str = "layer") -> F32:
        """The Hessian, float32 [in, in].

        Raises:
            BadInput: no token was added.
        """
        if self._sum is None or self.tokens == 0:
            raise BadInput(
                "no calibration token reached this layer",
                where=where,
                fix="give more calibration text",
                code="E_CALIBRATION",
            )
        result: F32 = (self._sum * (2.0 / self.tokens)).cpu().numpy()
        return result


def quantize_rtn(
    values: Array,
    mask: Mask | None,
    *,
    group_size: int,
    symmetric: bool = False,
    scale_dtype: type = np.float16,
    where: str = "weight",
) -> QuantizedWeight:
    """Round to the nearest point of each group's min/max grid.

    The grid always holds 0, so a pruned entry gets code == zero_point.

    Args:
        values: [out, in], any float dtype.
        mask: bool [out, in], True = kept; None for a dense weight. Pruned entries count as 0 whatever they hold.
        group_size: columns per group; -1 for one group per output row.
        symmetric: all zero-points 8; otherwise chosen per group.
        scale_dtype: dtype of the scales.
        where: name for error messages.

    Raises:
        BadInput: shapes or group size do not fit, or a value or scale is not finite.
    """
    weight, kept, group = _prepare(values, mask, group_size, where)
    scales, zero_points = choose_qparams_minmax(weight, group, symmetric, scale_dtype)
    codes = quantize_to_grid(weight, scales, zero_points, group, RoundingRule.PAPER)
    return _finish(QuantizedWeight(codes, scales, zero_points, group, mask=mask), kept, where)


def quantize_gptq(
    values: Array,
    mask: Mask | None,
    hessian: F32,
    *,
    group_size: int,
    symmetric: bool = False,
    damp: float = 0.01,
    block: int = 128,
    scale_dtype: type = np.float16,
    where: str = "weight",
) -> QuantizedWeight:
    """GPTQ with the mask held; columns in natural order (no act-order).

    Column j is rounded to q_j; e = (w_j - q_j) / U_jj goes to the later columns as -e * U_jk, times the mask, where
    H^-1 = U^T U. A group's grid is chosen when its first column is reached, from the weights as updated by then.
    A column that calibration never used has no feedback and is rounded to nearest.

    Args:
        values: [out, in], any float dtype.
        mask: bool [out, in], True = kept; None for a dense weight. Pruned entries count as 0 whatever they hold.
        hessian: float32 [in, in], see `HessianSum`; not changed.
        group_size: columns per group; -1 for one group per output row.
        symmetric: all zero-points 8; otherwise chosen per group.
        damp: added to the diagonal, as a fraction of its mean.
        block: most columns whose feedback to the rest is gathered into one matrix product.
        scale_dtype: dtype of the scales.
        where: name for error messages.

    Raises:
        BadInput: shapes or group size do not fit, a value is not finite, or the Hessian is not positive definite.
    """
    weight, kept, group = _prepare(values, mask, group_size, where)
    columns = weight.shape[1]
    factor = _inverse_factor(hessian, columns, damp, where)
    # Transposed, so that a column of the weight lies together in memory.
    work, held = np.ascontiguousarray(weight.T), np.ascontiguousarray(kept.T)
    codes = np.empty(work.shape, np.uint8)
    grids = []
    for start in range(0, columns, group):
        stop = start + group
        # Feedback that reached a pruned entry is dropped here and again where the column is read, before any use.
        work[start:stop] *= held[start:stop]
        scales, zero_points = choose_qparams_minmax(work[start:stop].T, group, symmetric, scale_dtype)
        grids.append((scales, zero_points))
        # Blocks never cross a group, so that a group is chosen from weights that have all their feedback.
        for first in range(start, stop, block):
            last = min(first + block, stop)
            errors = np.empty((last - first, work.shape[1]), np.float32)
            for j in range(first, last):
                column = (work[j] * held[j])[:, None]
                code = quantize_to_grid(column, scales, zero_points, 1, RoundingRule.PAPER)
                real = dequantize(QuantizedWeight(code, scales, zero_points, 1))
                error = ((column - real) / factor[j, j])[:, 0]
                work[j + 1 : last] -= np.outer(factor[j, j + 1 : last], error)
                codes[j], errors[j - first] = code[:, 0], error
            if last < columns:
                work[last:] -= factor[first:last, last:].T @ errors
    all_scales = np.concatenate([scales for scales, _ in grids], axis=1)
    all_zero_points = np.concatenate([zero_points for _, zero_points in grids], axis=1)
    result = QuantizedWeight(np.ascontiguousarray(codes.T), all_scales, all_zero_points, group, mask=mask)
    return _finish(result, kept, where)


def quantize_model(
    model: nn.Module,
    masks: Mapping[str, Mask] | None,
    method: str = "rtn",
    batches: Sequence[Tensor] | None = None,
    *,
    group_size: int = 64,
    symmetric: bool = False,
    damp: float = 0.01,
    scale_dtype: type = np.float16,
    on_progress: Progress | None = None,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantise every linear layer inside the decoder layers, one decoder layer at a time.

    With GPTQ the layers after a quantised one are measured on its dequantised outputs. The model's own weights are as
    before whenever the caller has control.

    Args:
        model: a causal language model of transformers, pruned already.
        masks: bool [out, in] by module name, one for every linear layer; None for a dense model.
        method: "rtn" or "gptq".
        batches: token ids int64 [batch, tokens]; needed by "gptq", not read by "rtn".
        group_size: columns per group; -1 for one group per output row.
        symmetric: all zero-points 8; otherwise chosen per group.
        damp: see `quantize_gptq`.
        scale_dtype: dtype of the scales.
        on_progress: called after every linear layer as (module name, done, total).

    Yields:
        Module name and quantised weight.

    Raises:
        UsageError: unknown method, or "gptq" without batches.
        BadInput: a mask is missing or does not belong to this model, or see `quantize_gptq`.
    """
    if method not in METHODS:
        raise UsageError("unknown quantisation method", expected=" | ".join(METHODS), found=method)
    if method == "gptq" and not batches:
        raise UsageError("gptq needs calibration batches", fix="give calibration text, or use method rtn")
    options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    calibration = batches if method == "gptq" else None
    return _quantize_layers(model, masks, calibration, damp, options, on_progress)


def _quantize_layers(
    model: nn.Module,
    masks: Mapping[str, Mask] | None,
    batches: Sequence[Tensor] | None,
    damp: float,
    options: Mapping[str, Any],
    on_progress: Progress | None,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """GPTQ when there are batches, round-to-nearest otherwise."""
    prefix, layers = decoder_layers(model)
    linears = [layer_linears(layer, f"{prefix}.{index}") for index, layer in enumerate(layers)]
    total = sum(len(group) for group in linears)
    done = 0
    with evaluating(model):
        trace = trace_layers(model, batches) if batches else None
        hidden = trace.hidden if trace else []
        for index, layer in enumerate(layers):
            hessians = {name: HessianSum() for name in linears[index]}
            if trace:
                observe_inputs(layer, linears[index], hessians, hidden, trace.calls[index])
            results: dict[str, QuantizedWeight] = {}
            for name, linear in linears[index].items():
                values = linear.weight.detach().float().cpu().numpy()
                mask = _mask_for(name, values, masks)
                if trace:
                    hessian = hessians.pop(name).value(name)
                    results[name] = quantize_gptq(values, mask, hessian, damp=damp, where=name, **options)
                else:
                    results[name] = quantize_rtn(values, mask, where=name, **options)
                done += 1
                if on_progress:
                    on_progress(name, done, total)
            if trace and index + 1 < len(layers):
                hidden = _propagate_quantized(layer, linears[index], results, hidden, trace.calls[index])
            yield from results.items()


def _propagate_quantized(
    layer: nn.Module,
    linears: Mapping[str, nn.Linear],
    results: Mapping[str, QuantizedWeight],
    hidden: Sequence[Tensor],
    calls: Sequence[Any],
) -> list[Tensor]:
    """Run the layer with dequantised weights in place of its own, which come back afterwards."""
    import torch

    own = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.weight.data = torch.from_numpy(dequantize(results[name])).to(own[name])
        return propagate(layer, hidden, calls)
    finally:
        for name, linear in linears.items():
            linear.weight.data = own[name]


def _mask_for(name: str, values: F32, masks: Mapping[str, Mask] | None) -> Mask | None:
    if masks is None:
        return None
    if name not in masks:
        raise BadInput(
            "no mask for this layer",
            where=name,
            expected="one mask per linear layer",
            fix="take the masks from the run that pruned this model",
            code="E_MASK",
        )
    mask = masks[name]
    alive = int(np.count_nonzero(values[~mask])) if mask.shape == values.shape else 0
    if alive:
        raise BadInput(
            f"{alive} weights are not zero where the mask says pruned",
            where=name,
            fix="take the masks from the run that pruned this model",
            code="E_MASK",
        )
    return mask


def _prepare(values: Array, mask: Mask | None, group_size: int, where: str) -> tuple[F32, Mask, int]:
    """A float32 copy with pruned entries at 0, the mask (all True when None), and the group size in columns."""
    columns = values.shape[1]
    group = columns if group_size == -1 else group_size
    if group < 1 or columns % group:
        raise BadInput(
            "group size does not divide the input features",
            where=where,
            expected=f"-1 or a divisor of {columns}",
            found=group_size,
            code="E_GROUP",
        )
    kept = np.ones(values.shape, bool) if mask is None else mask
    if kept.shape != values.shape:
        raise BadInput("mask has the wrong shape", where=where, expected=values.shape, found=kept.shape, code="E_MASK")
    weight = np.where(kept, values, 0).astype(np.float32)
    if not np.isfinite(weight).all():
        raise BadInput(
            "weights to quantise hold NaN or Inf", where=where, found=int((~np.isfinite(weight)).sum()), code="E_NAN"
        )
    return weight, kept, group


def _finish(weight: QuantizedWeight, kept: Mask, where: str) -> QuantizedWeight:
    weight.check(where)
    alive = revived(weight, kept)
    if alive:
        raise FidelityError(f"{alive} pruned weights would not be zero", where=where, expected="code == zero_point")
    return weight


def _inverse_factor(hessian: F32, columns: int, damp: float, where: str) -> F32:
    """Upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1.

    With J the reversal of rows and columns and J H J = L L^T, H = (J L J)(J L J)^T, so U is the inverse of the upper
    triangular J L J: one factorisation, and the inverse of H is never formed.
    """
    if hessian.shape != (columns, columns):
        raise BadInput(
            "the Hessian does not fit the weight", where=where, expected=(columns, columns), found=hessian.shape
        )
    damped = hessian.astype(np.float32)
    if not np.isfinite(damped).all():
        raise BadInput(
            "calibration inputs hold NaN or Inf",
            where=where,
            fix="run the calibration in float32 or bfloat16",
            code="E_NAN",
        )
    diagonal = np.diag(damped).copy()
    dead = diagonal <= 0
    typical = float(diagonal[~dead].mean()) if (~dead).any() else 1.0
    diagonal[dead] = typical
    np.fill_diagonal(damped, diagonal + np.float32(damp * typical))
    try:
        lower = np.linalg.cholesky(damped[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise BadInput(
            "the Hessian of this layer is not positive definite",
            where=where,
            found=f"damp {damp}",
            fix="raise damp, give more calibration text, or use method rtn",
            code="E_CALIBRATION",
        ) from error
    upper = lower[::-1, ::-1]
    factor: F32 = np.triu(np.linalg.inv(upper)).astype(np.float32)
    return factor
