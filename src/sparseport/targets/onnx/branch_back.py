"""Read the branches of a written ONNX graph back: a strict path from each matrix A to the sum with its own product.

None of the writer's code is used. What was found enters the entries of the products that it belongs to (`branches`), so
that a branch that is gone, fed from elsewhere or added elsewhere changes the digest of the graph as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.targets.onnx.graph_file import OnnxGraph
from sparseport.targets.onnx.structure import Entry
from sparseport.targets.read_back import BranchBack
from sparseport.weights.linear import LowRankBranch

A, B, SCALING = ".lora_A.weight", ".lora_B.weight", ".lora_scaling"


def is_branch_constant(name: str) -> bool:
    """Whether a constant is a matrix of a branch, by its name."""
    return name.endswith((A, B))


@dataclass(frozen=True)
class FoundBranch:
    """A branch in a graph.

    x       what it takes
    result  what is added to the product of its module
    """

    module: str
    x: str
    result: str

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
            constant = graph.constant_behind(node.input[1], ("Transpose", "Cast"))
            if constant is not None and constant.endswith(A):
                branch = _follow(graph, node, constant.removesuffix(A))
                found[branch.result] = branch
    waiting = dict(found)
    for entry in entries:
        for branch in _join(graph, entry, found):
            waiting.pop(branch.result, None)
    if waiting:
        module = next(iter(waiting.values())).module
        raise VerificationError("a branch is not added to the product of its layer", where=module)
    return list(found.values())


def _follow(graph: OnnxGraph, first: Any, module: str) -> FoundBranch:
    """Mul(MatMul(MatMul(x, A^T), B^T), scaling), followed from its beginning."""
    _matrix(graph, first, f"{module}{A}")
    graph.spent.add(first.output[0])
    second = graph.only_user(first.output[0], "MatMul")
    if second.input[0] != first.output[0]:
        raise VerificationError("operation missing in a branch", where=module, expected="MatMul with B")
    _matrix(graph, second, f"{module}{B}")
    multiply = graph.only_user(second.output[0], "Mul")
    if sorted(multiply.input) != sorted([second.output[0], f"{module}{SCALING}"]):
        raise VerificationError("a branch is scaled by something else", where=module, found=list(multiply.input))
    graph.spent.add(f"{module}{SCALING}")
    return FoundBranch(module, first.input[0], multiply.output[0])


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
    graph.spent.update((base, *others))
    entry["out"] = [add.output[0]]
    entry["branches"] = modules
    return beside
