"""Put exact weights into an IR skeleton: each placeholder constant is replaced by the stored one.

Layout of a quantised weight, the one that OpenVINO's CPU plugin keeps compressed at run time:

    Constant u4 [out, groups, group] -> Convert f16 -> Subtract(Convert(zero_points u4)) -> Multiply(scales)
        -> Reshape [out, in] -> Convert f32 -> MatMul

Names of the constants are `<module>.codes`, `<module>.zero_points`, `<module>.scales`, `<module>.weight`; that of a
small tensor which the graph holds plus 1 (Gemma's norms) ends in `.plus_one`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sparseport.errors import BadInput, FidelityError
from sparseport.targets.blocks import Block
from sparseport.targets.openvino.store import StoredDense, StoredQuantized, WeightStore

PLUS_ONE = ".plus_one"


def swap_constants(
    model: Any,
    placeholders: Mapping[str, str],
    stored: Mapping[str, StoredDense | StoredQuantized],
    store: WeightStore,
    plus_one: Collection[str] = (),
) -> list[Any]:
    """Replace placeholder constants of an `openvino.Model`, in place.

    Args:
        model: the skeleton.
        placeholders: checkpoint tensor name (`<module>.weight`) -> friendly name of its Constant in the skeleton.
        stored: checkpoint tensor name -> what to put there. Every key must be in `placeholders`.
        store: where the bytes are.
        plus_one: names of the small tensors that the skeleton holds plus 1.

    Returns:
        The tensors that own the bytes. OpenVINO does not keep them alive: hold the list until the model is saved.

    Raises:
        FidelityError: a placeholder is missing, or has another shape than the weight.
    """
    nodes = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"}
    alive: list[Any] = []
    for name, weight in stored.items():
        node = nodes.get(placeholders.get(name, ""))
        if node is None:
            raise FidelityError(
                "the graph has no place for this tensor",
                where=name,
                fix="check that config.json belongs to the weights; a tensor that no layer uses can be removed",
            )
        shape = (
            (weight.out_features, weight.in_features) if isinstance(weight, StoredQuantized) else weight.values.shape
        )
        if _squeezed(node.get_output_shape(0)) != _squeezed(shape):
            raise FidelityError(
                "tensor does not fit its place in the graph",
                where=name,
                expected=tuple(node.get_output_shape(0)),
                found=shape,
            )
        if isinstance(weight, StoredQuantized):
            _swap_quantized(node, name.removesuffix(".weight"), weight, store, alive)
        else:
            _swap_dense(node, name, weight, store, alive)
    for tensor_name, placeholder in placeholders.items():
        if tensor_name not in stored:
            # Small tensors are in place already; they only take their checkpoint name, by which read-back finds them.
            if placeholder not in nodes:
                raise FidelityError("the graph has no place for this tensor", where=tensor_name)
            if len(_squeezed(nodes[placeholder].get_output_shape(0))) >= 2:
                raise BadInput(
                    "the model needs a tensor that the checkpoint does not hold",
                    where=tensor_name,
                    fix="check that config.json belongs to the weights, and that no shard is missing",
                    code="E_TENSOR",
                )
            nodes[placeholder].set_friendly_name(tensor_name + (PLUS_ONE if tensor_name in plus_one else ""))
    model.validate_nodes_and_infer_types()
    return alive


def _swap_dense(node: Any, name: str, weight: StoredDense, store: WeightStore, alive: list[Any]) -> None:
    constant = constant_of(weight.values, name, store, alive, tuple(node.get_output_shape(0)))
    same_type = constant.get_element_type() == node.get_element_type()
    for consumer in list(node.output(0).get_target_inputs()):
        if same_type:
            consumer.replace_source_output(constant.output(0))
            continue
        # The skeleton decompresses f16 with a Convert to f32; another stored type goes in front of the same consumers.
        owner = consumer.get_node()
        if owner.get_type_name() == "Convert" and weight.values.element_type == "f32":
            for inner in list(owner.output(0).get_target_inputs()):
                inner.replace_source_output(constant.output(0))
        else:
            consumer.replace_source_output(convert(constant, node.get_element_type()).output(0))


def _swap_quantized(node: Any, module: str, weight: StoredQuantized, store: WeightStore, alive: list[Any]) -> None:
    import numpy as np
    from openvino import Type
    from openvino import opset13 as ops

    # Every operation gets a name: OpenVINO would number them through the process, and two exports would differ.
    compute = Type.f16 if weight.scales.element_type == "f16" else Type.f32
    value = convert(constant_of(weight.codes, f"{module}.codes", store, alive), compute)
    if weight.zero_points is not None:
        zero_points = convert(constant_of(weight.zero_points, f"{module}.zero_points", store, alive), compute)
        value = named(ops.subtract(value, zero_points), f"{module}/subtract")
    value = named(
        ops.multiply(value, constant_of(weight.scales, f"{module}.scales", store, alive)), f"{module}/dequantized"
    )
    if len(weight.codes.shape) == 3:
        columns = weight.codes.shape[1] * weight.codes.shape[2]
        shape = ops.constant(np.array([weight.out_features, columns], np.int64), name=f"{module}/shape")
        value = named(ops.reshape(value, shape, False), f"{module}/reshape")
    if compute != Type.f32:
        value = convert(value, Type.f32)
    for user in consumers_past_converts(node):
        operation = user.get_node()
        kind, side = operation.get_type_name(), user.get_index()
        # An embedding is looked up; a head that is tied to it multiplies with the same values.
        lookup = kind == "Gather" and side == 0 and weight.input_order is None
        if not lookup and (kind != "MatMul" or side != 1):
            raise FidelityError(
                "a quantised weight is used by something other than its linear layer",
                where=module,
                expected="MatMul",
                found=kind,
            )
        user.replace_source_output(value.output(0))
        if weight.input_order is not None:
            # Columns lie sorted by group (act-order), or groups are filled up: the activation is gathered to fit.
            order = constant_of(weight.input_order, f"{module}.input_order", store, alive)
            axis = ops.constant(np.array(-1, np.int32), name=f"{module}/gather_axis")
            gathered = named(ops.gather(operation.input_value(0), order, axis), f"{module}/gather")
            operation.input(0).replace_source_output(gathered.output(0))


def consumers_past_converts(node: Any) -> list[Any]:
    """Inputs that a constant feeds, looking through Converts."""
    found: list[Any] = []
    for consumer in node.output(0).get_target_inputs():
        owner = consumer.get_node()
        if owner.get_type_name() == "Convert":
            found.extend(consumers_past_converts(owner))
        else:
            found.append(consumer)
    return found


def constant_of(
    block: Block, name: str, store: WeightStore, alive: list[Any], shape: tuple[int, ...] | None = None
) -> Any:
    """A constant over a block's bytes, which the tensor that is added to `alive` owns."""
    import openvino as ov

    element_type = getattr(ov.Type, block.element_type)
    tensor = ov.Tensor(store.view(block), ov.Shape(list(shape or block.shape)), element_type)
    alive.append(tensor)
    constant = ov.op.Constant(tensor, shared_memory=True)
    constant.set_friendly_name(name)
    return constant


def convert(node: Any, element_type: Any) -> Any:
    """A Convert, named after its source."""
    from openvino import opset13 as ops

    kind = element_type.to_string()
    return named(ops.convert(node, kind), f"{node.get_friendly_name()}/to_{kind}")


def named(node: Any, name: str) -> Any:
    """The operation, with a friendly name."""
    node.set_friendly_name(name)
    return node


def _squeezed(shape: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in shape if int(n) != 1)
