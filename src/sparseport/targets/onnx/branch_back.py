"""Read the branches of a written ONNX graph back: a strict path from each matrix A to the sum with its own product.

None of the writer's code is used. What was found enters the entries of the products that it belongs to (`branches`, or
`slots` for places that an adapter's file fills), so that a branch that is gone, fed from elsewhere or added elsewhere
changes the digest of the graph as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.targets.onnx.graph_file import OnnxGraph
from sparseport.targets.onnx.structure import Entry
from sparseport.targets.read_back import BranchBack, SlotShape
from sparseport.weights.linear import LowRankBranch

A, B, SCALING = ".lora_A.weight", ".lora_B.weight", ".lora_scaling"
# Optional inputs of the graph, which lie the other way round: a [in, rank], b [rank, out].
SLOT_A, SLOT_B = ".lora_A", ".lora_B"
_TYPES = {1: "float32", 10: "float16"}


def is_branch_constant(name: str) -> bool:
    """Whether a constant is a matrix of a branch, by its name."""
    return name.endswith((A, B, SLOT_A, SLOT_B))


@dataclass(frozen=True)
class FoundBranch:
    """A branch in a graph.

    x       what it takes
    result  what is added to the product of its module
    slot    whether its values come from an adapter's file, and by default from nowhere
    """

    module: str
    x: str
    result: str
    slot: bool = False

    def takes(self, graph: OnnxGraph) -> SlotShape:
        """What an adapter's file may fill a slot with."""
        a, b = (graph.inputs[f"{self.module}{part}"].type.tensor_type for part in (SLOT_A, SLOT_B))
        shape = b.shape.dim[1].dim_value, a.shape.dim[0].dim_value
        return SlotShape(shape, (_TYPES.get(a.elem_type, "?"), _TYPES.get(b.elem_type, "?")))

    def read(self, graph: OnnxGraph) -> BranchBack:
        """Its values, in the dtypes they are stored in.

        Raises:
            VerificationError: the matrices do not fit each other, or are of an unknown type.
        """
        a, b, scaling = (graph.values(f"{self.module}{part}") for part in (A, B, SCALING))
        kinds = {a.dtype.name, b.dtype.name} - {"float16", "float32"}
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or kinds:
            raise VerificationError(
                "a branch's matrices do not fit each other", where=self.module, found=f"{a.shape}, {b.shape}"
            )
        if scaling.shape != (1,) or scaling.dtype != np.float32:
            raise VerificationError("a branch's scaling is no float32 number", where=self.module, found=scaling.shape)
        return BranchBack(self.module, LowRankBranch(np.array(a), np.array(b), float(scaling[0])))


def find_branches(graph: OnnxGraph, entries: Sequence[Entry]) -> list[FoundBranch]:
    """Every branch of a graph; the entries of their products get the sum as result, and the modules as `branches`.

    Raises:
        VerificationError: a branch is computed in another way, or not added to its own product.
    """
    found: dict[str, FoundBranch] = {}
    for node in graph.nodes:
        if node.op_type == "MatMul":
            constant = graph.constant_behind(node.input[1], ("Transpose", "Cast")) or ""
            if constant.endswith((A, SLOT_A)):
                slot = constant.endswith(SLOT_A)
                branch = _follow(graph, node, constant.removesuffix(SLOT_A if slot else A), slot)
                found[branch.result] = branch
    waiting = dict(found)
    for entry in entries:
        for branch in _join(graph, entry, found):
            waiting.pop(branch.result, None)
    if waiting:
        module = next(iter(waiting.values())).module
        raise VerificationError("a branch is not added to the product of its layer", where=module)
    return list(found.values())


