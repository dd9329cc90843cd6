"""Does a further adapter fit a base that was exported already, and what of it goes into the folder?

Adapters name the layers of the whole model. In the folder a sub-network may have numbered its blocks anew and cut its
layers; the certificate says of each layer which one it was (`from`) and how large (`whole_shape`), and config.json says
the same of the blocks in its own words. Both have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.elastic import CHOICES, SearchSpace, Selection, choose, open_search_space
from sparseport.checkpoints.layers import layer_count
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.checkpoints.sub_config import block_of, in_whole_model, kept_blocks, whole_config
from sparseport.errors import BadInput, Unsupported, VerificationError
from sparseport.merge.subnetwork import cut_branch, head_counts
from sparseport.verify.certificate import Certificate
from sparseport.weights.linear import LowRankBranch


@dataclass(frozen=True)
class Fit:
    """What of an adapter goes into an exported folder.

    written  module of the whole model -> its name in the folder, for the adapter's modules that are there
    shapes   module of the whole model -> [out, in] in the folder, for the same
    ranks    module of the whole model -> rank of the chosen sub-adapter; others keep theirs
    """

    written: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    ranks: dict[str, int]

    def branch(self, adapter: AdapterFolder, module: str) -> LowRankBranch:
        """The branch of a module of the whole model, at the chosen rank and cut like its layer."""
        branch = adapter.branch(module)
        return cut_branch(branch.at_rank(self.ranks.get(module, branch.rank)), *self.shapes[module])


def fit_adapter(
    adapter: AdapterFolder,
    certificate: Certificate,
    config: Mapping[str, Any],
    sub_adapter: str,
    search_space: Path | None,
) -> Fit:
    """What of an adapter goes into an exported folder, after a look at names and shapes.

    Args:
        adapter: for the whole model that the folder's base came from.
        certificate: the folder's.
        config: the folder's config.json.
        sub_adapter: maximal, heuristic, minimal, or a file.
        search_space: the adapter's search space, where it is not beside it.

    Raises:
        BadInput: the adapter is for another base, or there is nothing to choose from.
        Unsupported: the choice has other rows, heads or blocks than the folder's base.
        VerificationError: certificate and config.json say different things of the blocks that were left out.
    """
    blocks = kept_blocks(config)
    layers = _layers(certificate, blocks)
    siblings = {_without_block(module) for module in layers}
    written, shapes = {}, {}
    for module in adapter.modules():
        if module in layers:
            name, facts = layers[module]
            expected = tuple(facts.get("whole_shape", facts["shape"]))
            if adapter.shape(module) == expected:
                written[module], shapes[module] = name, (facts["shape"][0], facts["shape"][1])
                continue
        elif _left_out(module, blocks, config) and _without_block(module) in siblings:
            continue
        raise BadInput(
            "the adapter is for another base",
            where=f"{adapter.path}, {module}",
            expected=expected if module in layers else "one of the exported linear layers",
            found=adapter.shape(module),
            fix=f"use an adapter that was trained on this base; this one names {adapter.base_model_name!r}",
            code="E_PAIRING",
        )
    if not written:
        raise BadInput(
            "the adapter changes only blocks that were left out of the exported base",
            where=adapter.path,
            expected=f"layers of block {', '.join(map(str, blocks or ()))}",
            fix="export the base again with the blocks that the adapter changes",
            code="E_PAIRING",
        )
    return Fit(written, shapes, _ranks(adapter, layers, config, sub_adapter, search_space))


_Layers = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Module of the whole model -> (its name in the folder, what the certificate says of it)."""


def _layers(certificate: Certificate, blocks: tuple[int, ...] | None) -> _Layers:
    found = {facts.get("from", name): (name, facts) for name, facts in certificate.linears.items()}
    for module, (name, _) in found.items():
        if in_whole_model(name, blocks) != module:
            raise VerificationError(
                "certificate and config.json disagree about the blocks that were left out",
                where=name,
                expected=module,
                found=in_whole_model(name, blocks),
                fix="export the base again",
            )
    return found


def _ranks(
    adapter: AdapterFolder, layers: _Layers, config: Mapping[str, Any], sub_adapter: str, search_space: Path | None
) -> dict[str, int]:
    space_file = search_space or adapter.search_space_file()
    if space_file is None:
        if sub_adapter != "maximal":
            raise BadInput(
                "the adapter has no search space to choose a sub-adapter from",
                where=adapter.path,
                fix="give its search space, or leave the choice away",
                code="E_ELASTIC",
            )
        return {}
    space = open_search_space(space_file, layers=layer_count(whole_config(config)))
    choice = sub_adapter if sub_adapter in CHOICES else Path(sub_adapter)
    selection = choose(space, choice, trained=adapter.ranks())
    _require_same_cut(space, selection, layers, config)
    return selection.ranks


def _require_same_cut(space: SearchSpace, selection: Selection, layers: _Layers, config: Mapping[str, Any]) -> None:
    """Refuse a sub-adapter for another sub-network than the folder's.

    Raises:
        Unsupported: names the first layer, attention module or block that differs.
    """
    whole, blocks = whole_config(config), kept_blocks(config)
    for module, width in selection.widths.items():
        if module in layers and layers[module][1]["shape"][0] != width:
            raise _other_cut("rows of a layer", module, layers[module][1]["shape"][0], width)
    for attention, heads in selection.heads.items():
        query, key = (layers.get(f"{attention}.{leaf}") for leaf in ("q_proj", "k_proj"))
        if query is None or key is None:
            continue
        rows = [facts.get("whole_shape", facts["shape"])[0] for _, facts in (query, key)]
        size, _, _ = head_counts(rows[0], rows[1], whole, attention)
        if key[1]["shape"][0] != heads * size:
            raise _other_cut("key-value heads", attention, key[1]["shape"][0] // size, heads)
    for block in (target for group in space.groups if group.kind == "block" for target in group.targets):
        there = blocks is None or block_of(block) in blocks
        if there == (block in selection.removed):
            said = ("left out", "kept")
            raise _other_cut("blocks", block, said[there], said[not there])


def _other_cut(what: str, where: str, expected: object, found: object) -> Unsupported:
    return Unsupported(
        f"the sub-adapter keeps other {what} than the exported base",
        where=where,
        expected=expected,
        found=found,
        fix="choose the sub-adapter that has the base's sizes",
        code="E_WIDTH",
    )


def _left_out(module: str, blocks: tuple[int, ...] | None, config: Mapping[str, Any]) -> bool:
    """Whether a module is of a block that the whole model has and the folder has not."""
    number = block_of(module)
    count = layer_count(whole_config(config)) or 0
    return blocks is not None and number is not None and number not in blocks and number < count


def _without_block(module: str) -> tuple[str, ...]:
    """A module's name without the number of its block."""
    parts = module.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return (*parts[:position], "", *parts[position + 1 :])
