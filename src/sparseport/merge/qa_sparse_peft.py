"""Merging into INT4: QA-SparsePEFT. Scales and zero-points are the frozen ones; only codes change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparseport.errors import BadInput, FidelityError
from sparseport.merge.delta import row_blocks
from sparseport.merge.dense import scaled_delta_for
from sparseport.weights.linear import DenseWeight, LowRankBranch, QuantizedWeight
from sparseport.weights.mask import mask_of, revived
from sparseport.weights.rounding import RoundingRule, dequantize, quantize_to_grid

# GPTQ moves a weight by a fraction of a scale, seldom more; the limits below are far outside what it does and well
# inside what another model, or another sparsity of the same model, looks like.
_MEDIAN_DISTANCE_LIMIT = 1.0
_LARGE_AT_ZERO_LIMIT = 0.05
_PRUNED_OFF_ZERO_LIMIT = 0.08
_SAMPLE_ROWS = 64


def merge_qa_sparse_peft(
    sparse: DenseWeight,
    quantized: QuantizedWeight,
    branch: LowRankBranch,
    where: str,
    rule: RoundingRule = RoundingRule.SQFT,
) -> QuantizedWeight:
    """Quantise W + scaling * (B A) * M on the frozen grid of the quantised base (SQFT, QA-SparsePEFT, eq. 3).

    M is where the sparse base is not zero, as in training; SQFT applies it whatever `sparse_adapter` says.

    Args:
        sparse: the sparse floating-point base with its mask; the sum is taken in float32.
        quantized: the INT4 base; its scales, zero-points, group size and input order are kept untouched.
        branch: the adapter.
        where: module name, for messages.
        rule: `sqft` reproduces models that the reference code trained; `paper` is the formula as printed.

    Returns:
        A `QuantizedWeight` with new codes and the sparse base's mask; every pruned entry has code == zero_point.

    Raises:
        BadInput: shapes disagree, no mask, NaN / Inf, or the two bases are not of the same model.
        FidelityError: a pruned weight did not land on its zero-point.
    """
    if sparse.mask is None:
        raise BadInput("QA-SparsePEFT needs the mask of the sparse base", where=where, fix="give --sparse-base DIR")
    if sparse.shape != quantized.shape:
        raise BadInput(
            "sparse base and quantised base differ in shape",
            where=where,
            expected=quantized.shape,
            found=sparse.shape,
            code="E_PAIRING",
        )
    check_same_model(sparse, quantized, where)
    delta = scaled_delta_for(sparse.shape, branch, where)
    codes = np.empty(sparse.shape, np.uint8)
    for rows in row_blocks(sparse.shape):
        base = sparse.values[rows].astype(np.float32)
        if not np.isfinite(base).all():
            raise BadInput("sparse base holds NaN or Inf", where=where, code="E_NAN")
        merged = np.where(sparse.mask[rows] & mask_of(sparse.values[rows]), base + delta[rows], np.float32(0))
        stored = merged if quantized.input_order is None else merged[:, quantized.input_order]
        codes[rows] = quantize_to_grid(
            stored, quantized.scales[rows], quantized.zero_points[rows], quantized.group_size, rule, quantized.bits
        )
    result = replace(quantized, codes=codes, mask=sparse.mask)
    if count := revived(result, sparse.mask):
        raise FidelityError("pruned weights left their zero-point in the merge", where=where, found=count)
    return result


def check_same_model(sparse: DenseWeight, quantized: QuantizedWeight, where: str) -> None:
    """Refuse a sparse base that is not the one the INT4 base was made from.

    Three signs are read, on a sample of rows: kept weights lie close to their dequantised values; kept weights larger
    than a scale are not at zero in the INT4 base (else the given base is less sparse); pruned weights are mostly at
    zero there (else it is sparser).

    Raises:
        BadInput: one of the three does not hold.
    """
    assert sparse.mask is not None
    sample = slice(None, None, max(1, sparse.shape[0] // _SAMPLE_ROWS))
    part = replace(
        quantized,
        codes=quantized.codes[sample],
        scales=quantized.scales[sample],
        zero_points=quantized.zero_points[sample],
    )
    kept = sparse.mask[sample]
    steps = dequantize(replace(part, scales=np.ones_like(part.scales)))
    scales = dequantize(replace(part, codes=np.ones_like(part.codes), zero_points=np.zeros_like(part.zero_points)))
    ratio = sparse.values[sample].astype(np.float32) / scales
    fix = "give the sparse base that was quantised"
    if kept.any():
        median = float(np.median(np.abs(ratio - steps)[kept]))
        if median > _MEDIAN_DISTANCE_LIMIT:
            raise BadInput(
                "the sparse base is not the model that the INT4 base was made from",
                where=where,
                fix=fix,
                expected=f"a median distance below {_MEDIAN_DISTANCE_LIMIT:g} scales",
                found=f"{median:.1f}",
                code="E_PAIRING",
            )
    large = kept & (np.abs(ratio) > 1)
    if large.any() and (share := float((steps[large] == 0).mean())) > _LARGE_AT_ZERO_LIMIT:
        raise BadInput(
            "the sparse base keeps weights that are zero in the INT4 base: it is less sparse",
            where=where,
            fix=fix,
            expected=f"at most {_LARGE_AT_ZERO_LIMIT:.0%}",
            found=f"{share:.0%} of the large ones",
            code="E_PAIRING",
        )
    if not kept.all() and (share := float((steps[~kept] != 0).mean())) > _PRUNED_OFF_ZERO_LIMIT:
        raise BadInput(
            "the sparse base prunes weights that the INT4 base keeps: it is sparser",
            where=where,
            fix=fix,
            expected=f"at most {_PRUNED_OFF_ZERO_LIMIT:.0%}",
            found=f"{share:.0%} of the pruned ones",
            code="E_PAIRING",
        )
