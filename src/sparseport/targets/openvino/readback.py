"""Read the weights of a written OpenVINO folder back, with OpenVINO's own parser and none of the writer's code.

The graph is followed from each constant to what it feeds, so a weight counts as present only if it is really used, and
as quantised only if the operations around it compute scales * (codes - zero_points).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.weights.linear import U8, DenseWeight, QuantizedWeight


@dataclass(frozen=True)
class ReadBack:
    """One weight found in an IR.

    name          module name for `<module>.codes`, else the tensor's own name (`<module>.weight`)
    weight        the values; a quantised one has uint8 codes whatever the stored type was
    element_type  OpenVINO's name of the stored type
    users         how many linear layers or look-ups use it
    """

    name: str
    weight: QuantizedWeight | DenseWeight
    element_type: str
    users: int


def read_model(xml: Path) -> Any:
    """Parse an IR with OpenVINO; constants stay memory-mapped.

    Raises:
        VerificationError: OpenVINO cannot read the files.
    """
    import openvino as ov

    try:
        return ov.Core().read_model(xml)
    except RuntimeError as error:
        raise VerificationError(
            "OpenVINO cannot read the model", where=xml.name, found=str(error).strip().splitlines()[-1]
        ) from error


def weights(model: Any) -> Iterator[ReadBack]:
    """Yield every named weight that the graph uses, in graph order.

    Ours are `<module>.codes` (with zero-points and scales around them) and `<tensor name>` for floating point; NNCF
    keeps the tensor name on its integer codes.
    """
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        if op.get_type_name() != "Constant" or not name.endswith((".codes", ".weight", ".bias")):
            continue
        kind = op.get_element_type().to_string()
        if kind in ("u4", "i4", "u8", "i8"):
            yield _read_quantized(op, kind)
        elif users := _users_past(op, ("Convert",)):
            yield ReadBack(name, DenseWeight(op.get_data()), kind, len(users))


def _read_quantized(node: Any, kind: str) -> ReadBack:
    name = node.get_friendly_name()
    module = name.removesuffix(".codes")
    shape = tuple(int(n) for n in node.get_output_shape(0))
    bits = 4 if kind.endswith("4") else 8
    codes = _integers_of(node)
    user = _only_user(_expect(_only_user(node, module), "Convert", module), module)
    if user.get_type_name() == "Subtract":
        if not kind.startswith("u"):
            raise VerificationError("zero-points on signed codes", where=module, found=kind)
        convert = _expect(user.input_value(1).get_node(), "Convert", module)
        zero_points = _integers_of(_expect(convert.input_value(0).get_node(), "Constant", module))
        user = _only_user(user, module)
    elif kind.startswith("i"):
        # Signed codes come back as two's complement; adding half the range gives the offset code, zero-point and all.
        codes = (codes + np.uint8(2 ** (bits - 1))) & np.uint8(2**bits - 1)
        zero_points = None
    else:
        raise VerificationError("unsigned codes without zero-points", where=module)
    scales_node = _expect(_expect(user, "Multiply", module).input_value(1).get_node(), "Constant", module)
    scales = np.array(scales_node.get_data())
    users = _users_past(user, ("Reshape", "Convert"))
    if not users or any(each.get_type_name() not in ("MatMul", "Gather") for each in users):
        raise VerificationError("quantised weight does not feed a linear layer or a look-up", where=module)
    out = shape[0]
    columns = int(np.prod(shape[1:]))
    narrow = (out, scales.size // out)
    middle = np.full(narrow, 2 ** (bits - 1), np.uint8)
    weight = QuantizedWeight(
        codes=codes.reshape(out, columns),
        scales=scales.reshape(narrow),
        zero_points=middle if zero_points is None else np.broadcast_to(zero_points.reshape(out, -1), narrow),
        group_size=columns // narrow[1],
        bits=bits,
        input_order=_input_order(users[0], module),
    )
    return ReadBack(module if name.endswith(".codes") else name, weight, kind, len(users))


def _input_order(matmul: Any, module: str) -> Any:
    source = matmul.input_value(0).get_node()
    if source.get_type_name() != "Gather":
        return None
    order = source.input_value(1).get_node()
    if order.get_friendly_name() != f"{module}.input_order":
        return None
    return np.array(order.get_data())


def _integers_of(node: Any) -> U8:
    """Values of a 4- or 8-bit constant, uint8 of its shape; nibbles are taken byte by byte, the low one first."""
    shape = tuple(int(n) for n in node.get_output_shape(0))
    count = int(np.prod(shape))
    data = np.asarray(node.get_data()).reshape(-1).view(np.uint8)
    if node.get_element_type().to_string().endswith("8"):
        return np.array(data.reshape(shape))
    pairs = np.stack(np.divmod(data[: (count + 1) // 2], 16)[::-1], axis=-1)
    return np.ascontiguousarray(pairs.reshape(-1)[:count].reshape(shape))


def _only_user(node: Any, module: str) -> Any:
    users = [target.get_node() for target in node.output(0).get_target_inputs()]
    if len(users) != 1:
        raise VerificationError("quantised weight is not used exactly once", where=module, found=len(users))
    return users[0]


def _users_past(node: Any, kinds: tuple[str, ...]) -> list[Any]:
    found: list[Any] = []
    for target in node.output(0).get_target_inputs():
        user = target.get_node()
        found.extend(_users_past(user, kinds) if user.get_type_name() in kinds else [user])
    return found


def _expect(node: Any, kind: str, module: str) -> Any:
    if node.get_type_name() != kind:
        raise VerificationError(
            "operation missing around a quantised weight", where=module, expected=kind, found=node.get_type_name()
        )
    return node
