"""Put exact weights into the builder's graph: each placeholder becomes the layer that was stored (see `products`).

Norms and biases keep the checkpoint's names. Where the builder joined several, their names are joined by `+`; where it
added 1 (Gemma's norms), the name ends in `.plus_one`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import FidelityError, Unsupported
from sparseport.targets.onnx.branches import StoredLowRank, joinable_with_branches, product_beside
from sparseport.targets.onnx.data_file import DataFile
from sparseport.targets.onnx.products import JOIN, Products
from sparseport.targets.onnx.standard_ops import to_standard_ops
from sparseport.targets.onnx.store import Layout, OnnxStore, Stored
from sparseport.targets.onnx.structure import (
    constant_digest,
    look_up_entry,
    node_entry,
    product_entry,
    structure_digest,
    with_branches,
)
from sparseport.weights.linear import Array

MODEL = "model.onnx"
PLUS_ONE = ".plus_one"
# An input of GroupQueryAttention, and what the number of columns that it turns is a multiple of.
_COS_CACHE, _ROTATED = 7, 16
# Bytes from which a constant goes into the data file.
_LARGE = 1 << 14
Pieces = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Written:
    """What the certificate says of a written graph.

    places        module -> names of the nodes that multiply with its weight, or look it up
    plus_one      names of the tensors that 1 was added to
    graph_sha256  digest of the graph around the weights, taken before they were put in
    """

    places: dict[str, list[str]]
    plus_one: list[str]
    graph_sha256: str


def write_model(
    skeleton: Path,
    folder: Path,
    answer: Mapping[str, Any],
    stored: Mapping[str, Stored],
    small: Mapping[str, Array],
    store: OnnxStore,
    accuracy_level: int,
    branches: Mapping[str, StoredLowRank] | None = None,
) -> Written:
    """Write `model.onnx` and `model.onnx.data` into a folder.

    Args:
        skeleton: the builder's graph.
        folder: where to write.
        answer: what `builder.build_graph` said of it.
        stored: module -> its weight in `store`; the embedding and an untied head among them.
        small: tensor name -> values of norms and biases, any float dtype; stored as float32.
        store: the scratch file.
        accuracy_level: of MatMulNBits; 1 computes in float32, 4 quantises activations to int8.
        branches: module -> its un-merged branch in `store`, for modules that have one.

    Raises:
        FidelityError: a layer has no place in the graph, or a place no layer.
        Unsupported: the layout cannot hold a layer, or ONNX Runtime's attention cannot compute the heads.
    """
    import onnx

    branches = branches or {}
    model = onnx.load(skeleton, load_external_data=False)
    graph = model.graph
    if store.layout is Layout.NBITS:
        _require_rotations(graph)
    outside = {tensor.name for tensor in graph.initializer if tensor.external_data}
    renamed, tensors = _small_tensors(answer["small"], small)
    kept = [tensor for tensor in graph.initializer if tensor.name not in outside | set(answer["small"])]
    for tensor in kept:
        renamed[tensor.name] = tensor.name = _own_name(tensor.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    placeholders = [tensor for tensor in graph.initializer if tensor.name in outside]
    _replace(graph.initializer, [*kept, *tensors, *placeholders])
    standard = store.layout is not Layout.NBITS
    graph.input.extend(port for branch in branches.values() if branch.slot for port in branch.ports())
    expected = _structure(model, answer, stored, branches, {tensor.name for tensor in tensors} | outside, standard)
    with DataFile(folder, store) as data:
        products = Products(data, accuracy_level)
        places = _fill(graph, products, answer, stored, branches)
        own = [_outside_if_large(tensor, data) for tensor in kept]
    _replace(graph.node, products.nodes)
    made = {output for node in products.nodes for output in node.output}
    _replace(graph.value_info, [value for value in graph.value_info if value.name in made])
    _replace(graph.initializer, [*own, *tensors, *products.initializers])
    if standard:
        to_standard_ops(model)
    onnx.save(model, folder / MODEL)
    pieces = [piece for found in answer["small"].values() for piece in found]
    return Written(places, sorted({str(piece[0]) for piece in pieces if piece[3]}), expected)


def _require_rotations(graph: Any) -> None:
    """Refuse heads that GroupQueryAttention does not turn; it would say so only when it runs.

    Raises:
        Unsupported: the columns of a head that positions turn are no multiple of 16.
    """
    tables = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        rotates = any(attribute.name == "do_rotary" and attribute.i for attribute in node.attribute)
        if node.op_type != "GroupQueryAttention" or not rotates:
            continue
        turned = 2 * tables[node.input[_COS_CACHE]][-1]
        if turned % _ROTATED:
            raise Unsupported(
                "ONNX Runtime's GroupQueryAttention cannot turn heads of this size by their positions",
                where=node.name,
                expected=f"a multiple of {_ROTATED} columns",
                found=turned,
                fix="use `--onnx-format qdq`, whose attention is made of standard operators",
            )


def _structure(
    model: Any,
    answer: Mapping[str, Any],
    stored: Mapping[str, Stored],
    branches: Mapping[str, StoredLowRank],
    weights: set[str],
    standard: bool,
) -> str:
    """Digest of the builder's graph before any weight is in it: what a reader has to find around the weights.

    Args:
        model: the graph, its norms and biases under the checkpoint's names.
        answer: what the builder said of it.
        stored: the layers that will be put in.
        branches: the branches that will stand beside some of them.
        weights: names of norms, biases and placeholders.
        standard: whether the graph will be rewritten in standard operators.
    """
    import onnx
    from onnx import numpy_helper

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    if standard:
        to_standard_ops(plain)
    entries = []
    for node in plain.graph.node:
        modules = _modules(answer, node.name, stored)
        if modules is not None:
            product = product_entry(node.name, node.input[0], node.output[0], modules)
            beside = [branches[module] for module in modules if module in branches]
            entries.append(with_branches(product, [b.module for b in beside], any(b.slot for b in beside)))
        elif node.op_type == "Gather" and _is_placeholder(plain.graph, node.input[0]):
            entries.append(look_up_entry(node.name, node.input[1], node.output[0], answer["embedding"]))
        else:
            entries.append(node_entry(node))
    constants = {
        tensor.name: constant_digest(tensor.data_type, tensor.dims, numpy_helper.to_array(tensor).tobytes())
        for tensor in plain.graph.initializer
        if tensor.name not in weights
    }
    return structure_digest(plain, entries, constants)


def _modules(answer: Mapping[str, Any], node: str, stored: Mapping[str, Stored]) -> list[str] | None:
    """The layers that a node of the skeleton stands for, or None; a tied head is the embedding."""
    modules: list[str] | None = answer["matmuls"].get(node)
    if modules is not None and answer["tied"] and modules[0] not in stored:
        return [answer["embedding"]]
    return modules


def _is_placeholder(graph: Any, name: str) -> bool:
    return any(tensor.name == name and tensor.external_data for tensor in graph.initializer)


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Give a repeated field of a protobuf other values."""
    kept = list(values)
    del field[:]
    field.extend(kept)


