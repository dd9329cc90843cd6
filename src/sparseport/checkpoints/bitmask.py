"""compressed-tensors' sparse layouts, as releases up to 0.12 write them: `sparse-bitmask` and `sparse-24-bitmask`.

    shape        int [2] or [2, 1]      [out, in]
    bitmask      uint8 [out, ceil(in/8)]  column 8j+k at bit k of byte j; 1 = kept
    compressed   float [kept]           kept values in row-major order (sparse-bitmask)
                 float [out, in/2]      two kept values of each block of four (sparse-24-bitmask)
    row_offsets  int [out]              how many values lie before each row (sparse-bitmask only)

The bitmask is the mask: a kept weight may be exactly zero.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from sparseport.checkpoints.dialect import (
    DAMAGED,
    FLOATS,
    LayerFormat,
    check_part,
    expect_shape,
    read_part,
    require_part,
)
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput
from sparseport.weights.linear import DenseWeight, Mask
from sparseport.weights.mask import unpack_bitmask

Layout = Literal["sparse-bitmask", "sparse-24-bitmask"]


class Bitmask:
    """The dialect of a folder whose sparse layers are stored as bitmask and kept values."""

    def __init__(self, folder: ModelFolder, layout: Layout, writer: str) -> None:
        self._folder = folder
        self._layout = layout
        self.name = f"compressed-tensors {layout}"
        self.writer = writer

    def holds(self, module: str) -> bool:
        return self._folder.has(f"{module}.compressed")

    def parts(self, module: str) -> tuple[str, ...]:
        leaves = ("compressed", "bitmask", "shape", "row_offsets")
        return tuple(name for leaf in leaves if self._folder.has(name := f"{module}.{leaf}"))

    def format_of(self, module: str) -> LayerFormat:
        folder = self._folder
        out, columns = self._shape(module)
        mask = check_part(folder, f"{module}.bitmask", ("U8",), 2)
        expect_shape(folder, f"{module}.bitmask", mask, (out, -(-columns // 8)))
        name = f"{module}.compressed"
        if self._layout == "sparse-bitmask":
            check_part(folder, name, FLOATS, 1)
            offsets = check_part(folder, f"{module}.row_offsets", ("I64", "I32"), 1)
            expect_shape(folder, f"{module}.row_offsets", offsets, (out,))
        else:
            if columns % 4:
                raise BadInput(
                    "2:4 blocks do not divide the input features",
                    where=f"{folder.path}, tensor {name}",
                    expected="a multiple of 4",
                    found=columns,
                    fix=DAMAGED,
                    code="E_SHAPE",
                )
            expect_shape(folder, name, check_part(folder, name, FLOATS, 2), (out, columns // 2))
        return LayerFormat((out, columns), folder.info(name).dtype.name, packing=self._layout)

    def read(self, module: str) -> DenseWeight:
        form = self.format_of(module)
        mask = self._mask(module, form.shape)
        values = self._folder.read(f"{module}.compressed").reshape(-1)
        kept = int(np.count_nonzero(mask))
        if kept != values.size:
            raise BadInput(
                "bitmask and kept values disagree in number",
                where=f"{self._folder.path}, tensor {module}.bitmask",
                expected=f"{values.size} set bits",
                found=kept,
                fix=DAMAGED,
                code="E_BITMASK",
            )
        self._check_rows(module, mask)
        dense = np.zeros(form.shape, values.dtype)
        dense[mask] = values
        return DenseWeight(dense, mask)

    def _shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.shape"
        require_part(self._folder, name)
        info = self._folder.info(name)
        if info.stored not in ("I64", "I32") or info.shape not in ((2,), (2, 1)):
            raise BadInput(
                "tensor has the wrong dtype or rank",
                where=f"{self._folder.path}, tensor {name}",
                expected="I64 (2,) or (2, 1)",
                found=f"{info.stored} {info.shape}",
                fix=DAMAGED,
                code="E_SHAPE",
            )
        rows, columns = (int(n) for n in self._folder.read(name).reshape(-1))
        if rows < 1 or columns < 1:
            raise BadInput(
                "shape is impossible",
                where=f"{self._folder.path}, tensor {name}",
                found=[rows, columns],
                fix=DAMAGED,
                code="E_SHAPE",
            )
        return rows, columns

    def _mask(self, module: str, shape: tuple[int, int]) -> Mask:
        name = f"{module}.bitmask"
        bits = read_part(self._folder, name, ("U8",), 2).view(np.uint8)
        mask, filling = unpack_bitmask(bits, shape[1])
        if filling:
            raise BadInput(
                "bitmask has bits set beyond the last column",
                where=f"{self._folder.path}, tensor {name}",
                found=f"{filling} bits",
                fix=DAMAGED,
                code="E_BITMASK",
            )
        return mask

    def _check_rows(self, module: str, mask: Mask) -> None:
        """Row offsets must be those of the mask, and every block of a 2:4 layer must keep exactly two.

        Raises:
            BadInput: names the first bad row.
        """
        counts = mask.sum(axis=1)
        if self._layout == "sparse-bitmask":
            name = f"{module}.row_offsets"
            wrong = self._folder.read(name).astype(np.int64) != np.cumsum(counts) - counts
        else:
            name = f"{module}.bitmask"
            blocks = mask.reshape(mask.shape[0], -1, 4).sum(axis=2)
            wrong = (blocks != 2).any(axis=1)
        if wrong.any():
            raise BadInput(
                "row offsets are not those of the bitmask"
                if self._layout == "sparse-bitmask"
                else "a block of four does not keep two weights",
                where=f"{self._folder.path}, tensor {name}, row {int(np.argmax(wrong))}",
                fix=DAMAGED,
                code="E_BITMASK",
            )
