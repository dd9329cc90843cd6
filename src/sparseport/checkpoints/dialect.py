"""What every reader of linear layers offers, whichever tool wrote the folder.

A dialect is one way to store linear layers. It answers from headers (`format_of`), and reads one layer at a time into
the ground floor's plain data (`read`). Layers that a quantiser left alone are stored as a plain `.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput
from sparseport.weights.linear import Array, DenseWeight, QuantizedWeight

FLOATS = ("F16", "BF16", "F32")
DAMAGED = "download the folder again; if the error stays, its writer damaged the layer: quantise the model again"
ONLY_4_BITS = "quantise the model again, with 4-bit integers in every layer"
RESTORE = "restore the config.json that the writer saved"


@dataclass(frozen=True)
class LayerFormat:
    """How one linear layer is stored, as headers and config tell it.

    shape       [out, in] of the weight
    dtype       numpy name of the dtype of the values, or of the scales of a quantised layer
    bits        width of a code; None for floating point
    group_size  input columns per group; None for floating point
    symmetric   whether the file says that every zero-point is the middle; None for floating point
    packing     short name of a packed floating-point layout (`sparse-bitmask`), or empty
    """

    shape: tuple[int, int]
    dtype: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    packing: str = ""

    @property
    def quantized(self) -> bool:
        return self.bits is not None

    @property
    def label(self) -> str:
        """Short text for tables and certificates: `int4 g64 asym`, `float16`, `float16 sparse-bitmask`."""
        if self.bits is None:
            return f"{self.dtype} {self.packing}".rstrip()
        return f"int{self.bits} g{self.group_size} {'sym' if self.symmetric else 'asym'}"


class Dialect(Protocol):
    """One way to store linear layers.

    name    what the format is called (`GPTQ v1`, `AWQ gemm`, `compressed-tensors pack-quantized`)
    writer  tool and version, as far as the config says; empty if it does not
    """

    @property
    def name(self) -> str: ...

    @property
    def writer(self) -> str: ...

    def holds(self, module: str) -> bool:
        """Whether this layer is stored in this dialect."""
        ...

    def format_of(self, module: str) -> LayerFormat:
        """How the layer is stored, from headers only.

        Raises:
            BadInput: parts are missing, or their shapes or dtypes do not fit each other.
            Unsupported: the layer is stored in a way that cannot be carried.
        """
        ...

    def parts(self, module: str) -> tuple[str, ...]:
        """Names of the tensors that make up the layer's weight (not its bias)."""
        ...

    def read(self, module: str) -> QuantizedWeight | DenseWeight:
        """The layer's weight; raises like `format_of`, and for codes, scales or zero-points that are out of range."""
        ...


class DenseDialect:
    """Layers as transformers saves them: one floating-point tensor `<module>.weight` [out, in]."""

    name = "dense"
    writer = ""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder

    def holds(self, module: str) -> bool:
        return self._folder.has(f"{module}.weight")

    def format_of(self, module: str) -> LayerFormat:
        info = self._folder.info(f"{module}.weight")
        if info.stored not in FLOATS or len(info.shape) != 2 or 0 in info.shape:
            raise BadInput(
                "weight has a dtype or shape that no known writer gives a linear layer",
                where=f"{self._folder.path}, tensor {module}.weight",
                expected=f"{' or '.join(FLOATS)} with 2 axes, not empty",
                found=f"{info.stored} {info.shape}",
                fix="if a tool quantised this folder, its quantization_config is missing from config.json",
                code="E_SHAPE",
            )
        return LayerFormat((info.shape[0], info.shape[1]), info.dtype.name)

    def parts(self, module: str) -> tuple[str, ...]:
        return (f"{module}.weight",)

    def read(self, module: str) -> DenseWeight:
        self.format_of(module)
        return DenseWeight(self._folder.read(f"{module}.weight"))


class StoredLinears:
    """Every linear layer of a folder, packed or dense.

    folder  the open folder
    packed  the dialect of its packed layers, or None if there are none
    """

    def __init__(self, folder: ModelFolder, packed: Dialect | None) -> None:
        self.folder = folder
        self.packed = packed
        self._dense = DenseDialect(folder)

    def of(self, module: str) -> Dialect:
        """The dialect that a layer is stored in."""
        return self.packed if self.packed is not None and self.packed.holds(module) else self._dense

    def has(self, module: str) -> bool:
        return self.of(module).holds(module)

    def format_of(self, module: str) -> LayerFormat:
        return self.of(module).format_of(module)

    def parts(self, module: str) -> tuple[str, ...]:
        return self.of(module).parts(module)

    def read(self, module: str) -> QuantizedWeight | DenseWeight:
        return self.of(module).read(module)

    def act_order(self, module: str) -> bool:
        """Whether the columns of a layer lie in another order than its groups, told by its group indices alone."""
        indices = [self.folder.read(part) for part in self.parts(module) if part.endswith("g_idx")]
        return any(bool((np.diff(groups.astype(np.int64)) < 0).any()) for groups in indices)

    def part_names(self) -> set[str]:
        """Names of all tensors that make up linear layers' weights."""
        return {part for module in self.folder.linear_names() for part in self.parts(module)}


def read_part(folder: ModelFolder, name: str, stored: tuple[str, ...], axes: int) -> Array:
    """One tensor of a packed layer, checked for dtype and number of axes.

    stored  allowed dtypes by their safetensors names

    Raises:
        BadInput: it is missing, or of another dtype or rank.
    """
    check_part(folder, name, stored, axes)
    return folder.read(name)


def require_part(folder: ModelFolder, name: str) -> None:
    """Refuse a packed layer without one of its parts.

    Raises:
        BadInput: names the missing tensor.
    """
    if not folder.has(name):
        raise BadInput(
            "part of a packed layer is missing", where=f"{folder.path}, tensor {name}", fix=DAMAGED, code="E_TENSOR"
        )


def check_part(folder: ModelFolder, name: str, stored: tuple[str, ...], axes: int) -> tuple[int, ...]:
    """Shape of a tensor of a packed layer; raises as `read_part`."""
    require_part(folder, name)
    info = folder.info(name)
    if info.stored not in stored or len(info.shape) != axes:
        raise BadInput(
            "tensor has the wrong dtype or rank",
            where=f"{folder.path}, tensor {name}",
            expected=f"{' or '.join(stored)} with {axes} axes",
            found=f"{info.stored} {info.shape}",
            fix=DAMAGED,
            code="E_SHAPE",
        )
    return tuple(info.shape)


def expect_shape(folder: ModelFolder, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape does not fit the other parts of its layer.

    Raises:
        BadInput: names the tensor.
    """
    if found != shape:
        raise BadInput(
            "tensor has the wrong shape",
            where=f"{folder.path}, tensor {name}",
            expected=shape,
            found=found,
            fix=DAMAGED,
            code="E_SHAPE",
        )
