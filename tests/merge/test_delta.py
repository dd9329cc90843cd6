"""B A is the correctly rounded exact sum, whatever the order of summation, memory layout or block size."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparseport.errors import BadInput
from sparseport.merge import delta as module
from sparseport.merge.delta import low_rank_product, row_blocks, scaled_delta
from sparseport.weights.linear import LowRankBranch

# Plain numbers, powers of two far apart, and neighbours of 1 whose sums cancel.
NUMBERS = st.one_of(
    st.floats(-4, 4, width=32),
    st.builds(lambda sign, exponent: sign * 2.0**exponent, st.sampled_from([-1.0, 1.0]), st.integers(-60, 60)),
    st.builds(lambda sign, steps: sign * (1 + steps * 2.0**-23), st.sampled_from([-1.0, 1.0]), st.integers(-4, 4)),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126]),
)


@st.composite
def branches(draw, dtypes=(np.float32,)):
    dtype = draw(st.sampled_from(dtypes))
    out, rank, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 4))

    def matrix(rows, width):
        cells = draw(st.lists(NUMBERS, min_size=rows * width, max_size=rows * width))
        array = np.array(cells).reshape(rows, width)
        return (np.clip(array, -60000, 60000) if dtype is np.float16 else array).astype(dtype)

    return LowRankBranch(matrix(rank, columns), matrix(out, rank), 1.0)


def exact(branch):
    """b @ a in rational arithmetic, rounded to float64 and then to float32; zeros are +0."""
    a = [[Fraction(float(x)) for x in row] for row in branch.a]
    b = [[Fraction(float(x)) for x in row] for row in branch.b]
    result = np.zeros((len(b), len(a[0])), np.float32)
    for i, row in enumerate(b):
        for j in range(len(a[0])):
            total = sum((x * a[k][j] for k, x in enumerate(row)), Fraction(0))
            result[i, j] = np.float32(float(total))
    return result + np.float32(0)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32).tolist()


def branch_of(a, b):
    return LowRankBranch(np.array(a, np.float32), np.array(b, np.float32), 1.0)


@given(branches((np.float32, np.float16, ml_dtypes.bfloat16)))
@example(branch_of([[2.0**60], [1.0], [-(2.0**60)]], [[2.0**60, 2.0**-40, 2.0**60]]))  # all but the smallest cancels
@example(branch_of([[1.0], [2.0**-24]], [[1.0, 1.0]]))  # exactly between two float32 numbers
@example(branch_of([[1.0], [2.0**-24], [2.0**-70]], [[1.0, 1.0, 1.0]]))  # a hair above the middle of two
@example(branch_of([[2.0**-100], [-(2.0**-120)]], [[2.0**-60, 2.0**-40]]))  # vanishes in float32
@example(branch_of([[0.0, -0.0]], [[-1.0]]))
def test_the_product_is_the_exact_sum_correctly_rounded(branch):
    assert bits(low_rank_product(branch)) == bits(exact(branch))


def test_rounding_edges_are_decided_exactly():
    # Random matrices seldom reach an edge; these columns are built on one: 1 + 2^-24 +- one part in 2^60.
    signs = np.array([1, -1, 1, -1, 1], np.float32)
    a = np.stack([np.ones(5, np.float32), np.full(5, 2.0**-24, np.float32), signs * np.float32(2.0**-60)])
    branch = LowRankBranch(a, np.ones((1, 3), np.float32), 1.0)
    up, down = np.float32(1 + 2.0**-23), np.float32(1)
    # float64 has no room for the last part: the sum is a tie there, and ties go to even.
    assert low_rank_product(branch).tolist() == exact(branch).tolist() == [[down] * 5]
    wide = LowRankBranch(np.where(a == a[2], signs * np.float32(2.0**-50), a).astype(np.float32), branch.b, 1.0)
    assert low_rank_product(wide).tolist() == exact(wide).tolist() == [[up, down, up, down, up]]


def random_branch(seed, out=37, rank=8, columns=53):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(rank, columns)), random.normal(size=(out, rank))
    return LowRankBranch(a.astype(np.float32), b.astype(np.float32), 0.5)


@pytest.mark.parametrize("elements", [1, 53, 54, 200, 1 << 20])
def test_blocks_do_not_change_a_bit(monkeypatch, elements):
    branch = random_branch(0)
    whole = bits(low_rank_product(branch))
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    assert bits(low_rank_product(branch)) == whole


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (10, 1 << 16), (5000, 100), (0, 4)])
def test_blocks_cover_every_row_once(shape):
    rows = [row for part in row_blocks(shape) for row in range(shape[0])[part]]
    assert rows == list(range(shape[0]))


def test_memory_layout_and_order_of_ranks_do_not_change_a_bit():
    branch = random_branch(1)
    whole = bits(low_rank_product(branch))
    turned = LowRankBranch(np.asfortranarray(branch.a), np.asfortranarray(branch.b), 0.5)
    assert bits(low_rank_product(turned)) == whole
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(8)
        assert bits(low_rank_product(LowRankBranch(branch.a[order], branch.b[:, order], 0.5))) == whole


def test_a_wrong_blas_result_within_its_error_bound_changes_nothing(monkeypatch):
    # Every sum is 1 + 2^-24, between two float32 numbers: the smallest error in float64 tips it over.
    branch = branch_of([[1.0] * 3, [2.0**-24] * 3], [[1.0, 1.0], [-1.0, -1.0]])
    right = bits(low_rank_product(branch))
    assert right == bits(np.array([[1.0] * 3, [-1.0] * 3], np.float32))
    plain = np.ndarray.__matmul__

    class Sloppy(np.ndarray):
        """An array whose products are off by a few float64 roundings, as another BLAS may be."""

        def __matmul__(self, other):
            result = plain(np.asarray(self), np.asarray(other))
            return result if result.ndim == 1 else result * (1 + 2**-52)

    class Wide(np.ndarray):
        def astype(self, *args, **keywords):
            return np.asarray(self).astype(*args, **keywords).view(Sloppy)

    sloppy = LowRankBranch(branch.a, branch.b.view(Wide), 0.5)
    assert bits(np.asarray(low_rank_product(sloppy))) == right


@given(branches(), st.integers(1, 6))
def test_a_sub_adapter_is_the_adapter_with_its_last_ranks_zero(branch, rank):
    rank = min(rank, branch.rank)
    a, b = branch.a.copy(), branch.b.copy()
    a[rank:] = 0
    b[:, rank:] = 0
    assert bits(low_rank_product(branch.at_rank(rank))) == bits(low_rank_product(LowRankBranch(a, b, 1.0)))


def test_scaling_stays_and_is_applied_in_float32():
    branch = LowRankBranch(np.eye(4, 3, dtype=np.float32), np.ones((2, 4), np.float32), 0.1)
    assert scaled_delta(branch.at_rank(2)).tolist() == [[np.float32(0.1), np.float32(0.1), 0.0]] * 2
    assert scaled_delta(branch.at_rank(2)).dtype == np.float32


@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_adapters_that_are_not_finite_are_refused(part, bad):
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros((4, 2), np.float32)}
    arrays[part][1, 1] = bad
    with pytest.raises(BadInput, match="NaN or Inf") as caught:
        low_rank_product(LowRankBranch(**arrays, scaling=1.0), "layer")
    assert caught.value.code == "E_NAN" and f"layer.lora_{part.upper()}" in str(caught.value)


def test_float64_adapters_are_refused():
    with pytest.raises(BadInput, match="float16, bfloat16 or float32"):
        low_rank_product(LowRankBranch(np.ones((1, 2)), np.ones((2, 1), np.float32), 1.0))


def test_a_product_that_overflows_is_refused():
    large = np.full((1, 1), 3e38, np.float32)
    with pytest.raises(BadInput, match="overflows") as caught:
        low_rank_product(LowRankBranch(large, large, 1.0), "layer")
    assert caught.value.code == "E_OVERFLOW"
