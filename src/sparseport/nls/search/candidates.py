"""Sub-networks as integer vectors: one size per group of the search space."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

from sparseport.errors import BadInput

Candidate: TypeAlias = tuple[int, ...]
"""A sub-network: one trained size per group, in the order of the groups."""

Sizes: TypeAlias = Sequence[tuple[int, ...]]
"""Trained sizes of each group: the first is the maximal one, the last the minimal one."""


class Group(Protocol):
    """What the search knows of a group; `checkpoints.elastic.ElasticGroup` is one."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules that share the size."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Trained sizes, first = maximal, last = minimal."""

    @property
    def kind(self) -> str:
        """What the sizes are: rank, width, heads or block."""


def sizes_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """The sizes of every group.

    Raises:
        BadInput: E_ELASTIC for a space without groups, or a group whose sizes do not run from the largest to the
            smallest, each once.
    """
    if not groups:
        raise BadInput("the search space has no groups", fix="train with elastic modules", code="E_ELASTIC")
    for number, group in enumerate(groups):
        sizes = group.sizes
        whole = bool(sizes) and all(type(size) is int and size >= 0 for size in sizes)
        if not whole or len(set(sizes)) != len(sizes) or max(sizes) != sizes[0] or min(sizes) != sizes[-1]:
            raise BadInput(
                "sizes of a group do not run from the largest to the smallest",
                where=_place(number, group),
                expected="whole numbers, the largest first, each once",
                found=repr(sizes)[:80],
                code="E_ELASTIC",
            )
    return [tuple(group.sizes) for group in groups]


def space_digest(groups: Sequence[Group]) -> str:
    """SHA-256 of the groups as canonical JSON: names, sizes and kinds, in their order."""
    content = [{"kind": group.kind, "sizes": list(group.sizes), "targets": list(group.targets)} for group in groups]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def number_of_candidates(sizes: Sizes) -> int:
    """How many sub-networks the space has."""
    return math.prod(len(group) for group in sizes)


def maximal(sizes: Sizes) -> Candidate:
    """The first size of every group."""
    return tuple(group[0] for group in sizes)


def heuristic(sizes: Sizes) -> Candidate:
    """The size at index (n - 1) // 2 of every group (the reference configuration of LoNAS, Shears and SQFT)."""
    return tuple(group[(len(group) - 1) // 2] for group in sizes)


def minimal(sizes: Sizes) -> Candidate:
    """The last size of every group."""
    return tuple(group[-1] for group in sizes)


def named_candidates(sizes: Sizes) -> dict[str, Candidate]:
    """The sub-networks that every search looks at, by their names."""
    return {"minimal": minimal(sizes), "heuristic": heuristic(sizes), "maximal": maximal(sizes)}


def to_indices(candidate: Candidate, sizes: Sizes) -> tuple[int, ...]:
    """Sizes -> their positions in the groups. The candidate has to be one of the space."""
    return tuple(group.index(size) for size, group in zip(candidate, sizes, strict=True))


def from_indices(indices: Iterable[int], sizes: Sizes) -> Candidate:
    """Positions in the groups -> sizes."""
    return tuple(group[index] for index, group in zip(indices, sizes, strict=True))


def neighbours(candidate: Candidate, sizes: Sizes) -> list[Candidate]:
    """All sub-networks that are one step away in one group, group by group, the larger size first."""
    found = []
    for number, index in enumerate(to_indices(candidate, sizes)):
        for step in (index - 1, index + 1):
            if 0 <= step < len(sizes[number]):
                found.append((*candidate[:number], sizes[number][step], *candidate[number + 1 :]))
    return found


def random_candidates(
    sizes: Sizes, number: int, dice: random.Random, without: Iterable[Candidate] = ()
) -> list[Candidate]:
    """Distinct sub-networks drawn with equal chances.

    number   how many; fewer come back where the space has no more
    without  sub-networks that are not wanted
    """
    taken = set(without)
    number = min(number, number_of_candidates(sizes) - len(taken))
    found: list[Candidate] = []
    while len(found) < number:
        candidate = tuple(dice.choice(group) for group in sizes)
        if candidate not in taken:
            taken.add(candidate)
            found.append(candidate)
    return found


def check_candidate(values: object, groups: Sequence[Group], where: str) -> Candidate:
    """The values as a sub-network of the space.

    where  what the values are or where they stand, for the message

    Raises:
        BadInput: E_ELASTIC for a wrong number of sizes, or a size that was not trained; the message has the allowed
            ones.
    """
    if not isinstance(values, list | tuple) or len(values) != len(groups):
        raise BadInput(
            "a sub-network has one size per group",
            where=where,
            expected=f"{len(groups)} whole numbers",
            found=len(values) if isinstance(values, list | tuple) else repr(values)[:80],
            code="E_ELASTIC",
        )
    for number, (value, group) in enumerate(zip(values, groups, strict=True)):
        if type(value) is not int or value not in group.sizes:
            raise BadInput(
                f"{group.kind} is not in the search space",
                where=f"{where}, {_place(number, group)}",
                expected=f"one of {list(group.sizes)}",
                found=repr(value)[:40],
                code="E_ELASTIC",
            )
    return tuple(values)


def label_of(candidate: Candidate) -> str:
    """A sub-network in a message: its sizes, the middle left out where there are many."""
    if len(candidate) <= 16:
        return f"sub-network [{', '.join(map(str, candidate))}]"
    ends = [*map(str, candidate[:8]), "...", *map(str, candidate[-7:])]
    return f"sub-network [{', '.join(ends)}] of {len(candidate)} groups"


def _place(number: int, group: Group) -> str:
    return f"group {number}" + (f" ({group.targets[0]})" if group.targets else "")
