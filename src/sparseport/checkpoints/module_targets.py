"""Which layers a quantiser's config means: exact names, class names, and `re:` patterns.

Patterns come from files, and Python's engine can be made to run for ever by a hostile one. So only a plain subset is
read: literals, escaped characters, `.`, character classes, each perhaps with `*`, `+`, `?` or a count, groups of
alternatives without repetition, `^` and `$`. And it is matched by the set of positions that a match can have reached,
which takes time in proportion to pattern times name, whatever they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, Union

from sparseport.errors import Unsupported

_T = TypeVar("_T")
_MAX_LENGTH = 300
_MAX_DEPTH = 8
_MAX_NAME = 300
# One character, perhaps repeated. Sets inside classes ([[, --, &&, ~~, ||) mean different things to different engines.
_ATOM = re.compile(
    r"(?P<one>\\[dwsDWS.\-_/\[\](){}+*?^$|]|\[\^?(?:\\.|(?!--|&&|~~|\|\|)[^\]\\\[])+\]|[A-Za-z0-9_\-/:]|\.)"
    r"(?:(?P<repeat>[*+?])|\{(?P<count>\d{1,3})\})?"
)


@dataclass(frozen=True)
class _Atom:
    """One kind of character, at least `least` times; `most` None = without end."""

    one: re.Pattern[str]
    least: int
    most: int | None


@dataclass(frozen=True)
class _Group:
    """Alternatives, each a sequence of atoms, groups and the anchors `^` and `$`."""

    alternatives: tuple[tuple[Union[_Atom, _Group, str], ...], ...]  # noqa: UP007 (refers to itself)


@dataclass(frozen=True)
class Pattern:
    """A pattern of the plain subset; `match` agrees with Python's `re.match`."""

    group: _Group

    def match(self, name: str) -> bool:
        """Whether the pattern matches from the start of the name."""
        return _ends(self.group, 1, name) != 0


def first_match(module: str, groups: Sequence[tuple[Sequence[str], _T]], class_name: str) -> _T | None:
    """The value of the group that names a module.

    An exact name wins over a pattern, and that over the class. Among patterns the first in alphabetical order wins, and
    among equal targets the last: so compressed-tensors decides.

    Args:
        module: module path.
        groups: (targets, value) in the order of the config.
        class_name: the class of the layer (`Linear`), which a target may name.

    Raises:
        Unsupported: a pattern that is not read.
    """
    values = {target: value for targets, value in groups for target in targets}
    for target in sorted(values, key=lambda target: (target.startswith("re:"), target)):
        if names(target, module):
            return values[target]
    return values.get(class_name)


def names(target: str, module: str) -> bool:
    """Whether a target is the module's name, or a `re:` pattern that matches from its start.

    Raises:
        Unsupported: a pattern outside the subset above, or a name that is too long to be matched.
    """
    if not target.startswith("re:"):
        return target == module
    if len(module) > _MAX_NAME:
        raise Unsupported(
            "module name is too long for patterns",
            where=f"{module[:80]}...",
            expected=f"at most {_MAX_NAME} characters",
            found=len(module),
            code="E_PATTERN",
        )
    return compiled(target[3:]).match(module)


@lru_cache(maxsize=1024)
def compiled(pattern: str, where: str | None = None) -> Pattern:
    """A pattern from a config file, if it is of the plain subset.

    where  the file, for messages

    Raises:
        Unsupported: it is not; the message has the pattern.
    """
    # The innermost group is last: its finished alternatives, and the one that is being read.
    finished: list[list[tuple[_Atom | _Group | str, ...]]] = [[]]
    current: list[list[_Atom | _Group | str]] = [[]]
    position = 0
    while position < len(pattern) <= _MAX_LENGTH:
        character = pattern[position]
        if character == "(" and len(current) <= _MAX_DEPTH:
            finished.append([])
            current.append([])
            position += 3 if pattern.startswith("(?:", position) else 1
        elif character == ")" and len(current) > 1:
            group = _Group((*finished.pop(), tuple(current.pop())))
            current[-1].append(group)
            position += 1
        elif character == "|":
            finished[-1].append(tuple(current[-1]))
            current[-1] = []
            position += 1
        elif character in "^$":
            current[-1].append(character)
            position += 1
        else:
            match = _ATOM.match(pattern, position)
            atom = _atom(match) if match else None
            if match is None or atom is None:
                break
            current[-1].append(atom)
            position = match.end()
    if position != len(pattern) or len(current) > 1 or not pattern:
        raise Unsupported(
            "pattern in a config file is not of the plain kind that sparseport reads",
            where=where,
            found=repr(pattern)[:120],
            expected="names, `.`, `.*`, `\\d+`, character classes and alternatives without repetition",
            fix="name the layers one by one in the config",
            code="E_PATTERN",
        )
    return Pattern(_Group((*finished[0], tuple(current[0]))))


def _atom(match: re.Match[str]) -> _Atom | None:
    """None for a character class that is none, such as `[z-a]`."""
    try:
        one = re.compile(match["one"])
    except re.error:
        return None
    if match["count"]:
        return _Atom(one, int(match["count"]), int(match["count"]))
    least, most = {"*": (0, None), "+": (1, None), "?": (0, 1), None: (1, 1)}[match["repeat"]]
    return _Atom(one, least, most)


def _ends(group: _Group, starts: int, name: str) -> int:
    """Where a match of the group can end, as a set of positions: bit p stands for position p."""
    line_ends = 1 << len(name) | (1 << len(name) - 1 if name.endswith("\n") else 0)
    ends = 0
    for items in group.alternatives:
        reached = starts
        for item in items:
            if isinstance(item, _Atom):
                reached = _steps(item, reached, name)
            elif isinstance(item, _Group):
                reached = _ends(item, reached, name)
            else:
                reached &= 1 if item == "^" else line_ends
            if not reached:
                break
        ends |= reached
    return ends


def _steps(atom: _Atom, starts: int, name: str) -> int:
    fits = sum(1 << position for position, character in enumerate(name) if atom.one.fullmatch(character))
    reached = starts
    for _ in range(min(atom.least, len(name) + 1)):
        reached = (reached & fits) << 1
    for _ in range(len(name) if atom.most is None else atom.most - atom.least):
        reached |= (reached & fits) << 1
    return reached
