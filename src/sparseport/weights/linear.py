"""What a linear layer's weight can be: the one truth that every checkpoint becomes and every target packs.

Shapes follow PyTorch: a weight is [out, in]. Arrays are never changed in place; a step makes new values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sparseport.errors import BadInput

Array = npt.NDArray[np.generic]
U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of the model: its name and shape, without its values.

    name          module path in the checkpoint, without `.weight` (`model.layers.0.self_attn.q_proj`)
    out_features  rows of the weight
    in_features   columns of the weight
    has_bias      whether a `.bias` tensor stands beside it
    tied_to       name of the module that owns the same storage (a tied head), or None
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    tied_to: str | None = None


@dataclass(frozen=True)
class DenseWeight:
    """A floating-point weight in the dtype it was stored in.

    values  [out, in], float16 / bfloat16 / float32
    mask    bool [out, in], True where the weight is kept; None when nobody gave a mask
    """

    values: Array
    mask: Mask | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]


@dataclass(frozen=True)
class QuantizedWeight:
    """A group-quantised weight: W = scales * (codes - zero_points).

    codes        uint8 [out, in], unpacked, 0 .. 2**bits - 1
    scales       [out, groups], in the dtype they were stored in; some writers' are negative (AutoRound, NNCF)
    zero_points  uint8 [out, groups], 0 .. 2**bits - 1 (symmetric: all 2**(bits-1))
    group_size   input columns per group, after `input_order`
    bits         4
    mask         bool [out, in], True = kept; a pruned entry has code == zero_point. None when nobody gave one
    input_order  int32 [in] or None. With act-order, stored column j belongs to input `input_order[j]`: columns are kept
                 sorted by group and the activation is gathered with this permutation
    """

    codes: U8
    scales: Array
    zero_points: U8
    group_size: int
    bits: int = 4
    mask: Mask | None = None
    input_order: npt.NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def groups(self) -> int:
        return int(self.scales.shape[1])

    def check(self, where: str, *, signed_scales: bool = False) -> QuantizedWeight:
        """Return self if shapes and ranges agree.

        signed_scales  whether the writer is one whose scales may be negative

        Raises:
            BadInput: shapes disagree, a code or zero-point is out of range, or `check_scales` refuses a scale.
        """
        out, cols = self.shape
        if self.group_size < 1 or cols % self.group_size:
            raise BadInput(
                "group size does not divide the input features",
                where=where,
                expected=f"a divisor of {cols}",
                found=self.group_size,
                code="E_GROUP",
            )
        want = (out, cols // self.group_size)
        for label, array in (("scales", self.scales), ("zero_points", self.zero_points)):
            if array.shape != want:
                raise BadInput(f"{label} have the wrong shape", where=where, expected=want, found=array.shape)
        top = 2**self.bits - 1
        for label, array in (("code", self.codes), ("zero-point", self.zero_points)):
            if array.size and int(array.max()) > top:
                raise BadInput(f"{label} out of range", where=where, expected=f"0..{top}", found=int(array.max()))
        check_scales(self.scales, where, signed=signed_scales)
        if self.mask is not None and self.mask.shape != self.shape:
            raise BadInput("mask has the wrong shape", where=where, expected=self.shape, found=self.mask.shape)
        return self


@dataclass(frozen=True)
class LowRankBranch:
    """A low-rank adapter, kept beside a base weight: delta W = scaling * (b @ a).

    a        [rank, in]
    b        [out, rank]
    scaling  alpha / r_max, also for a sub-adapter of lower rank (LoRA, eq. in section 4.1; SQFT keeps r_max)
    """

    a: Array
    b: Array
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def at_rank(self, rank: int) -> LowRankBranch:
        """The sub-adapter made of the leading `rank` ranks; the scaling stays that of the super-adapter.

        Raises:
            BadInput: `rank` is below 1 or above the trained rank.
        """
        if not 1 <= rank <= self.rank:
            raise BadInput("sub-adapter rank outside the trained one", expected=f"1..{self.rank}", found=rank)
        return replace(self, a=self.a[:rank], b=self.b[:, :rank])


def check_scales(scales: Array, where: str, *, signed: bool = False) -> None:
    """Refuse scales that are NaN, infinite or zero, and negative ones unless `signed`.

    Raises:
        BadInput: names the first bad row and group, and how many there are.
    """
    values = scales.astype(np.float32)
    bad = ~(np.isfinite(values) & ((values != 0) if signed else (values > 0)))
    if bad.any():
        row, group = (int(i) for i in np.argwhere(bad)[0])
        raise BadInput(
            f"{int(bad.sum())} quantisation scales are not finite and {'different from 0' if signed else 'positive'}",
            where=f"{where}, row {row}, group {group}",
            expected="a finite scale other than 0" if signed else "a finite scale above 0",
            found=values[row, group],
            fix="quantise this layer again; a zero or NaN scale usually comes from an all-zero or NaN group",
            code="E_SCALE",
        )
