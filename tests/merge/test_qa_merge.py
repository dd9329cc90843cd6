"""`qa_sparse_peft` against scalar arithmetic, its promises, and the bases it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import BadInput, FidelityError
from sparseport.merge import delta
from sparseport.merge import qa_sparse_peft as module
from sparseport.merge.qa_sparse_peft import merge_qa_sparse_peft
from sparseport.nls.quantize import quantize_rtn
from sparseport.weights.linear import DenseWeight, LowRankBranch
from sparseport.weights.mask import mask_of, revived
from sparseport.weights.rounding import RoundingRule


def sparse_layer(seed, out=16, columns=64, share=0.5, dtype=np.float16):
    random = np.random.default_rng(seed)
    values = (random.normal(size=(out, columns)) * 0.1).astype(dtype)
    order = np.argsort(np.abs(values.astype(np.float32)), axis=1)
    np.put_along_axis(values, order[:, : int(columns * share)], 0, 1)
    return DenseWeight(values, mask_of(values))


def quantized(sparse, group=16, symmetric=False):
    return quantize_rtn(sparse.values, sparse.mask, group_size=group, symmetric=symmetric)


def adapter(seed, out=16, columns=64, rank=4):
    """Eighths, so that the product is exact and the oracle needs no care."""
    random = np.random.default_rng(seed)
    a = (random.integers(-8, 9, (rank, columns)) / 8).astype(np.float32)
    return LowRankBranch(a, (random.integers(-8, 9, (out, rank)) / 64).astype(np.float32), 0.5)


def by_hand(sparse, grid, branch, rule):
    """Codes one by one, float32 at each step; columns in the model's order."""
    product = branch.b.astype(np.float64) @ branch.a.astype(np.float64)
    codes = np.zeros(sparse.shape, np.uint8)
    for i in range(sparse.shape[0]):
        for j in range(sparse.shape[1]):
            scale, point = grid.scales[i, j // grid.group_size], grid.zero_points[i, j // grid.group_size]
            weight = np.float32(0)
            if sparse.mask[i, j]:
                weight = np.float32(sparse.values[i, j]) + np.float32(product[i, j]) * np.float32(branch.scaling)
            if rule is RoundingRule.SQFT:
                code = round(float((weight + np.float32(np.float16(point) * scale)) / np.float32(scale)))
            else:
                code = round(float(weight / np.float32(scale))) + int(point)
            codes[i, j] = min(max(code, 0), 15)
    return codes


@given(st.integers(0, 10**6), st.sampled_from(RoundingRule), st.booleans())
def test_codes_are_those_of_the_formula(seed, rule, symmetric):
    sparse = sparse_layer(seed, 3, 16)
    grid = quantized(sparse, 8, symmetric)
    branch = adapter(seed + 1, 3, 16)
    merged = merge_qa_sparse_peft(sparse, grid, branch, "layer", rule)
    assert np.array_equal(merged.codes, by_hand(sparse, grid, branch, rule))
    assert merged.scales is grid.scales and merged.zero_points is grid.zero_points
    assert merged.group_size == 8 and merged.mask is sparse.mask
    assert revived(merged, sparse.mask) == 0
    assert merged.check("layer") is merged


def test_the_adapter_changes_codes_but_never_pruned_ones():
    sparse = sparse_layer(0)
    grid = quantized(sparse)
    merged = merge_qa_sparse_peft(sparse, grid, adapter(1), "layer")
    changed = merged.codes != grid.codes
    assert changed[sparse.mask].mean() > 0.5
    assert not changed[~sparse.mask].any()
    zero = LowRankBranch(np.zeros((1, 64), np.float32), np.zeros((16, 1), np.float32), 1.0)
    untouched = merge_qa_sparse_peft(sparse, grid, zero, "layer", RoundingRule.PAPER)
    assert np.array_equal(untouched.codes, grid.codes)


def test_the_default_rule_is_sqft():
    sparse = DenseWeight(np.array([[0.5, 1.0]], np.float32), np.ones((1, 2), bool))
    grid = replace(
        quantized(sparse, 2),
        scales=np.ones((1, 1), np.float16),
        zero_points=np.ones((1, 1), np.uint8),
        codes=np.array([[1, 2]], np.uint8),
    )
    branch = LowRankBranch(np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32), 1.0)
    assert merge_qa_sparse_peft(sparse, grid, branch, "layer").codes.tolist() == [[2, 2]]
    assert merge_qa_sparse_peft(sparse, grid, branch, "layer", RoundingRule.PAPER).codes.tolist() == [[1, 2]]


def test_act_order_gives_the_same_weights_in_another_column_order():
    sparse = sparse_layer(3)
    order = np.random.default_rng(0).permutation(64).astype(np.int32)
    stored = DenseWeight(sparse.values[:, order], sparse.mask[:, order])
    grid = replace(quantized(stored), mask=None, input_order=order)
    branch = adapter(4)
    merged = merge_qa_sparse_peft(sparse, grid, branch, "layer")
    permuted = LowRankBranch(branch.a[:, order], branch.b, branch.scaling)
    assert np.array_equal(merged.codes, by_hand(stored, grid, permuted, RoundingRule.SQFT))
    assert merged.input_order is order and np.array_equal(merged.mask, sparse.mask)
    assert revived(merged, sparse.mask) == 0


