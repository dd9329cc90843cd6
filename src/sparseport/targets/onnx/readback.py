"""Read the weights of a written ONNX folder back, with none of the writer's code.

The protobuf is parsed by the onnx package; bytes of external tensors are taken from the data file by their own offsets,
which must stay inside the folder and the file. The graph is followed from each product and look-up to the constants
behind it, so a weight counts as present only if it is really used, and as quantised only if the nodes around it
compute scales * (codes - zero_points).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.targets.onnx.adapter_back import adapter_branches
from sparseport.targets.onnx.branch_back import FoundBranch, find_branches, is_branch_constant
from sparseport.targets.onnx.graph_file import OnnxGraph
from sparseport.targets.onnx.structure import Entry, look_up_entry, node_entry, product_entry, structure_digest
from sparseport.targets.read_back import BranchBack, ReadBack, Shapes, SlotShape
from sparseport.weights.grouping import without_filling
from sparseport.weights.linear import U8, Array, DenseWeight, QuantizedWeight

# Which input of a node is a matrix of weights.
_MATRIX_SIDES = {"MatMul": (0, 1), "Gemm": (0, 1), "FusedMatMul": (0, 1), "MatMulNBits": (1,), "Gather": (0,),
                 "GatherBlockQuantized": (0,), "EmbedLayerNormalization": (2,)}  # fmt: skip
_PASSED = ("Transpose", "Cast", "DequantizeLinear", "Reshape", "Sub", "Mul")
_PLUS_ONE = ".plus_one"
_FLOAT16 = 10
# Tables of the rotary embedding, which the builder computes from the config.
_ROTARY = re.compile(r"(cos|sin)_cache(_global|_local)?$")
_LAYER = re.compile(r"(?:^|[./])(?:layers|h|blocks)\.(\d+)(?=[./]|$)")


@dataclass(frozen=True)
class _Found:
    """Rows of one or several layers as one tensor holds them, and the product or look-up that they were found in."""

    label: str
    weight: QuantizedWeight | DenseWeight
    element_type: str
    entry: Entry


class OnnxReader:
    """The reader of `targets.read_back` for an ONNX folder."""

    graph_file = "model.onnx"
    data_file = "model.onnx.data"

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        # What `weights` came across: products and look-ups, branches, and names of norms and biases.
        self._entries: list[Entry] = []
        self._branches: list[FoundBranch] = []
        self._norms: set[str] = set()

    @classmethod
    def open(cls, folder: Path) -> OnnxReader:
        """Parse a folder's graph; raises as `OnnxGraph`."""
        return cls(OnnxGraph(folder, cls.graph_file))

    def weights(self, shapes: Shapes) -> Iterator[ReadBack]:
        """See `GraphReader.weights`; names that are joined by `+` are layers of one tensor."""
        places: dict[str, list[str]] = {}
        readers: dict[str, list[Callable[[], _Found]]] = {}
        for node in self.graph.nodes:
            for label, read in self._matrices(node):
                places.setdefault(label, []).append(node.name)
                readers.setdefault(label, []).append(read)
        self._entries.clear()
        for label, (read, *others) in readers.items():
            found = read()
            uses = [found, *(other() for other in others)]
            # A table that is looked up and multiplied with must be the same weight in both uses.
            if not all(_same(found, use) for use in uses):
                raise VerificationError("a weight is used in two different ways", where=label)
            self._entries.extend(use.entry for use in uses)
            yield from _split(found, tuple(places[label]), shapes)
        self._branches = find_branches(self.graph, self._entries)
        self._norms.clear()
        for name in self.graph.tensors:
            values = self._small(name)
            if values is not None:
                users = tuple(node.name for node in self.graph.users.get(name, ()))
                if not users:
                    raise VerificationError("weight is not used", where=name)
                self._norms.add(name)
                yield from _split_small(name, values, users, shapes)

    def branches(self) -> Iterator[BranchBack]:
        """See `GraphReader.branches`."""
        for branch in self._branches:
            if not branch.slot:
                yield branch.read(self.graph)

    def adapter(self, name: str) -> Iterator[BranchBack]:
        """See `GraphReader.adapter`."""
        return adapter_branches(self.graph.folder, name, self.places())

    def places(self) -> dict[str, SlotShape]:
        """After `weights`: module -> what its place for adapters takes."""
        return {branch.module: branch.takes(self.graph) for branch in self._branches if branch.slot}

    def around(self) -> dict[str, Any]:
        """See `GraphReader.around`: a digest of what is no weight, and the accuracy levels of MatMulNBits."""
        graph = self.graph
        graph.check()
        products = {entry["out"][0]: entry for entry in self._entries}
        taken = {value for entry in self._entries for value in entry["out"]} | graph.spent
        rest = []
        for node in graph.nodes:
            if set(node.output) <= taken:
                continue
            joined = _joined(node, products)
            rest.append(joined or node_entry(node))
        parts = {value for entry in rest if entry["op"] == "product" for value in entry.pop("parts")}
        entries = [entry for entry in self._entries if entry["out"][0] not in parts] + rest
        own = [name for name in graph.tensors if name not in graph.spent and name not in self._norms]
        return {
            "graph_sha256": structure_digest(graph.model, entries, {name: graph.digest_of(name) for name in own}),
            "accuracy_levels": sorted(
                {
                    next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)
                    for node in graph.nodes
                    if node.op_type == "MatMulNBits"
                }
            ),
        }

    def unnamed_matrices(self, named: set[str]) -> list[str]:
        """See `GraphReader.unnamed_matrices`."""
        unknown = set()
        slots = {f"{branch.module}.lora_{side}" for branch in self._branches if branch.slot for side in "AB"}
        for node in self.graph.nodes:
            for side in _MATRIX_SIDES.get(node.op_type, ()):
                constant = self.graph.constant_behind(node.input[side], _PASSED) if side < len(node.input) else None
                if constant is None or _ROTARY.match(constant) or constant in slots:
                    continue
                if sum(length != 1 for length in self.graph.shape(constant)) < 2:
                    continue
                label = re.sub(r"\.(codes|scales|zero_points)$", "", constant)
                unknown |= {part for part in label.split("+") if part not in named}
        return sorted(unknown)

    def misplaced(self, module: str, places: tuple[str, ...], tied_head: bool) -> str | None:
        """A weight of a numbered layer belongs to nodes of the same number; others are told by the certificate."""
        del tied_head
        number = _LAYER.search(module)
        for place in places:
            found = _LAYER.search(place.removesuffix(f"/{module}"))
            if (found and found[1]) != (number and number[1]):
                return place
        return None

    def _matrices(self, node: Any) -> Iterator[tuple[str, Callable[[], _Found]]]:
        """Labels of the matrices that a node uses, each with what reads it.

        Raises:
            VerificationError: a named weight is used in a way that no layer of a model uses it.
        """
        graph = self.graph
        if node.op_type == "MatMulNBits":
            yield graph.label(node.input[1], ".codes"), lambda: self._nbits(node)
        elif node.op_type == "MatMul":
            if graph.constant_behind(node.input[0], _PASSED) is not None:
                raise VerificationError("a weight stands on the left side of a product", where=node.name)
            constant = graph.constant_behind(node.input[1], _PASSED)
            if constant is None or len(graph.shape(constant)) < 2 or is_branch_constant(constant):
                return  # branches are followed when all products are known
            if constant.endswith(".codes"):
                yield constant.removesuffix(".codes"), lambda: self._dequantized(node)
            else:
                yield constant, lambda: self._multiplied(node, constant)
        elif node.op_type == "Gather" and node.input[0] in graph.tensors and len(graph.shape(node.input[0])) >= 2:
            name = node.input[0]
            if name.endswith((".scales", ".zero_points")):
                return  # looked up beside their codes, and checked there
            if name.endswith(".codes"):
                yield name.removesuffix(".codes"), lambda: self._looked_up(node)
            elif not _ROTARY.match(name):
                yield name, lambda: self._plain_look_up(node)

    def _dense(self, constant: str, entry: Entry) -> _Found:
        values = self.graph.values(constant)
        self.graph.spent.add(constant)
        kinds = {"float16": "f16", "float32": "f32"}
        if values.dtype.name not in kinds:
            raise VerificationError("a weight is of an unknown type", where=constant, found=values.dtype.name)
        return _Found(constant, DenseWeight(values), kinds[values.dtype.name], entry)

    def _plain_look_up(self, node: Any) -> _Found:
        """Gather(table), and for a table in float16 a Cast of what was looked up."""
        y = node.output[0]
        _check_axis(node, 0)
        if self.graph.tensors[node.input[0]].data_type == _FLOAT16:
            self.graph.spent.add(y)
            y = self.graph.producer(self.graph.only_user(y, "Cast").output[0], "Cast").output[0]
        return self._dense(node.input[0], look_up_entry(node.name, node.input[1], y, _modules(node.input[0])[0]))

    def _multiplied(self, node: Any, constant: str) -> _Found:
        """MatMul(x, Transpose(Cast(weight))): one Transpose, or a square weight would pass the wrong way round."""
        if not self.graph.is_transposed(node.input[1]):
            raise VerificationError("a weight is multiplied without being transposed", where=constant)
        if self.graph.behind(self.graph.producer(node.input[1], "Transpose").input[0], ("Cast",)) != constant:
            raise VerificationError("a weight is computed by something else", where=constant)
        return self._dense(constant, self._product(node, constant, node.input[0]))

    def _product(self, node: Any, label: str, x: str) -> Entry:
        return product_entry(node.name, x, node.output[0], _modules(label))

    def _nbits(self, node: Any) -> _Found:
        """MatMulNBits, as ONNX Runtime's contrib operators define it."""
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        label = self.graph.label(node.input[1], ".codes")
        bits, block = int(attributes.get("bits", 4)), int(attributes["block_size"])
        columns, rows = int(attributes["K"]), int(attributes["N"])
        if bits not in (4, 8) or columns % block or (len(node.input) > 4 and any(node.input[4:])):
            raise VerificationError(
                "a quantised layer of an unknown layout", where=label, found=f"{bits} bits, {columns}"
            )
        groups = columns // block
        names = [*node.input, ""]
        codes = _unpacked(self._shaped(names[1], (rows, groups, block * bits // 8)), bits).reshape(rows, columns)
        zero_points = None
        if names[3]:
            packed = self._shaped(names[3], (rows, -(-groups * bits // 8)))
            wide = _unpacked(packed, bits)
            if wide[:, groups:].any():
                raise VerificationError("zero-points have more values than groups", where=label)
            zero_points = np.ascontiguousarray(wide[:, :groups])
        scales = self._shaped(self.graph.behind(names[2], ("Cast",)), (rows, groups))
        return self._quantized(label, codes, scales, zero_points, block, bits, node)

    def _dequantized(self, node: Any) -> _Found:
        """MatMul with a weight that is dequantised by rows and transposed, or by columns."""
        graph = self.graph
        value = node.input[1]
        transposed = graph.is_transposed(value)
        if transposed:
            value = graph.producer(value, "Transpose").input[0]
            if value in graph.producers and graph.producers[value].op_type == "Reshape":
                label, weight = self._computed(value, [-1], None)
                return _Found(label, weight, "u8", self._product(node, label, node.input[0]))
        dequantize = graph.producer(value, "DequantizeLinear")
        attributes = {attribute.name: attribute.i for attribute in dequantize.attribute}
        label = graph.label(dequantize.input[0], ".codes")
        axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
        if axis != (1 if transposed else 0) or block < 1 or len(dequantize.input) != 3:
            found = f"axis {axis}, blocks of {block}"
            raise VerificationError("a quantised layer of an unknown layout", where=label, found=found)
        codes = graph.values(dequantize.input[0])
        bits = graph.bits(dequantize.input[0])
        if codes.ndim != 2 or codes.shape[axis] % block:
            raise VerificationError("blocks do not divide the codes", where=label, found=f"{codes.shape}, {block}")
        narrow = tuple(n // block if i == axis else n for i, n in enumerate(codes.shape))
        points = self._shaped(dequantize.input[2], narrow)
        scales = self._shaped(graph.behind(dequantize.input[1], ("Cast",)), narrow)
        if not transposed:
            codes, points, scales = (np.ascontiguousarray(part.T) for part in (codes, points, scales))
        return self._quantized(label, codes, scales, points, block, bits, node)

    def _looked_up(self, node: Any) -> _Found:
        """A quantised table whose codes, zero-points and scales are looked up by the same indices."""
        value, graph = node.output[0], self.graph
        for kind in ("Cast", "Reshape", "Sub", "Mul", "Reshape"):
            value = graph.only_user(value, kind).output[0]
        label, weight = self._computed(value, [0, 0], node.input[1])
        return _Found(label, weight, "u8", look_up_entry(node.name, node.input[1], value, _modules(label)[0]))

    def _computed(self, value: str, lead: list[int], indices: str | None) -> tuple[str, QuantizedWeight]:
        """Reshape((Reshape(Cast(codes)) - Reshape(Cast(zero_points))) * Reshape(Cast(scales))), followed from its end.

        Args:
            value: the result.
            lead: the leading lengths in every Reshape.
            indices: what codes, zero-points and scales are each looked up by, or None if they are taken whole.
        """
        graph = self.graph
        final = graph.producer(value, "Reshape")
        multiply = graph.producer(final.input[0], "Mul")
        subtract = graph.producer(multiply.input[0], "Sub")
        tables, shapes = [], [graph.values(final.input[1]).tolist()]
        graph.spent.add(final.input[1])
        for part, cast in ((subtract.input[0], True), (subtract.input[1], True), (multiply.input[1], False)):
            reshape = graph.producer(part, "Reshape")
            shapes.append(graph.values(reshape.input[1]).tolist())
            graph.spent.add(reshape.input[1])
            source = graph.producer(reshape.input[0], "Cast").input[0] if cast else reshape.input[0]
            if indices is not None:
                gather = graph.producer(source, "Gather")
                _check_axis(gather, 0)
                if gather.input[1] != indices:
                    raise VerificationError("parts of a quantised table are looked up differently", where=gather.name)
                source = gather.input[0]
            tables.append(graph.behind(source, ("Cast",)))
        label = graph.label(tables[0], ".codes")
        codes, points, scales = (graph.values(name) for name in tables)
        rows = codes.shape[0]
        codes, points, scales = (part.reshape(rows, -1) for part in (codes, points, scales))
        groups = points.shape[1]
        block = codes.shape[1] // max(groups, 1)
        wanted = [[*lead, codes.shape[1]], [*lead, groups, block], [*lead, groups, 1], [*lead, groups, 1]]
        names = [f"{label}.{part}" for part in ("codes", "zero_points", "scales")]
        if shapes != wanted or tables != names or points.shape != scales.shape or block * groups != codes.shape[1]:
            raise VerificationError("parts of a quantised table do not fit each other", where=label)
        if codes.dtype != np.uint8 or points.dtype != np.uint8 or graph.bits(tables[0]) != 8:
            raise VerificationError("a quantised table is not of 8-bit codes", where=label)
        _check_finite(scales, label)
        return label, QuantizedWeight(codes, scales, points, block, 8)

    def _quantized(
        self, label: str, codes: U8, scales: Array, zero_points: U8 | None, block: int, bits: int, node: Any
    ) -> _Found:
        middle = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
        _check_finite(scales, label)
        x, order = self._order(node.input[0], label)
        points = middle if zero_points is None else zero_points
        weight = QuantizedWeight(codes, np.array(scales), points, block, bits, input_order=order)
        return _Found(label, without_filling(weight, label), f"u{bits}", self._product(node, label, x))

    def _order(self, x: str, label: str) -> tuple[str, Any]:
        """What a layer reads before its act-order permutation, and the permutation, if there is one."""
        gather = self.graph.producers.get(x)
        if gather is None or gather.op_type != "Gather" or gather.input[1] != f"{label}.input_order":
            return x, None
        _check_axis(gather, -1)
        self.graph.spent.update((x, gather.input[1]))
        return gather.input[0], np.array(self.graph.values(gather.input[1]))

    def _shaped(self, name: str, shape: tuple[int, ...]) -> Any:
        """A constant's values, which must have a shape.

        Raises:
            VerificationError: they have another one.
        """
        values = self.graph.values(name)
        self.graph.spent.add(name)
        if values.shape != shape:
            raise VerificationError("constant has the wrong shape", where=name, expected=shape, found=values.shape)
        return values

    def _small(self, name: str) -> Array | None:
        """Values of a norm or bias: a float32 vector under a checkpoint's name."""
        stem = name.removesuffix(_PLUS_ONE)
        if len(self.graph.shape(name)) != 1 or not stem.endswith((".weight", ".bias")):
            return None
        values: Array = self.graph.values(name)
        return values if values.dtype == np.float32 else None


def _split(found: _Found, places: tuple[str, ...], shapes: Shapes) -> Iterator[ReadBack]:
    """The layers whose rows a tensor holds, in order.

    Raises:
        VerificationError: the rows of the layers do not add up to those of the tensor.
    """
    names, weight = found.label.split("+"), found.weight
    if len(names) == 1:
        yield ReadBack(found.label, weight, found.element_type, places)
        return
    start = 0
    for name in names:
        shape = shapes.get(name) or shapes.get(name.removesuffix(".weight"))
        if shape is None:
            raise VerificationError("a tensor holds a layer that is not known", where=name)
        rows = slice(start, start + shape[0])
        start = rows.stop
        if isinstance(weight, DenseWeight):
            part: DenseWeight | QuantizedWeight = DenseWeight(weight.values[rows])
        else:
            part = replace(
                weight, codes=weight.codes[rows], scales=weight.scales[rows], zero_points=weight.zero_points[rows]
            )
        # Where layers of one node are products of their own, the node carries the layer's name.
        yield ReadBack(name, part, found.element_type, places)
    if start != weight.shape[0]:
        raise VerificationError("rows do not add up", where=found.label, expected=start, found=weight.shape[0])


def _split_small(label: str, values: Array, places: tuple[str, ...], shapes: Shapes) -> Iterator[ReadBack]:
    plus_one = label.endswith(_PLUS_ONE)
    names = label.removesuffix(_PLUS_ONE).split("+")
    start = 0
    for name in names:
        if name not in shapes:
            raise VerificationError("a tensor is not known", where=name)
        stop = start + int(np.prod(shapes[name]))
        yield ReadBack(name, DenseWeight(values[start:stop]), "f32", places, added=int(plus_one))
        start = stop
    if start != values.size:
        raise VerificationError("elements do not add up", where=label, expected=start, found=values.size)


def _same(one: _Found, other: _Found) -> bool:
    if isinstance(one.weight, DenseWeight) or isinstance(other.weight, DenseWeight):
        return one.label == other.label and type(one.weight) is type(other.weight)
    return all(
        np.array_equal(getattr(one.weight, part), getattr(other.weight, part))
        for part in ("codes", "zero_points", "scales", "input_order")
    )


def _modules(label: str) -> list[str]:
    """The layers whose rows a tensor holds, by its label."""
    return [part.removesuffix(".weight") for part in label.split("+")]


def _joined(node: Any, products: Mapping[str, Entry]) -> Entry | None:
    """One product, where a node joins the results of several in the order of their layers; else None."""
    parts = [products.get(value) for value in node.input]
    name = node.name.removesuffix("/Concat")
    axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    if node.op_type != "Concat" or name == node.name or axis != [-1] or not all(parts):
        return None
    found = [part for part in parts if part is not None]
    if any(part["name"] != f"{name}/{part['of'][0]}" or part["in"] != found[0]["in"] for part in found):
        return None
    entry = product_entry(name, found[0]["in"][0], node.output[0], [module for part in found for module in part["of"]])
    for kind in ("branches", "slots"):
        if beside := [module for part in found for module in part.get(kind, [])]:
            entry[kind] = beside
    return {**entry, "parts": list(node.input)}


def _check_axis(gather: Any, axis: int) -> None:
    """A Gather takes its first axis unless it says otherwise.

    Raises:
        VerificationError: it takes another one.
    """
    found = next((attribute.i for attribute in gather.attribute if attribute.name == "axis"), 0)
    if found != axis:
        what = "act-order permutes another axis than the columns" if axis == -1 else "a table is looked up otherwise"
        raise VerificationError(what, where=gather.name, found=found)


def _check_finite(scales: Array, label: str) -> None:
    """Neither onnx's checker nor ONNX Runtime minds a NaN among scales.

    Raises:
        VerificationError: a scale is NaN or infinite.
    """
    if not np.isfinite(scales.astype(np.float32)).all():
        raise VerificationError("scales hold NaN or Inf", where=label)


def _unpacked(packed: U8, bits: int) -> U8:
    """Bytes -> values: for 4 bits the low half of each byte comes first, along the last axis."""
    if bits == 8:
        return np.array(packed)
    low, high = packed & np.uint8(15), packed >> np.uint8(4)
    values: U8 = np.stack([low, high], axis=-1).reshape(*packed.shape[:-1], -1)
    return values
