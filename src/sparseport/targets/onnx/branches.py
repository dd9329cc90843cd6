"""Un-merged low-rank branches beside the products of an ONNX graph, in standard operators:

    x -> MatMul(A^T) -> MatMul(B^T) -> Mul(scaling) -> Add <- product with the base weight <- x

The matrices are initializers `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], which are
transposed and widened as floating-point weights are; the scaling is `<module>.lora_scaling`, float32 [1]. Where one
node multiplies with the rows of several layers, the results of their branches are joined in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparseport.targets.onnx.products import Products, joinable
from sparseport.targets.onnx.store import OnnxStore, Stored, StoredMatrix
from sparseport.weights.linear import LowRankBranch


@dataclass(frozen=True)
class StoredLowRank:
    """A branch in the scratch file: a [rank, in] and b [out, rank]."""

    module: str
    a: StoredMatrix
    b: StoredMatrix
    scaling: float


def store_branch(store: OnnxStore, module: str, branch: LowRankBranch) -> StoredLowRank:
    """Append a branch to the scratch file, in the dtypes that it has."""
    a = store.add_dense(f"{module}.lora_A.weight", branch.a)
    b = store.add_dense(f"{module}.lora_B.weight", branch.b)
    return StoredLowRank(module, a, b, branch.scaling)


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
    products.initializers.append(numpy_helper.from_array(np.array([branch.scaling], np.float32), scaling))
    products.product(f"{name}/lora_A", x, f"{name}/lora_A/output", [branch.a])
    products.product(f"{name}/lora_B", f"{name}/lora_A/output", f"{name}/lora_B/output", [branch.b])
    products.node("Mul", [f"{name}/lora_B/output", scaling], f"{name}/lora", f"{name}/Mul")
    return f"{name}/lora"
