"""Which layers a quantiser's config means: exact names, class names, and `re:` patterns.

Patterns come from files, and Python's engine can be made to run for ever by a hostile one. So only a plain subset is
read: literals, escaped characters, `.`, character classes, each perhaps with `*`, `+`, `?` or a count, groups of
alternatives without repetition, `^` and `$`. And it is matched by the set of positions that a match can have reached,
which takes time in proportion to pattern times name, whatever they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, Union

from sparseport.errors import BadInput, Unsupported

_T = TypeVar("_T")
_MAX_LENGTH = 300
_MAX_DEPTH = 8
_MAX_NAME = 300
_MAX_TARGETS = 10_000
_MAX_PATTERNS = 1000
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
class _Name:
    """A module name, and where each kind of character stands in it, found once for all patterns.

    fits  expression of one character -> the positions where it stands, bit p for position p
    """

    text: str
    fits: dict[str, int] = field(default_factory=dict)

    def positions(self, one: re.Pattern[str]) -> int:
        if one.pattern not in self.fits:
            self.fits[one.pattern] = sum(1 << p for p, character in enumerate(self.text) if one.fullmatch(character))
        return self.fits[one.pattern]


@dataclass(frozen=True)
class Pattern:
    """A pattern of the plain subset; `match` agrees with Python's `re.match`."""

    group: _Group

    def match(self, name: str) -> bool:
        """Whether the pattern matches from the start of the name."""
        return self.matches(_Name(name))

    def matches(self, name: _Name) -> bool:
        return _ends(self.group, 1, name) != 0


class Targets(Generic[_T]):
    """The targets of all config groups, sorted once, with what each group stands for.

    An exact name wins over a pattern, and that over the class. Among patterns the first in alphabetical order wins, and
    among equal targets the last: so compressed-tensors decides.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[str], _T]], *, class_name: str, where: str | None = None
    ) -> None:
        """Take targets as a config has them.

        groups      (targets, value) in the order of the config
        class_name  the class of the layers (`Linear`), which a target may name
        where       the config file, for messages

        Raises:
            BadInput: E_LIMIT, more targets or patterns than a sane config has.
            Unsupported: a pattern outside the subset above.
        """
        patterns = {target for targets, _ in groups for target in targets if target.startswith("re:")}
        for what, found, most in (
            ("targets", sum(len(targets) for targets, _ in groups), _MAX_TARGETS),
            ("patterns", len(patterns), _MAX_PATTERNS),
        ):
            if found > most:
                raise BadInput(
                    f"config groups name too many {what}",
                    where=where,
                    expected=f"at most {most}",
                    found=found,
                    fix="name the layers by their class, or by a few patterns",
                    code="E_LIMIT",
                )
        self._values = {target: value for targets, value in groups for target in targets}
        self._patterns = [(compiled(target[3:], where), self._values[target]) for target in sorted(patterns)]
        self._class_name = class_name
        self._found: dict[str, _T | None] = {}

    def of(self, module: str) -> _T | None:
        """The value of the group that names a module, or None.

        Raises:
            Unsupported: the name is too long to be matched.
        """
        if module not in self._found:
            self._found[module] = self._search(module)
        return self._found[module]

    def _search(self, module: str) -> _T | None:
        if module in self._values and not module.startswith("re:"):
            return self._values[module]
        if self._patterns and len(module) > _MAX_NAME:
            raise Unsupported(
                "module name is too long for patterns",
                where=f"{module[:80]}...",
                expected=f"at most {_MAX_NAME} characters",
                found=len(module),
                fix="name the layers by their class, or one by one, in the config",
                code="E_PATTERN",
            )
        name = _Name(module)
        for pattern, value in self._patterns:
            if pattern.matches(name):
                return value
        return self._values.get(self._class_name)


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


def _ends(group: _Group, starts: int, name: _Name) -> int:
    """Where a match of the group can end, as a set of positions: bit p stands for position p."""
    length = len(name.text)
    line_ends = 1 << length | (1 << length - 1 if name.text.endswith("\n") else 0)
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


def _steps(atom: _Atom, starts: int, name: _Name) -> int:
    fits = name.positions(atom.one)
    reached = starts
    for _ in range(atom.least):
        if not reached:
            return 0
        reached = (reached & fits) << 1
    if atom.most is not None:
        for _ in range(atom.most - atom.least):
            reached |= (reached & fits) << 1
        return reached
    # Any number of steps, 1, 2, 4, ... at a time: `ahead` has the positions with so many fitting characters before.
    ahead, span = fits << 1, 1
    while span <= len(name.text):
        reached |= ahead & reached << span
        ahead &= ahead << span
        span *= 2
    return reached
