"""Group indices of act-order: the permutation that they mean, and the ones that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.checkpoints.act_order import order_by_group
from sparseport.errors import BadInput


def indices(*values, dtype=np.int32):
    return np.array(values, dtype)


def test_columns_in_their_places_need_no_permutation():
    assert order_by_group(indices(0, 0, 1, 1, 2, 2), 2, "f") is None
    assert order_by_group(indices(0, 0, 0), 3, "f") is None


def test_columns_are_gathered_group_by_group():
    order = order_by_group(indices(2, 0, 1, 0, 2, 1), 2, "f")
    assert order is not None and order.dtype == np.int32
    assert order.tolist() == [1, 3, 2, 5, 0, 4]


def test_swapped_groups_are_a_permutation_too():
    order = order_by_group(indices(1, 1, 0, 0, dtype=np.int64), 2, "f")
    assert order is not None and order.dtype == np.int32 and order.tolist() == [2, 3, 0, 1]


@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_order_of_columns(groups, group_size, random):
    g_idx = [group for group in range(groups) for _ in range(group_size)]
    random.shuffle(g_idx)
    order = order_by_group(np.array(g_idx, np.int32), group_size, "f")
    # By the definition: all columns of group 0 from left to right, then those of group 1, and so on.
    expected = [column for group in range(groups) for column, of in enumerate(g_idx) if of == group]
    assert (order is None) == (expected == list(range(len(g_idx))))
    assert order is None or order.tolist() == expected


@pytest.mark.parametrize(
    ("g_idx", "what", "found"),
    [
        (indices(0, 0, 1, 2), "out of range", "2"),
        (indices(0, -1, 1, 1), "out of range", "-1"),
        (indices(-1, -1, -1, -1), "out of range", "-1"),
        (indices(0, 2**31 - 1, 1, 1), "out of range", "2147483647"),
        (indices(0, 2**40, 1, 1, dtype=np.int64), "out of range", str(2**40)),
        (indices(0, 0, 0, 1), "group 0 has the wrong number", "3"),
        (indices(1, 1, 1, 1), "group 0 has the wrong number", "0"),
    ],
)
def test_indices_that_mean_no_order(g_idx, what, found):
    with pytest.raises(BadInput, match=what) as caught:
        order_by_group(g_idx, 2, "folder, tensor m.g_idx")
    assert caught.value.code == "E_G_IDX" and caught.value.found == found and caught.value.fix
    assert caught.value.where == "folder, tensor m.g_idx"
