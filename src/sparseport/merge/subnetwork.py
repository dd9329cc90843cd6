"""Cut a sub-network out of a model: which rows and columns of which layers stay, and which decoder blocks.

LoNAS (section 3) keeps the first rows of a layer, never re-ordered; what those rows fed is cut at its input to fit:

    width   gate, up: first k rows            down: first k columns
    heads   q: rows of the first h groups     k, v: rows of the first h heads     o: columns as rows of q
    block   the whole decoder layer is left out (Sukthanker et al.)

A cut layer computes exactly what the whole one computes when everything cut away is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sparseport.checkpoints.elastic import Selection
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import Array, DenseWeight, LowRankBranch, QuantizedWeight

# Last names of the layers of one MLP: those whose rows are channels, and the one that takes the channels in.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
)
_QUERY, _KEY_VALUE, _OUTPUT = "q_proj", ("k_proj", "v_proj"), ("o_proj", "out_proj", "dense")

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SubNetwork:
    """What is left of a model; everything is counted from the first.

    prefix   path of the list of decoder blocks (`model.layers`)
    blocks   numbers of the blocks that stay, in order
    rows     module of the whole model -> rows that stay, for modules that lose some
    columns  module of the whole model -> columns that stay, for modules that lose some
    heads    attention module -> key-value heads that stay, for those that lose some
    sizes    attention module -> elements of one head, for those that lose some
    """

    prefix: str
    blocks: tuple[int, ...]
    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[int, int]:
        """Number of a block in the whole model -> its number in the sub-network."""
        return {old: new for new, old in enumerate(self.blocks)}

    def name(self, name: str) -> str | None:
        """Name in the sub-network of a module or tensor of the whole model; None if its block is left out."""
        number, rest = self._split(name)
        if number is None:
            return name
        new = self.numbers.get(number)
        return None if new is None else f"{self.prefix}.{new}{rest}"

    def shape(self, module: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of a module after the cut, [out, in]."""
        return self.rows.get(module, shape[0]), self.columns.get(module, shape[1])

    def _split(self, name: str) -> tuple[int | None, str]:
        if not name.startswith(f"{self.prefix}."):
            return None, ""
        number, dot, rest = name[len(self.prefix) + 1 :].partition(".")
        return (int(number), dot + rest) if number.isdecimal() else (None, "")


def sub_network(selection: Selection, shapes: Shapes, config: Mapping[str, Any], where: str = "") -> SubNetwork | None:
    """What a selection leaves of a model; None if that is all of it.

    Args:
        selection: widths, heads and removed blocks; ranks are not looked at.
        shapes: [out, in] of every linear layer of the whole model, by module.
        config: the model's config.json.
        where: what to name in messages.

    Raises:
        BadInput: a module or block that the model does not have, a width or head count that it cannot have (the message
            has the allowed values), layers of one MLP cut differently, heads and widths that contradict each other, or
            no block left.
        Unsupported: the architecture's layers cannot be cut (fused projections, unknown names).
    """
    prefix, numbers = _blocks(shapes, where)
    removed = {_number_of(block, prefix, numbers, where) for block in selection.removed}
    blocks = tuple(number for number in numbers if number not in removed)
    if not blocks:
        raise BadInput(
            "a sub-network without any block", where=where, expected=f"at least 1 of {len(numbers)}", code="E_WIDTH"
        )
    cut = SubNetwork(prefix, blocks)
    heads = dict(selection.heads)
    widths = dict(selection.widths)
    for module, kept in _heads_from_widths(widths, shapes, config, where).items():
        if heads.setdefault(module, kept) != kept:
            raise BadInput(
                "heads and widths of an attention module keep different numbers of heads",
                where=f"{where}, {module}" if where else module,
                expected=f"{heads[module]} key-value heads, as its heads say",
                found=f"{kept}, as the widths of its q, k and v say",
                fix="give the module's size once, as heads or as widths of q, k and v",
                code="E_WIDTH",
            )
    for module, kept in heads.items():
        _cut_heads(cut, module, kept, shapes, config, where)
    _cut_widths(cut, widths, shapes, where)
    gone = [name for name in {*cut.rows, *cut.columns} if cut.name(name) is None]
    for name in gone:
        cut.rows.pop(name, None)
        cut.columns.pop(name, None)
    for name in [name for name in cut.heads if cut.name(name) is None]:
        del cut.heads[name], cut.sizes[name]
    return cut if len(blocks) < len(numbers) or cut.rows or cut.columns else None


