"""Adapters in files beside a written graph: digests of what the runtime will use, compared with what was exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.errors import FidelityError, VerificationError
from sparseport.targets.read_back import GraphReader
from sparseport.weights.branch import branch_digest

Adapters = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""File -> module -> facts of its branch."""


def digest_adapter(graph: GraphReader, file: str) -> dict[str, str]:
    """Module -> digest of the branch that an adapter's file gives it; `graph.weights` has to be through.

    Raises:
        VerificationError: the file cannot be read, or names a module twice or one that the graph has no place for.
    """
    found: dict[str, str] = {}
    for beside in graph.adapter(file):
        if beside.module in found:
            raise VerificationError("an adapter has two branches for a layer", where=f"{file}, {beside.module}")
        found[beside.module] = branch_digest(beside.branch)
    return found


def require_adapters(graph: GraphReader, target: str, adapters: Mapping[str, dict[str, dict[str, Any]]]) -> None:
    """Compare every branch of every written adapter with what was exported; on success the digests enter the facts.

    Raises:
        FidelityError: a branch in a file is not the adapter's.
    """
    for file, branches in adapters.items():
        found = digest_adapter(graph, file)
        for module in sorted({*branches, *found}):
            expected = branches.get(module, {}).get("branch_sha256")
            if found.get(module) != expected:
                raise FidelityError(
                    "the written adapter is not the one that was exported",
                    where=f"{file}, {module}",
                    expected=str(expected)[:16],
                    found=str(found.get(module))[:16],
                    code="E_READBACK",
                )
            branches[module]["readback"][target] = found[module]


def adapter_differences(graph: GraphReader, target: str, adapters: Adapters) -> list[str]:
    """What is wrong with the adapters of a folder; a file that is missing is found by its hash.

    Raises:
        VerificationError: as `digest_adapter`.
    """
    differences = []
    for file, branches in sorted(adapters.items()):
        found = digest_adapter(graph, file)
        for module in sorted({*branches, *found}):
            if module not in branches:
                differences.append(f"{file}: branch of {module} is in the file but not certified")
            elif module not in found:
                differences.append(f"{file}: branch of {module} is not in the file")
            elif found[module] != branches[module]["readback"][target]:
                differences.append(f"{file}: branch of {module} changed")
            elif found[module] != branches[module]["branch_sha256"]:
                differences.append(f"sparseport.json: branch of {module} was not read back as it was written")
    return differences