def _outside_if_large(tensor: Any, data: DataFile) -> Any:
    """A tensor of the builder; a large one moves into the data file."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    return tensor if values.nbytes < _LARGE else data.array(tensor.name, values, tensor.data_type)


def _own_name(name: str) -> str:
    """Norms that a model has without values (OLMo) are constants of the builder, and no tensors of a checkpoint."""
    return f"{name}.constant" if name.endswith((".weight", ".bias")) else name


def _fill(
    graph: Any,
    products: Products,
    answer: Mapping[str, Any],
    stored: Mapping[str, Stored],
    branches: Mapping[str, StoredLowRank],
) -> dict[str, list[str]]:
    """Every node of the skeleton again, with products and look-ups of what was stored; returns where each is used."""
    embedding = answer["embedding"]
    places: dict[str, list[str]] = {}
    for node in graph.node:
        modules = _modules(answer, node.name, stored)
        if modules is None and node.op_type == "Gather" and _is_placeholder(graph, node.input[0]):
            places.setdefault(embedding, []).append(node.name)
            products.look_up(node.name, node.input[1], node.output[0], _of(embedding, stored))
        elif modules is None:
            products.nodes.append(node)
        else:
            names = _products(products, node, modules, [_of(module, stored) for module in modules], branches)
            for module, name in zip(modules, names, strict=True):
                places.setdefault(module, []).append(name)
    if missing := sorted((set(stored) | set(branches)) - set(places)):
        raise FidelityError(
            "the graph has no place for this layer",
            where=missing[0],
            fix="check that config.json belongs to the weights",
        )
    return places


def _products(
    products: Products,
    node: Any,
    modules: Sequence[str],
    parts: Sequence[Stored],
    branches: Mapping[str, StoredLowRank],
) -> list[str]:
    """One product for all parts, or one for each; returns the name of the node that each part is in."""
    if joinable_with_branches(modules, parts, branches):
        product_beside(products, node.name, node.input[0], node.output[0], modules, parts, branches)
        return [node.name] * len(parts)
    # Layers that are stored differently, or of which some have a branch, cannot share one product; their results are
    # joined instead.
    outputs = [f"{node.output[0]}/{module}" for module in modules]
    names = [f"{node.name}/{module}" for module in modules]
    for module, name, output, part in zip(modules, names, outputs, parts, strict=True):
        product_beside(products, name, node.input[0], output, [module], [part], branches)
    products.node("Concat", outputs, node.output[0], f"{node.name}/Concat", axis=-1)
    return names


def _small_tensors(pieces_of: Mapping[str, Pieces], small: Mapping[str, Array]) -> tuple[dict[str, str], list[Any]]:
    """New names of the graph's small tensors, and the tensors with the checkpoint's values.

    Raises:
        Unsupported: the builder took a tensor apart.
        FidelityError: the checkpoint does not hold it.
    """
    from onnx import numpy_helper

    renamed: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for initializer, pieces in pieces_of.items():
        parts = []
        for name, first, last, added in pieces:
            if name not in small:
                raise FidelityError("the graph needs a tensor that the checkpoint does not hold", where=name)
            values = small[name].astype(np.float32).reshape(-1)
            if first or last != values.size or added not in (0, 1) or (added and len(pieces) > 1):
                raise Unsupported("the builder changes this tensor in a way that is not known", where=name)
            parts.append(values + np.float32(added))
        label = JOIN.join(str(piece[0]) for piece in pieces) + (PLUS_ONE if pieces[0][3] else "")
        renamed[initializer] = label
        tensors[label] = numpy_helper.from_array(np.concatenate(parts), label)
    return renamed, list(tensors.values())


def _of(module: str, stored: Mapping[str, Stored]) -> Stored:
    try:
        return stored[module]
    except KeyError:
        raise FidelityError("the graph needs a layer that the checkpoint does not hold", where=module) from None
