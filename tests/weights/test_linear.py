"""Weights check themselves, and sub-adapters are the leading ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparseport.errors import BadInput
from sparseport.weights.linear import LowRankBranch, QuantizedWeight, check_scales


def good():
    return QuantizedWeight(
        np.full((2, 8), 15, np.uint8),
        np.ones((2, 2), np.float16),
        np.zeros((2, 2), np.uint8),
        4,
        mask=np.ones((2, 8), bool),
    )


def test_a_good_weight_passes_unchanged():
    weight = good()
    assert weight.check("layer") is weight
    assert weight.shape == (2, 8) and weight.groups == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "does not divide"),
        ({"group_size": 0}, "does not divide"),
        ({"group_size": 8}, "scales have the wrong shape"),
        ({"zero_points": np.zeros((2, 1), np.uint8)}, "zero_points have the wrong shape"),
        ({"codes": np.full((2, 8), 16, np.uint8)}, "code out of range"),
        ({"zero_points": np.full((2, 2), 16, np.uint8)}, "zero-point out of range"),
        ({"mask": np.ones((8, 2), bool)}, "mask has the wrong shape"),
        ({"scales": np.array([[1, 1], [1, np.nan]], np.float16)}, "layer, row 1, group 1"),
    ],
)
def test_a_bad_weight_is_refused(change, message):
    with pytest.raises(BadInput, match=message) as caught:
        replace(good(), **change).check("layer")
    assert "layer" in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -0.0, -1.0])
def test_bad_scales_are_named(bad):
    scales = np.ones((3, 2), np.float16)
    scales[2, 1] = bad
    with pytest.raises(BadInput, match=r"1 quantisation scales .* row 2, group 1") as caught:
        check_scales(scales, "layer")
    assert caught.value.code == "E_SCALE"


def test_the_smallest_and_the_largest_scale_are_fine():
    check_scales(np.array([[6e-8, 65504]], np.float16), "layer")


def test_a_sub_adapter_is_the_leading_ranks_at_the_same_scaling():
    random = np.random.default_rng(0)
    branch = LowRankBranch(random.normal(size=(4, 5)).astype("f4"), random.normal(size=(3, 4)).astype("f4"), 2.5)
    sub = branch.at_rank(2)
    assert sub.rank == 2 and sub.scaling == 2.5
    assert np.array_equal(sub.a, branch.a[:2]) and np.array_equal(sub.b, branch.b[:, :2])
    assert branch.rank == 4 and branch.at_rank(4).rank == 4


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_ranks_that_were_not_trained_are_refused(rank):
    branch = LowRankBranch(np.ones((4, 5), np.float32), np.ones((3, 4), np.float32), 1.0)
    with pytest.raises(BadInput, match=r"expected 1\.\.4"):
        branch.at_rank(rank)
