"""Weights in ONNX Runtime's layout, as they wait in the scratch file, and the group sizes that its kernel accepts.

MatMulNBits (com.microsoft): codes uint8 [out, groups, group * bits / 8], low nibble first along the input; zero-points
uint8 [out, ceil(groups * bits / 8)]; scales [out, groups]. W = scale * (code - zero_point), computed as x @ W^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseport.errors import Unsupported
from sparseport.targets.blocks import Block, BlockFile
from sparseport.weights.grouping import all_zero_points_are, fill_groups, regroup
from sparseport.weights.linear import Array, QuantizedWeight
from sparseport.weights.packing import pack_matmulnbits_zero_points, pack_nibbles_low_first

BLOCK_SIZES = (16, 32, 64, 128, 256)
# A layer that would grow by more than this is refused instead.
_MOST_FILLING = 4


@dataclass(frozen=True)
class StoredNBits:
    """A quantised layer in the scratch file.

    symmetric    every zero-point is the middle, so that they may be left out
    input_order  int32 [columns], the input of each stored column, or None
    """

    codes: Block
    zero_points: Block
    scales: Block
    input_order: Block | None
    bits: int
    block_size: int
    rows: int
    columns: int
    symmetric: bool


@dataclass(frozen=True)
class StoredMatrix:
    """A floating-point matrix in the scratch file, [out, in]."""

    values: Block


class OnnxStore(BlockFile):
    """Append-only scratch file of packed weights; element types are ONNX's names."""

    def add_dense(self, values: Array) -> StoredMatrix:
        """Append a matrix as it is; bfloat16 is widened to float32, which is exact."""
        if values.dtype.name == "bfloat16":
            values = values.astype(np.float32)
        return StoredMatrix(self.append(values, "FLOAT16" if values.dtype == np.float16 else "FLOAT", values.shape))

    def add_quantized(self, weight: QuantizedWeight) -> StoredNBits:
        """Append a quantised weight whose group size is one of `BLOCK_SIZES`."""
        rows, columns = weight.shape
        groups = weight.groups
        scales = weight.scales.astype(np.float32) if weight.scales.dtype.name == "bfloat16" else weight.scales
        if weight.bits == 4:
            codes = pack_nibbles_low_first(weight.codes).reshape(rows, groups, -1)
            zero_points = pack_matmulnbits_zero_points(weight.zero_points)
        else:
            codes, zero_points = weight.codes.reshape(rows, groups, -1), weight.zero_points
        order = weight.input_order
        return StoredNBits(
            codes=self.append(codes, "UINT8", codes.shape),
            zero_points=self.append(zero_points, "UINT8", zero_points.shape),
            scales=self.append(scales, "FLOAT16" if scales.dtype == np.float16 else "FLOAT", scales.shape),
            input_order=None if order is None else self.append(order.astype(np.int32), "INT32", order.shape),
            bits=weight.bits,
            block_size=weight.group_size,
            rows=rows,
            columns=columns,
            symmetric=all_zero_points_are(weight, 2 ** (weight.bits - 1)),
        )


def block_size_for(group_size: int, where: str) -> tuple[int, int]:
    """How groups reach MatMulNBits: columns per part, and columns per block after filling it up with zeros.

    A group is split into equal parts, and a part is filled up if no block size equals it: 96 -> parts of 32; 12 ->
    parts of 12 in blocks of 16; 576 -> parts of 64.

    Raises:
        Unsupported: the layer would grow more than fourfold.
    """
    parts = [part for part in range(1, min(group_size, BLOCK_SIZES[-1]) + 1) if group_size % part == 0]
    exact = [part for part in parts if part in BLOCK_SIZES]
    part = max(exact) if exact else max(parts)
    block = next(size for size in BLOCK_SIZES if size >= part)
    if block > _MOST_FILLING * part:
        raise Unsupported(
            "ONNX Runtime's MatMulNBits cannot hold this group size",
            where=where,
            expected=" or ".join(map(str, BLOCK_SIZES)),
            found=group_size,
            fix="quantise with group size 32, 64 or 128",
            code="E_GROUP",
        )
    return part, block


def for_matmulnbits(weight: QuantizedWeight, where: str) -> QuantizedWeight:
    """The same layer in groups that MatMulNBits accepts: split, then filled up; see `block_size_for`."""
    part, block = block_size_for(weight.group_size, where)
    return fill_groups(regroup(weight, part), block)
