"""Small adapter folders, and ways to change them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparseport.checkpoints.peft import AdapterFolder, write_adapter
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, SparseportError
from sparseport.weights.linear import LowRankBranch

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
A_NAME, B_NAME = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def branch(out=64, columns=64, rank=8, scaling=2.0) -> LowRankBranch:
    random = np.random.default_rng(out + columns)
    a, b = random.normal(size=(rank, columns)), random.normal(size=(out, rank))
    return LowRankBranch(a.astype(np.float32), b.astype(np.float32), scaling)


def small_adapter(folder: Path) -> Path:
    """Two modules, one of them of a lower rank than the config's."""
    write_adapter(
        folder,
        {Q: branch(), UP: branch(128, 64, 4)},
        r=8,
        alpha=16,
        target_modules=["q_proj", "up_proj"],
        base_model_name="../../etc/passwd",
        sparse_adapter=True,
        quantization_aware=True,
        dropout=0.1,
    )
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    with SafeTensorsFile.open(path) as file:
        tensors = {name: np.array(file.read(name)) for name in file.names()}
    edit(tensors)
    write_safetensors(path, [spec_of(name, array) for name, array in tensors.items()])


def refused(folder: Path, kind: type[SparseportError] = BadInput) -> str:
    with pytest.raises(kind) as caught:
        AdapterFolder.open(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)
