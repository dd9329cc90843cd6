"""Apply the planned rule to one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparseport.errors import BadInput, FidelityError
from sparseport.merge.dense import merge_lora, merge_sparse_peft
from sparseport.merge.qa_sparse_peft import merge_qa_sparse_peft
from sparseport.weights.linear import DenseWeight, LowRankBranch, Mask, QuantizedWeight
from sparseport.weights.mask import revived
from sparseport.weights.rounding import RoundingRule


@dataclass(frozen=True)
class Merged:
    """A merged layer.

    weight       what leaves, with its mask
    revived      pruned weights of the mask that are not zero in it (0 unless the policy is keep-codes)
    re_pruned    weights that the policy `reapply` set back to zero
    before       the weight before that, if there were some
    branch       the adapter, where it stays un-merged beside the weight
    """

    weight: QuantizedWeight | DenseWeight
    revived: int = 0
    re_pruned: int = 0
    before: QuantizedWeight | DenseWeight | None = None
    branch: LowRankBranch | None = None


def merge_layer(
    rule: str,
    base: QuantizedWeight | DenseWeight,
    branch: LowRankBranch | None,
    sparse: DenseWeight | None,
    where: str,
    *,
    rounding: RoundingRule = RoundingRule.SQFT,
    mask_policy: str = "strict",
) -> Merged:
    """Return the layer that leaves.

    Args:
        rule: carry, branch (a base that is carried beside its un-merged adapter), lora, sparse_peft or qa_sparse_peft.
        base: the base's weight.
        branch: the adapter, for every rule but `carry`; `branch` keeps it as it is.
        sparse: the sparse floating-point base, for `qa_sparse_peft`; its mask also judges a carried INT4 layer.
        where: module name, for messages.
        rounding: how QA-SparsePEFT rounds.
        mask_policy: for an input that breaks its own mask (GPTQ revives pruned weights): `strict` refuses,
            `keep-codes` carries the codes as trained and counts them, `reapply` prunes them again.

    Raises:
        BadInput: the inputs do not fit each other.
        FidelityError: the result would break the mask.
    """
    if isinstance(base, DenseWeight):
        _check_finite(base, where)
    if isinstance(base, DenseWeight) and sparse is not None:
        _check_same_values(base, sparse, where)
    if rule in ("carry", "branch"):
        held = hold_mask(base, sparse.mask if sparse is not None else base.mask, where, mask_policy)
        return replace(held, branch=branch)
    assert branch is not None
    if rule == "qa_sparse_peft":
        assert isinstance(base, QuantizedWeight) and sparse is not None
        return Merged(merge_qa_sparse_peft(sparse, base, branch, where, rounding))
    assert isinstance(base, DenseWeight)
    if rule == "lora":
        return Merged(merge_lora(base, branch, where))
    if rule == "sparse_peft":
        # The base itself first: a mask that was given apart may find weights that it prunes.
        pruned = hold_mask(base, base.mask, where, mask_policy)
        assert isinstance(pruned.weight, DenseWeight)
        merged = merge_sparse_peft(pruned.weight, branch, where)
        count = pruned.re_pruned or pruned.revived
        return Merged(merged, re_pruned=count, before=base if count else None)
    raise ValueError(f"no such merge rule: {rule}")


def _check_finite(base: DenseWeight, where: str) -> None:
    bad = ~np.isfinite(base.values.astype(np.float32))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise BadInput(
            "base weight holds NaN or Inf",
            where=f"{where}, row {row}, column {column}",
            found=f"{int(bad.sum())} values",
            fix="download or train the base again",
            code="E_NAN",
        )


def _check_same_values(base: DenseWeight, sparse: DenseWeight, where: str) -> None:
    """A sparse base beside a floating-point base must be the same model: equal wherever it keeps a weight."""
    assert sparse.mask is not None
    if base.shape != sparse.shape or not np.array_equal(base.values[sparse.mask], sparse.values[sparse.mask]):
        raise BadInput(
            "base and sparse base hold other values where both keep a weight",
            where=where,
            fix="give the sparse base alone as --base, or the one that was pruned from this base",
            code="E_PAIRING",
        )


def hold_mask(base: QuantizedWeight | DenseWeight, mask: Mask | None, where: str, mask_policy: str) -> Merged:
    """A weight with its mask, after judging pruned weights that are not zero in it; see `merge_layer` for the policies.

    Raises:
        FidelityError: the policy is `strict`, and there are some.
    """
    if mask is None:
        return Merged(base)
    count = revived(base, mask)
    masked = replace(base, mask=mask)
    if count == 0:
        return Merged(masked)
    if mask_policy == "keep-codes":
        return Merged(masked, revived=count)
    if mask_policy == "reapply":
        return Merged(prune_again(masked, mask), re_pruned=count, before=masked)
    raise FidelityError(
        "this layer revives weights that the sparse base prunes",
        where=where,
        found=f"{count} weights",
        fix="`--mask-policy keep-codes` exports what was trained and records them, `--mask-policy reapply` prunes them",
        code="E_MASK",
    )


def prune_again(weight: QuantizedWeight | DenseWeight, mask: Mask) -> QuantizedWeight | DenseWeight:
    """The weight with every pruned entry exactly zero (code == zero_point); `mask` in the model's column order."""
    if isinstance(weight, DenseWeight):
        return replace(weight, values=np.where(mask, weight.values, np.zeros((), weight.values.dtype)), mask=mask)
    stored = mask if weight.input_order is None else mask[:, weight.input_order]
    zero_codes = np.repeat(weight.zero_points, weight.group_size, axis=1)
    return replace(weight, codes=np.where(stored, weight.codes, zero_codes), mask=mask)
