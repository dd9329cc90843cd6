"""The adapter's file that OpenVINO GenAI switches on and off: safetensors under PEFT's names.

GenAI 2026.4 computes alpha * B(A x) with the one alpha of `AdapterConfig` (1 unless it is set) and reads none from the
file, so that the scaling has to be in B. It looks for layers by parts of operations' names, and gives the branch what
the product takes: for a layer whose columns lie in another order, A is in that order too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparseport.checkpoints.peft import PREFIX
from sparseport.checkpoints.safetensors import TensorSpec, write_safetensors
from sparseport.targets.blocks import Block
from sparseport.targets.openvino.branches import StoredLowRank
from sparseport.targets.openvino.store import WeightStore
from sparseport.weights.linear import Array

ADAPTER = "adapter.safetensors"
_TYPES: dict[str, np.dtype[np.generic]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


def write_adapter_file(path: Path, branches: Mapping[str, StoredLowRank], store: WeightStore) -> None:
    """Write branches, one tensor after the other; the scaling of each has to be 1, in b already."""
    specs = []
    for module, branch in branches.items():
        assert branch.scaling == 1.0, "folded into b"
        for side, stored in (("A", branch.a), ("B", branch.b)):
            specs.append(_spec(f"{PREFIX}{module}.lora_{side}.weight", stored.values, store))
    write_safetensors(path, specs)


def _spec(name: str, block: Block, store: WeightStore) -> TensorSpec:
    dtype = _TYPES[block.element_type]

    def produce() -> Array:
        return store.view(block).view(dtype).reshape(block.shape)

    return TensorSpec(name, dtype, block.shape, produce)
