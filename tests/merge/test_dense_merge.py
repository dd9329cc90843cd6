"""`lora` and `sparse_peft` against the formulas in plain numpy, and what they refuse."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import BadInput, FidelityError
from sparseport.merge.dense import merge_lora, merge_sparse_peft
from sparseport.weights.linear import DenseWeight, LowRankBranch
from sparseport.weights.mask import mask_of, revived

DTYPES = (np.float16, np.float32, ml_dtypes.bfloat16)


def layer(seed, dtype=np.float32, out=6, columns=10, rank=3, scaling=0.5):
    """A sparse layer and an adapter of small integers over 8: every product and sum is exact."""
    random = np.random.default_rng(seed)
    base = (random.integers(-64, 64, (out, columns)) / 64).astype(dtype)
    base[random.random(base.shape) < 0.5] = 0
    a = (random.integers(-8, 9, (rank, columns)) / 8).astype(np.float32)
    b = (random.integers(-8, 9, (out, rank)) / 8).astype(np.float32)
    return base, LowRankBranch(a, b, scaling)


def raw(values):
    return np.ascontiguousarray(values).view(np.uint8).tolist()


@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_lora_is_base_plus_scaled_product_rounded_once(seed, dtype):
    base, branch = layer(seed, dtype)
    merged = merge_lora(DenseWeight(base), branch, "layer")
    expected = base.astype(np.float64) + 0.5 * (branch.b.astype(np.float64) @ branch.a.astype(np.float64))
    assert merged.mask is None and merged.values.dtype == base.dtype
    assert np.array_equal(merged.values, expected.astype(np.float32).astype(dtype))


@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_sparse_peft_adds_where_the_mask_keeps_and_leaves_plus_zero_elsewhere(seed, dtype):
    base, branch = layer(seed, dtype)
    base[0, 0] = -0.0
    mask = mask_of(base)
    merged = merge_sparse_peft(DenseWeight(base, mask), branch, "layer")
    product = branch.b.astype(np.float64) @ branch.a.astype(np.float64)
    expected = (base.astype(np.float64) + 0.5 * product * mask).astype(np.float32).astype(dtype)
    assert np.array_equal(merged.values, expected) and merged.mask is mask
    assert merged.values.dtype == base.dtype and revived(merged, mask) == 0
    pruned = merged.values[~mask]
    assert raw(pruned) == raw(np.zeros_like(pruned))  # +0, not -0


def test_rounding_happens_once_from_float32():
    # 1 + 2^-11 lies between two float16 numbers and goes to even; a little more goes up, unless B A is rounded first.
    base = np.array([[1.0, 1.0]], np.float16)
    branch = LowRankBranch(np.array([[2.0**-11, 2.0**-11 + 2.0**-22]], np.float32), np.ones((1, 1), np.float32), 1.0)
    assert merge_lora(DenseWeight(base), branch, "layer").values.tolist() == [[1.0, 1 + 2.0**-10]]


def test_inputs_are_not_changed():
    base, branch = layer(0)
    copies = base.copy(), branch.a.copy(), branch.b.copy()
    merge_sparse_peft(DenseWeight(base, mask_of(base)), branch, "layer")
    merge_lora(DenseWeight(base), branch, "layer")
    assert all(np.array_equal(x, y) for x, y in zip(copies, (base, branch.a, branch.b), strict=True))


def test_a_dense_merge_into_a_sparse_base_is_refused():
    base, branch = layer(0)
    with pytest.raises(FidelityError, match="fill the pruned weights") as caught:
        merge_lora(DenseWeight(base, mask_of(base)), branch, "layer")
    assert caught.value.code == "E_RULE" and caught.value.exit_code == 4
    assert f"{int((base == 0).sum())} pruned weights" in str(caught.value) and "sparse_peft" in str(caught.value)
    full = np.ones(base.shape, bool)
    assert merge_lora(DenseWeight(base, full), branch, "layer").mask is full


def test_sparse_peft_without_a_mask_is_refused():
    base, branch = layer(0)
    with pytest.raises(BadInput, match="--sparse-base"):
        merge_sparse_peft(DenseWeight(base), branch, "layer")


@pytest.mark.parametrize("merge", [merge_lora, merge_sparse_peft])
@pytest.mark.parametrize("shape", [(10, 6), (6, 9), (7, 10)])
def test_an_adapter_of_another_shape_is_refused(merge, shape):
    _, branch = layer(0)
    base = DenseWeight(np.ones(shape, np.float32), np.ones(shape, bool))
    with pytest.raises(BadInput, match="does not fit its base") as caught:
        merge(base, branch, "layer 7")
    assert caught.value.code == "E_PAIRING" and "layer 7" in str(caught.value)


@pytest.mark.parametrize("merge", [merge_lora, merge_sparse_peft])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_base_that_is_not_finite_is_refused(merge, bad):
    base, branch = layer(0)
    base[2, 3] = bad
    with pytest.raises(BadInput, match="base weight holds NaN or Inf") as caught:
        merge(DenseWeight(base, np.ones(base.shape, bool)), branch, "layer")
    assert caught.value.code == "E_NAN"


@pytest.mark.parametrize("merge", [merge_lora, merge_sparse_peft])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_sum_that_overflows_is_refused(merge, dtype):
    top = np.full((1, 1), np.finfo(dtype).max, dtype)
    branch = LowRankBranch(top.astype(np.float32), np.ones((1, 1), np.float32), 1.0)
    with pytest.raises(BadInput, match=f"overflows {np.dtype(dtype)}") as caught:
        merge(DenseWeight(top, np.ones((1, 1), bool)), branch, "layer")
    assert caught.value.code == "E_OVERFLOW"
    minus = LowRankBranch(-branch.a, branch.b, 1.0)
    assert merge(DenseWeight(top, np.ones((1, 1), bool)), minus, "layer").values.tolist() == [[0.0]]


def test_a_scaling_that_overflows_is_refused():
    one = np.ones((1, 1), np.float32)
    with pytest.raises(BadInput, match="overflows"):
        merge_lora(DenseWeight(one), LowRankBranch(one * 1e30, one, 1e30), "layer")
