"""Digests of what stands in a written graph, in the terms of the source: its group size and its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparseport.errors import FidelityError, VerificationError
from sparseport.targets.read_back import GraphReader
from sparseport.weights.branch import branch_digest
from sparseport.weights.digest import array_digest, digest, value_digest
from sparseport.weights.grouping import collapse
from sparseport.weights.linear import DenseWeight, QuantizedWeight

Facts = Mapping[str, Mapping[str, Any]]


@dataclass
class GraphDigests:
    """What was found in a graph.

    linears   module -> digest of the weight, groups joined as they were in the source
    kinds     module -> element type that holds it (`i4`, `u4`, `f16`)
    tensors   tensor name -> digest of the stored values
    values    tensor name -> digest of the numbers whatever float dtype holds them; None if they are quantised
    branches  module -> digest of the un-merged branch beside its weight
    unproven  names of matrices that the graph uses and nobody certified
    around    what the reader says of the graph around the weights
    """

    linears: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    values: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    unproven: list[str] = field(default_factory=list)
    around: dict[str, Any] = field(default_factory=dict)


def digest_graph(
    graph: GraphReader, linears: Facts, tensors: Facts, on_step: Callable[[], None] = lambda: None
) -> GraphDigests:
    """Digest every certified weight of a graph read from disk, in one pass.

    Args:
        graph: the parsed graph.
        linears: per module, `shape` and `group_size` as certified, and `places` where the target certifies them.
        tensors: per tensor name, `shape` (the graph may hold it with extra dimensions of 1), and `added` if something
            was added to every element.
        on_step: called after each linear layer.

    Raises:
        FidelityError: groups that were split from one no longer agree.
        VerificationError: the operations around a weight are not a dequantisation, or it feeds another layer.
    """
    found = GraphDigests()
    shapes = {name: tuple(int(length) for length in facts["shape"]) for name, facts in ({**linears, **tensors}).items()}
    for item in graph.weights(shapes):
        module = item.name.removesuffix(".weight")
        weight = item.weight
        if module in found.linears or item.name in found.tensors:
            raise VerificationError("a weight is found twice in the graph", where=item.name)
        if module in linears:
            _check_places(graph, module, item.places, linears[module])
            group_size = linears[module].get("group_size")
            if isinstance(weight, QuantizedWeight) and group_size:
                weight = collapse(weight, int(group_size), module)
            found.linears[module] = digest(weight)
            found.kinds[module] = item.element_type
            on_step()
        elif item.name in tensors:
            if "places" in tensors[item.name]:
                _check_places(graph, item.name, item.places, tensors[item.name])
            if item.added != tensors[item.name].get("added", 0):
                raise VerificationError(
                    "tensor is stored in another form", where=item.name, found=f"added {item.added}"
                )
            if isinstance(weight, DenseWeight):
                values = weight.values.reshape(shapes[item.name])
                found.tensors[item.name] = array_digest(values)
                found.values[item.name] = value_digest(values)
            else:
                found.tensors[item.name] = digest(weight)
                found.values[item.name] = None
    for beside in graph.branches():
        if beside.module in found.branches:
            raise VerificationError("a layer has two branches", where=beside.module)
        found.branches[beside.module] = branch_digest(beside.branch)
    known = set(found.linears) | set(found.tensors) | {f"{module}.weight" for module in found.linears}
    # Whether they are certified is asked by name: a branch of a layer that has none is a difference of its own.
    known |= {f"{module}.lora_{side}.weight" for module in found.branches for side in "AB"}
    found.unproven = graph.unnamed_matrices(known)
    if not found.unproven:
        found.around = graph.around()
    return found


def _check_places(graph: GraphReader, name: str, places: tuple[str, ...], facts: Mapping[str, Any]) -> None:
    """A weight must sit where its name says and, where the certificate lists its places, exactly there.

    Raises:
        VerificationError: it feeds another layer.
    """
    wrong = graph.misplaced(name, places, bool(facts.get("tied_head")))
    if wrong is not None:
        raise VerificationError("weight feeds another layer than its own", where=name, found=wrong)
    if "places" in facts and sorted(facts["places"]) != sorted(places):
        raise VerificationError(
            "weight is used elsewhere than certified", where=name, expected=facts["places"], found=list(places)
        )


def require_read_back(
    graph: GraphReader,
    target: str,
    linears: dict[str, dict[str, Any]],
    tensors: dict[str, dict[str, Any]],
    around: Mapping[str, Any],
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Compare every weight of a written graph with what was merged; on success the digests enter the facts.

    Args:
        graph: the written graph.
        target: what it was written for.
        linears: what was merged, by module.
        tensors: what else was written, by name.
        around: what the graph around the weights was built as.
        on_step: called after each linear layer.

    Raises:
        FidelityError: a weight in the file is not the one that was merged, or the graph uses one that nobody merged, or
            is another one around the weights than was built.
    """
    file = graph.graph_file
    found = digest_graph(graph, linears, tensors, on_step)
    if found.unproven:
        raise FidelityError(
            "the graph uses a matrix that no input gave", where=f"{file}, {found.unproven[0]}", code="E_READBACK"
        )
    if found.around != around:
        raise FidelityError(
            "the written graph is not the one that was built",
            where=file,
            expected=around,
            found=found.around,
            code="E_READBACK",
        )
    for module, facts in linears.items():
        expected = facts.get("compressed_sha256", facts["weight_sha256"])
        if found.linears.get(module) != expected:
            raise FidelityError(
                "the written weight is not the merged one",
                where=f"{file}, {module}",
                expected=expected[:16],
                found=str(found.linears.get(module))[:16],
                code="E_READBACK",
            )
        facts["readback"][target] = found.linears[module]
        # What the plan expected is not always what is best to store: all zero-points of 8 make u4 an i4.
        stored_group = facts.get("stored_group_size")
        facts["stored"] = found.kinds[module] + (f" g{stored_group}" if stored_group else "")
    certified = {module: facts["branch"] for module, facts in linears.items() if "branch" in facts}
    for module in sorted({*certified, *found.branches}):
        expected = certified.get(module, {}).get("branch_sha256")
        if found.branches.get(module) != expected:
            raise FidelityError(
                "the written branch is not the adapter's",
                where=f"{file}, {module}",
                expected=str(expected)[:16],
                found=str(found.branches.get(module))[:16],
                code="E_READBACK",
            )
        certified[module]["readback"][target] = found.branches[module]
    for name, facts in tensors.items():
        same = (
            found.tensors.get(name) == facts["compressed_sha256"]
            if "compressed_sha256" in facts
            else found.values.get(name) == facts["value_sha256"]
        )
        if not same:
            raise FidelityError("the written tensor is not the source's", where=f"{file}, {name}", code="E_READBACK")
        facts["readback"][target] = found.tensors[name]
