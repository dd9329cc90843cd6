"""Which layers a quantiser's config means: exact names, last parts of names, class names, and `re:` patterns.

Patterns come from files, and Python's engine can be made to run for ever by a hostile one; so only a plain subset is
read: literals, escaped characters, `.`, character classes, `.*`, `.+`, `\\d+`, `[...]+`, groups of alternatives without
repetition, `^` and `$`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from sparseport.errors import Unsupported

_T = TypeVar("_T")
_MAX_LENGTH = 300
# A pattern that fails may try about name length ** repeats ways.
_MAX_REPEATS = 4
_MAX_NAME = 300
# One atom, perhaps repeated; a group may hold alternatives but is never repeated.
_ATOM = re.compile(
    r"(?:\\[dwsDWS.\-_/\[\](){}+*?^$|]|\[\^?(?:\\.|[^\]\\])+\]|[A-Za-z0-9_\-/:]|\.)(?P<repeat>[*+?]|\{\d{1,3}\})?"
)
_FRAME = re.compile(r"\(\?:|\(|\)|\||\^|\$")


def first_match(module: str, groups: Sequence[tuple[Sequence[str], _T]], class_name: str) -> _T | None:
    """The value of the first group that names a module; a name or pattern wins over the class.

    Args:
        module: module path.
        groups: (targets, value) in the order of the config.
        class_name: the class of the layer (`Linear`), which a target may name.

    Raises:
        Unsupported: a pattern that is not read.
    """
    for targets, value in groups:
        if any(names(target, module) for target in targets):
            return value
    for targets, value in groups:
        if class_name in targets:
            return value
    return None


def names(target: str, module: str) -> bool:
    """Whether a target is the module's name, or a `re:` pattern that matches from its start.

    Raises:
        Unsupported: a pattern outside the subset above.
    """
    if target.startswith("re:"):
        return len(module) <= _MAX_NAME and compiled(target[3:]).match(module) is not None
    return target == module


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern from a config file, if it is of the plain subset.

    Raises:
        Unsupported: it is not; the message has the pattern.
    """
    position, depth, repeats = 0, 0, 0
    while position < len(pattern) <= _MAX_LENGTH:
        frame = _FRAME.match(pattern, position)
        if frame:
            depth += frame[0].startswith("(") - (frame[0] == ")")
            position = frame.end()
            continue
        atom = _ATOM.match(pattern, position)
        if atom is None or depth < 0:
            break
        repeats += atom["repeat"] in ("*", "+")
        position = atom.end()
    if position != len(pattern) or depth or repeats > _MAX_REPEATS or not pattern:
        raise Unsupported(
            "pattern in a config file is not of the plain kind that sparseport reads",
            found=repr(pattern)[:120],
            expected="names, `.`, `.*`, `\\d+`, character classes and alternatives without repetition",
            fix="name the layers one by one in the config",
            code="E_PATTERN",
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise Unsupported("pattern in a config file is no regular expression", found=str(error)) from error
