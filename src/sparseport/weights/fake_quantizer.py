"""A trained fake quantiser: the range that a weight is rounded on during training, and its low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import F32, Array


@dataclass(frozen=True)
class FakeQuantizer:
    """What NNCF trains beside a weight in the formats FQ_LORA and FQ_LORA_NLS (nncf.torch.quantization.layers).

    The weight that the model computes with is the base weight plus b @ a, rounded on a grid of 2**bits points. The
    adapter has no scaling factor.

    bits         4, or 8 (embeddings and heads)
    symmetric    the grid is given by `scale`; otherwise by `input_low` and `input_range`
    group_size   input columns per group; -1 = one group per row
    input_low    float32 [out, groups], lower end of the range before it is aligned to zero; None if symmetric
    input_range  float32 [out, groups], width of the range, whose sign has no meaning; None if symmetric
    scale        float32 [out, groups], the weight at the lowest code with its sign turned; often negative; None if not
                 symmetric
    a            [rank, in], the adapter in the dtype that the product is computed in; None if there is none
    b            [out, rank]
    """

    bits: int
    symmetric: bool
    group_size: int
    input_low: F32 | None = None
    input_range: F32 | None = None
    scale: F32 | None = None
    a: Array | None = None
    b: Array | None = None

    @property
    def rank(self) -> int:
        """Trained rank of the adapter; 0 if there is none."""
        return 0 if self.a is None else int(self.a.shape[0])

    @property
    def ranges(self) -> dict[str, F32]:
        """The arrays that define the grid, by name, each float32 [out, groups]."""
        asymmetric = {"input_low": self.input_low, "input_range": self.input_range}
        named = {"scale": self.scale} if self.symmetric else asymmetric
        return {name: array for name, array in named.items() if array is not None}

    @property
    def rows(self) -> int:
        """Output features of the weight."""
        return int(next(iter(self.ranges.values())).shape[0])

    def check(self, where: str) -> FakeQuantizer:
        """Return self if the parts fit each other and every number is finite.

        Raises:
            BadInput: a part is missing, has the wrong shape or dtype, or holds NaN or infinity.
            Unsupported: other than 4 or 8 bits.
        """
        if self.bits not in (4, 8):
            raise Unsupported(
                "only 4-bit and 8-bit fake quantisers are supported",
                where=where,
                expected="4 or 8",
                found=self.bits,
                code="E_BITS",
            )
        ranges = self.ranges
        if len(ranges) != (1 if self.symmetric else 2) or (self.a is None) != (self.b is None):
            raise BadInput("fake quantiser is incomplete", where=where, code="E_NNCF")
        shapes = {array.shape for array in ranges.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or any(a.dtype != np.float32 for a in ranges.values()):
            raise BadInput(
                "the range of a fake quantiser has the wrong shape or dtype",
                where=where,
                expected="float32 [out, groups]",
                found=", ".join(f"{array.dtype} {array.shape}" for array in ranges.values()),
                code="E_NNCF",
            )
        adapter = {} if self.a is None or self.b is None else {"lora_A": self.a, "lora_B": self.b}
        if adapter and (
            any(array.ndim != 2 for array in adapter.values())
            or adapter["lora_A"].shape[0] != adapter["lora_B"].shape[1]
            or adapter["lora_B"].shape[0] != self.rows
            or adapter["lora_A"].dtype != adapter["lora_B"].dtype
        ):
            raise BadInput(
                "the adapter of a fake quantiser does not fit",
                where=where,
                expected=f"lora_A [rank, in] and lora_B [{self.rows}, rank] of one dtype",
                found=", ".join(f"{array.dtype} {array.shape}" for array in adapter.values()),
                code="E_NNCF",
            )
        for name, array in {**ranges, **adapter}.items():
            bad = ~np.isfinite(array.astype(np.float32))
            if bad.any():
                first = tuple(int(i) for i in np.argwhere(bad)[0])
                raise BadInput(
                    f"{int(bad.sum())} values of a fake quantiser are NaN or infinite",
                    where=f"{where}, {name} {first}",
                    expected="finite numbers",
                    found=array[first],
                    fix="the training run diverged; use an earlier checkpoint",
                    code="E_FINITE",
                )
        return self
