"""JSON files, read strictly: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sparseport.checkpoints.loose_json import strict_text
from sparseport.checkpoints.paths import open_regular
from sparseport.checkpoints.sniff import SNIFF_BYTES, recognise
from sparseport.errors import BadInput

MAX_DEPTH = 32


class _Refused(ValueError):
    """A JSON text that parses, but breaks one of our rules; the text says which."""


def read_json(
    path: Path, *, limit: int = 64 << 20, what: str = "config", allow_list: bool = False, loose: bool = False
) -> Any:
    """The object in a JSON file (with `allow_list`, an array is fine too).

    limit  largest size in bytes; checked before reading
    what   what the file is, for the message
    loose  comments and trailing commas are fine too; the rules below hold all the same

    Refuses a byte-order mark, duplicate keys, NaN and Infinity (also numbers that overflow to infinity), nesting deeper
    than 32, and text that is not UTF-8.

    Raises:
        BadInput: E_JSON, E_LIMIT, E_MISSING or E_PATH, naming the file.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadInput(f"{what} is too large", where=path, expected=f"at most {limit} bytes", code="E_LIMIT")
    if not data:
        raise BadInput(f"{what} is empty", where=path, fix="download it again", code="E_JSON")
    if meaning := recognise(data[:SNIFF_BYTES]):
        raise BadInput(f"{what} is {meaning}", where=path, expected="a JSON file", code="E_JSON")
    value = parse_json(data, where=str(path), what=what, loose=loose)
    if not isinstance(value, (dict, list) if allow_list else dict):
        expected = "a JSON object or array" if allow_list else "a JSON object"
        raise BadInput(f"{what} has the wrong shape", where=path, expected=expected, found=_kind(value), code="E_JSON")
    return value


def parse_json(data: bytes, *, where: str, what: str, code: str = "E_JSON", loose: bool = False) -> Any:
    """The value of a JSON text under the rules of `read_json`.

    Raises:
        BadInput: with `code`, or E_LIMIT when the nesting is too deep.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not UTF-8", where=f"{where}, byte {error.start}", code=code) from None
    if text.startswith("\ufeff"):
        raise BadInput(f"{what} starts with a byte-order mark", where=where, fix="save it as plain UTF-8", code=code)
    if loose:
        text = strict_text(text)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise _too_deep(what, where) from None
    except ValueError as error:
        raise BadInput(f"{what} is not valid JSON: {error}", where=where, code=code) from None
    if _depth_over(value, MAX_DEPTH):
        raise _too_deep(what, where)
    if "\\u" in text and _has_surrogate(value):
        raise BadInput(f"{what} holds half of a surrogate pair", where=where, code=code)
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON in one fixed form: UTF-8, two spaces, keys in the order given, newline at the end."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def _too_deep(what: str, where: str) -> BadInput:
    return BadInput(f"{what} is nested too deeply", where=where, expected=f"depth <= {MAX_DEPTH}", code="E_LIMIT")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"key {key!r} appears twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> float:
    raise _Refused(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"{text[:32]} is too large for a number")
    return value


def _depth_over(value: Any, limit: int) -> bool:
    # Level by level, not by recursion: the input decides how deep this goes.
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        if not level:
            return False
        children = (c for v in level for c in (v.values() if isinstance(v, dict) else v))
        level = [c for c in children if isinstance(c, (dict, list))]
    return bool(level)


def _has_surrogate(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if any("\ud800" <= c <= "\udfff" for c in item):
                return True
        elif isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
