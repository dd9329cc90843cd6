"""Weights in OpenVINO's layout, as they wait in the scratch file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparseport.targets.blocks import Block, BlockFile
from sparseport.weights.grouping import all_zero_points_are
from sparseport.weights.linear import U8, Array, QuantizedWeight
from sparseport.weights.packing import pack_nibbles_low_first


@dataclass(frozen=True)
class StoredQuantized:
    """A quantised weight in the store, in OpenVINO's layout.

    codes        u4 or i4 [out, groups, group]; [out, in] for one group per row; u8 for 8 bits
    zero_points  u4 or u8 [out, groups, 1], or None when codes are i4 (code - 8, every zero-point 8)
    scales       f16 or f32 [out, groups, 1]
    input_order  i32 [columns], the input of each stored column, or None; more columns than inputs where groups are
                 filled up with zeros
    in_features  inputs of the layer
    """

    codes: Block
    zero_points: Block | None
    scales: Block
    input_order: Block | None
    out_features: int
    in_features: int


@dataclass(frozen=True)
class StoredDense:
    """A floating-point tensor in the store."""

    values: Block


class WeightStore(BlockFile):
    """Append-only scratch file of packed weights."""

    def add_dense(self, values: Array) -> StoredDense:
        """Append a tensor as it is; bfloat16 is widened to f32, which is exact and which the CPU plugin can fuse."""
        if values.dtype.name == "bfloat16":
            values = values.astype(np.float32)
        return StoredDense(self.append(values, "f16" if values.dtype == np.float16 else "f32", values.shape))

    def add_quantized(self, weight: QuantizedWeight) -> StoredQuantized:
        """Append a quantised weight; its group size must be one that OpenVINO computes correctly.

        When every zero-point is 8 the codes are stored as i4 (code - 8) without zero-points: the same weights, and the
        CPU plugin runs them about 1.1 times as fast.
        """
        out, cols = weight.shape
        per_channel = weight.group_size == cols
        grouped = (out, cols) if per_channel else (out, weight.groups, weight.group_size)
        narrow = (out, 1) if per_channel else (out, weight.groups, 1)
        eight_bits = weight.bits == 8
        packed: Callable[[U8], U8] = np.ascontiguousarray if eight_bits else _nibbles
        kind = "u8" if eight_bits else "u4"
        symmetric = not eight_bits and all_zero_points_are(weight, 8)
        # i4 is two's complement: flipping the top bit of an offset-8 code subtracts 8.
        codes = weight.codes ^ np.uint8(8) if symmetric else weight.codes
        scales = weight.scales.astype(np.float32) if weight.scales.dtype.name == "bfloat16" else weight.scales
        order = weight.input_order
        return StoredQuantized(
            codes=self.append(packed(codes), "i4" if symmetric else kind, grouped),
            zero_points=None if symmetric else self.append(packed(weight.zero_points), kind, narrow),
            scales=self.append(scales, "f16" if scales.dtype == np.float16 else "f32", narrow),
            input_order=None if order is None else self.append(order.astype(np.int32), "i32", order.shape),
            out_features=out,
            in_features=cols if order is None else int(order.max()) + 1,
        )


def _nibbles(values: U8) -> U8:
    flat = values.reshape(-1)
    if flat.size % 2:  # an odd number of zero-points: OpenVINO rounds up to whole bytes
        flat = np.append(flat, np.uint8(0))
    return pack_nibbles_low_first(flat)
