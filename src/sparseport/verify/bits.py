"""Digests of what stands in a written graph, in the terms of the source: its group size and its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparseport.checkpoints.folder import HEADS
from sparseport.errors import VerificationError
from sparseport.targets.openvino import readback
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
    unproven  names of matrices that the graph uses and nobody certified
    """

    linears: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    values: dict[str, str | None] = field(default_factory=dict)
    unproven: list[str] = field(default_factory=list)


def digest_graph(
    model: Any, linears: Facts, tensors: Facts, on_step: Callable[[], None] = lambda: None
) -> GraphDigests:
    """Digest every certified weight of an `openvino.Model` read from disk, in one pass.

    Args:
        model: the graph.
        linears: per module, `shape` and `group_size` as certified.
        tensors: per tensor name, `shape`; the graph may hold it with extra dimensions of 1.
        on_step: called after each linear layer.

    Raises:
        FidelityError: groups that were split from one no longer agree.
        VerificationError: the operations around a weight are not a dequantisation, or it feeds another layer.
    """
    found = GraphDigests()
    for item in readback.weights(model):
        module = item.name.removesuffix(".weight")
        weight = item.weight
        if module in linears:
            _check_places(module, item.places, bool(linears[module].get("tied_head")))
            group_size = linears[module].get("group_size")
            if isinstance(weight, QuantizedWeight) and group_size:
                weight = collapse(weight, int(group_size), module)
            found.linears[module] = digest(weight)
            found.kinds[module] = item.element_type
            on_step()
        elif item.name in tensors:
            if isinstance(weight, DenseWeight):
                values = weight.values.reshape([int(length) for length in tensors[item.name]["shape"]])
                found.tensors[item.name] = array_digest(values)
                found.values[item.name] = value_digest(values)
            else:
                found.tensors[item.name] = digest(weight)
                found.values[item.name] = None
    known = set(found.linears) | set(found.tensors) | {f"{module}.weight" for module in found.linears}
    found.unproven = readback.unnamed_matrices(model, known)
    return found


def _check_places(module: str, places: tuple[str, ...], tied_head: bool) -> None:
    """The traced graph names every operation after its module: a weight must sit where its name says.

    tied_head  the weight is the embedding, and the head uses it too

    Raises:
        VerificationError: it feeds another layer.
    """
    allowed = [module, *(HEADS if tied_head else ())]
    for place in places:
        if not place.startswith(tuple(f"__module.{name}/" for name in allowed)):
            raise VerificationError("weight feeds another layer than its own", where=module, found=place)
