"""Un-merged low-rank branches beside the products of an ONNX graph, in standard operators:

    x -> MatMul(A^T) -> MatMul(B^T) -> Mul(scaling) -> Add <- product with the base weight <- x

In the graph: the matrices are initializers `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight`
[out, rank], which are transposed and widened as floating-point weights are; the scaling is `<module>.lora_scaling`,
float32 [1]. Where one node multiplies with the rows of several layers, the results of their branches are joined in the
same order.

As a place for adapters: the same nodes, but matrices and scaling are optional inputs of the graph, `<module>.lora_A`
[in, rank], `<module>.lora_B` [rank, out] and `<module>.lora_scaling` [1], which an adapter's file gives. By default the
matrices have rank 0, and their product is zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseport.targets.onnx.products import Products, joinable
from sparseport.targets.onnx.store import OnnxStore, Stored, StoredMatrix
from sparseport.weights.linear import LowRankBranch


@dataclass(frozen=True)
class StoredLowRank:
    """A branch in the scratch file: a [rank, in] and b [out, rank].

    slot  whether the graph has a place for it only
    """

    module: str
    a: StoredMatrix
    b: StoredMatrix
    scaling: float
    slot: bool = False

    def ports(self) -> list[Any]:
        """Inputs of a graph with a place for this branch: their names, types and shapes."""
        from onnx import TensorProto, helper

        a, b = (TensorProto.DataType.Value(part.values.element_type) for part in (self.a, self.b))
        rank = f"{self.module}.rank"
        return [
            helper.make_tensor_value_info(f"{self.module}.lora_A", a, [self.a.values.shape[1], rank]),
            helper.make_tensor_value_info(f"{self.module}.lora_B", b, [rank, self.b.values.shape[0]]),
            helper.make_tensor_value_info(f"{self.module}.lora_scaling", TensorProto.FLOAT, [1]),
        ]

    def defaults(self) -> list[Any]:
        """What these inputs are while no adapter is active."""
        from onnx import helper

        a, b, scaling = self.ports()
        return [
            helper.make_tensor(a.name, a.type.tensor_type.elem_type, [self.a.values.shape[1], 0], []),
            helper.make_tensor(b.name, b.type.tensor_type.elem_type, [0, self.b.values.shape[0]], []),
            helper.make_tensor(scaling.name, scaling.type.tensor_type.elem_type, [1], [1.0]),
        ]


def store_branch(store: OnnxStore, module: str, branch: LowRankBranch, *, slot: bool) -> StoredLowRank:
    """Append a branch to the scratch file, in the dtypes that it has."""
    a = store.add_dense(f"{module}.lora_A.weight", branch.a)
    b = store.add_dense(f"{module}.lora_B.weight", branch.b)
    return StoredLowRank(module, a, b, branch.scaling, slot)


def joinable_with_branches(modules: Sequence[str], parts: Sequence[Stored], branches: Mapping[str, object]) -> bool:
    """Whether layers can share one product: their rows can lie in one tensor, and all have a branch or none has."""
    return joinable(parts) and len({module in branches for module in modules}) == 1


def product_beside(
    products: Products,
    name: str,
    x: str,
    y: str,
    modules: Sequence[str],
    parts: Sequence[Stored],
    branches: Mapping[str, StoredLowRank],
) -> None:
    """y = x @ W^T with the rows of all parts, plus the branches of their modules, if they have any.

    Args:
        products: takes nodes and initializers.
        name: name of the node that multiplies with the base weight.
        x: its input, before any act-order permutation.
        y: the result.
        modules: the layers, in the order of their rows.
        parts: their weights, which `joinable_with_branches` allows in one tensor.
        branches: module -> branch.
    """
    beside = [branches[module] for module in modules if module in branches]
    products.product(name, x, f"{y}/base" if beside else y, parts)
    if not beside:
        return
    results = [_branch(products, f"{name}/{branch.module}", x, branch) for branch in beside]
    if len(results) > 1:
        products.node("Concat", results, f"{name}/branches", f"{name}/branches/Concat", axis=-1)
        results = [f"{name}/branches"]
    products.node("Add", [f"{y}/base", *results], y, f"{name}/Add")


def _branch(products: Products, name: str, x: str, branch: StoredLowRank) -> str:
    """The nodes of one branch; returns the name of its result."""
    import numpy as np
    from onnx import numpy_helper

    scaling = f"{branch.module}.lora_scaling"
    if branch.slot:
        products.initializers.extend(branch.defaults())
    else:
        products.initializers.append(numpy_helper.from_array(np.array([branch.scaling], np.float32), scaling))
    for side, matrix in (("A", branch.a), ("B", branch.b)):
        y = f"{name}/lora_{side}/output"
        if branch.slot:
            value = products.widened(f"{branch.module}.lora_{side}", matrix.values.element_type)
            products.node("MatMul", [x, value], y, f"{name}/lora_{side}")
        else:
            products.product(f"{name}/lora_{side}", x, y, [matrix])
        x = y
    products.node("Mul", [x, scaling], f"{name}/lora", f"{name}/Mul")
    return f"{name}/lora"
