"""Adapters for un-merged branches, and peft's own forward of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import write_adapter
from sparseport.weights.linear import DenseWeight, LowRankBranch, QuantizedWeight

Weights = dict[str, QuantizedWeight | DenseWeight]
TOKENS = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 7, 0, 255]


def dense_adapter(
    base: Path,
    out: Path,
    names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "down_proj"),
    *,
    rank: int = 4,
    alpha: float = 6.0,
    dtype: Any = np.float32,
    seed: int = 3,
) -> dict[str, LowRankBranch]:
    """Write a dense adapter for the layers of these names; returns its branches."""
    random = np.random.default_rng(seed)
    branches = {}
    with ModelFolder.open(base) as folder:
        for module in folder.linear_names():
            if module.rpartition(".")[2] in names:
                rows, columns = folder.info(f"{module}.weight").shape
                a = (random.normal(size=(rank, columns)) / columns**0.5).astype(dtype)
                b = (random.normal(size=(rows, rank)) * 0.1).astype(dtype)
                branches[module] = LowRankBranch(a, b, alpha / rank)
    write_adapter(out, branches, r=rank, alpha=alpha, target_modules=names, base_model_name="tiny")
    return branches


def peft_logits(model: Path, adapter: Path | None, weights: Weights | None = None) -> np.ndarray:
    """Logits float32 [tokens, vocabulary] of a Hugging Face folder in float32, with peft's own un-merged adapter.

    weights  take the place of the folder's: module -> weight
    """
    import torch
    import transformers

    from sparseport.weights.rounding import dequantize

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for module, weight in (weights or {}).items():
        values = dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values
        with torch.no_grad():
            network.get_submodule(module).weight.copy_(torch.from_numpy(np.array(values, np.float32)))
    if adapter is not None:
        import peft

        network = peft.PeftModel.from_pretrained(network, str(adapter))
    with torch.no_grad():
        return np.asarray(network.eval()(torch.tensor([TOKENS])).logits[0].numpy())


def exported_logits(folder: Path, target: str) -> np.ndarray:
    """Logits of an exported folder at full precision, computed by its runtime."""
    from sparseport.verify.runs import runs_of

    run = next(run for run in runs_of(target, folder) if run.label == "full_precision")
    return np.asarray(run.logits(TOKENS))