def _follow(graph: OnnxGraph, first: Any, module: str, slot: bool) -> FoundBranch:
    """Mul(MatMul(MatMul(x, A^T), B^T), scaling), followed from its beginning."""
    check, names = (_slot, (SLOT_A, SLOT_B)) if slot else (_matrix, (A, B))
    check(graph, first, f"{module}{names[0]}")
    graph.spent.add(first.output[0])
    second = graph.only_user(first.output[0], "MatMul")
    if second.input[0] != first.output[0]:
        raise VerificationError("operation missing in a branch", where=module, expected="MatMul with B")
    check(graph, second, f"{module}{names[1]}")
    multiply = graph.only_user(second.output[0], "Mul")
    if sorted(multiply.input) != sorted([second.output[0], f"{module}{SCALING}"]):
        raise VerificationError("a branch is scaled by something else", where=module, found=list(multiply.input))
    scaling = f"{module}{SCALING}"
    graph.spent.add(scaling)
    if (scaling in graph.inputs) != slot or (slot and graph.values(scaling).tolist() != [1.0]):
        raise VerificationError("a branch's scaling is in an unknown place", where=scaling)
    return FoundBranch(module, first.input[0], multiply.output[0], slot)


def _matrix(graph: OnnxGraph, node: Any, name: str) -> None:
    """The right side of a product must be a constant of a name, transposed, and widened if it is float16.

    Raises:
        VerificationError: it is something else.
    """
    value = node.input[1]
    if not graph.is_transposed(value):
        raise VerificationError("a branch's matrix is multiplied without being transposed", where=name)
    if graph.behind(graph.producer(value, "Transpose").input[0], ("Cast",)) != name:
        raise VerificationError("a branch is made of another constant", where=name)


def _slot(graph: OnnxGraph, node: Any, name: str) -> None:
    """The right side of a product must be an input of a name, of rank 0 by default, and widened if it is float16.

    Raises:
        VerificationError: it is something else, or holds values of its own.
    """
    value = node.input[1]
    if value != name:
        value = graph.producer(value, "Cast").input[0]
    if value != name or name not in graph.inputs:
        raise VerificationError("a branch is made of something else than its input", where=name, found=value)
    side = 1 if name.endswith(SLOT_A) else 0
    shape = graph.shape(name)
    if len(shape) != 2 or shape[side] != 0:
        raise VerificationError("a place for adapters holds values of its own", where=name, found=shape)
    graph.spent.add(name)


def _join(graph: OnnxGraph, entry: Entry, found: dict[str, FoundBranch]) -> list[FoundBranch]:
    """The branches that a product's only user adds to it, which must be those of all its layers, in their order.

    Raises:
        VerificationError: a branch is that of another layer, or takes another activation.
    """
    base = entry["out"][0]
    users = graph.users.get(base, [])
    if entry["op"] != "product" or len(users) != 1 or users[0].op_type != "Add":
        return []
    add = users[0]
    others = [value for value in add.input if value != base]
    results = others
    concat = graph.producers.get(others[0]) if len(others) == 1 else None
    if concat is not None and concat.op_type == "Concat" and set(concat.input) & set(found):
        axis = [attribute.i for attribute in concat.attribute if attribute.name == "axis"]
        if axis != [-1] or len(graph.users.get(others[0], [])) != 1:
            raise VerificationError("branches are joined in an unknown way", where=concat.name)
        results = list(concat.input)
    if not set(results) & set(found):
        return []
    beside = [found[result] for result in results if result in found]
    modules = [branch.module for branch in beside]
    if modules != entry["of"] or len(beside) != len(results):
        raise VerificationError(
            "a branch is added to another layer than its own", where=entry["name"], expected=entry["of"], found=modules
        )
    for branch in beside:
        if branch.x != entry["in"][0]:
            raise VerificationError("a branch takes another activation than its layer", where=branch.module)
        if len(graph.users.get(branch.result, [])) != 1:
            raise VerificationError("a branch is used elsewhere as well", where=branch.module)
    if len({branch.slot for branch in beside}) != 1:
        raise VerificationError("branches of two kinds are joined", where=entry["name"])
    graph.spent.update((base, *others))
    entry["out"] = [add.output[0]]
    entry["slots" if beside[0].slot else "branches"] = modules
    return beside