def cut_weight(
    weight: QuantizedWeight | DenseWeight, rows: int | None, columns: int | None, where: str
) -> QuantizedWeight | DenseWeight:
    """The first rows and columns of a weight, with their codes, zero-points, scales and mask as they are.

    Groups that the cut goes through are split losslessly first: each part keeps the group's scale and zero-point.

    Args:
        weight: [out, in].
        rows: rows to keep, or None for all.
        columns: columns to keep, or None for all.
        where: module name, for messages.

    Raises:
        Unsupported: columns of a weight with act-order, whose first columns belong to any group.
    """
    rows = weight.shape[0] if rows is None else rows
    columns = weight.shape[1] if columns is None else columns
    mask = None if weight.mask is None else weight.mask[:rows, :columns]
    if isinstance(weight, DenseWeight):
        return DenseWeight(np.ascontiguousarray(weight.values[:rows, :columns]), mask)
    if columns == weight.shape[1]:
        return replace(
            weight,
            codes=weight.codes[:rows],
            scales=weight.scales[:rows],
            zero_points=weight.zero_points[:rows],
            mask=mask,
        )
    if weight.input_order is not None:
        raise act_order_refusal(where)
    part = math.gcd(weight.group_size, columns)
    groups, repeat = columns // part, weight.group_size // part
    return replace(
        weight,
        codes=np.ascontiguousarray(weight.codes[:rows, :columns]),
        scales=np.ascontiguousarray(np.repeat(weight.scales[:rows], repeat, axis=1)[:, :groups]),
        zero_points=np.ascontiguousarray(np.repeat(weight.zero_points[:rows], repeat, axis=1)[:, :groups]),
        group_size=part,
        mask=mask,
    )


def act_order_refusal(where: str) -> Unsupported:
    """The error for an act-order layer that loses columns: its first columns belong to any group."""
    return Unsupported(
        "columns of an act-order layer cannot be cut",
        where=where,
        fix="quantise the base without act-order (desc_act false)",
        code="E_WIDTH",
    )


def cut_group_size(group_size: int, columns: int) -> int:
    """Group size of an INT4 layer after a cut to `columns`: the largest one that divides both."""
    return math.gcd(group_size, columns)


def cut_branch(branch: LowRankBranch, rows: int | None, columns: int | None) -> LowRankBranch:
    """The low-rank update of a cut weight: first columns of A, first rows of B."""
    return replace(branch, a=branch.a[:, :columns], b=branch.b[:rows])


def cut_small(name: str, values: Array, cut: SubNetwork) -> Array:
    """A tensor of fewer than two dimensions after the cut: a bias loses the rows of its layer.

    Raises:
        Unsupported: another tensor that runs over the rows of a cut layer, such as a norm over all heads.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf == "bias" and owner in cut.rows:
        return values[: cut.rows[owner]]
    attention = next((module for module in cut.heads if name.startswith(f"{module}.")), None)
    if attention is not None and owner not in cut.columns and values.size > cut.sizes[attention]:
        raise Unsupported(
            "heads of this architecture cannot be cut: a tensor runs over all of them",
            where=name,
            found=f"{values.size} elements, head size {cut.sizes[attention]}",
            fix="keep all heads in the sub-network",
            code="E_WIDTH",
        )
    return values


def _blocks(shapes: Shapes, where: str) -> tuple[str, list[int]]:
    """Path of the list of decoder blocks and the blocks' numbers."""
    found: dict[str, set[int]] = {}
    for module in shapes:
        parts = module.split(".")
        for position, part in enumerate(parts):
            if part.isdecimal():
                found.setdefault(".".join(parts[:position]), set()).add(int(part))
                break
    if len(found) != 1:
        raise Unsupported("cannot tell the decoder blocks of this model", where=where, found=sorted(found) or "none")
    prefix, numbers = found.popitem()
    return prefix, sorted(numbers)


def _number_of(block: str, prefix: str, numbers: list[int], where: str) -> int:
    number = block.removeprefix(f"{prefix}.")
    if not number.isdecimal() or int(number) not in numbers:
        raise BadInput(
            "the model has no such block",
            where=where,
            expected=f"{prefix}.{numbers[0]} to {prefix}.{numbers[-1]}",
            found=block,
            code="E_WIDTH",
        )
    return int(number)


