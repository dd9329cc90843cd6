"""Where the tensors of an ONNX model lie: in its external data files, or in the model itself; without onnx.

Format: onnx.proto of the ONNX repository. Numbers of fields used here:

ModelProto      graph 7
GraphProto      node 1, initializer 5
NodeProto       input 1, op_type 4, attribute 5
AttributeProto  name 1, i 3
TensorProto     dims 1, data_type 2, name 8, raw_data 9, external_data 13, data_location 14 (1: external)
StringStringEntryProto  key 1, value 2
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path

from sparseport.transit.layout import Elements, Points, Region
from sparseport.transit.protobuf import fields, numbers, text

# TensorProto.DataType -> bits: FLOAT, UINT8, INT8, FLOAT16, DOUBLE, BFLOAT16, UINT4, INT4.
_BITS = {1: 32, 2: 8, 3: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
_UINT8 = 2
_EXTERNAL = 1


@dataclass
class _Tensor:
    """A constant and where its bytes are: `file` "" is the model itself."""

    shape: list[int] = field(default_factory=list)
    kind: int = 0
    name: str = ""
    file: str = ""
    offset: int = 0
    size: int = 0
    external: dict[str, str] = field(default_factory=dict)


@dataclass
class _Node:
    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)


def onnx_regions(path: Path) -> dict[str, list[Region]]:
    """The constants of a model as regions of files: by file name, that of the model included.

    Raises:
        ValueError, OSError: this is no ONNX model.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as buffer:
            tensors, nodes = _read_model(buffer)
    codes: dict[str, Elements | None] = {}
    for node in nodes:
        if node.kind == "MatMulNBits":
            codes.update(_n_bits(node, tensors))
        elif node.kind == "DequantizeLinear":
            codes.update(_dequantized(node, tensors))
    regions: dict[str, list[Region]] = {}
    for tensor in tensors.values():
        elements = codes.get(tensor.name) or _plain(tensor)
        if elements is not None and tensor.size:
            place = tensor.file or path.name
            regions.setdefault(place, []).append(Region(tensor.offset, tensor.size, elements))
    return regions


def _plain(tensor: _Tensor) -> Elements | None:
    """A tensor that no known operator takes as codes. Bytes may be anything, so they stay bytes."""
    if tensor.kind not in _BITS or tensor.kind == _UINT8 or not tensor.shape:
        return None
    return Elements(_BITS[tensor.kind], math.prod(tensor.shape[1:]))


def _n_bits(node: _Node, tensors: dict[str, _Tensor]) -> dict[str, Elements | None]:
    """Codes of MatMulNBits: uint8 [N, groups, block_size * bits / 8]; zero-points [N, groups], each row whole bytes."""
    codes = tensors.get(node.inputs[1]) if len(node.inputs) > 1 else None
    bits, block = node.attributes.get("bits", 4), node.attributes.get("block_size", 0)
    if codes is None or len(codes.shape) != 3 or bits not in (4, 8) or block <= 0:
        return {}
    groups = codes.shape[1]
    points = tensors.get(node.inputs[3]) if len(node.inputs) > 3 else None
    if points is None or points.kind != _UINT8 or points.file != codes.file:
        return {codes.name: Elements(bits, groups * block, centre=1 << (bits - 1))}
    pitch = -(-groups * bits // 8) * 8 // bits
    return {
        codes.name: Elements(
            bits, groups * block, points=Points(points.offset, pitch * codes.shape[0], pitch, 1, block)
        )
    }


def _dequantized(node: _Node, tensors: dict[str, _Tensor]) -> dict[str, Elements | None]:
    """Codes of DequantizeLinear: [rows, columns], zero-points in blocks along one axis, or one per index of an axis."""
    codes = tensors.get(node.inputs[0]) if node.inputs else None
    if codes is None or codes.kind not in _BITS or len(codes.shape) != 2:
        return {}
    rows, columns = codes.shape
    bits = _BITS[codes.kind]
    points = tensors.get(node.inputs[2]) if len(node.inputs) > 2 else None
    if points is None or points.kind != codes.kind or points.file != codes.file or bits > 8:
        return {codes.name: Elements(bits, columns)}
    shape = points.shape
    if len(shape) < 2:
        length = math.prod(shape)
        by_rows = node.attributes.get("axis", 1) % 2 == 0
        shape = [1, 1] if length == 1 else [length, 1] if by_rows else [1, length]
    if len(shape) != 2 or any(there <= 0 or whole % there for whole, there in zip(codes.shape, shape, strict=True)):
        return {codes.name: Elements(bits, columns)}
    down, across = shape
    return {
        codes.name: Elements(
            bits, columns, points=Points(points.offset, down * across, across, rows // down, columns // across)
        )
    }


def _read_model(buffer: memoryview) -> tuple[dict[str, _Tensor], list[_Node]]:
    tensors: dict[str, _Tensor] = {}
    nodes: list[_Node] = []
    for graph in fields(buffer, 0, len(buffer)):
        if graph.number != 7:
            continue
        for part in fields(buffer, graph.begin, graph.end):
            if part.number == 5:
                tensor = _read_tensor(buffer, part.begin, part.end)
                tensors[tensor.name] = tensor
            elif part.number == 1:
                nodes.append(_read_node(buffer, part.begin, part.end))
    return tensors, nodes


def _read_tensor(buffer: memoryview, begin: int, end: int) -> _Tensor:
    tensor, location = _Tensor(), 0
    for part in fields(buffer, begin, end):
        if part.number == 1:
            tensor.shape += numbers(buffer, part)
        elif part.number == 2:
            tensor.kind = part.value
        elif part.number == 8:
            tensor.name = text(buffer, part)
        elif part.number == 9:
            tensor.offset, tensor.size = part.begin, part.end - part.begin
        elif part.number == 13:
            entry = {inner.number: text(buffer, inner) for inner in fields(buffer, part.begin, part.end)}
            tensor.external[entry.get(1, "")] = entry.get(2, "")
        elif part.number == 14:
            location = part.value
    if location == _EXTERNAL:
        tensor.file = tensor.external.get("location", "")
        tensor.offset = int(tensor.external.get("offset", "0"))
        tensor.size = int(tensor.external.get("length", "0"))
    return tensor


def _read_node(buffer: memoryview, begin: int, end: int) -> _Node:
    node = _Node()
    for part in fields(buffer, begin, end):
        if part.number == 1:
            node.inputs.append(text(buffer, part))
        elif part.number == 4:
            node.kind = text(buffer, part)
        elif part.number == 5:
            name, value = "", 0
            for inner in fields(buffer, part.begin, part.end):
                if inner.number == 1:
                    name = text(buffer, inner)
                elif inner.number == 3:
                    value = inner.value
            node.attributes[name] = value
    return node
