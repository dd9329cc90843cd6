"""Which groups a runtime's kernels can hold, and how a layer's own groups reach them without changing a weight.

A group is first split into equal parts, which repeats its scale and zero-point; a part is then filled up with columns
of zeros to a block. Both are undone exactly on read-back (`grouping.collapse`, `grouping.without_filling`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparseport.errors import Unsupported
from sparseport.weights.grouping import fill_groups, regroup
from sparseport.weights.linear import QuantizedWeight

MATMULNBITS_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes of ONNX Runtime's MatMulNBits."""

PORTABLE_BLOCKS = (32, 64, 128)
"""Those of them that OpenVINO computes from the same ONNX file without widening the weights."""

# A layer that would grow by more than this is refused instead.
_MOST_FILLING = 4
_ADVICE = "quantise with group size 32, 64 or 128"


@dataclass(frozen=True)
class GroupLayout:
    """How the groups of a layer are stored.

    part   columns of the source per stored group: the group size itself, or a divisor of it
    block  columns per stored group, those of zeros included
    """

    part: int
    block: int

    @property
    def growth(self) -> float:
        """Stored columns per column of the source."""
        return self.block / self.part


def in_layout(weight: QuantizedWeight, layout: GroupLayout) -> QuantizedWeight:
    """The same layer with its groups split and filled up."""
    return fill_groups(regroup(weight, layout.part), layout.block)


def openvino_layout(group_size: int, in_features: int, where: str) -> GroupLayout:
    """Groups in which OpenVINO computes a layer correctly.

    Filling costs memory and time in proportion, and is only chosen where no split is possible (36 becomes 64).
    """
    try:
        part = openvino_group_size(group_size, in_features, where)
        return GroupLayout(part, part)
    except Unsupported:
        block = next((size for size in (8, 16, 32) if size >= group_size), -(-group_size // 64) * 64)
        return GroupLayout(group_size, block)


def openvino_group_size(group_size: int, in_features: int, where: str) -> int:
    """The group size to use on OpenVINO's CPU plugin, which computes wrong results for many others without an error.

    Safe are 8, 16, 32, multiples of 64, and one group per row. Others are split to their largest power of two.

    Raises:
        Unsupported: no safe lossless split exists (odd groups, for example).
    """
    if group_size == in_features or group_size in (8, 16, 32) or group_size % 64 == 0:
        return group_size
    power = group_size & -group_size  # the largest power of two that divides it
    power = min(power, 64)
    if power >= 8:
        return power
    raise Unsupported(
        "OpenVINO computes this group size wrongly and it cannot be split losslessly",
        where=where,
        expected="a group size with a divisor of 8, 16, 32 or 64",
        found=group_size,
        fix=_ADVICE,
        code="E_GROUP",
    )


def matmulnbits_layout(group_size: int, where: str, blocks: tuple[int, ...] = MATMULNBITS_BLOCKS) -> GroupLayout:
    """Groups that MatMulNBits accepts: 96 -> parts of 32; 576 -> parts of 64; 12 -> parts of 12 in blocks of 16.

    Args:
        group_size: columns per group in the source.
        where: the layer, for the message.
        blocks: block sizes to choose from, ascending.

    Raises:
        Unsupported: the layer would grow more than fourfold.
    """
    parts = [part for part in range(1, min(group_size, blocks[-1]) + 1) if group_size % part == 0]
    exact = [part for part in parts if part in blocks]
    part = max(exact) if exact else max(parts)
    block = next(size for size in blocks if size >= part)
    if block > _MOST_FILLING * part:
        raise Unsupported(
            "ONNX Runtime's MatMulNBits cannot hold this group size",
            where=where,
            expected=" or ".join(map(str, blocks)),
            found=group_size,
            fix=_ADVICE,
            code="E_GROUP",
        )
    return GroupLayout(part, block)
