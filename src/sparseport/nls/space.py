"""The search space that a recipe asks for on a model: which modules share a size, and the sizes they can have.

The order of the groups, which is that of a list of sizes: ranks, then widths, then heads, then blocks; within ranks
and widths list by list as the recipe has them, and within a list from the first decoder layer to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sparseport.checkpoints.elastic import ElasticGroup, SearchSpace, choose
from sparseport.errors import BadInput, Unsupported
from sparseport.merge.subnetwork import sub_network
from sparseport.nls.elastic import linear_shapes
from sparseport.nls.linears import decoder_layers, leaf
from sparseport.training_recipe import ALL_LINEAR, BlockEnds, FinetuneRecipe, Modules, flat_modules

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, int]]


def adapted_modules(model: nn.Module, recipe: FinetuneRecipe) -> list[str]:
    """The linear layers that get an adapter, in the order of the module tree.

    Raises:
        BadInput: the recipe names a module that the decoder layers do not have; the message has the names they have.
    """
    names = list(linear_shapes(model))
    if recipe.target_modules == ALL_LINEAR:
        return names
    _require(recipe.target_modules, "target_modules", names)
    return [name for name in names if leaf(name) in recipe.target_modules]


def search_space(model: nn.Module, recipe: FinetuneRecipe) -> SearchSpace:
    """The search space of a recipe; empty without NLS.

    Args:
        model: with adapters in place or without; its weights are not looked at and may be on the meta device.
        recipe: the space's sizes and modules.

    Raises:
        BadInput: a module or block that the model does not have, or a size that it cannot have; the message has the
            allowed values.
        Unsupported: an architecture whose layers or heads cannot be cut.
    """
    adapted = adapted_modules(model, recipe)
    shapes = linear_shapes(model)
    _require_ranks(recipe, {name: shapes[name] for name in adapted})
    if not recipe.nls:
        return SearchSpace(())
    prefix, layers = decoder_layers(model)
    groups = [
        *_rank_groups(recipe, adapted, prefix, len(layers)),
        *_width_groups(recipe, shapes, prefix, len(layers)),
        *_head_groups(recipe, shapes, prefix, len(layers)),
        *_block_groups(recipe, model.config, prefix, len(layers)),
    ]
    space = SearchSpace(tuple(groups))
    # Whatever else keeps a sub-network from being cut shows at the two ends of the space.
    for end in ("maximal", "minimal"):
        sub_network(choose(space, end), shapes, model.config.to_dict(), f"{end} sub-network")
    return space


def _require_ranks(recipe: FinetuneRecipe, shapes: Shapes) -> None:
    """Refuse a rank that no update of a layer can have: B A has at most the smaller of its two sides.

    Raises:
        BadInput: names the first such module, and its largest rank.
    """
    for name, shape in shapes.items():
        if recipe.rank > min(shape):
            raise BadInput(
                "a rank is above the smaller side of a module's weight",
                where=name,
                expected=f"at most {min(shape)}",
                found=recipe.rank,
                fix="give smaller ranks in search_space, or leave the module out of target_modules",
                code="E_ELASTIC",
            )


def _rank_groups(recipe: FinetuneRecipe, adapted: Sequence[str], prefix: str, count: int) -> Iterator[ElasticGroup]:
    names = flat_modules(recipe.elastic_modules)
    if "elastic_modules" in recipe.model_fields_set:
        _require(names, "elastic_modules", adapted)
    elif not {leaf(name) for name in adapted} & set(names):
        raise BadInput(
            "no adapter is elastic",
            where="elastic_modules",
            expected=_leaves(adapted),
            found=", ".join(names),
            fix="name the modules whose rank is elastic, or train with nls: false",
            code="E_ELASTIC",
        )
    if recipe.rank_sharing == "module":
        for wanted in names:
            yield from (ElasticGroup((name,), recipe.search_space) for name in adapted if leaf(name) == wanted)
        return
    for together in _lists(recipe.elastic_modules):
        for block in _blocks(prefix, count):
            if targets := tuple(name for name in adapted if name.startswith(block) and leaf(name) in together):
                yield ElasticGroup(targets, recipe.search_space)


def _width_groups(recipe: FinetuneRecipe, shapes: Shapes, prefix: str, count: int) -> Iterator[ElasticGroup]:
    if not recipe.widths:
        return
    _require(flat_modules(recipe.width_modules), "width_modules", list(shapes))
    for together in _lists(recipe.width_modules):
        for block in _blocks(prefix, count):
            targets = tuple(name for name in shapes if name.startswith(block) and leaf(name) in together)
            rows = {shapes[name][0] for name in targets}
            if len(rows) > 1:
                raise BadInput(
                    "modules with different numbers of rows cannot share a width",
                    where=f"width_modules, {', '.join(targets)}",
                    found=sorted(rows),
                    fix="give them in lists of their own",
                    code="E_WIDTH",
                )
            if targets:
                yield ElasticGroup(targets, _rows(recipe, rows.pop(), targets[0]), "width")


def _rows(recipe: FinetuneRecipe, whole: int, where: str) -> tuple[int, ...]:
    """The recipe's widths as numbers of rows of a layer that has `whole` of them."""
    step = recipe.width_multiple
    fractions = recipe.widths[0] <= 1
    sizes: list[int] = []
    for width in recipe.widths:
        exact = width * whole if fractions else width
        size = math.floor(exact + 0.5)
        below = max(step, int(exact) // step * step)
        if size > whole:
            raise BadInput(
                "a width is above the layer's rows", where=where, expected=f"at most {whole}", found=size,
                code="E_WIDTH",
            )  # fmt: skip
        if abs(size - exact) > 1e-6 * whole or (size != whole and size % step):
            near = [rows for rows in (below, below + step) if rows < whole] or [whole]
            raise BadInput(
                f"a width is no multiple of {step} rows",
                where=where,
                expected=" or ".join(f"{rows / whole:.6g}" if fractions else str(rows) for rows in [*near, whole]),
                found=f"{width:g} of {whole} rows" if fractions else size,
                fix="give whole numbers of rows, or another width_multiple; INT4 groups must fit it",
                code="E_WIDTH",
            )
        if sizes and size >= sizes[-1]:
            below = (sizes[-1] - 1) // step * step
            raise BadInput(
                "two widths are the same number of rows",
                where=where,
                expected=f"at most {below / whole:.6g} after {sizes[-1]} rows"
                if below
                else f"none after {sizes[-1]} rows",
                found=f"{width:g} of {whole} rows, which is {size}",
                fix="name each width once",
                code="E_WIDTH",
            )
        sizes.append(size)
    return tuple(sizes)


def _head_groups(recipe: FinetuneRecipe, shapes: Shapes, prefix: str, count: int) -> Iterator[ElasticGroup]:
    if not recipe.heads:
        return
    for block in _blocks(prefix, count):
        attention = [name.rpartition(".")[0] for name in shapes if name.startswith(block) and leaf(name) == "q_proj"]
        if not attention:
            raise Unsupported(
                "heads of this architecture cannot be cut",
                where=block.rstrip("."),
                expected="q_proj, k_proj and v_proj",
                found=_leaves([name for name in shapes if name.startswith(block)]),
                fix="leave heads away",
                code="E_WIDTH",
            )
        yield from (ElasticGroup((name,), recipe.heads, "heads") for name in attention)


def _block_groups(recipe: FinetuneRecipe, config: object, prefix: str, count: int) -> Iterator[ElasticGroup]:
    wanted = recipe.elastic_blocks
    if isinstance(wanted, BlockEnds):
        removable = list(range(wanted.all_but_first, count - wanted.all_but_last))
        if not removable:
            raise BadInput(
                "no block is left to be elastic",
                where="elastic_blocks",
                expected=f"all_but_first and all_but_last below {count} together",
                found=wanted.all_but_first + wanted.all_but_last,
                code="E_ELASTIC",
            )
    else:
        removable = sorted(set(wanted))
        if strange := [number for number in removable if not 0 <= number < count]:
            raise BadInput(
                "the model has no such block", where="elastic_blocks", expected=f"0 to {count - 1}",
                found=", ".join(map(str, strange)), code="E_ELASTIC",
            )  # fmt: skip
    if len(removable) == count:
        raise BadInput(
            "every block could be left out, and nothing would be left",
            where="elastic_blocks",
            expected=f"at most {count - 1} of {count} blocks",
            found=f"{count} blocks",
            fix="keep the first block: {all_but_first: 1}",
            code="E_ELASTIC",
        )
    # The key-value cache is measured by the first block's kind of attention.
    kinds = getattr(config, "layer_types", None)
    if kinds and removable and not any(kinds[i] == kinds[0] for i in range(count) if i not in removable):
        raise BadInput(
            f"no block with {kinds[0]} would be left",
            where="elastic_blocks",
            expected=f"one of {[i for i in range(count) if kinds[i] == kinds[0]]} always kept",
            found=", ".join(map(str, removable)),
            code="E_ELASTIC",
        )
    yield from (ElasticGroup((f"{prefix}.{number}",), (1, 0), "block") for number in removable)


def _blocks(prefix: str, count: int) -> list[str]:
    """What the names of each decoder layer's modules begin with."""
    return [f"{prefix}.{number}." for number in range(count)]


def _lists(modules: Modules) -> list[tuple[str, ...]]:
    """Lists of names that share a size: one list, if they came in a row."""
    nested = [group for group in modules if not isinstance(group, str)]
    return nested or [flat_modules(modules)]


def _require(wanted: Sequence[str], field: str, names: Sequence[str]) -> None:
    known = {leaf(name) for name in names}
    if strange := [name for name in wanted if name not in known]:
        raise BadInput(
            f"the model has none of the {field.replace('_', ' ')} that the recipe names",
            where=field,
            expected=_leaves(names),
            found=", ".join(strange),
            code="E_MODULES",
        )


def _leaves(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(leaf(name) for name in names))
