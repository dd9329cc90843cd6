"""The scratch file between merging and writing: packed weights leave memory as soon as they are made.

Merging appends blocks of bytes; the IR's constants are then memory-mapped views of the same file, so that neither
step holds more than one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from sparseport.weights.grouping import all_zero_points_are
from sparseport.weights.linear import U8, Array, QuantizedWeight
from sparseport.weights.packing import pack_nibbles_low_first

# Memory maps want aligned starts; 64 bytes is a cache line and what OpenVINO itself uses.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Block:
    """A stretch of the store: `shape` elements of `element_type` (an OpenVINO type name) from byte `offset`."""

    offset: int
    size: int
    element_type: str
    shape: tuple[int, ...]


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


class WeightStore:
    """Append-only scratch file of packed weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._map: U8 | None = None

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let go of the memory map; views handed out by `view` stay valid."""
        self._file.close()
        self._map = None

    def add_dense(self, values: Array) -> StoredDense:
        """Append a tensor as it is; bfloat16 is widened to f32, which is exact and which the CPU plugin can fuse."""
        if values.dtype.name == "bfloat16":
            values = values.astype(np.float32)
        return StoredDense(self._append(values, "f16" if values.dtype == np.float16 else "f32", values.shape))

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
        packed, kind = ((lambda values: values), "u8") if eight_bits else (_nibbles, "u4")
        symmetric = not eight_bits and all_zero_points_are(weight, 8)
        # i4 is two's complement: flipping the top bit of an offset-8 code subtracts 8.
        codes = weight.codes ^ np.uint8(8) if symmetric else weight.codes
        scales = weight.scales.astype(np.float32) if weight.scales.dtype.name == "bfloat16" else weight.scales
        order = weight.input_order
        return StoredQuantized(
            codes=self._append(packed(codes), "i4" if symmetric else kind, grouped),
            zero_points=None if symmetric else self._append(packed(weight.zero_points), kind, narrow),
            scales=self._append(scales, "f16" if scales.dtype == np.float16 else "f32", narrow),
            input_order=None if order is None else self._append(order.astype(np.int32), "i32", order.shape),
            out_features=out,
            in_features=cols if order is None else int(order.max()) + 1,
        )

    def view(self, block: Block) -> U8:
        """The block's bytes, memory-mapped, read-only: uint8 [size]."""
        self._file.flush()
        if self._map is None or self._map.size < block.offset + block.size:
            self._map = np.memmap(self.path, np.uint8, "r")
        return self._map[block.offset : block.offset + block.size]

    def _append(self, array: Array, element_type: str, shape: tuple[int, ...]) -> Block:
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._file.write(data.data)
        return Block(offset, data.size, element_type, shape)


def _nibbles(values: U8) -> U8:
    flat = values.reshape(-1)
    if flat.size % 2:  # an odd number of zero-points: OpenVINO rounds up to whole bytes
        flat = np.append(flat, np.uint8(0))
    return pack_nibbles_low_first(flat)
