"""Where the tensors of an OpenVINO IR lie in its .bin: from the .xml alone, without OpenVINO.

Format: every Const layer has <data element_type shape offset size/>; <edges> say which layer's output feeds which port.
Only the shape of the graph around a constant is used, no names, so that IRs of other tools are understood as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from sparseport.transit.layout import Elements, Points, Region

# Text and tables are stored as u8, so bytes count as codes only where zero-points stand beside them.
_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "i4": 4, "u4": 4, "i8": 8, "u8": 8}
_WITH_POINTS_ONLY = ("u8",)


def ir_regions(xml: Path) -> list[Region]:
    """The constants of an IR as regions of its .bin.

    Raises:
        ValueError, KeyError, AttributeError, ElementTree.ParseError: this is no IR.
    """
    root = ElementTree.parse(xml).getroot()
    # Bodies of loops have layers of their own inside a layer; only the outermost count.
    layers = {layer.attrib["id"]: layer for layer in root.findall("./layers/layer")}
    graph = _Edges(layers, root.findall("./edges/edge"))
    return [region for number in graph.constants for region in _region(graph, number)]


class _Edges:
    """Constants by their layer's number, and how they are connected."""

    def __init__(self, layers: dict[str, ElementTree.Element], edges: list[ElementTree.Element]) -> None:
        self.kinds = {number: layer.attrib["type"] for number, layer in layers.items()}
        self.constants = {
            number: layer.find("data").attrib  # type: ignore[union-attr]
            for number, layer in layers.items()
            if layer.attrib["type"] == "Const"
        }
        self.users: dict[str, list[tuple[str, str]]] = {}
        self.sources: dict[tuple[str, str], str] = {}
        for edge in edges:
            source = edge.attrib["from-layer"]
            target = edge.attrib["to-layer"], edge.attrib["to-port"]
            self.users.setdefault(source, []).append(target)
            self.sources[target] = source

    def subtracted(self, number: str) -> str | None:
        """The constant that is subtracted from a constant, both behind a Convert: the zero-points of codes."""
        for convert, _ in self.users.get(number, []):
            for subtract, port in self.users.get(convert, []):
                if self.kinds[convert] == "Convert" and self.kinds[subtract] == "Subtract" and port == "0":
                    other = self.sources.get((subtract, "1"), "")
                    found = self.sources.get((other, "0"), "") if self.kinds.get(other) == "Convert" else other
                    return found if found in self.constants else None
        return None


def _region(graph: _Edges, number: str) -> Iterator[Region]:
    data = graph.constants[number]
    kind, shape = data["element_type"], _shape(data["shape"])
    if kind not in _BITS or not shape:
        return
    columns = math.prod(shape[1:])
    points = _points(graph, number, shape)
    if kind in _WITH_POINTS_ONLY and points is None:
        return
    yield Region(int(data["offset"]), int(data["size"]), Elements(_BITS[kind], columns, points=points))


def _points(graph: _Edges, number: str, shape: list[int]) -> Points | None:
    other = graph.subtracted(number)
    if other is None or graph.constants[other]["element_type"] != graph.constants[number]["element_type"]:
        return None
    theirs = _shape(graph.constants[other]["shape"])
    theirs = [1] * (len(shape) - len(theirs)) + theirs
    shared = len(theirs)
    while shared and theirs[shared - 1] == 1:
        shared -= 1
    # Zero-points have the codes' shape up to some axis, and are shared along the axes behind it.
    if theirs[:shared] != shape[:shared]:
        return None
    offset, count = int(graph.constants[other]["offset"]), math.prod(theirs)
    if shared > 1:
        return Points(offset, count, math.prod(theirs[1:]), 1, math.prod(shape[shared:]))
    # One for each row, or one for all.
    return Points(offset, count, 1, 1 if shared else shape[0], math.prod(shape[1:]))


def _shape(text: str) -> list[int]:
    return [int(length) for length in text.split(",") if length.strip()]
