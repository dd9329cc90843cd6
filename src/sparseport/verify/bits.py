"""Digests of what stands in a written graph, in the terms of the source: its group size and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparseport.targets.openvino import readback
from sparseport.weights.digest import array_digest, digest
from sparseport.weights.grouping import collapse
from sparseport.weights.linear import DenseWeight, QuantizedWeight


def digest_linears(
    model: Any, certified: Mapping[str, Mapping[str, Any]], on_step: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Digest every linear layer's weight found in an `openvino.Model`.

    Args:
        model: a graph read from disk.
        certified: per module, `shape` and `group_size` as they stand in the certificate.
        on_step: called after each layer.

    Returns:
        Module name -> digest of the values. Modules that the graph does not hold are left out.

    Raises:
        FidelityError: groups that were split from one no longer agree.
        VerificationError: the operations around a weight are not a dequantisation.
    """
    found: dict[str, str] = {}
    for item in readback.weights(model):
        module = item.name.removesuffix(".weight")
        facts = certified.get(module)
        if facts is None:
            continue
        weight = item.weight
        if isinstance(weight, QuantizedWeight) and facts.get("group_size"):
            weight = collapse(weight, int(facts["group_size"]), module)
        found[module] = digest(weight)
        on_step()
    return found


def digest_tensors(model: Any, certified: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Digest the other tensors (embedding, head, norms, biases) found in an `openvino.Model`.

    Args:
        model: a graph read from disk.
        certified: per tensor name, its `shape`; the graph may hold it with extra dimensions of 1.

    Returns:
        Tensor name -> digest of the stored values.
    """
    found: dict[str, str] = {}
    for item in readback.weights(model):
        facts = certified.get(item.name)
        if facts is None:
            continue
        if isinstance(item.weight, DenseWeight):
            found[item.name] = array_digest(item.weight.values.reshape([int(n) for n in facts["shape"]]))
        else:
            found[item.name] = digest(item.weight)
    return found
