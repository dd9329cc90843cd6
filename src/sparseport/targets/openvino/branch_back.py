"""Read the branches of a written IR back: a strict path from each matrix A to the sum, without the writer's code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.targets.read_back import BranchBack
from sparseport.weights.linear import Array, LowRankBranch

A, B, SCALING = ".lora_A.weight", ".lora_B.weight", ".lora_scaling"
# What may stand between the constants of a base weight and its product.
_DEQUANTISES = ("Convert", "Subtract", "Multiply", "Reshape")


def is_branch_constant(name: str) -> bool:
    """Whether a constant is a matrix of a branch, by its name."""
    return name.endswith((A, B))


def branches(model: Any) -> Iterator[BranchBack]:
    """Yield the branch of every module that has one, in graph order.

    The matrices must be multiplied with the input of the module's own product, one after the other, then with the
    scaling; the sum with the product must be the product's only use.

    Raises:
        VerificationError: a branch is computed or used in another way.
    """
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        if op.get_type_name() != "Constant":
            continue
        if name.endswith(A):
            yield _branch(op, name.removesuffix(A))
        elif name.endswith(B) and not _used(op):
            raise VerificationError("a branch's matrix is not used", where=name)


def _branch(constant: Any, module: str) -> BranchBack:
    first = _only_user(_past_convert(constant, module), "MatMul", 1, module)
    second = _only_user(first, "MatMul", 0, module)
    for product in (first, second):
        settings = product.get_attributes()
        if settings["transpose_a"] or not settings["transpose_b"]:
            raise VerificationError("a branch's matrix is not transposed, or its input is", where=module)
    matrix_b = _constant(second.input_value(1).get_node(), f"{module}{B}", module)
    multiply = _only_user(second, "Multiply", None, module)
    scaling = _constant(_other(multiply, second), f"{module}{SCALING}", module)
    if scaling.shape != () or scaling.dtype != np.float32:
        raise VerificationError("a branch's scaling is no float32 scalar", where=module, found=scaling.shape)
    total = _only_user(multiply, "Add", None, module)
    base = _other(total, multiply)
    if base.get_type_name() != "MatMul" or len(base.output(0).get_target_inputs()) != 1:
        raise VerificationError("a branch is not added to a product, or the product is used without it", where=module)
    own = {f"{module}.codes", f"{module}.weight"}
    if not own & set(_constants_below(base.input_value(1).get_node())):
        raise VerificationError("a branch is added to another layer than its own", where=module)
    if first.input_value(0) not in _activations(base, module):
        raise VerificationError("a branch takes another activation than its layer", where=module)
    a = np.array(constant.get_data())
    return BranchBack(module, LowRankBranch(a, matrix_b, float(scaling)))


def _activations(base: Any, module: str) -> list[Any]:
    """What the base product takes; before an act-order permutation, if there is one, and only then."""
    value = base.input_value(0)
    node = value.get_node()
    if node.get_type_name() == "Gather":
        order = node.input_value(1).get_node()
        if order.get_type_name() == "Constant" and order.get_friendly_name() == f"{module}.input_order":
            return [node.input_value(0)]
    return [value]


def _past_convert(constant: Any, module: str) -> Any:
    """A float32 constant itself; for a float16 one the Convert to float32 behind it."""
    kind = constant.get_element_type().to_string()
    if kind == "f32":
        return constant
    convert = _only_user(constant, "Convert", 0, module)
    if kind != "f16" or convert.get_element_type().to_string() != "f32":
        raise VerificationError("a branch's matrix is of an unknown type", where=module, found=kind)
    return convert


def _constant(node: Any, name: str, module: str) -> Array:
    """Values of a constant of a name, looked at through a Convert to float32 if it is float16."""
    if node.get_type_name() == "Convert" and node.get_element_type().to_string() == "f32":
        node = node.input_value(0).get_node()
    kind = node.get_element_type().to_string()
    if node.get_type_name() != "Constant" or node.get_friendly_name() != name or kind not in ("f16", "f32"):
        raise VerificationError(
            "a branch is made of another constant", where=module, expected=name, found=node.get_friendly_name()
        )
    return np.array(node.get_data())


def _constants_below(node: Any) -> Iterator[str]:
    if node.get_type_name() == "Constant":
        yield node.get_friendly_name()
    elif node.get_type_name() in _DEQUANTISES:
        for index in range(node.get_input_size()):
            yield from _constants_below(node.input_value(index).get_node())


def _only_user(node: Any, kind: str, side: int | None, module: str) -> Any:
    """The one operation that uses a result, of a kind, on a side (None: either).

    Raises:
        VerificationError: several use it, or one of another kind or on the other side.
    """
    users = list(node.output(0).get_target_inputs())
    found = [user.get_node().get_type_name() for user in users]
    if found != [kind] or (side is not None and users[0].get_index() != side):
        raise VerificationError("operation missing in a branch", where=module, expected=kind, found=", ".join(found))
    return users[0].get_node()


def _other(node: Any, one: Any) -> Any:
    """The other operand of an operation with two."""
    left, right = (node.input_value(side).get_node() for side in (0, 1))
    return right if left == one else left


def _used(node: Any) -> bool:
    return bool(node.output(0).get_target_inputs())
