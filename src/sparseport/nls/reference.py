"""The torch model that an export recipe describes, and how far training and merge agree."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sparseport.merging import merge_planned
from sparseport.nls.elastic import elastic_layers
from sparseport.nls.load import filled, load_for_training
from sparseport.plan import make_plan
from sparseport.recipe import FinetuneRecipe, Recipe
from sparseport.sources import open_sources
from sparseport.weights.linear import Array, QuantizedWeight
from sparseport.weights.rounding import dequantize


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

        return filled(sources.written_config(), values)


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
            if name not in planned:  # its block is left out
                continue
            branch = sources.branch(name)
            layer.active_rank = branch.rank
            if sources.cut is not None:
                layer.active_rows, layer.active_columns = sources.cut.shape(name, layer.shape)
            with torch.no_grad():
                layer.a[: branch.rank] = torch.from_numpy(np.array(branch.a))
                layer.b[:, : branch.rank] = torch.from_numpy(np.array(branch.b))
            trained = layer.codes()
            merged = merge_planned(recipe, sources, planned[name]).weight
            assert trained is not None and isinstance(merged, QuantizedWeight)
            total += merged.codes.size
            different += int(np.count_nonzero(trained.numpy() != merged.codes))
    return {"codes": total, "different": different}
