"""The adapter's file that ONNX Runtime switches on and off: the values of optional inputs of the graph.

ONNX Runtime puts the parameters of a `LoraAdapter` in the place of graph inputs of the same names. Each branch has
three: `<module>.lora_A` [in, rank], `<module>.lora_B` [rank, out] and `<module>.lora_scaling` [1] (a parameter needs at
least one dimension). Without an adapter they take their defaults, matrices of rank 0, and the branch adds zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparseport.weights.linear import LowRankBranch

ADAPTER = "adapter.onnx_adapter"


def write_adapter_file(path: Path, branches: Mapping[str, LowRankBranch]) -> None:
    """Write branches; all of them are in memory at once, because ONNX Runtime's writer takes them so."""
    from onnxruntime import AdapterFormat, OrtValue

    parameters = {}
    for module, branch in branches.items():
        parameters[f"{module}.lora_A"] = np.ascontiguousarray(branch.a.T)
        parameters[f"{module}.lora_B"] = np.ascontiguousarray(branch.b.T)
        parameters[f"{module}.lora_scaling"] = np.array([branch.scaling], np.float32)
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(values) for name, values in parameters.items()})
    adapter.export_adapter(str(path))
