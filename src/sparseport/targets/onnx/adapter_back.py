"""Read an adapter's file for ONNX Runtime back, with ONNX Runtime's own parser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.targets.read_back import BranchBack, SlotShape
from sparseport.weights.linear import LowRankBranch

_PARTS = (".lora_A", ".lora_B", ".lora_scaling")


def adapter_branches(folder: Path, name: str, slots: Mapping[str, SlotShape]) -> Iterator[BranchBack]:
    """Yield the branches of an adapter's file.

    Args:
        folder: an exported folder.
        name: the adapter's file in it.
        slots: module -> what its place in the graph takes.

    Raises:
        VerificationError: the file cannot be read, or holds something else than whole branches for these modules.
    """
    parameters = _parameters(folder / name)
    modules = sorted(
        {parameter[: -len(part)] for parameter in parameters for part in _PARTS if parameter.endswith(part)}
    )
    expected = {f"{module}{part}" for module in modules for part in _PARTS}
    if set(parameters) != expected:
        strange = sorted(set(parameters) ^ expected)[0]
        raise VerificationError("an adapter's file holds no whole branches", where=f"{name}, {strange}")
    for module in modules:
        where = f"{name}, {module}"
        if module not in slots:
            raise VerificationError("the graph has no place for a layer of the adapter", where=where)
        a, b, scaling = (parameters[f"{module}{part}"] for part in _PARTS)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise VerificationError("an adapter's matrices do not fit each other", where=where)
        found = SlotShape((b.shape[1], a.shape[0]), (a.dtype.name, b.dtype.name))
        if found != slots[module]:
            raise VerificationError(
                "an adapter's matrices do not fit their place in the graph",
                where=where,
                expected=slots[module],
                found=found,
            )
        if scaling.shape != (1,) or scaling.dtype != np.float32:
            raise VerificationError("an adapter's scaling is no float32 number", where=where, found=scaling.shape)
        yield BranchBack(module, LowRankBranch(a.T.copy(), b.T.copy(), float(scaling[0])))


def _parameters(path: Path) -> dict[str, Any]:
    from onnxruntime import AdapterFormat

    if path.is_symlink() or not path.is_file():
        raise VerificationError("the adapter's file is missing", where=path.name)
    try:
        read = AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: np.array(value.numpy()) for name, value in read.items()}
    except Exception as error:
        raise VerificationError(
            "ONNX Runtime cannot read the adapter's file", where=path.name, found=str(error)[:120]
        ) from error
