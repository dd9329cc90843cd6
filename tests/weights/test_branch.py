"""Un-merged branches: what storing them changes, and a digest in which every single change shows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.errors import BadInput, FidelityError
from sparseport.weights.branch import branch_digest, in_order, out_of_order, stored_branch
from sparseport.weights.linear import LowRankBranch

A = np.array([[1, -2, 0.5]], np.float32)
B = np.array([[3], [0.25]], np.float32)
BRANCH = LowRankBranch(A, B, 2.0)


def branch(dtype, scaling, seed=0, rank=3):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(rank, 8)), random.normal(size=(6, rank))
    return LowRankBranch(a.astype(dtype), b.astype(dtype), scaling)


def test_canonical_form():
    expected = hashlib.sha256(
        b"branch 2x3 rank=1 a=float32 b=float32\n"
        + bytes.fromhex("0000803f000000c00000003f")
        + bytes.fromhex("000040400000803e")
        + bytes.fromhex("00000040")
    )
    assert branch_digest(BRANCH) == expected.hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        replace(BRANCH, a=np.nextafter(A, np.float32(9))),
        replace(BRANCH, b=-B),
        replace(BRANCH, scaling=float(np.nextafter(np.float32(2), np.float32(3)))),
        replace(BRANCH, a=A.astype(np.float16)),
        replace(BRANCH, b=B.astype(np.float16)),
        LowRankBranch(np.vstack([A, 0 * A]), np.hstack([B, 0 * B]), 2.0),
    ],
)
def test_every_change_shows(other):
    assert branch_digest(other) != branch_digest(BRANCH)


def test_layout_in_memory_does_not_show():
    turned = LowRankBranch(np.asfortranarray(branch(np.float32, 2.0).a), branch(np.float32, 2.0).b[:, :], 2.0)
    assert branch_digest(turned) == branch_digest(branch(np.float32, 2.0))
    low = branch(np.float32, 2.0).at_rank(2)  # b is a view of every third column left out
    assert branch_digest(low) == branch_digest(replace(low, b=low.b.copy()))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_stored_values_are_the_adapters(dtype):
    source = branch(dtype, 1.7)
    stored, changed = stored_branch(source, "stored", "layer")
    assert changed == 0 and stored.scaling == float(np.float32(1.7))
    assert stored.a.dtype == (np.float16 if dtype is np.float16 else np.float32)
    assert np.array_equal(stored.a, source.a.astype(np.float32)) and np.array_equal(stored.b, source.b.astype("f4"))


@given(st.integers(0, 1000), st.integers(-8, 8), st.sampled_from([np.float16, np.float32]))
def test_a_power_of_two_folds_into_b_exactly(seed, power, dtype):
    source = branch(dtype, 2.0**power, seed)
    stored, changed = stored_branch(source, "stored", "layer", fold=True)
    assert changed == 0 and stored.scaling == 1.0
    for kept, value in zip(stored.b.reshape(-1).tolist(), source.b.reshape(-1).tolist(), strict=True):
        assert Fraction(kept) == Fraction(value) * Fraction(2.0**power)
    assert np.array_equal(stored.a, source.a) and stored.a.dtype == stored.b.dtype


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_any_scaling_folds_within_half_a_unit_in_the_last_place(seed, scaling):
    source = branch(np.float16, scaling, seed)
    stored, changed = stored_branch(source, "stored", "layer", fold=True)
    exact = source.b.astype(np.float64) * float(np.float32(scaling))
    assert (np.abs(stored.b - exact) <= 0.5 * np.spacing(np.abs(exact).astype(np.float32))).all()
    assert changed == np.count_nonzero(stored.b.astype(np.float64) != exact)
    assert np.array_equal(stored.a, source.a.astype(stored.a.dtype)) and stored.a.dtype == stored.b.dtype


def test_rounding_to_float16_is_counted():
    source = LowRankBranch(np.array([[1, 1 + 2**-12]], np.float32), np.array([[0.1], [0.5]], np.float32), 3.0)
    stored, changed = stored_branch(source, "fp16", "layer")
    assert changed == 2 and stored.a.dtype == stored.b.dtype == np.float16 and stored.scaling == 3.0
    folded, changed = stored_branch(source, "fp16", "layer", fold=True)
    assert changed == 2 and folded.scaling == 1.0 and folded.b[1, 0] == 1.5


def test_overflow_is_refused():
    with pytest.raises(BadInput, match="overflows float16") as caught:
        stored_branch(LowRankBranch(A * 1e5, B, 2.0), "fp16", "layers.0.q")
    assert caught.value.code == "E_OVERFLOW" and "layers.0.q" in str(caught.value)
    with pytest.raises(BadInput, match="overflows float32"):
        stored_branch(LowRankBranch(A, B * np.float32(1e38), 100.0), "stored", "layer", fold=True)


@pytest.mark.parametrize("scaling", [1e-60, 1e60, 0.0, float("nan"), -1.0])
def test_a_scaling_that_float32_does_not_hold_is_refused(scaling):
    with pytest.raises(BadInput, match="scaling"):
        stored_branch(replace(BRANCH, scaling=scaling), "stored", "layer")


@given(st.integers(0, 1000), st.integers(0, 4))
def test_the_order_of_columns_changes_no_product(seed, filling):
    """x[order] @ in_order(a).T is x @ a.T, also where columns that fill up a group read an input twice."""
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(8), random.integers(0, 8, filling)]).astype(np.int32)
    a, x = random.integers(-9, 9, (3, 8)).astype(np.float32), random.integers(-9, 9, 8).astype(np.float32)
    stored = in_order(a, order)
    assert stored.shape == (3, 8 + filling) and np.array_equal(stored @ x[order], a @ x)
    assert np.array_equal(out_of_order(stored, order, "layer"), a)
    assert in_order(a, None) is a and out_of_order(a, None, "layer") is a


def test_a_filling_column_that_counts_is_found():
    order = np.array([1, 0, 1], np.int32)
    stored = in_order(A[:, :2], order)
    stored[0, 2] = 1
    with pytest.raises(FidelityError, match="order"):
        out_of_order(stored, order, "layer")
    with pytest.raises(FidelityError, match="order"):
        out_of_order(A, np.array([0, 1], np.int32), "layer")
