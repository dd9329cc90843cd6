"""The search space of an elastic adapter, and the choice of a sub-adapter from it.

SQFT saves a list of groups: modules that share one rank, and the ranks they were trained with, the largest first:

    [{"target": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A", ...], "search_space": [32, 24, 16]}, ...]

Shears, LoNAS and SQFT's first releases have an NNCF configuration (`nncf_space`); LoNAS has widths beside ranks there:
how many rows of a layer are kept, always the first ones. Adapted modules in no group keep their full rank and width.

What neither of the two can say (attention heads, whole decoder blocks) stands in a file of our own, search_space.json:

    {"sparseport_search_space": 1, "groups": [{"kind": "block", "targets": ["model.layers.3"], "sizes": [1, 0]}, ...]}

In every form a sub-network is a list of sizes, one per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.checkpoints.nncf_space import nncf_groups
from sparseport.checkpoints.peft import PREFIX
from sparseport.errors import BadInput, UsageError

FILE_NAME = "elastic_adapter_config.json"
OWN_FILE_NAME = "search_space.json"
KINDS = ("rank", "width", "heads", "block")
CHOICES = ("maximal", "heuristic", "minimal")
_SUFFIXES = (".lora_A.default", ".lora_A")
_MAX_BYTES = 16 << 20
_OWN_KEY, _OWN_VERSION = "sparseport_search_space", 1


@dataclass(frozen=True)
class ElasticGroup:
    """Modules that were trained with one shared size.

    targets  names of base modules (`model.layers.0.self_attn.q_proj`), each once
    sizes    trained sizes in the order of the file: first = maximal, last = minimal
    kind     "rank": ranks of the modules' updates
             "width": rows that are kept of the modules' weights, and of their lora_B where they have one
             "heads": targets are attention modules (`model.layers.0.self_attn`); key-value heads that are kept, with
                      the query heads that share them
             "block": targets are decoder blocks (`model.layers.0`); 1 = kept, 0 = left out
    """

    targets: tuple[str, ...]
    sizes: tuple[int, ...]
    kind: str = "rank"


@dataclass(frozen=True)
class SearchSpace:
    """All groups of a super-adapter.

    groups  in the order in which a list of sizes names them
    """

    groups: tuple[ElasticGroup, ...]


@dataclass(frozen=True)
class Selection:
    """A chosen sub-network; modules that are not named keep what they have.

    ranks    base module -> rank of its update
    widths   base module -> rows that are kept, counted from the first
    heads    attention module -> key-value heads that are kept, counted from the first
    removed  decoder blocks that are left out
    """

    ranks: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether nothing but ranks was chosen, so that the model keeps its shape."""
        return not (self.widths or self.heads or self.removed)


def open_search_space(path: Path | str, *, layers: int | None = None) -> SearchSpace:
    """The search space in a file of any of the systems; the content tells which.

    layers  num_hidden_layers of the base model; needed where the file writes a group once for all layers (Shears)

    An NNCF configuration may have comments and trailing commas, as NNCF itself accepts them.

    Raises:
        BadInput: E_ELASTIC for a file that is no search space, that contradicts itself, or that needs `layers`.
        Unsupported: E_ELASTIC for an NNCF configuration with other dimensions than width, or with re-ordered rows.
    """
    path = Path(path)
    content = read_json(path, limit=_MAX_BYTES, what="search space", allow_list=True, loose=True)
    if isinstance(content, list):
        return SearchSpace(tuple(read_search_space(path)))
    if _OWN_KEY in content:
        return SearchSpace(_own_groups(content, path))
    seen: set[tuple[str, str]] = set()
    return SearchSpace(
        tuple(
            _group(group.kind, group.modules, group.sizes, group.where, seen)
            for group in nncf_groups(content, str(path), layers=layers)
        )
    )


def read_search_space(path: Path | str) -> list[ElasticGroup]:
    """The groups of an elastic_adapter_config.json.

    Raises:
        BadInput: the file is no list of groups, a module comes twice, or a rank is no positive whole number.
    """
    path = Path(path)
    groups: list[ElasticGroup] = []
    seen: set[tuple[str, str]] = set()
    for number, entry in enumerate(_entries(path, "search space")):
        where = f"{path}, group {number}"
        groups.append(_group("rank", _modules(entry, where), entry.get("search_space"), where, seen))
    return groups


def write_search_space(path: Path | str, groups: Sequence[ElasticGroup]) -> None:
    """Write groups in the form that `read_search_space` and SQFT's scripts read.

    Raises:
        UsageError: not all of them are ranks; the form has nothing else.
    """
    if any(group.kind != "rank" for group in groups):
        raise UsageError(
            "elastic_adapter_config.json holds ranks only, and a group has widths", where=path, fix="write_own_space"
        )
    write_json(
        Path(path),
        [
            {"target": [f"{PREFIX}{module}.lora_A" for module in group.targets], "search_space": list(group.sizes)}
            for group in groups
        ],
    )