def _heads_from_widths(widths: dict[str, int], shapes: Shapes, config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Widths of q, k and v say heads: attention module -> key-value heads. Such widths are taken out of `widths`."""
    found: dict[str, int] = {}
    for attention in sorted({m.rpartition(".")[0] for m in widths if m.rpartition(".")[2] in (_QUERY, *_KEY_VALUE)}):
        own = {leaf: widths.pop(f"{attention}.{leaf}", None) for leaf in (_QUERY, *_KEY_VALUE)}
        size, key_value_heads, shared = _heads(attention, shapes, config, where)
        whole = {_QUERY: key_value_heads * shared * size, **dict.fromkeys(_KEY_VALUE, key_value_heads * size)}
        ratio = {leaf: (whole[leaf] if width is None else width) for leaf, width in own.items()}
        kept = ratio["k_proj"] // size
        if ratio != {_QUERY: kept * shared * size, **dict.fromkeys(_KEY_VALUE, kept * size)}:
            raise BadInput(
                "widths of q, k and v keep no whole heads, or not the same ones",
                where=f"{where}, {attention}" if where else attention,
                expected=f"k and v: a multiple of {size}; q: {shared} times that",
                found=", ".join(f"{leaf} {width}" for leaf, width in ratio.items()),
                code="E_WIDTH",
            )
        found[attention] = kept
    return found


def _heads(attention: str, shapes: Shapes, config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """(head size, key-value heads, query heads that share one) of an attention module."""
    missing = [leaf for leaf in (_QUERY, *_KEY_VALUE) if f"{attention}.{leaf}" not in shapes]
    if missing or _output(attention, shapes) is None:
        raise Unsupported(
            "heads of this attention module cannot be cut",
            where=f"{where}, {attention}" if where else attention,
            expected=f"{_QUERY}, {', '.join(_KEY_VALUE)} and one of {', '.join(_OUTPUT)}",
            found=", ".join(m.rpartition(".")[2] for m in shapes if m.startswith(f"{attention}.")) or "no such module",
            code="E_WIDTH",
        )
    return head_counts(shapes[f"{attention}.{_QUERY}"][0], shapes[f"{attention}.k_proj"][0], config, attention)


def head_counts(query: int, keys: int, config: Mapping[str, Any], attention: str) -> tuple[int, int, int]:
    """(head size, key-value heads, query heads that share one) of an attention module.

    Args:
        query: rows of its q_proj.
        keys: rows of its k_proj.
        config: the model's config.json.
        attention: its name, for messages.

    Raises:
        Unsupported: the rows are no whole heads.
    """
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if not isinstance(size, int) and isinstance(heads, int) and heads > 0:
        size = query // heads
    if not isinstance(size, int) or size < 1 or keys < size or keys % size or query % keys:
        raise Unsupported(
            "cannot tell the attention heads of this model",
            where=attention,
            found=f"head_dim {size}, q {query}, k {keys} rows",
        )
    return size, keys // size, query // keys


def _output(attention: str, shapes: Shapes) -> str | None:
    return next((f"{attention}.{leaf}" for leaf in _OUTPUT if f"{attention}.{leaf}" in shapes), None)


def _cut_heads(
    cut: SubNetwork, attention: str, kept: int, shapes: Shapes, config: Mapping[str, Any], where: str
) -> None:
    size, key_value_heads, shared = _heads(attention, shapes, config, where)
    if not 1 <= kept <= key_value_heads:
        raise BadInput(
            "the layer has not so many key-value heads",
            where=f"{where}, {attention}" if where else attention,
            expected=f"1 to {key_value_heads}",
            found=kept,
            code="E_WIDTH",
        )
    if kept == key_value_heads:
        return
    output = _output(attention, shapes)
    assert output is not None
    cut.heads[attention], cut.sizes[attention] = kept, size
    cut.rows[f"{attention}.{_QUERY}"] = cut.columns[output] = kept * shared * size
    for leaf in _KEY_VALUE:
        cut.rows[f"{attention}.{leaf}"] = kept * size


def _cut_widths(cut: SubNetwork, widths: Mapping[str, int], shapes: Shapes, where: str) -> None:
    for module, width in widths.items():
        place = f"{where}, {module}" if where else module
        if module not in shapes:
            raise BadInput("the model has no such layer", where=place, code="E_WIDTH")
        rows = shapes[module][0]
        if not 1 <= width <= rows:
            raise BadInput(
                "the layer has not so many rows", where=place, expected=f"1 to {rows}", found=width, code="E_WIDTH"
            )
        producers, consumer = _mlp(module, shapes, place)
        others = {other: widths.get(other, shapes[other][0]) for other in producers}
        if len(set(others.values())) > 1:
            raise BadInput(
                "layers whose channels are multiplied keep different widths",
                where=place,
                expected="one width for " + " and ".join(name.rpartition(".")[2] for name in producers),
                found=", ".join(f"{name.rpartition('.')[2]} {kept}" for name, kept in others.items()),
                fix="put them in one group of the search space",
                code="E_WIDTH",
            )
        if width < rows:
            cut.rows[module] = width
            cut.columns[consumer] = width


def _mlp(module: str, shapes: Shapes, where: str) -> tuple[list[str], str]:
    """The layers whose channels go together with a module's, and the layer that takes them in."""
    parent, _, leaf = module.rpartition(".")
    for producers, consumer in _MLPS:
        names = [f"{parent}.{name}" for name in producers]
        taker = f"{parent}.{consumer}"
        if leaf in producers and all(name in shapes for name in [*names, taker]):
            if any(shapes[name][0] != shapes[taker][1] for name in names):
                break
            return names, taker
    raise Unsupported(
        "cannot tell which layer takes in the rows of this one",
        where=where,
        expected="; ".join(f"{', '.join(producers)} -> {consumer}" for producers, consumer in _MLPS),
        fix="give widths for layers of these names only",
        code="E_WIDTH",
    )
