"""One layer through the planned rule, and the three policies for a base that breaks its own mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparseport.errors import FidelityError
from sparseport.merge.dense import merge_lora, merge_sparse_peft
from sparseport.merge.layer import merge_layer, prune_again
from sparseport.merge.qa_sparse_peft import merge_qa_sparse_peft
from sparseport.nls.quantize import quantize_rtn
from sparseport.weights.linear import DenseWeight, LowRankBranch
from sparseport.weights.mask import mask_of, revived
from sparseport.weights.rounding import RoundingRule, dequantize

RANDOM = np.random.default_rng(0)
VALUES = (RANDOM.normal(size=(8, 32)) * (RANDOM.random((8, 32)) < 0.5)).astype(np.float16)
SPARSE = DenseWeight(VALUES, mask_of(VALUES))
A, B = (RANDOM.integers(-8, 9, shape) / 8 for shape in ((2, 32), (8, 2)))
BRANCH = LowRankBranch(A.astype(np.float32), B.astype(np.float32), 0.5)


@pytest.fixture
def int4():
    return replace(quantize_rtn(VALUES, SPARSE.mask, group_size=16), mask=None)


@pytest.fixture(params=["natural", "act-order"])
def damaged(request, int4):
    """An INT4 base in which three pruned weights came back, as GPTQ does; and the same with act-order."""
    codes = int4.codes.copy()
    for row, column in np.argwhere(~SPARSE.mask)[[0, 10, 50]]:
        codes[row, column] = (codes[row, column] + 1) % 16
    weight = replace(int4, codes=codes)
    if request.param == "natural":
        return weight
    order = RANDOM.permutation(32).astype(np.int32)
    # One group per row, so that permuted columns keep their grid.
    grid = quantize_rtn(VALUES, SPARSE.mask, group_size=32)
    codes = grid.codes.copy()
    for row, column in np.argwhere(~SPARSE.mask)[[0, 10, 50]]:
        codes[row, column] = (codes[row, column] + 1) % 16
    return replace(grid, codes=codes[:, order], input_order=order, mask=None)


def test_carry_without_a_mask_changes_nothing(int4):
    merged = merge_layer("carry", int4, None, None, "layer")
    assert merged.weight is int4 and (merged.revived, merged.re_pruned) == (0, 0)


def test_carry_takes_the_mask_of_the_sparse_base(int4):
    merged = merge_layer("carry", int4, None, SPARSE, "layer")
    assert merged.weight.mask is SPARSE.mask and np.array_equal(merged.weight.codes, int4.codes)
    dense = merge_layer("carry", DenseWeight(VALUES, SPARSE.mask), None, None, "layer")
    assert dense.weight.values is VALUES and dense.revived == 0


def test_strict_refuses_a_base_that_breaks_its_mask(damaged):
    with pytest.raises(FidelityError, match="3 weights") as caught:
        merge_layer("carry", damaged, None, SPARSE, "layer 5")
    assert caught.value.code == "E_MASK" and "layer 5" in str(caught.value)
    assert "keep-codes" in caught.value.fix and "reapply" in caught.value.fix


def test_keep_codes_carries_and_counts(damaged):
    merged = merge_layer("carry", damaged, None, SPARSE, "layer", mask_policy="keep-codes")
    assert (merged.revived, merged.re_pruned) == (3, 0)
    assert np.array_equal(merged.weight.codes, damaged.codes) and merged.weight.mask is SPARSE.mask


def test_reapply_prunes_and_counts(damaged):
    merged = merge_layer("carry", damaged, None, SPARSE, "layer", mask_policy="reapply")
    assert (merged.revived, merged.re_pruned) == (0, 3)
    assert revived(merged.weight, SPARSE.mask) == 0
    before, after = dequantize(damaged), dequantize(merged.weight)
    assert np.array_equal(before[SPARSE.mask], after[SPARSE.mask])
    assert not after[~SPARSE.mask].any() and (before != after).sum() == 3


@pytest.mark.parametrize(("policy", "counts"), [("keep-codes", (2, 0)), ("reapply", (0, 2))])
def test_policies_hold_for_floating_point_bases(policy, counts):
    values = VALUES.copy()
    for row, column in np.argwhere(~SPARSE.mask)[[1, 9]]:
        values[row, column] = -1
    base = DenseWeight(values, SPARSE.mask)
    with pytest.raises(FidelityError, match="2 weights"):
        merge_layer("carry", base, None, None, "layer")
    merged = merge_layer("carry", base, None, None, "layer", mask_policy=policy)
    assert (merged.revived, merged.re_pruned) == counts
    assert np.array_equal(merged.weight.values, values if policy == "keep-codes" else VALUES)


def test_pruning_again_leaves_plus_zero():
    pruned = prune_again(DenseWeight(np.full((1, 2), -1, np.float16)), np.array([[True, False]]))
    assert pruned.values.view(np.uint16).tolist() == [[0xBC00, 0]]
    assert pruned.mask.tolist() == [[True, False]]


def test_each_rule_is_the_one_it_names(int4):
    lora = merge_layer("lora", DenseWeight(VALUES), BRANCH, None, "layer").weight
    assert np.array_equal(lora.values, merge_lora(DenseWeight(VALUES), BRANCH, "layer").values)
    sparse = merge_layer("sparse_peft", SPARSE, BRANCH, None, "layer").weight
    assert np.array_equal(sparse.values, merge_sparse_peft(SPARSE, BRANCH, "layer").values)
    assert not np.array_equal(lora.values, sparse.values)
    for rule in RoundingRule:
        merged = merge_layer("qa_sparse_peft", int4, BRANCH, SPARSE, "layer", rounding=rule)
        assert np.array_equal(merged.weight.codes, merge_qa_sparse_peft(SPARSE, int4, BRANCH, "layer", rule).codes)
        assert (merged.revived, merged.re_pruned) == (0, 0)


def test_an_unknown_rule_is_a_defect():
    with pytest.raises(ValueError, match="no such merge rule"):
        merge_layer("magic", SPARSE, BRANCH, None, "layer")
