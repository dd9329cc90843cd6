"""OpenVINO IR files (`.xml` and `.bin`) as a plain graph: read, change, write.

Only the file format is used (IR version 11): layers with ports, edges between ports, constants as byte ranges of the
`.bin` file. No OpenVINO library is needed, so a graph of any size costs only its XML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from sparseport.errors import BadInput

NUMPY_TYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
ALIGNMENT = 64  # offsets of constants in the .bin file; lets a memory-mapped reader use them without a copy


@dataclass(frozen=True)
class Zeros:
    """The content of a placeholder constant: that many zero bytes, written as a hole in the file."""

    nbytes: int


Payload = bytes | Zeros


@dataclass(eq=False)
class Node:
    """One layer of the graph. `inputs` maps an input port id to the producing node and its output port id."""

    element: ElementTree.Element
    inputs: dict[int, tuple[Node, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.element.attrib["name"]

    @property
    def kind(self) -> str:
        return self.element.attrib["type"]

    @property
    def data(self) -> dict[str, str]:
        """The attributes of the layer's `<data>`; a live dictionary, empty when there is none."""
        data = self.element.find("data")
        return {} if data is None else data.attrib

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a constant."""
        return tuple(int(side) for side in self.data["shape"].split(",") if side.strip())


@dataclass(frozen=True)
class Carrier:
    """The constant that carries one tensor of the checkpoint.

    `form` says what the constant holds of a small tensor: `weight`, or `1 + weight` after constant folding.
    """

    node: Node
    shape: tuple[int, ...]
    form: str = "weight"

    @property
    def is_small(self) -> bool:
        return len(self.shape) < 2


class Graph:
    """A whole IR file. `nodes` is in file order, which fixes the order of parameters, results and sinks."""

    def __init__(self, root: ElementTree.Element, nodes: list[Node], weights: npt.NDArray[np.uint8]) -> None:
        self.root = root
        self.nodes = nodes
        self._weights = weights
        self._replaced: dict[ElementTree.Element, Payload] = {}

    @classmethod
    def read(cls, xml_path: Path) -> Graph:
        """Read `xml_path` and memory-map the `.bin` file next to it."""
        root = ElementTree.parse(xml_path).getroot()
        layers, edges = root.find("layers"), root.find("edges")
        if layers is None or edges is None:
            raise BadInput("not an OpenVINO IR file", where=xml_path, expected="<layers> and <edges>")
        by_id = {layer.attrib["id"]: Node(layer) for layer in layers}
        for edge in edges:
            source, target = by_id[edge.attrib["from-layer"]], by_id[edge.attrib["to-layer"]]
            target.inputs[int(edge.attrib["to-port"])] = (source, int(edge.attrib["from-port"]))
        bin_path = xml_path.with_suffix(".bin")
        empty = bin_path.stat().st_size == 0
        weights = np.zeros(0, np.uint8) if empty else np.memmap(bin_path, np.uint8, mode="r")
        return cls(root, list(by_id.values()), weights)

    def constants(self) -> Iterator[Node]:
        return (node for node in self.nodes if node.kind == "Const")

    def payload(self, node: Node) -> Payload:
        """The bytes of a constant, as read or as set."""
        return self._payload_of(_data_element(node.element))

    def set_payload(self, node: Node, payload: Payload) -> None:
        size = payload.nbytes if isinstance(payload, Zeros) else len(payload)
        if size != int(node.data["size"]):
            raise ValueError(f"constant {node.name} has {node.data['size']} bytes, not {size}")
        self._replaced[_data_element(node.element)] = payload

    def consumers(self) -> dict[Node, list[tuple[Node, int]]]:
        """For each node the (consumer, input port) pairs, in file order of the consumers."""
        found: dict[Node, list[tuple[Node, int]]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for port, (source, _) in node.inputs.items():
                found[source].append((node, port))
        return found

    def number_names(self) -> None:
        """Number the nodes that OpenVINO numbered with a process-wide counter by their position instead.

        Names with a module path, and those of parameters, come from the model and stay.
        """
        self.root.set("name", "Model")
        for index, node in enumerate(self.nodes):
            if node.kind != "Parameter" and not {".", "/"} & set(node.name):
                node.element.set("name", f"{node.kind}_{index}")

    def write(self, xml_path: Path) -> None:
        """Write the graph as `xml_path` and the `.bin` file next to it; the same graph gives the same bytes.

        Layer ids follow the order of `nodes`. Constants of equal content share one range, as OpenVINO writes them.
        """
        self._write_weights(xml_path.with_suffix(".bin"))
        ids = {node: str(index) for index, node in enumerate(self.nodes)}
        layers, edges = self.root.find("layers"), self.root.find("edges")
        assert layers is not None and edges is not None
        layers[:] = [node.element for node in self.nodes]
        edges[:] = []
        for node in self.nodes:
            node.element.set("id", ids[node])
            for port, (source, source_port) in sorted(node.inputs.items()):
                link = {"from-layer": ids[source], "from-port": str(source_port)}
                edges.append(ElementTree.Element("edge", link | {"to-layer": ids[node], "to-port": str(port)}))
        ElementTree.indent(self.root, "\t")
        xml_path.write_bytes(b'<?xml version="1.0"?>\n' + ElementTree.tostring(self.root) + b"\n")

    def _write_weights(self, bin_path: Path) -> None:
        offsets: dict[Payload, int] = {}
        layout: list[tuple[Mapping[str, str], int]] = []
        with bin_path.open("wb") as stream:
            end = 0
            for layer in self._constant_layers():
                data = _data_element(layer)
                payload = self._payload_of(data)
                size = int(data.attrib["size"])
                if payload not in offsets:
                    offsets[payload] = -(-end // ALIGNMENT) * ALIGNMENT
                    end = offsets[payload] + size
                    if isinstance(payload, bytes):
                        stream.seek(offsets[payload])
                        stream.write(payload)
                layout.append((data.attrib, offsets[payload]))
            stream.truncate(end)
        for attributes, offset in layout:
            attributes["offset"] = str(offset)  # type: ignore[index]

    def _constant_layers(self) -> Iterator[ElementTree.Element]:
        # `iter` also reaches the bodies of loops and conditions, whose constants lie in the same .bin file.
        for node in self.nodes:
            yield from (layer for layer in node.element.iter("layer") if layer.attrib["type"] == "Const")

    def _payload_of(self, data: ElementTree.Element) -> Payload:
        if data in self._replaced:
            return self._replaced[data]
        offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
        return self._weights[offset : offset + size].tobytes()


def _data_element(layer: ElementTree.Element) -> ElementTree.Element:
    data = layer.find("data")
    assert data is not None, layer.attrib
    return data
