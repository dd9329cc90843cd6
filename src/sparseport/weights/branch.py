"""A low-rank branch as a target stores it beside a base weight, and its digest.

y = base(x) + scaling * B(A x), with the scaling alpha / r_max of the super-adapter (LoRA, arXiv 2106.09685, section
4.1; SQFT keeps r_max for every sub-adapter). Runtimes compute it in float32, so the scaling is a float32 number.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sparseport.errors import BadInput, FidelityError
from sparseport.weights.digest import canonical_bytes
from sparseport.weights.linear import Array, LowRankBranch


def stored_branch(branch: LowRankBranch, dtype: str, where: str, *, fold: bool = False) -> tuple[LowRankBranch, int]:
    """A branch in the dtypes that a target stores, and how many of its values that changes.

    bfloat16 is widened to float32, which changes nothing; float16 and float32 stay.

    Args:
        branch: a [rank, in], b [out, rank], of float16, bfloat16 or float32.
        dtype: `stored` keeps the values, `fp16` rounds them to float16.
        where: module name, for messages.
        fold: multiply b by the scaling, which is 1 afterwards, for a runtime that takes no scaling. A scaling that is
            a power of two changes nothing; for others both matrices become float32, and b is rounded to it.

    Raises:
        BadInput: a value overflows its dtype, or the scaling is no positive float32 number.
    """
    scaling = _float32_scaling(branch.scaling, where)
    a, b = _no_bfloat16(branch.a), _no_bfloat16(branch.b)
    exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    if fold:
        exact_b = exact_b * scaling  # exact: two float32 significands have 48 bits, float64 has 53
        scaling = 1.0
    if dtype == "fp16":
        a, b = (_rounded(part, np.dtype(np.float16), where) for part in (exact_a, exact_b))
    elif fold:
        if a.dtype == b.dtype and _holds(exact_b, b.dtype):
            b = exact_b.astype(b.dtype)
        else:  # one dtype for both: OpenVINO GenAI takes no others
            a, b = (_rounded(part, np.dtype(np.float32), where) for part in (exact_a, exact_b))
    changed = sum(int(np.count_nonzero(part != kept)) for part, kept in ((exact_a, a), (exact_b, b)))
    return LowRankBranch(np.ascontiguousarray(a), np.ascontiguousarray(b), scaling), changed


def branch_digest(branch: LowRankBranch) -> str:
    """SHA-256 (hex) of a branch: a header with shape, rank and dtypes, then a, b and the float32 scaling."""
    sizes = f"{branch.b.shape[0]}x{branch.a.shape[1]} rank={branch.rank}"
    sha = hashlib.sha256(f"branch {sizes} a={branch.a.dtype.name} b={branch.b.dtype.name}\n".encode("ascii"))
    for array in (branch.a, branch.b, np.array([branch.scaling], np.float32)):
        sha.update(canonical_bytes(array))
    return sha.hexdigest()


def widened(branch: LowRankBranch) -> LowRankBranch:
    """The same branch with both matrices in float32, which holds float16 and bfloat16 exactly."""
    return replace(branch, a=branch.a.astype(np.float32), b=branch.b.astype(np.float32))


def in_order(a: Array, order: npt.NDArray[np.int32] | None) -> Array:
    """A matrix a [rank, in] for an activation that is gathered by `order` (act-order, groups that are filled up).

    A column that reads an input for the second time becomes zero, so that no input counts twice.
    """
    if order is None:
        return a
    gathered: Array = np.ascontiguousarray(a[:, order])
    _, first = np.unique(order, return_index=True)
    again = np.ones(order.size, np.bool_)
    again[first] = False
    gathered[:, again] = 0
    return gathered


def out_of_order(a: Array, order: npt.NDArray[np.int32] | None, where: str) -> Array:
    """Inverse of `in_order`, used on read-back.

    Raises:
        FidelityError: a column that reads an input for the second time is not zero, or columns are missing.
    """
    if order is None:
        return a
    inputs, first = np.unique(order, return_index=True)
    whole = np.array_equal(inputs, np.arange(inputs.size)) and a.shape[1] == order.size
    if not whole or (np.delete(a, first, axis=1) != 0).any():
        raise FidelityError("the adapter does not fit the order of its layer's columns", where=where, code="E_READBACK")
    return np.ascontiguousarray(a[:, first])


def _float32_scaling(scaling: float, where: str) -> float:
    with np.errstate(over="ignore", under="ignore"):
        value = float(np.float32(scaling))
    if not np.isfinite(value) or value <= 0:
        raise BadInput(
            "the adapter's scaling is no positive float32 number",
            where=where,
            found=scaling,
            fix="correct lora_alpha and r in adapter_config.json",
            code="E_OVERFLOW",
        )
    return value


def _no_bfloat16(values: Array) -> Array:
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values


def _holds(exact: Array, dtype: np.dtype[np.generic]) -> bool:
    with np.errstate(over="ignore", under="ignore"):
        return bool((exact.astype(dtype) == exact).all())


def _rounded(exact: Array, dtype: np.dtype[np.generic], where: str) -> Array:
    """Float64 values rounded once to a narrower dtype.

    Raises:
        BadInput: a value overflows it.
    """
    with np.errstate(over="ignore", under="ignore"):
        values: Array = exact.astype(dtype)
    if not np.isfinite(values).all():
        raise BadInput(
            f"the adapter overflows {dtype.name}",
            where=where,
            found=f"{int(np.count_nonzero(~np.isfinite(values)))} values",
            fix="leave --branch-dtype away" if dtype == np.float16 else "give --branches graph",
            code="E_OVERFLOW",
        )
    return values
