"""Merging into floating-point weights: `lora` for a dense base, `sparse_peft` for a sparse one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparseport.errors import BadInput, FidelityError
from sparseport.merge.delta import scaled_delta
from sparseport.weights.linear import F32, Array, DenseWeight, LowRankBranch
from sparseport.weights.mask import mask_of


def merge_lora(base: DenseWeight, branch: LowRankBranch, where: str) -> DenseWeight:
    """W + scaling * B A, in float32, rounded once to the base's dtype (LoRA, arXiv 2106.09685).

    Raises:
        FidelityError: the base is sparse: a dense merge would fill its pruned weights.
        BadInput: shapes disagree, NaN / Inf, or the sum overflows the base's dtype.
    """
    if base.mask is not None and not base.mask.all():
        raise FidelityError(
            "a dense LoRA merge would fill the pruned weights of a sparse base",
            where=where,
            found=f"{int((~base.mask).sum())} pruned weights",
            fix="train with sparse_adapter (SparsePEFT) and merge with rule sparse_peft, or give --branches graph",
            code="E_RULE",
        )
    return replace(base, values=_add(base.values, scaled_delta_for(base.shape, branch, where), where))


def merge_sparse_peft(base: DenseWeight, branch: LowRankBranch, where: str) -> DenseWeight:
    """W + scaling * (B A) * M, in float32, rounded once to the base's dtype (SQFT, SparsePEFT, eq. 1-2).

    M is where the base is not zero, as in training (W != 0). A mask that was stored with the weights may also keep a
    weight that is exactly zero; that one gets no update either. Pruned weights stay exactly +0.

    Raises:
        BadInput: the base has no mask, shapes disagree, NaN / Inf, or the sum overflows the base's dtype.
    """
    if base.mask is None:
        raise BadInput("SparsePEFT needs the mask of a sparse base", where=where, fix="give --sparse-base DIR")
    # Selecting instead of multiplying by the mask keeps pruned weights +0 even where the delta is negative.
    trained = base.mask & mask_of(base.values)
    delta = np.where(trained, scaled_delta_for(base.shape, branch, where), np.float32(0))
    merged = _add(base.values, delta, where)
    return replace(base, values=np.where(base.mask, merged, np.zeros((), merged.dtype)))


def scaled_delta_for(shape: tuple[int, int], branch: LowRankBranch, where: str) -> F32:
    """`scaled_delta`, after checking that the adapter fits a weight of `shape`.

    Raises:
        BadInput: the adapter belongs to a layer of another shape, so to another base.
    """
    fits = (branch.b.shape[0], branch.a.shape[1])
    if fits != shape:
        raise BadInput(
            "adapter does not fit its base",
            where=where,
            expected=shape,
            found=fits,
            fix="use the base model that the adapter was trained on",
            code="E_PAIRING",
        )
    return scaled_delta(branch, where)


def _add(values: Array, delta: F32, where: str) -> Array:
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        raise BadInput("base weight holds NaN or Inf", where=where, code="E_NAN")
    with np.errstate(over="ignore"):
        merged = (wide + delta).astype(values.dtype)
    if not np.isfinite(merged.astype(np.float32)).all():
        raise BadInput(
            f"merged weight overflows {values.dtype}",
            where=where,
            code="E_OVERFLOW",
            fix="store the base in float32 or bfloat16",
        )
    return merged
