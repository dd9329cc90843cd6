"""The search space of an elastic adapter (SQFT's elastic_adapter_config.json) and the choice of ranks from it.

The file is a list of groups: modules that share one rank, and the ranks they were trained with, the largest first:

    [{"target": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A", ...], "search_space": [32, 24, 16]}, ...]

Adapted modules that are in no group keep their full rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.checkpoints.peft import PREFIX
from sparseport.errors import BadInput, UsageError

FILE_NAME = "elastic_adapter_config.json"
CHOICES = ("maximal", "heuristic", "minimal")
_SUFFIXES = (".lora_A.default", ".lora_A")


@dataclass(frozen=True)
class ElasticGroup:
    """Modules that were trained with one shared rank.

    targets  names of base modules (`model.layers.0.self_attn.q_proj`)
    ranks    trained ranks in the order of the file: first = maximal, last = minimal
    """

    targets: tuple[str, ...]
    ranks: tuple[int, ...]


def read_search_space(path: Path | str) -> list[ElasticGroup]:
    """The groups of an elastic_adapter_config.json.

    Raises:
        BadInput: the file is no list of groups, a module comes twice, or a rank is no positive whole number.
    """
    path = Path(path)
    groups: list[ElasticGroup] = []
    seen: set[str] = set()
    for number, entry in enumerate(_entries(path, "search space")):
        where = f"{path}, group {number}"
        ranks = entry.get("search_space")
        if not isinstance(ranks, list) or not ranks or any(type(r) is not int or r < 1 for r in ranks):
            raise BadInput(
                "search_space is no list of ranks",
                where=where,
                expected="whole numbers above 0",
                found=repr(ranks)[:80],
                code="E_ELASTIC",
            )
        if len(set(ranks)) != len(ranks) or max(ranks) != ranks[0] or min(ranks) != ranks[-1]:
            raise BadInput(
                "search_space does not run from the largest rank to the smallest",
                where=where,
                found=repr(ranks)[:80],
                fix="list each rank once, the largest first",
                code="E_ELASTIC",
            )
        groups.append(ElasticGroup(_modules(entry, where, seen), tuple(ranks)))
    return groups


def write_search_space(path: Path | str, groups: Sequence[ElasticGroup]) -> None:
    """Write groups in the form that `read_search_space` and SQFT's scripts read."""
    write_json(
        Path(path),
        [
            {"target": [f"{PREFIX}{module}.lora_A" for module in group.targets], "search_space": list(group.ranks)}
            for group in groups
        ],
    )


def choose_ranks(
    groups: Sequence[ElasticGroup], choice: str | Path, *, trained: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Module -> rank for a named choice, or for a file of SQFT's custom form.

    choice   maximal (first rank), heuristic (the rank at index (n - 1) // 2), minimal (last), or the path of a list of
             {"target": [...], "active_rank_value": rank} that names every module of the search space once
    trained  module -> rank of the adapter's tensors, to check against

    Raises:
        BadInput: an unknown or forgotten module, or a rank that was not trained; the message has the allowed values.
        UsageError: `choice` is text, but none of the names.
    """
    spaces = {module: group.ranks for group in groups for module in group.targets}
    if isinstance(choice, Path):
        ranks = _custom(choice, spaces)
        origin = str(choice)
    elif choice in CHOICES:
        ranks = {
            module: space[{"maximal": 0, "heuristic": (len(space) - 1) // 2, "minimal": -1}[choice]]
            for module, space in spaces.items()
        }
        origin = f"sub-adapter {choice}"
    else:
        raise UsageError(
            "unknown choice of sub-adapter",
            expected=", ".join(CHOICES) + ", or the path of a JSON file",
            found=repr(choice),
        )
    for module, rank in ranks.items() if trained is not None else ():
        assert trained is not None
        if module not in trained:
            raise BadInput(
                "the search space names a module that the adapter does not have",
                where=f"{origin}, module {module}",
                fix="use the search space saved with the adapter",
                expected=", ".join(list(trained)[:3]) + ", ...",
                code="E_ELASTIC",
            )
        if rank > trained[module]:
            allowed = [r for r in spaces[module] if r <= trained[module]]
            raise BadInput(
                "rank is above the trained one",
                where=f"{origin}, module {module}",
                expected=f"one of {allowed}" if allowed else f"at most {trained[module]}",
                found=rank,
                code="E_ELASTIC",
            )
    return ranks


def _custom(path: Path, spaces: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    seen: set[str] = set()
    for number, entry in enumerate(_entries(path, "custom sub-adapter")):
        where = f"{path}, group {number}"
        rank = entry.get("active_rank_value")
        for module in _modules(entry, where, seen):
            if module not in spaces:
                raise BadInput(
                    "the custom sub-adapter names a module outside the search space",
                    found=module,
                    where=where,
                    expected=", ".join(list(spaces)[:3]) + ", ...",
                    code="E_ELASTIC",
                )
            if type(rank) is not int or rank not in spaces[module]:
                raise BadInput(
                    "rank is not in the search space",
                    where=f"{where}, module {module}",
                    expected=f"one of {list(spaces[module])}",
                    found=repr(rank)[:40],
                    code="E_ELASTIC",
                )
            ranks[module] = rank
    if missing := [module for module in spaces if module not in ranks]:
        raise BadInput(
            f"the custom sub-adapter leaves out {len(missing)} modules",
            where=f"{path}, module {missing[0]}",
            expected=f"one of {list(spaces[missing[0]])}",
            fix="name every module of the search space",
            code="E_ELASTIC",
        )
    return {module: ranks[module] for module in spaces}


def _entries(path: Path, what: str) -> list[dict[str, Any]]:
    entries = read_json(path, what=what, allow_list=True)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(
            f"{what} is no list of groups", where=path, expected='[{"target": [...], ...}, ...]', code="E_ELASTIC"
        )
    return entries


def _modules(entry: Mapping[str, Any], where: str, seen: set[str]) -> tuple[str, ...]:
    targets = entry.get("target")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise BadInput("target is no list of names", where=where, found=repr(targets)[:80], code="E_ELASTIC")
    modules = []
    for target in targets:
        suffix = next((s for s in _SUFFIXES if target.endswith(s)), None)
        if suffix is None or not target.startswith(PREFIX):
            raise BadInput(
                "target is no adapter module",
                where=where,
                expected=f"{PREFIX}<module>.lora_A",
                found=repr(target)[:120],
                code="E_ELASTIC",
            )
        module = target[len(PREFIX) : -len(suffix)]
        if module in seen:
            raise BadInput("module is in more than one group", where=f"{where}, module {module}", code="E_ELASTIC")
        seen.add(module)
        modules.append(module)
    return tuple(modules)