def test_blocks_of_rows_do_not_change_a_code(monkeypatch):
    sparse = sparse_layer(5)
    grid, branch = quantized(sparse), adapter(6)
    whole = merge_qa_sparse_peft(sparse, grid, branch, "layer").codes
    monkeypatch.setattr(delta, "BLOCK_ELEMENTS", 130)
    assert np.array_equal(merge_qa_sparse_peft(sparse, grid, branch, "layer").codes, whole)


def test_a_code_that_leaves_its_zero_point_is_noticed(monkeypatch):
    def broken(values, *rest):
        return np.full(values.shape, 3, np.uint8)

    monkeypatch.setattr(module, "quantize_to_grid", broken)
    sparse = sparse_layer(0)
    with pytest.raises(FidelityError, match="left their zero-point"):
        merge_qa_sparse_peft(sparse, quantized(sparse), adapter(1), "layer")


def test_a_missing_mask_is_refused():
    sparse = sparse_layer(0)
    with pytest.raises(BadInput, match="--sparse-base"):
        merge_qa_sparse_peft(DenseWeight(sparse.values), quantized(sparse), adapter(1), "layer")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sparse_base_that_is_not_finite_is_refused(bad):
    sparse = sparse_layer(0)
    grid = quantized(sparse)
    values = sparse.values.copy()
    row, column = np.argwhere(sparse.mask)[7]
    values[row, column] = bad
    with pytest.raises(BadInput, match="NaN or Inf") as caught:
        merge_qa_sparse_peft(DenseWeight(values, sparse.mask), grid, adapter(1), "layer")
    assert caught.value.code == "E_NAN"


def test_an_adapter_that_is_not_finite_is_refused():
    sparse, branch = sparse_layer(0), adapter(1)
    branch.b[0, 0] = np.nan
    with pytest.raises(BadInput, match="adapter holds NaN"):
        merge_qa_sparse_peft(sparse, quantized(sparse), branch, "layer")


def test_a_sum_that_overflows_is_refused():
    sparse = sparse_layer(0)
    huge = LowRankBranch(np.full((1, 64), 1e30, np.float32), np.ones((16, 1), np.float32), 1e30)
    with pytest.raises(BadInput, match="NaN or Inf"):
        merge_qa_sparse_peft(sparse, quantized(sparse), huge, "layer")


def test_zero_points_whose_product_overflows_are_refused():
    values = np.full((1, 2), 60000, np.float32)
    sparse = DenseWeight(values, np.ones((1, 2), bool))
    grid = replace(
        quantized(sparse, 2),
        scales=np.full((1, 1), 60000, np.float16),
        zero_points=np.full((1, 1), 2, np.uint8),
        codes=np.full((1, 2), 3, np.uint8),
    )
    branch = LowRankBranch(np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32), 1.0)
    with pytest.raises(BadInput, match="zero_point \\* scale overflows"):
        merge_qa_sparse_peft(sparse, grid, branch, "layer")


@pytest.mark.parametrize("other", [(16, 32), (8, 64)])
def test_bases_of_different_shapes_are_refused(other):
    sparse = sparse_layer(0)
    with pytest.raises(BadInput, match="differ in shape") as caught:
        merge_qa_sparse_peft(sparse_layer(0, *other), quantized(sparse), adapter(1), "layer")
    assert caught.value.code == "E_PAIRING"


def test_an_adapter_of_another_shape_is_refused():
    sparse = sparse_layer(0)
    with pytest.raises(BadInput, match="does not fit its base") as caught:
        merge_qa_sparse_peft(sparse, quantized(sparse), adapter(1, columns=32), "layer")
    assert caught.value.code == "E_PAIRING"


def refusal(sparse, grid):
    with pytest.raises(BadInput) as caught:
        merge_qa_sparse_peft(sparse, grid, adapter(1, *sparse.shape), "layer 3")
    assert caught.value.code == "E_PAIRING" and caught.value.exit_code == 3
    assert "layer 3" in str(caught.value) and "sparse base that was quantised" in str(caught.value)
    return caught.value.what


def test_the_unpruned_base_is_refused():
    dense = sparse_layer(0, 64, 256, share=0.0)
    pruned = sparse_layer(0, 64, 256, share=0.5)
    assert np.array_equal(dense.values[pruned.mask], pruned.values[pruned.mask])
    assert "less sparse" in refusal(dense, quantized(pruned))


def test_a_sparser_base_is_refused():
    assert "sparser" in refusal(sparse_layer(0, 64, 256, share=0.8), quantized(sparse_layer(0, 64, 256, share=0.5)))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_another_model_is_refused(share):
    refusal(sparse_layer(1, 64, 256, share=share), quantized(sparse_layer(0, 64, 256, share=share)))


def test_the_same_model_at_another_scale_is_refused():
    sparse = sparse_layer(0, 64, 256)
    assert "not the model" in refusal(DenseWeight(sparse.values * np.float16(3), sparse.mask), quantized(sparse))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("group", [8, 32, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_right_base_is_never_refused(share, group, symmetric):
    sparse = sparse_layer(7, 64, 256, share)
    merge_qa_sparse_peft(sparse, quantized(sparse, group, symmetric), adapter(1, 64, 256), "layer")


def test_pairing_is_read_from_rows_spread_over_the_layer():
    # 300 rows are sampled in steps of 4; a base that is right in the first rows only is found out.
    right, wrong = sparse_layer(0, 300, 64), sparse_layer(1, 300, 64)
    values = np.concatenate([right.values[:30], wrong.values[30:]])
    refusal(DenseWeight(values, mask_of(values)), quantized(right))
