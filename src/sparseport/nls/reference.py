"""Torch models for measuring: dense, INT4, and merged exactly as the exporter merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import read_gptq_linear, read_quantization_config
from sparseport.merging import merge_planned
from sparseport.nls.elastic import elastic_layers
from sparseport.nls.finetune import load_for_training
from sparseport.plan import make_plan
from sparseport.recipe import FinetuneRecipe, Recipe
from sparseport.sources import open_sources
from sparseport.targets.empty_model import config_of, empty_model
from sparseport.weights.linear import Array, QuantizedWeight
from sparseport.weights.rounding import dequantize


def load_dense(folder: Path) -> nn.Module:
    """A floating-point checkpoint in float32, ready to evaluate."""
    with ModelFolder.open(folder) as source:
        return _filled(source.config, source.read)


def load_int4(folder: Path) -> nn.Module:
    """A GPTQ checkpoint, dequantised to float32 by our own reader."""
    with ModelFolder.open(folder) as source:
        config = read_quantization_config(source)

        def values(name: str) -> Array:
            module = name.removesuffix(".weight")
            if source.has(f"{module}.qweight"):
                return dequantize(read_gptq_linear(source, module, config))
            return source.read(name)

        return _filled(source.config, values)


def load_merged(recipe: Recipe) -> nn.Module:
    """The model that an export recipe describes, dequantised to float32: the same merge, without writing files."""
    with open_sources(recipe) as sources:
        planned = {layer.name: layer for layer in make_plan(recipe, sources).layers}
        small = sources.small_tensors()

        def values(name: str) -> Array:
            layer = planned.get(name.removesuffix(".weight"))
            if layer is None:
                return small[name] if name in small else sources.base.read(name)
            weight = merge_planned(recipe, sources, layer).weight
            return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values

        return _filled(sources.written_config(), values)


def code_differences(recipe: Recipe, finetune: FinetuneRecipe) -> dict[str, int]:
    """How many INT4 codes differ between the float32 training forward and the merge.

    They differ only where a weight lands on a rounding edge, within the error of a float32 matrix product.

    Returns:
        `codes` compared and `different` among them; both 0 if the method has no codes.
    """
    total = different = 0
    if finetune.method != "qa_sparse_peft":
        return {"codes": 0, "different": 0}
    assert recipe.sparse_base is not None
    model = load_for_training(recipe.sparse_base, finetune, recipe.base)
    with open_sources(recipe) as sources:
        planned = {layer.module: layer for layer in make_plan(recipe, sources).layers}
        for name, layer in elastic_layers(model):
            branch = sources.branch(name)
            layer.active_rank = branch.rank
            with torch.no_grad():
                layer.a[: branch.rank] = torch.from_numpy(np.array(branch.a))
                layer.b[:, : branch.rank] = torch.from_numpy(np.array(branch.b))
            trained = layer.codes()
            merged = merge_planned(recipe, sources, planned[name]).weight
            assert trained is not None and isinstance(merged, QuantizedWeight)
            total += merged.codes.size
            different += int(np.count_nonzero(trained.numpy() != merged.codes))
    return {"codes": total, "different": different}


def _filled(settings: dict[str, Any], values: Callable[[str], Array]) -> nn.Module:
    """The Hugging Face model of a config.json in float32, every parameter taken from `values`."""
    model: Any = empty_model(config_of(settings, "config.json"), dtype="float32")
    model.tie_weights()
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        filled = torch.from_numpy(values(name).astype(np.float32)).reshape(parameter.shape)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(filled))
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]
