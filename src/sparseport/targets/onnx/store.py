"""Weights in the layouts that ONNX graphs hold them in, as they wait in the scratch file.

nbits    MatMulNBits (com.microsoft): codes uint8 [out, groups, group * bits / 8], low nibble first along the input;
         zero-points uint8 [out, ceil(groups * bits / 8)]; scales [out, groups]. W = scale * (code - zero_point)
rows     blocked DequantizeLinear (opset 21) along axis 1: codes uint4 or uint8 [out, in], zero-points [out, groups]
columns  blocked DequantizeLinear along axis 0: codes [in, out], zero-points and scales [groups, out]

Elements of uint4 tensors lie two to a byte, the first in the low half, without regard to rows (ONNX, TensorProto).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from sparseport.errors import Unsupported
from sparseport.targets.blocks import Block, BlockFile
from sparseport.weights.grouping import all_zero_points_are
from sparseport.weights.linear import U8, Array, QuantizedWeight
from sparseport.weights.packing import pack_matmulnbits_zero_points, pack_nibbles_low_first


class Layout(str, Enum):
    """How codes lie in their tensor; see the head of this file."""

    NBITS = "nbits"
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class StoredNBits:
    """A quantised layer in the scratch file.

    label        what its initializers are named after: a module, or a tensor's name
    layout       how `codes`, `zero_points` and `scales` lie
    input_order  int32 [columns], the input of each stored column, or None
    symmetric    every zero-point is the middle, so that they may be left out
    """

    label: str
    layout: Layout
    codes: Block
    zero_points: Block
    scales: Block
    input_order: Block | None
    bits: int
    block_size: int
    rows: int
    columns: int
    symmetric: bool

    @property
    def groups(self) -> int:
        return self.columns // self.block_size


@dataclass(frozen=True)
class StoredMatrix:
    """A floating-point matrix in the scratch file, [out, in].

    label  name of its initializer: `<module>.weight`, or a tensor's name
    """

    label: str
    values: Block


Stored = StoredNBits | StoredMatrix


class OnnxStore(BlockFile):
    """Append-only scratch file of packed weights; element types are ONNX's names."""

    def __init__(self, path: Path, layout: Layout = Layout.NBITS) -> None:
        super().__init__(path)
        self.layout = layout

    def add_dense(self, label: str, values: Array) -> StoredMatrix:
        """Append a matrix as it is; bfloat16 is widened to float32, which is exact."""
        wide = _no_bfloat16(values)
        return StoredMatrix(label, self.append(wide, _float_type(wide), wide.shape))

    def add_quantized(self, label: str, weight: QuantizedWeight) -> StoredNBits:
        """Append a quantised weight whose groups the layout can hold.

        Raises:
            Unsupported: an odd number of nibbles, which cannot be joined with other layers byte by byte.
        """
        rows, columns = weight.shape
        groups, bits = weight.groups, weight.bits
        codes, zero_points, scales = weight.codes, weight.zero_points, _no_bfloat16(weight.scales)
        # A table has to lie by rows to be looked up, and 8-bit matrices are tables (and heads that are tied to them).
        layout = Layout.ROWS if self.layout is Layout.COLUMNS and bits == 8 else self.layout
        if layout is Layout.NBITS:
            packed = codes if bits == 8 else pack_nibbles_low_first(codes)
            packed = packed.reshape(rows, groups, -1)
            points = zero_points if bits == 8 else pack_matmulnbits_zero_points(zero_points)
            code_block = self.append(packed, "UINT8", packed.shape)
            point_block = self.append(points, "UINT8", points.shape)
        else:
            if layout is Layout.COLUMNS:
                codes, zero_points, scales = (np.ascontiguousarray(part.T) for part in (codes, zero_points, scales))
            code_block = self._append_elements(codes, bits, label)
            point_block = self._append_elements(zero_points, bits, label)
        order = weight.input_order
        return StoredNBits(
            label=label,
            layout=layout,
            codes=code_block,
            zero_points=point_block,
            scales=self.append(scales, _float_type(scales), scales.shape),
            input_order=None if order is None else self.append(order.astype(np.int32), "INT32", order.shape),
            bits=bits,
            block_size=weight.group_size,
            rows=rows,
            columns=columns,
            symmetric=all_zero_points_are(weight, 2 ** (bits - 1)),
        )

    def _append_elements(self, values: U8, bits: int, label: str) -> Block:
        """Append a tensor of whole bytes, or of nibbles that fill whole bytes."""
        if bits == 8:
            return self.append(values, "UINT8", values.shape)
        if values.size % 2:
            raise Unsupported(
                "an odd number of 4-bit values cannot be stored for DequantizeLinear",
                where=label,
                found=values.shape,
                fix="use `--onnx-format nbits`",
                code="E_PACK",
            )
        return self.append(pack_nibbles_low_first(values.reshape(1, -1)), "UINT4", values.shape)


def _no_bfloat16(values: Array) -> Array:
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values


def _float_type(values: Array) -> str:
    return "FLOAT16" if values.dtype == np.float16 else "FLOAT"
