"""Act-order: columns that were quantised in another order than they are stored, told by a group index per column."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.dialect import DAMAGED
from sparseport.errors import BadInput
from sparseport.weights.linear import Array


def order_by_group(g_idx: Array, group_size: int, where: str) -> npt.NDArray[np.int32] | None:
    """The permutation that sorts columns by group, or None where they are sorted already.

    Args:
        g_idx: int [in], the group of each input column.
        group_size: columns per group.
        where: the tensor, for messages.

    Returns:
        int32 [in]: stored column j of the sorted weight belongs to input `order[j]`. The sort is stable.

    Raises:
        BadInput: an index is out of range, or a group does not have `group_size` columns.
    """
    columns = g_idx.size
    groups = columns // group_size
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise BadInput(
            "group index out of range",
            where=where,
            expected=f"0..{groups - 1}",
            found=low if low < 0 else high,
            fix=DAMAGED,
            code="E_G_IDX",
        )
    sizes = np.bincount(g_idx.astype(np.int64), minlength=groups)
    if (sizes != group_size).any():
        group = int(np.argmax(sizes != group_size))
        raise BadInput(
            f"group {group} has the wrong number of columns",
            where=where,
            expected=group_size,
            found=int(sizes[group]),
            fix=DAMAGED,
            code="E_G_IDX",
        )
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(columns)) else order
