"""An adapter and the base that it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapter_folders import branch, edit_config, edit_tensors
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import AdapterFolder, write_adapter
from sparseport.errors import BadInput


@pytest.fixture
def full_adapter(tmp_path) -> Path:
    """An adapter for every module that its config targets in the tiny model."""
    write_adapter(
        tmp_path / "full",
        {f"model.layers.{i}.self_attn.q_proj": branch() for i in range(2)},
        r=8,
        alpha=16,
        target_modules=["q_proj"],
        base_model_name="tiny",
    )
    return tmp_path / "full"


def test_base_that_fits(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors):
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        adapter.check_base(folder)


@pytest.mark.parametrize("case", ["missing module", "forgotten layer"])
def test_base_that_does_not_fit(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors, case):
    name = "model.layers.1.self_attn.q_proj"
    if case == "missing module":
        del tiny_tensors[f"{name}.weight"]
    else:
        edit_tensors(full_adapter, lambda t: [t.pop(f"base_model.model.{name}.lora_{s}.weight") for s in "AB"])
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        with pytest.raises(BadInput) as caught:
            adapter.check_base(folder)
    assert name in str(caught.value) and str(full_adapter) in str(caught.value)


def test_layers_left_out_on_purpose(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors):
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    edit_tensors(full_adapter, lambda t: [t.pop(f"{name}.lora_{s}.weight") for s in "AB"])
    edit_config(full_adapter, layers_to_transform=[0])
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        adapter.check_base(folder)


@pytest.mark.parametrize(
    "parts",
    [
        {"qweight": (8, 64), "qzeros": (2, 8), "scales": (2, 64)},  # GPTQ: packed along the inputs
        {"qweight": (64, 8), "qzeros": (2, 8), "scales": (2, 64)},  # AWQ: packed along the outputs
        {"weight_packed": (64, 8), "weight_scale": (64, 2)},
        {"compressed": (1000,), "bitmask": (64, 8), "row_offsets": (64,), "shape": (2,)},
    ],
    ids=["gptq", "awq", "compressed-tensors", "bitmask"],
)
def test_packed_base(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors, parts):
    """Only the reader of the base's layers knows their shapes."""
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        del tiny_tensors[f"{name}.weight"]
        tiny_tensors |= {f"{name}.{leaf}": np.zeros(shape, np.int32) for leaf, shape in parts.items()}
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        adapter.check_base(folder)
