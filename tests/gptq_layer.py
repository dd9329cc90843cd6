"""A GPTQ folder with one layer, or a few, written with the package's own packing code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import gptq_config_dict, read_gptq_linear, read_quantization_config
from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.packing import ZeroPointStorage

NAME = "model.layers.0.mlp.up_proj"


def weight(
    out: int = 16,
    columns: int = 64,
    group: int = 32,
    *,
    zero: int | None = None,
    seed: int = 0,
    shift: float = 0,
    order: Any = None,
) -> QuantizedWeight:
    """A layer whose codes scatter around their zero-points (plus `shift`), as trained weights do."""
    random = np.random.default_rng(seed)
    zeros = random.integers(5, 11, (out, columns // group)) if zero is None else np.full((out, columns // group), zero)
    codes = np.clip(np.repeat(zeros, group, axis=1) + np.rint(random.normal(shift, 2, (out, columns))), 0, 15)
    scales = random.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    return QuantizedWeight(codes.astype(np.uint8), scales, zeros.astype(np.uint8), group, input_order=order)


def quantization_config(
    weight: QuantizedWeight, storage: ZeroPointStorage, *, sym: bool = False, **changes: Any
) -> dict[str, Any]:
    """The settings as this package writes them, changed; `...` leaves a key out."""
    config = gptq_config_dict(group_size=weight.group_size, sym=sym, storage=storage)
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def save(path: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, np.ndarray]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    write_safetensors(path / "model.safetensors", [spec_of(name, array) for name, array in tensors.items()])
    return path


def read(path: Path, **options: Any) -> QuantizedWeight:
    with ModelFolder.open(path) as folder:
        return read_gptq_linear(folder, NAME, read_quantization_config(folder, **options))
