"""Read the weights of a written OpenVINO folder back, with OpenVINO's own parser and none of the writer's code.

The graph is followed from each constant to what it feeds, so a weight counts as present only if it is really used, and
as quantised only if the operations around it compute scales * (codes - zero_points).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.folder import HEADS
from sparseport.errors import VerificationError
from sparseport.targets.openvino.adapter_back import adapter_branches, order_of, products
from sparseport.targets.openvino.branch_back import branches, is_branch_constant
from sparseport.targets.read_back import BranchBack, ReadBack, Shapes
from sparseport.weights.grouping import without_filling
from sparseport.weights.linear import U8, DenseWeight, QuantizedWeight

_PLUS_ONE = ".plus_one"


class OpenVinoReader:
    """The reader of `targets.read_back` for a parsed IR."""

    graph_file = "openvino_model.xml"
    data_file = "openvino_model.bin"

    def __init__(self, model: Any, folder: Path = Path()) -> None:
        self.model, self.folder = model, folder

    @classmethod
    def open(cls, folder: Path) -> OpenVinoReader:
        """Parse a folder's IR; raises as `read_model`."""
        return cls(read_model(folder / cls.graph_file), folder)

    def weights(self, shapes: Shapes) -> Iterator[ReadBack]:
        """Every named weight, see `weights`; an IR has one constant per layer and needs no shapes."""
        del shapes
        return weights(self.model)

    def branches(self) -> Iterator[BranchBack]:
        """See `branch_back.branches`."""
        return branches(self.model)

    def adapter(self, name: str) -> Iterator[BranchBack]:
        """See `adapter_back.adapter_branches`."""
        return adapter_branches(self.folder, name, self.model)

    def orders(self, modules: list[str]) -> dict[str, Any]:
        """Module -> order int32 in which its columns lie, or None; raises as `adapter_back.products`."""
        return {module: order_of(product, module) for module, product in products(self.model, modules).items()}

    def unnamed_matrices(self, named: set[str]) -> list[str]:
        """See `unnamed_matrices`."""
        return unnamed_matrices(self.model, named)

    def around(self) -> dict[str, Any]:
        """Nothing: OpenVINO's own parser has read the graph, and the logit check shows what it computes."""
        return {}

    def misplaced(self, module: str, places: tuple[str, ...], tied_head: bool) -> str | None:
        """The traced graph names every operation after its module: a weight must sit where its name says."""
        allowed = tuple(f"__module.{name}/" for name in (module, *(HEADS if tied_head else ())))
        return next((place for place in places if not place.startswith(allowed)), None)


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

    Ours are `<module>.codes` (with zero-points and scales around them) and `<tensor name>` for floating point, with
    `.plus_one` behind it where the graph holds 1 more; NNCF keeps the tensor name on its integer codes.

    Raises:
        VerificationError: a name comes twice, or a weight is used by something that no layer of a model does with it.
    """
    seen: set[str] = set()
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        if op.get_type_name() != "Constant" or not name.endswith((".codes", ".weight", ".bias", _PLUS_ONE)):
            continue
        plus_one = name.endswith(_PLUS_ONE)
        name = name.removesuffix(_PLUS_ONE)
        if name in seen:
            raise VerificationError("two constants have one name", where=name)
        seen.add(name)
        if is_branch_constant(name):
            continue
        kind = op.get_element_type().to_string()
        if kind in ("u4", "i4", "u8", "i8"):
            yield _read_quantized(op, kind)
        elif inputs := _inputs_past(op, ("Convert",)):
            if _is_matrix(op):
                _check_matrix_use(inputs, name)
            yield ReadBack(name, DenseWeight(op.get_data()), kind, _names(inputs), added=int(plus_one))


def unnamed_matrices(model: Any, named: set[str]) -> list[str]:
    """Constants that feed a linear layer or a look-up without being one of the `named` weights.

    A weight that no certificate knows would go unproven; in a whole export this list is empty.
    """
    found = set()
    for op in model.get_ordered_ops():
        sides = {"MatMul": (0, 1), "Gather": (0,)}.get(op.get_type_name(), ())
        for side in sides:
            leaves = _constant_leaves(op.input_value(side).get_node())
            # A rotary table is a vector on the left. A matrix of two real dimensions is a weight, and so is any on the
            # right, such as those of a branch of rank 1.
            if any(_is_matrix(leaf) or (side == 1 and len(leaf.get_output_shape(0)) == 2) for leaf in leaves):
                names = {leaf.get_friendly_name().removesuffix(".codes") for leaf in leaves}
                if not names & named:
                    found.add(sorted(names)[0])
    return sorted(found)


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
    inputs = _inputs_past(user, ("Reshape", "Convert"))
    _check_matrix_use(inputs, module)
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
        input_order=_input_order(inputs, module),
    )
    weight = without_filling(weight, module)
    return ReadBack(module if name.endswith(".codes") else name, weight, kind, _names(inputs))


def _check_matrix_use(inputs: list[Any], name: str) -> None:
    """A matrix may only be the transposed right side of a linear layer, or the table of a look-up.

    Raises:
        VerificationError: it is used in another way, or not at all.
    """
    if not inputs:
        raise VerificationError("weight is not used", where=name)
    for place in inputs:
        op = place.get_node()
        kind = op.get_type_name()
        if kind == "Gather" and place.get_index() == 0:
            continue
        if kind != "MatMul" or place.get_index() != 1 or not op.get_attributes()["transpose_b"]:
            raise VerificationError(
                "weight does not feed a linear layer or a look-up", where=name, found=f"{kind} {op.get_friendly_name()}"
            )


def _input_order(inputs: list[Any], module: str) -> Any:
    """The act-order permutation in front of every linear layer that uses this weight, or None."""
    orders: list[Any] = []
    for place in inputs:
        source = place.get_node().input_value(0).get_node()
        order = source.input_value(1).get_node() if source.get_type_name() == "Gather" else None
        if order is None or order.get_friendly_name() != f"{module}.input_order":
            orders.append(None)
            continue
        axis = int(source.input_value(2).get_node().get_data())
        if axis not in (-1, len(source.get_output_partial_shape(0)) - 1):
            raise VerificationError("act-order permutes another axis than the columns", where=module, found=axis)
        orders.append(np.array(order.get_data()))
    if any((order is None) != (orders[0] is None) for order in orders):
        raise VerificationError("act-order is applied to some uses only", where=module)
    return orders[0]


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


def _inputs_past(node: Any, kinds: tuple[str, ...]) -> list[Any]:
    """Inputs that a node feeds, looking through operations of the given kinds; sorted by name.

    Who asks for its shape alone (OPT's tied head) computes nothing with its values.
    """
    found: list[Any] = []
    for target in node.output(0).get_target_inputs():
        user = target.get_node()
        if user.get_type_name() == "ShapeOf":
            continue
        found.extend(_inputs_past(user, kinds) if user.get_type_name() in kinds else [target])
    return sorted(found, key=lambda place: (place.get_node().get_friendly_name(), place.get_index()))


def _names(inputs: list[Any]) -> tuple[str, ...]:
    return tuple(place.get_node().get_friendly_name() for place in inputs)


def _is_matrix(node: Any) -> bool:
    return sum(1 for length in node.get_output_shape(0) if int(length) != 1) >= 2


def _constant_leaves(node: Any) -> list[Any]:
    """The constants below a node, if there is nothing but arithmetic on constants; otherwise an empty list."""
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
        return []
    leaves: list[Any] = []
    for index in range(node.get_input_size()):
        below = _constant_leaves(node.input_value(index).get_node())
        if not below:
            return []
        leaves.extend(below)
    return leaves


def _expect(node: Any, kind: str, module: str) -> Any:
    if node.get_type_name() != kind:
        raise VerificationError(
            "operation missing around a quantised weight", where=module, expected=kind, found=node.get_type_name()
        )
    return node