def write_own_space(path: Path | str, groups: Sequence[ElasticGroup]) -> None:
    """Write groups of any kind in the form of our own (search_space.json)."""
    entries = [{"kind": g.kind, "targets": list(g.targets), "sizes": list(g.sizes)} for g in groups]
    write_json(Path(path), {_OWN_KEY: _OWN_VERSION, "groups": entries})


def save_search_space(folder: Path, groups: Sequence[ElasticGroup]) -> Path:
    """Write a search space beside an adapter: in SQFT's form if it has ranks only, else our own. Returns the file."""
    if all(group.kind == "rank" for group in groups):
        write_search_space(folder / FILE_NAME, groups)
        return folder / FILE_NAME
    write_own_space(folder / OWN_FILE_NAME, groups)
    return folder / OWN_FILE_NAME


def select(space: SearchSpace, sizes: Sequence[int], where: str = "sub-network") -> Selection:
    """The sub-network of a list of sizes, one per group in the order of the space.

    Raises:
        BadInput: a wrong number of sizes, or one that was not trained; the message has the allowed values.
    """
    return _listed(Path(where), list(sizes), space)


def choose(space: SearchSpace, choice: str | Path, *, trained: Mapping[str, int] | None = None) -> Selection:
    """The sizes of a named choice, or of a file.

    choice   maximal (first size), heuristic (the size at index (n - 1) // 2), minimal (last), or the path of a list:
             whole numbers, one per group in the order of the space; or {"target": [...], "active_rank_value": rank}
             objects that name every module of a space without widths
    trained  module -> rank of the adapter's tensors, to check the ranks against

    A sub-adapter that was extracted from its super-adapter may still have the search space beside it. What is maximal
    then is what its tensors hold, where that is one of the trained ranks.

    Raises:
        BadInput: an unknown or forgotten module, a wrong number of sizes, or a size that was not trained; the message
            has the allowed values.
        UsageError: `choice` is text, but none of the names.
    """
    if isinstance(choice, Path):
        selection = _from_file(choice, space)
        origin = str(choice)
    elif choice in CHOICES:
        selection = _selection(
            space,
            [
                group.sizes[{"maximal": 0, "heuristic": (len(group.sizes) - 1) // 2, "minimal": -1}[choice]]
                for group in space.groups
            ],
        )
        if choice == "maximal" and trained is not None:
            selection = _within(selection, _spaces(space), trained)
        origin = f"sub-adapter {choice}"
    else:
        raise UsageError(
            "unknown choice of sub-adapter",
            expected=", ".join(CHOICES) + ", or the path of a JSON file",
            found=repr(choice),
        )
    if trained is not None:
        _check_trained(selection, _spaces(space), trained, origin)
    return selection


def choose_ranks(
    groups: Sequence[ElasticGroup], choice: str | Path, *, trained: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Module -> rank, as `choose` finds it for groups of ranks.

    Raises:
        BadInput, UsageError: as `choose`.
    """
    return choose(SearchSpace(tuple(groups)), choice, trained=trained).ranks


def _group(kind: str, modules: tuple[str, ...], sizes: object, where: str, seen: set[tuple[str, str]]) -> ElasticGroup:
    label = {"rank": "search_space", "width": "list of widths"}.get(kind, "sizes")
    if kind == "block" and sizes != [1, 0]:
        raise BadInput(
            "a block is kept or left out", where=where, expected="sizes [1, 0]", found=repr(sizes)[:80],
            code="E_ELASTIC",
        )  # fmt: skip
    lowest = 0 if kind == "block" else 1
    if not isinstance(sizes, list) or not sizes or any(type(size) is not int or size < lowest for size in sizes):
        raise BadInput(
            f"{label} is no list of {kind}s",
            where=where,
            expected="whole numbers above 0",
            found=repr(sizes)[:80],
            fix=f"list the {kind}s of the training run, the largest first",
            code="E_ELASTIC",
        )
    if len(set(sizes)) != len(sizes) or max(sizes) != sizes[0] or min(sizes) != sizes[-1]:
        raise BadInput(
            f"{label} does not run from the largest {kind} to the smallest",
            where=where,
            found=repr(sizes)[:80],
            fix=f"list each {kind} once, the largest first",
            code="E_ELASTIC",
        )
    for module in modules:
        if (kind, module) in seen:
            raise BadInput(
                "module is in more than one group",
                where=f"{where}, module {module}",
                fix=f"give the module's {kind} in one group",
                code="E_ELASTIC",
            )
        seen.add((kind, module))
    return ElasticGroup(modules, tuple(sizes), kind)


def _own_groups(content: Mapping[str, Any], path: Path) -> tuple[ElasticGroup, ...]:
    entries = content.get("groups")
    known = content.get(_OWN_KEY) == _OWN_VERSION and set(content) == {_OWN_KEY, "groups"}
    if not known or not isinstance(entries, list) or not entries:
        raise BadInput(
            "not a search space of this version",
            where=path,
            expected=f'{{"{_OWN_KEY}": {_OWN_VERSION}, "groups": [...]}}',
            found=", ".join(map(str, list(content)[:4])),
            code="E_ELASTIC",
        )
    seen: set[tuple[str, str]] = set()
    groups = []
    for number, entry in enumerate(entries):
        where = f"{path}, group {number}"
        targets = entry.get("targets") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or set(entry) != {"kind", "targets", "sizes"} or entry["kind"] not in KINDS:
            raise BadInput(
                "not a group",
                where=where,
                expected=f"kind ({', '.join(KINDS)}), targets and sizes",
                found=repr(entry)[:80],
                code="E_ELASTIC",
            )
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise BadInput("targets is no list of names", where=where, found=repr(targets)[:80], code="E_ELASTIC")
        groups.append(_group(entry["kind"], tuple(targets), entry["sizes"], where, seen))
    return tuple(groups)


def _selection(space: SearchSpace, sizes: Sequence[int]) -> Selection:
    found: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for group, size in zip(space.groups, sizes, strict=True):
        found[group.kind].update(dict.fromkeys(group.targets, size))
    removed = frozenset(block for block, kept in found["block"].items() if not kept)
    return Selection(found["rank"], found["width"], found["heads"], removed)


def _spaces(space: SearchSpace) -> dict[str, tuple[int, ...]]:
    return {module: group.sizes for group in space.groups if group.kind == "rank" for module in group.targets}


def _within(selection: Selection, spaces: Mapping[str, tuple[int, ...]], trained: Mapping[str, int]) -> Selection:
    """The selection with ranks no larger than the tensors, for modules whose tensors have a rank of the space."""
    ranks = {
        module: trained[module] if trained.get(module, rank) < rank and trained[module] in spaces[module] else rank
        for module, rank in selection.ranks.items()
    }
    return replace(selection, ranks=ranks)


def _check_trained(
    selection: Selection, spaces: Mapping[str, tuple[int, ...]], trained: Mapping[str, int], origin: str
) -> None:
    for module, rank in selection.ranks.items():
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
                fix="the sub-adapter was extracted already: --sub-adapter maximal takes all of it"
                if trained[module] in spaces[module]
                else "use the search space saved with the adapter, or remove it from the folder to take all of the "
                "adapter's tensors",
                code="E_ELASTIC",
            )


def _from_file(path: Path, space: SearchSpace) -> Selection:
    content = read_json(path, limit=_MAX_BYTES, what="custom sub-adapter", allow_list=True)
    if isinstance(content, list) and content and all(type(value) is int for value in content):
        return _listed(path, content, space)
    if any(group.kind != "rank" for group in space.groups):
        raise BadInput(
            "the custom sub-adapter has ranks only, and the search space has widths too",
            where=path,
            expected=f"a list of {len(space.groups)} whole numbers, one per group",
            fix="give one number per group, in the order of the search space",
            code="E_ELASTIC",
        )
    return Selection(ranks=_custom(path, _spaces(space)))


def _listed(path: Path, sizes: list[int], space: SearchSpace) -> Selection:
    if len(sizes) != len(space.groups):
        raise BadInput(
            "the custom sub-adapter does not have one number per group",
            where=path,
            expected=f"{len(space.groups)} numbers",
            found=len(sizes),
            fix="a group that is written once for all layers counts once per layer",
            code="E_ELASTIC",
        )
    for number, (group, size) in enumerate(zip(space.groups, sizes, strict=True)):
        if size not in group.sizes:
            raise BadInput(
                f"{group.kind} is not in the search space",
                where=f"{path}, number {number}, module {group.targets[0]}",
                expected=f"one of {list(group.sizes)}",
                found=str(size)[:40],
                code="E_ELASTIC",
            )
    return _selection(space, sizes)


def _custom(path: Path, spaces: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for number, entry in enumerate(_entries(path, "custom sub-adapter")):
        where = f"{path}, group {number}"
        rank = entry.get("active_rank_value")
        for module in _modules(entry, where):
            if module in ranks:
                raise BadInput("module is in more than one group", where=f"{where}, module {module}", code="E_ELASTIC")
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
    entries = read_json(path, limit=_MAX_BYTES, what=what, allow_list=True)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(
            f"{what} is no list of groups", where=path, expected='[{"target": [...], ...}, ...]', code="E_ELASTIC"
        )
    return entries


def _modules(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
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
        modules.append(target[len(PREFIX) : -len(suffix)])
    return tuple(modules)
