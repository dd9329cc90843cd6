"""Put un-merged low-rank branches beside their base products:

    x -> MatMul(A) -> MatMul(B) -> Multiply(scaling) -> Add <- MatMul(base weight) <- x

Constants are named `<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank] and
`<module>.lora_scaling` (a float32 scalar). What used the product uses the sum, a bias behind it included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.errors import FidelityError
from sparseport.targets.openvino.constants import constant_of, consumers_past_converts, convert, named
from sparseport.targets.openvino.store import StoredDense, WeightStore


@dataclass(frozen=True)
class StoredLowRank:
    """A branch in the store: f16 or f32 matrices a [rank, in] and b [out, rank]."""

    a: StoredDense
    b: StoredDense
    scaling: float


def insert_branches(
    model: Any, placeholders: Mapping[str, str], branches: Mapping[str, StoredLowRank], store: WeightStore
) -> list[Any]:
    """Add branches to an `openvino.Model`, in place, before its placeholders are swapped.

    A weight whose columns lie in another order gathers its activation; the branch, which is there first, takes the
    activation as it was.

    Args:
        model: the skeleton.
        placeholders: checkpoint tensor name (`<module>.weight`) -> friendly name of its Constant in the skeleton.
        branches: module -> its branch.
        store: where the bytes are.

    Returns:
        The tensors that own the bytes, to be held until the model is saved.

    Raises:
        FidelityError: the layer is not in the graph, or is no plain product.
    """
    nodes = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"}
    alive: list[Any] = []
    for module, branch in branches.items():
        node = nodes.get(placeholders.get(f"{module}.weight", ""))
        users = [] if node is None else consumers_past_converts(node)
        if len(users) != 1 or users[0].get_node().get_type_name() != "MatMul" or users[0].get_index() != 1:
            raise FidelityError(
                "the graph has no product of its own for this layer, and its adapter no place",
                where=module,
                found=[user.get_node().get_type_name() for user in users],
            )
        _insert(users[0].get_node(), module, branch, store, alive)
    model.validate_nodes_and_infer_types()
    return alive


def _insert(product: Any, module: str, branch: StoredLowRank, store: WeightStore, alive: list[Any]) -> None:
    from openvino import Type
    from openvino import opset13 as ops

    # OpenVINO GenAI looks for layers by parts of names: an adapter for this module must not find these operations.
    name = f"branch/{module.replace('.', '/')}"
    target = product.output(0)
    users = list(target.get_target_inputs())
    value = product.input_value(0)
    for side, matrix in (("A", branch.a), ("B", branch.b)):
        weight = constant_of(matrix.values, f"{module}.lora_{side}.weight", store, alive)
        if matrix.values.element_type != "f32":
            weight = convert(weight, Type.f32)
        value = named(ops.matmul(value, weight, False, True), f"{name}/{side}")
    scaling = ops.constant(np.float32(branch.scaling), name=f"{module}.lora_scaling")
    value = named(ops.multiply(value, scaling), f"{name}/scaled")
    total = named(ops.add(target, value), f"{name}/sum")
    for user in users:
        user.replace_source_output(total.output(0))
    # A head's product carries the name of the model's result.
    names = target.get_names()
    target.get_tensor().set_names(set())
    total.output(0).get_tensor().set_names(names)
