"""A digest of everything in an ONNX graph but its weights.

Nodes are named by the values that they make, so their order does not count (onnx's checker looks at that). A product
with a weight, however it is stored, is one entry: its name, input, output and the layers whose rows it multiplies with.
The same entries can be made of the builder's graph before any weight is in it, and of the file that was written; equal
digests mean that nothing was added, left out, exchanged or set to another attribute around the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Entry = dict[str, Any]


def product_entry(name: str, x: str, y: str, modules: Sequence[str]) -> Entry:
    """y = x @ W^T with the rows of these layers, in this order."""
    return {"op": "product", "name": name, "in": [x], "out": [y], "of": list(modules)}


def with_branches(entry: Entry, modules: Sequence[str], slots: bool) -> Entry:
    """A product whose result is the sum with the un-merged branches of these of its layers; without any, itself.

    slots  whether they are places that an adapter's file fills
    """
    return {**entry, "slots" if slots else "branches": list(modules)} if modules else entry


def look_up_entry(name: str, indices: str, y: str, module: str) -> Entry:
    """y = the rows of a table that the indices name, in float32."""
    return {"op": "look-up", "name": name, "in": [indices], "out": [y], "of": [module]}


def node_entry(node: Any) -> Entry:
    """Any other node, with every attribute."""
    attributes = {attribute.name: attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute}
    domain = "" if node.domain == "ai.onnx" else node.domain
    return {
        "op": f"{domain}:{node.op_type}",
        "name": node.name,
        "in": list(node.input),
        "out": list(node.output),
        "attributes": attributes,
    }


def constant_digest(data_type: int, shape: Sequence[int], data: bytes) -> str:
    """A constant that is no weight: its element type, shape and little-endian bytes."""
    header = f"{data_type} {'x'.join(map(str, shape))}\n".encode("ascii")
    return hashlib.sha256(header + data).hexdigest()


def structure_digest(model: Any, entries: Iterable[Entry], constants: Mapping[str, str]) -> str:
    """SHA-256 (hex) of a `ModelProto`'s operator sets, inputs and outputs, its entries and its constants' digests."""
    ports = [
        [side, value.name, value.type.SerializeToString(deterministic=True).hex()]
        for side in ("input", "output")
        for value in getattr(model.graph, side)
    ]
    data = {
        "opsets": sorted([opset.domain, opset.version] for opset in model.opset_import),
        "ports": ports,
        "nodes": sorted(entries, key=lambda entry: (entry["out"], entry["name"])),
        "constants": dict(constants),
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("ascii")).hexdigest()
