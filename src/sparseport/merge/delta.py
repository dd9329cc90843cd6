"""The product B A of a low-rank adapter, the same bits on every machine.

A matrix product in float32 or even float64 differs between BLAS builds and thread counts in its last bits, and then a
merged code flips where a sum lands on a rounding edge. Here every element is the exact sum, correctly rounded to
float64 and then to float32, whatever BLAS does: BLAS computes it in float64, and the few elements whose error bound
straddles a float32 rounding edge are summed again with `math.fsum`, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sparseport.errors import BadInput
from sparseport.weights.linear import F32, LowRankBranch

# Elements per block of rows: the float64 temporaries then stay in the L2 cache, whatever the layer's size.
BLOCK_ELEMENTS = 1 << 15


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows that cover a [out, in] array in cache-sized blocks."""
    step = max(1, BLOCK_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def low_rank_product(branch: LowRankBranch, where: str = "adapter") -> F32:
    """Return b @ a as float32 [out, in], each element correctly rounded from the exact sum; zeros are +0.

    Adapters of float16, bfloat16 or float32 are accepted: their products are exact in float64.

    Raises:
        BadInput: the adapter is float64, or holds NaN or Inf, or the product overflows float32.
    """
    for label, array in (("lora_A", branch.a), ("lora_B", branch.b)):
        if array.dtype.itemsize > 4:
            raise BadInput(
                "adapter weights must be float16, bfloat16 or float32",
                where=f"{where}.{label}",
                found=array.dtype,
                fix="save the adapter in float32",
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise BadInput("adapter holds NaN or Inf", where=f"{where}.{label}", code="E_NAN")
    a = branch.a.astype(np.float64)
    b = branch.b.astype(np.float64)
    # |error| <= r u / (1 - r u) * |b| @ |a| for any order of summation (Higham 2002, section 3.1). Each |a| is replaced
    # by its row's maximum, which only widens the bound, and the factor is doubled twice for the rounding done here.
    bound = (4.0 * branch.rank * 2.0**-53) * (np.abs(b) @ np.abs(a).max(axis=1, initial=0.0))
    product = np.empty((b.shape[0], a.shape[1]), np.float32)
    with np.errstate(over="ignore"):
        for rows in row_blocks((b.shape[0], a.shape[1])):
            centre = b[rows] @ a
            margin = bound[rows, None]
            block = (centre - margin).astype(np.float32)
            unsure = block != (centre + margin).astype(np.float32)
            for i, j in np.argwhere(unsure):
                block[i, j] = np.float32(math.fsum((b[rows][i] * a[:, j]).tolist()))
            # Adding 0 makes every zero +0: the sign of a vanishing sum depends on the order of summation.
            np.add(block, np.float32(0), out=product[rows])
    if not np.isfinite(product).all():
        raise BadInput("adapter product overflows float32", where=where, code="E_OVERFLOW")
    return product


def scaled_delta(branch: LowRankBranch, where: str = "adapter") -> F32:
    """Return scaling * (b @ a) as float32 [out, in]: the correctly rounded product times the float32 scaling."""
    product = low_rank_product(branch, where)
    with np.errstate(over="ignore"):  # an infinite delta is refused where it is added
        product *= np.float32(branch.scaling)
    return product
