"""The groups of an NNCF configuration: the search spaces of Shears, LoNAS, and SQFT's first releases.

Two lists stand under `bootstrapNAS` (or `SQFT`) `.training.elasticity.width`: `overwrite_groups` has the graph nodes
that share one size, `overwrite_groups_widths` the sizes that each group was trained with. A node names the path of a
module with its classes, and the operation in it:

    PeftModelForCausalLM/LoraModel[base_model]/.../LlamaMLP[mlp]/Linear[up_proj]/ModuleDict[lora_A]/...[default]/linear_0

Class names differ between versions of the libraries, so only the names in brackets count. The output of lora_A is the
rank of a module's update. Every other output is a width: rows of the module's own weight, and of its lora_B with them.

Shears writes a group once for all layers: nodes that start with `{re}` stand for every layer, `{*}` is its number. The
flattened list has all layers of the first group, then all layers of the second, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sparseport.checkpoints.peft import PREFIX
from sparseport.errors import BadInput, Unsupported

SECTIONS = ("SQFT", "bootstrapNAS")
# Nodes after expansion; the largest known space has 480.
MAX_NODES = 1 << 17

_EVERY_LAYER, _LAYER = "{re}", "{*}"
_SAME_FILE = "give the NNCF configuration used in training"
_AS_PRINTED = "name linear layers of the PEFT model as NNCF prints them"
_NODE = re.compile(r"[\w.]+(?:/[\w.]+\[\w+\])+/linear_\d+")
_NAME = re.compile(r"\[(\w+)\]")
# The linear layer that an adapted module keeps inside: PEFT called it self_linear in patched 0.5, base_layer later.
_BASE_LAYERS = ("self_linear", "base_layer")


class NncfGroup(NamedTuple):
    """One group of the flattened list, its sizes not yet checked.

    where    file, group, and layer if the group was written for all layers
    kind     "rank" or "width"
    modules  base modules (`model.layers.0.mlp.up_proj`), each once
    sizes    as found in the file
    """

    where: str
    kind: str
    modules: tuple[str, ...]
    sizes: object


def nncf_groups(config: Mapping[str, Any], where: str, *, layers: int | None) -> list[NncfGroup]:
    """The groups of an NNCF configuration in flattened order.

    layers  num_hidden_layers of the base model; needed for groups written for all layers

    Raises:
        BadInput: the lists are not there or do not fit together, a node is no linear layer of a PEFT model, a group
            mixes ranks and widths or names only half of an adapted module, or a template cannot be expanded.
        Unsupported: the space has other dimensions than width, or the base's rows were re-ordered in training.
    """
    training, width = _sections(config, where)
    groups = width.get("overwrite_groups")
    sizes = width.get("overwrite_groups_widths")
    for name, value in (("overwrite_groups", groups), ("overwrite_groups_widths", sizes)):
        if not isinstance(value, list) or not value:
            raise _bad(f"{name} is no list of groups", where, found=value, fix=_SAME_FILE)
    assert isinstance(groups, list) and isinstance(sizes, list)
    if len(groups) != len(sizes):
        raise _bad(
            "overwrite_groups and overwrite_groups_widths have different lengths",
            where,
            expected=f"{len(groups)} lists of widths",
            found=len(sizes),
            fix="give one list of widths per group",
        )
    result: list[NncfGroup] = []
    room = MAX_NODES
    for number, (nodes, size) in enumerate(zip(groups, sizes, strict=True)):
        place = f"{where}, group {number}"
        if size == [-1]:
            raise _bad(
                "the group has a placeholder where its ranks belong",
                place,
                expected="the ranks that --search_space gave in training",
                found=size,
                fix="write them into overwrite_groups_widths, or give the nncf_config.json saved with the adapter",
            )
        for own_place, members in _expanded(nodes, place, layers, room):
            room -= len(members)
            kind, modules = _members(members, own_place)
            result.append(NncfGroup(own_place, kind, modules, size))
    if any(group.kind == "width" for group in result) and _reorders(training):
        raise Unsupported(
            "reorg_weights re-ordered the base's rows in training, and the base on disk has them in the old order",
            where=where,
            expected="a space trained without reorg_weights",
            fix="train without it: a sub-network is then made of the first rows",
            code="E_ELASTIC",
        )
    return result


def _sections(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    present = [key for key in SECTIONS if key in config]
    if len(present) != 1:
        raise _bad(
            "the file is no search space",
            where,
            expected=f"one of the keys {' and '.join(SECTIONS)}, or a list of groups",
            found=", ".join(present) or ", ".join(list(config)[:3]) or "an empty object",
            fix=f"give elastic_adapter_config.json, or {_SAME_FILE.removeprefix('give ')}",
        )
    path, section = present[0], config[present[0]]
    found: dict[str, Mapping[str, Any]] = {}
    for key in ("training", "elasticity", "width"):
        section = section.get(key) if isinstance(section, dict) else None
        path += f".{key}"
        if not isinstance(section, dict):
            raise _bad(f"{path} is missing", where, found=section, fix=_SAME_FILE)
        found[key] = section
    dimensions = found["elasticity"].get("available_elasticity_dims", ["width"])
    if dimensions != ["width"]:
        raise Unsupported(
            "the search space has other dimensions than width",
            where=where,
            expected='available_elasticity_dims: ["width"]',
            found=repr(dimensions)[:80],
            fix="train with width alone",
            code="E_ELASTIC",
        )
    return found["training"], found["width"]


def _reorders(training: Mapping[str, Any]) -> bool:
    schedule = training.get("schedule")
    stages = schedule.get("list_stage_descriptions") if isinstance(schedule, dict) else None
    return isinstance(stages, list) and any(isinstance(s, dict) and bool(s.get("reorg_weights")) for s in stages)


def _expanded(nodes: object, where: str, layers: int | None, room: int) -> Iterator[tuple[str, list[str]]]:
    """(place, nodes) of a group: one, or one per layer if it is written for all layers."""
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, str) for node in nodes):
        raise _bad("group is no list of node names", where, found=nodes, fix=_AS_PRINTED)
    patterns = [node.removeprefix(_EVERY_LAYER) for node in nodes if node.startswith(_EVERY_LAYER)]
    if not patterns:
        _check_room(len(nodes), room, where)
        yield where, nodes
        return
    for pattern in patterns:
        if pattern.count(f"[{_LAYER}]") != 1:
            raise _bad(
                f"a node that starts with {_EVERY_LAYER} needs {_LAYER} once, in brackets, for the layer's number",
                where,
                found=pattern,
                fix=f"write the node as ...[layers]/...[{_LAYER}]/..., or without {_EVERY_LAYER}",
            )
    if len(patterns) != len(nodes):
        raise _bad(
            f"some nodes of the group start with {_EVERY_LAYER} and some do not",
            where,
            found=next(node for node in nodes if not node.startswith(_EVERY_LAYER)),
            fix="write them in groups of their own",
        )
    if layers is None:
        raise _bad(
            "the group is written for all layers, and the number of layers is not known",
            where,
            found=patterns[0],
            expected="num_hidden_layers of the base",
            fix="give the base model together with the search space",
        )
    if type(layers) is not int or layers < 1:
        raise _bad("the number of layers is no number above 0", where, found=layers, fix="check the base's config.json")
    _check_room(layers * len(nodes), room, where)
    for layer in range(layers):
        yield f"{where}, layer {layer}", [pattern.replace(_LAYER, str(layer)) for pattern in patterns]


def _members(nodes: list[str], where: str) -> tuple[str, tuple[str, ...]]:
    """(kind, modules) of the nodes of a group."""
    parts: dict[str, list[str]] = {}
    for node in nodes:
        module, part = _module(node, where)
        if part in parts.setdefault(module, []):
            raise _bad("the group names a node twice", f"{where}, module {module}", found=node, fix="name it once")
        parts[module].append(part)
    if all(names == ["lora_A"] for names in parts.values()):
        return "rank", tuple(parts)
    for module, names in parts.items():
        if "lora_A" in names:
            raise _bad(
                "the group mixes ranks and widths",
                f"{where}, module {module}",
                found=", ".join(names),
                fix="give lora_A nodes a group of their own",
            )
        # An adapted module is cut in two places at once, or its update no longer has the shape of its weight.
        if sorted(names) not in (["base", "lora_B"], ["plain"]):
            raise _bad(
                "the group names only a part of an adapted module",
                f"{where}, module {module}",
                expected=f"{_BASE_LAYERS[0]} and lora_B",
                found=", ".join(names),
                fix="list both nodes, so that weight and update keep the same rows",
            )
    return "width", tuple(parts)


def _module(node: str, where: str) -> tuple[str, str]:
    """(base module, part) of a node; part is lora_A, lora_B, base (of an adapted module) or plain (not adapted)."""
    if _LAYER in node or not _NODE.fullmatch(node):
        raise _bad(
            f"node has {_LAYER} without {_EVERY_LAYER} before it" if _LAYER in node else "unknown node",
            where,
            expected="Class/Class[base_model]/Class[model]/.../Class[name]/linear_0",
            found=node,
            fix=f"start the node with {_EVERY_LAYER}" if _LAYER in node else _AS_PRINTED,
        )
    names = _NAME.findall(node)
    module, part = names, "plain"
    if names[-2:] in (["lora_A", "default"], ["lora_B", "default"]):
        module, part = names[:-2], names[-2]
    elif names[-1] in _BASE_LAYERS:
        module, part = names[:-1], "base"
    path = ".".join(module)
    if not path.startswith(PREFIX) or any(n.startswith("lora_") or n in _BASE_LAYERS for n in module):
        raise _bad(
            "node is not part of a LoRA model",
            where,
            expected=f"[base_model]/[model]/.../[name], then lora_A, lora_B or {_BASE_LAYERS[0]}",
            found=node,
            fix=_AS_PRINTED,
        )
    return path[len(PREFIX) :], part


def _check_room(count: int, room: int, where: str) -> None:
    if count > room:
        raise _bad(
            "the search space is too large",
            where,
            expected=f"at most {MAX_NODES} nodes in all",
            found=f"{count} more after {MAX_NODES - room}",
            fix="check num_hidden_layers and the number of groups",
        )


def _bad(what: str, where: str, *, found: object, fix: str, expected: str | None = None) -> BadInput:
    text = found if isinstance(found, str) else repr(found)
    return BadInput(what, where=where, expected=expected, found=text[:160], fix=fix, code="E_ELASTIC")
