"""Read the weights of a written ONNX folder back, with none of the writer's code.

The protobuf is parsed by the onnx package; bytes of external tensors are taken from the data file by their own offsets,
which must stay inside the folder and the file. The graph is followed from each product to the constants behind it, so a
weight counts as present only if it is really used, and as quantised only if MatMulNBits dequantises it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.weights.grouping import without_filling
from sparseport.weights.linear import U8, DenseWeight, QuantizedWeight

MODEL = "model.onnx"
# ONNX's numbers for FLOAT, UINT8, INT32 and FLOAT16.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    6: np.dtype("<i4"),
    10: np.dtype("<f2"),
}
_MATRIX_USERS = {"MatMul": 1, "MatMulNBits": 1, "Gather": 0, "GatherBlockQuantized": 0, "Gemm": 1, "FusedMatMul": 1}


@dataclass(frozen=True)
class ReadBack:
    """One weight found in a graph.

    name          names of the layers whose rows it holds, joined by `+`, or a tensor's own name
    weight        the values, with the groups that were written
    element_type  `u4` or `u8` for quantised layers, `f16` or `f32`
    places        names of the nodes that use it
    """

    name: str
    weight: QuantizedWeight | DenseWeight
    element_type: str
    places: tuple[str, ...]


class OnnxGraph:
    """A parsed `model.onnx`; external tensors are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Parse a folder's graph.

        Raises:
            VerificationError: it cannot be parsed, or an external tensor leaves the folder or its file.
        """
        import onnx

        self.folder = folder
        try:
            self.model = onnx.load(folder / MODEL, load_external_data=False)
        except Exception as error:
            raise VerificationError("ONNX cannot read the model", where=MODEL, found=str(error)[:120]) from error
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producers = {output: node for node in self.model.graph.node for output in node.output}
        self._maps: dict[str, Any] = {}

    def values(self, name: str) -> Any:
        """A constant's values, in the dtype it is stored in.

        Raises:
            VerificationError: no such constant, an unknown type, or a place outside its file.
        """
        tensor = self.tensors.get(name)
        dtype = _DTYPES.get(tensor.data_type) if tensor is not None else None
        if tensor is None or dtype is None:
            raise VerificationError("constant is missing or of an unknown type", where=name)
        shape = tuple(int(n) for n in tensor.dims)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if not tensor.external_data:
            return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        offset, length = (int(entries.get(key, "0")) for key in ("offset", "length"))
        if not location or Path(location).name != location or location in (".", ".."):
            raise VerificationError("external data lies outside the folder", where=name, found=location)
        path = self.folder / location
        if path.is_symlink() or not path.is_file():
            raise VerificationError("external data file is missing", where=location)
        data = self._maps.setdefault(location, np.memmap(path, np.uint8, "r"))
        if length != size or offset < 0 or offset + size > data.size:
            raise VerificationError(
                "external data does not fit its tensor", where=name, expected=size, found=f"{length} at {offset}"
            )
        return np.frombuffer(data[offset : offset + size], dtype).reshape(shape)

    def behind(self, name: str, kinds: tuple[str, ...]) -> str:
        """The constant that a value is made of, looking through operations of the given kinds."""
        while name not in self.tensors:
            node = self.producers.get(name)
            if node is None or node.op_type not in kinds:
                raise VerificationError("a weight is computed by something else", where=name)
            name = node.input[0]
        return str(name)


def weights(graph: OnnxGraph) -> Iterator[ReadBack]:
    """Yield every matrix that the graph multiplies with or looks up, in graph order, and every small tensor.

    Raises:
        VerificationError: a weight is used in an unknown way, or its parts do not fit each other.
    """
    places: dict[str, list[str]] = {}
    found: dict[str, ReadBack] = {}
    for node in graph.model.graph.node:
        if node.op_type == "MatMulNBits":
            item = _quantized(graph, node)
        elif node.op_type == "MatMul" and _is_constant(graph, node.input[1]):
            item = _dense(graph, node.input[1], ("Transpose", "Cast"))
            transposed = graph.producers.get(node.input[1])
            if transposed is None or transposed.op_type != "Transpose":
                raise VerificationError("a weight is multiplied without being transposed", where=item.name)
        elif (
            node.op_type == "Gather" and node.input[0] in graph.tensors and len(graph.tensors[node.input[0]].dims) == 2
        ):
            item = _dense(graph, node.input[0], ())
        else:
            continue
        places.setdefault(item.name, []).append(node.name)
        found.setdefault(item.name, item)
    for name, item in found.items():
        yield ReadBack(item.name, item.weight, item.element_type, tuple(places[name]))


def unnamed_matrices(graph: OnnxGraph, named: Mapping[str, object]) -> list[str]:
    """Matrices that a product or a look-up uses and that are not among the `named` ones."""
    unknown = set()
    for node in graph.model.graph.node:
        side = _MATRIX_USERS.get(node.op_type)
        if side is None or not _is_constant(graph, node.input[side]):
            continue
        name = graph.behind(node.input[side], ("Transpose", "Cast"))
        if len(graph.tensors[name].dims) < 2:
            continue
        label = name.removesuffix(".codes").removesuffix(".weight")
        unknown |= {module for module in label.split("+") if module not in named}
    return sorted(unknown)


def _is_constant(graph: OnnxGraph, name: str) -> bool:
    while name not in graph.tensors:
        node = graph.producers.get(name)
        if node is None or node.op_type not in ("Transpose", "Cast"):
            return False
        name = node.input[0]
    return True


def _dense(graph: OnnxGraph, name: str, kinds: tuple[str, ...]) -> ReadBack:
    constant = graph.behind(name, kinds)
    values = graph.values(constant)
    kind = "f16" if values.dtype == np.float16 else "f32"
    return ReadBack(constant.removesuffix(".weight"), DenseWeight(values), kind, ())


def _quantized(graph: OnnxGraph, node: Any) -> ReadBack:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    bits, block = int(attributes.get("bits", 4)), int(attributes["block_size"])
    columns, rows = int(attributes["K"]), int(attributes["N"])
    groups = -(-columns // block)
    label = graph.behind(node.input[1], ()).removesuffix(".codes")
    if bits not in (4, 8) or columns % block:
        raise VerificationError(
            "a quantised layer of an unknown layout", where=label, found=f"{bits} bits, K={columns}"
        )
    codes = _unpacked(graph.values(node.input[1]), bits).reshape(rows, columns)
    scales = graph.values(graph.behind(node.input[2], ("Cast",))).reshape(rows, groups)
    if len(node.input) > 3 and node.input[3]:
        packed = graph.values(node.input[3]).reshape(rows, -1)
        zero_points = np.ascontiguousarray(_unpacked(packed, bits)[:, :groups])
    else:
        zero_points = np.full((rows, groups), 2 ** (bits - 1), np.uint8)
    order = None
    gather = graph.producers.get(node.input[0])
    if gather is not None and gather.op_type == "Gather" and gather.input[1] == f"{label}.input_order":
        order = graph.values(gather.input[1])
    weight = QuantizedWeight(codes, np.array(scales), zero_points, block, bits, input_order=order)
    return ReadBack(label, without_filling(weight, label), f"u{bits}", ())


def _unpacked(packed: U8, bits: int) -> U8:
    """Bytes -> values: for 4 bits the low half of each byte comes first, along the last axis."""
    if bits == 8:
        return np.array(packed)
    low, high = packed & np.uint8(15), packed >> np.uint8(4)
    values: U8 = np.stack([low, high], axis=-1).reshape(*packed.shape[:-1], -1)
    return values
