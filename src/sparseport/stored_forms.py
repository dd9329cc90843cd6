"""In which form each target holds a layer (groups, label in tables, size), and which models it cannot hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparseport.errors import BadInput, Unsupported
from sparseport.recipe import Recipe
from sparseport.weights.layouts import (
    MATMULNBITS_BLOCKS,
    PORTABLE_BLOCKS,
    GroupLayout,
    matmulnbits_layout,
    openvino_group_size,
    openvino_layout,
)


@dataclass(frozen=True)
class StoredForm:
    """How one target holds one layer.

    label   as tables show it: `u4 g64`, `f16`
    layout  how the groups of an INT4 layer are stored, or None
    bytes   size of its values on disk
    """

    label: str
    layout: GroupLayout | None
    bytes: int


def quantized_form(
    target: str, recipe: Recipe, shape: tuple[int, int], group_size: int, bits: int, symmetric: bool, module: str
) -> StoredForm:
    """The form of a layer of integers.

    Raises:
        Unsupported: the target's kernels cannot hold the group size.
    """
    rows, columns = shape
    if target == "openvino":
        layout = GroupLayout(columns, columns) if bits == 8 else openvino_layout(group_size, columns, module)
        kind = f"i{bits}" if symmetric and bits == 4 else f"u{bits}"
    elif recipe.onnx.format == "qdq" and not recipe.onnx.portable and bits == 4:
        layout, kind = GroupLayout(group_size, group_size), f"u{bits}"
    else:
        blocks = PORTABLE_BLOCKS if recipe.onnx.portable else MATMULNBITS_BLOCKS
        layout, kind = matmulnbits_layout(group_size, module, blocks), f"u{bits}"
    if target == "onnx" and bits == 8 and layout.block != layout.part:
        raise Unsupported(
            "an 8-bit layer of this width cannot be stored for ONNX Runtime",
            where=module,
            expected="a multiple of 16",
            found=columns,
            fix="export to OpenVINO",
            code="E_GROUP",
        )
    groups = columns // layout.part
    # A scale of 16 bits and a zero-point of the codes' width for each group.
    size = rows * groups * (layout.block * bits + 16 + bits) // 8
    return StoredForm(f"{kind} g{layout.block}", layout, size)


def floating_form(target: str, recipe: Recipe, shape: tuple[int, int], dtype: str, module: str) -> StoredForm:
    """The form of a floating-point layer: as it is (bfloat16 as float32), or what NNCF will make of it.

    Raises:
        BadInput, Unsupported: NNCF cannot have the group size that was asked for.
    """
    weights = shape[0] * shape[1]
    mode = recipe.compress.mode
    if target != "openvino" or mode == "none":
        return StoredForm("f16", None, weights * 2) if dtype == "float16" else StoredForm("f32", None, weights * 4)
    if mode.startswith("int4"):
        group = _compress_group(recipe.compress.group_size, shape[1], module)
        return StoredForm(f"nncf {mode} g{group}", None, weights * 9 // 16)
    return StoredForm(f"nncf {mode}", None, weights)


def _compress_group(group_size: int, columns: int, module: str) -> int:
    """The group size for NNCF, if this layer can have it.

    Raises:
        BadInput: it does not divide the layer's columns.
        Unsupported: OpenVINO computes it wrongly.
    """
    group = columns if group_size == -1 else group_size
    if columns % group:
        raise BadInput(
            "--compress-group-size does not divide the layer's input features",
            where=module,
            expected=f"a divisor of {columns}",
            found=group,
            fix="choose 32 or 64, or -1 for one group per row",
            code="E_GROUP",
        )
    if openvino_group_size(group, columns, module) != group:
        raise Unsupported(
            "OpenVINO computes this group size wrongly",
            where=module,
            expected="8, 16, 32, a multiple of 64, or -1",
            found=group,
            fix="choose --compress-group-size 32 or 64",
            code="E_GROUP",
        )
    return group


def require_head_size(recipe: Recipe, config: dict[str, Any], where: str) -> None:
    """GroupQueryAttention takes head sizes that are multiples of 8, and would say so only when it runs.

    Raises:
        Unsupported: the model has another one.
    """
    size = config.get("head_dim")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    if "onnx" in recipe.target and recipe.onnx.format == "nbits" and isinstance(size, int) and size % 8:
        raise Unsupported(
            "ONNX Runtime's GroupQueryAttention needs a head size that is a multiple of 8",
            where=where,
            found=size,
            fix="use `--onnx-format qdq`, whose attention is made of standard operators",
        )
