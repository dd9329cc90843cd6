"""Read an adapter's file for OpenVINO GenAI back, and find the layers that GenAI will give its branches to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.safetensors import SafeTensorsFile
from sparseport.errors import SparseportError, VerificationError
from sparseport.targets.read_back import BranchBack
from sparseport.weights.branch import out_of_order
from sparseport.weights.linear import LowRankBranch

_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def adapter_branches(folder: Path, name: str, model: Any) -> Iterator[BranchBack]:
    """Yield the branches of an adapter's file as the graph beside it will use them, with a scaling of 1.

    Args:
        folder: an exported folder.
        name: the adapter's file in it.
        model: the folder's parsed IR.

    Raises:
        VerificationError: the file cannot be read, holds something else than pairs of matrices, or GenAI would give a
            branch to another layer than its own, to none, or to several.
    """
    try:
        with SafeTensorsFile.open(folder / name) as file:
            modules = _modules(file, name)
            found = products(model, modules)
            for module in modules:
                a, b = (np.array(file.read(f"{_PREFIX}{module}{suffix}")) for suffix in _SUFFIXES)
                a = out_of_order(a, order_of(found[module], module), module)
                columns, rows = a.shape[-1], b.shape[0]
                if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.dtype != b.dtype:
                    raise VerificationError("an adapter's matrices do not fit each other", where=f"{name}, {module}")
                weight = found[module].input_value(1).get_shape()
                if (rows, columns) != (int(weight[0]), _inputs(found[module], module)):
                    raise VerificationError("an adapter's matrices do not fit their layer", where=f"{name}, {module}")
                yield BranchBack(module, LowRankBranch(a, b, 1.0))
    except VerificationError:
        raise
    except (SparseportError, OSError) as error:
        raise VerificationError("the adapter's file cannot be read", where=name, found=str(error)[:120]) from error


def _modules(file: SafeTensorsFile, name: str) -> list[str]:
    """Modules of a file, which must hold both matrices of each and nothing else: GenAI has uses for other names too."""
    found: dict[str, set[str]] = {}
    for tensor in file.names():
        suffix = next((suffix for suffix in _SUFFIXES if tensor.endswith(suffix)), None)
        if suffix is None or not tensor.startswith(_PREFIX):
            raise VerificationError("an adapter's file holds another tensor", where=f"{name}, {tensor}")
        found.setdefault(tensor[len(_PREFIX) : -len(suffix)], set()).add(suffix)
    for module, sides in found.items():
        if len(sides) != len(_SUFFIXES):
            raise VerificationError("an adapter's file lacks a matrix", where=f"{name}, {module}")
    return list(found)


def products(model: Any, modules: list[str]) -> dict[str, Any]:
    """Module -> the one product that GenAI finds for it: a name matches if the module's name is part of it.

    Raises:
        VerificationError: GenAI would find another operation as well, or none.
    """
    found: dict[str, Any] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() not in ("MatMul", "Convolution"):
            continue
        name = op.get_friendly_name()
        matching = [module for module in modules if module in name or module in name.replace(".", "_")]
        own = [module for module in matching if name.startswith(f"__module.{module}/")]
        if matching != own or len(own) > 1 or (own and own[0] in found):
            raise VerificationError("an adapter would change another layer than its own", where=name, found=matching)
        if own:
            found[own[0]] = op
    missing = [module for module in modules if module not in found]
    if missing:
        raise VerificationError("the graph has no product for a layer of the adapter", where=missing[0])
    return found


def order_of(product: Any, module: str) -> Any:
    """The permutation by which a product's activation is gathered, or None."""
    gather = product.input_value(0).get_node()
    if gather.get_type_name() != "Gather":
        return None
    order = gather.input_value(1).get_node()
    return np.array(order.get_data()) if order.get_friendly_name() == f"{module}.input_order" else None


def _inputs(product: Any, module: str) -> int:
    """Inputs of a layer: of its columns those that are no filling."""
    order = order_of(product, module)
    return int(product.input_value(1).get_shape()[1]) if order is None else int(np.unique(order).size)
