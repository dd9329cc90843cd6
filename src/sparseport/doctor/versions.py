"""Versions of Python packages, compared as PEP 440 orders them; as much of it as the table of conflicts needs.

`packaging` does this in full and is not there in every environment.
"""

from __future__ import annotations

import re

_VERSION = re.compile(r"v?(?:\d+!)?(?P<release>\d+(?:\.\d+)*)(?P<rest>[^+]*)(?:\+.*)?", re.IGNORECASE)
_BEFORE = re.compile(r"[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)", re.IGNORECASE)
_CLAUSE = re.compile(r"(==|!=|<=|>=|<|>)\s*([^\s,]+)")

Key = tuple[tuple[int, ...], int]
"""Release without trailing zeros, and -1 for what comes before that release, 1 for what comes after it, else 0."""


def key(version: str) -> Key:
    """What versions are compared by; epochs and local parts (`+cpu`) are left out.

    Raises:
        ValueError: it is no version.
    """
    found = _VERSION.fullmatch(version.strip())
    if found is None:
        raise ValueError(f"no version: {version!r}")
    release = [int(part) for part in found["release"].split(".")]
    while release and release[-1] == 0:
        release.pop()
    rest = found["rest"]
    return tuple(release), 0 if not rest else -1 if _BEFORE.match(rest) else 1


def release(version: str, parts: int) -> tuple[int, ...]:
    """The first numbers of a version, filled up with zeros.

    Raises:
        ValueError: it is no version.
    """
    numbers, _ = key(version)
    return (numbers + (0,) * parts)[:parts]


def matches(version: str, specifier: str) -> bool:
    """Whether a version fits a specifier such as `>=2,<2.5`; an empty one fits all.

    Raises:
        ValueError: one of them cannot be read.
    """
    clauses = [clause.strip() for clause in specifier.split(",") if clause.strip()]
    found = key(version)
    for clause in clauses:
        parts = _CLAUSE.fullmatch(clause)
        if parts is None:
            raise ValueError(f"no specifier: {clause!r}")
        if not _fits(found, parts[1], key(parts[2])):
            return False
    return True


def _fits(found: Key, operator: str, wanted: Key) -> bool:
    if operator == "<":
        # By PEP 440 a release candidate is not smaller than its own release here.
        return found < wanted and not (found[1] < 0 and found[0] == wanted[0] and wanted[1] == 0)
    if operator == ">":
        return found > wanted and not (found[1] > 0 and found[0] == wanted[0] and wanted[1] == 0)
    if operator == "<=":
        return found <= wanted
    if operator == ">=":
        return found >= wanted
    return (found == wanted) == (operator == "==")
