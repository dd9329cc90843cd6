"""Keys of certificates: those that docs/certificate.md explains, those of a certificate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docs.markdown_text import REPO

PAGE = REPO / "docs" / "certificate.md"
_BRANCHES = re.compile(r"^(?:linears\.\*\.branch|adapters\.\*\.\*)(?=\.)")


def documented() -> set[str]:
    """Paths of keys in the first cells of the page's tables; `*` stands for a name."""
    found: set[str] = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            found |= set(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    return found


def keys_of(certificate: dict[str, Any]) -> set[str]:
    """Paths of keys in a certificate, as the page writes them."""
    return {_BRANCHES.sub("branch", path) for path in _paths(certificate, "")}


def _paths(value: Any, path: str) -> Iterator[str]:
    if path:
        yield path
    last = path.rpartition(".")[2]
    # The page sends to the recipe's own reference; settings are the runtime's; input files have names of their own.
    if not isinstance(value, dict) or last in ("recipe", "settings") or re.match(r"inputs\.[^.]+$", path):
        return
    for name, inner in value.items():
        yield from _paths(inner, f"{path}.{_shown(path, name)}".removeprefix("."))


def _shown(path: str, name: str) -> str:
    if path == "numerics":
        return re.sub(r"^(with|without) .*", r"\1 *", name)
    if path == "inputs":
        return re.sub(r"^adapter .*", "adapter *", name)
    named = path in ("linears", "tensors", "files", "versions", "adapters", "adapters.*") or path.endswith(".readback")
    return "*" if named else name


def unexplained(certificate: dict[str, Any]) -> list[str]:
    """Keys of a certificate that the page does not explain; a key above an explained one needs no row of its own."""
    told = documented()
    patterns = [re.compile(re.escape(path).replace(r"\*", r"[^.]*")) for path in told]
    above = {path[: match.start()] for path in told for match in re.finditer(r"\.", path)}
    return sorted(
        path
        for path in keys_of(certificate)
        if path not in above and not any(pattern.fullmatch(path) for pattern in patterns)
    )
