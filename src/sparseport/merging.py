"""Merge one planned layer from open sources: which inputs its rule takes, and what happens to a broken mask."""

from __future__ import annotations

from dataclasses import replace

from sparseport.checkpoints.safetensors_header import numpy_dtype
from sparseport.merge.fq_lora import merge_fq_lora
from sparseport.merge.layer import Merged, hold_mask, merge_layer
from sparseport.merge.subnetwork import cut_branch, cut_weight
from sparseport.plan import LayerPlan
from sparseport.recipe import Recipe
from sparseport.sources import Sources
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import revived

_STORED_NAMES = {"bfloat16": "BF16", "float32": "F32"}


def merge_planned(recipe: Recipe, sources: Sources, layer: LayerPlan) -> Merged:
    """Merge one planned layer from open sources, and cut from it what the chosen sub-network keeps.

    The whole layer is merged and judged first, so that a cut layer is a part of what the whole model would have.
    """
    merged = _merge_whole(recipe, sources, layer)
    cut = sources.cut
    if cut is None or layer.whole_shape is None:
        return merged
    rows, columns = cut.rows.get(layer.module), cut.columns.get(layer.module)
    weight = cut_weight(merged.weight, rows, columns, layer.module)
    # What the whole layer revived, or what was pruned again in it, may lie in the part that is cut away.
    kept_revived = 0 if weight.mask is None or not merged.revived else revived(weight, weight.mask)
    re_pruned = 0
    if merged.before is not None:
        assert weight.mask is not None
        re_pruned = revived(cut_weight(merged.before, rows, columns, layer.module), weight.mask)
    branch = None if merged.branch is None else cut_branch(merged.branch, rows, columns)
    return replace(merged, weight=weight, revived=kept_revived, re_pruned=re_pruned, before=None, branch=branch)


def _merge_whole(recipe: Recipe, sources: Sources, layer: LayerPlan) -> Merged:
    if layer.rule == "fq_lora":
        assert sources.tuned is not None
        dense = sources.dense(layer.module)
        if recipe.nncf_base_dtype != "stored":
            dense = replace(
                dense, values=dense.values.astype(numpy_dtype(_STORED_NAMES[recipe.nncf_base_dtype], layer.module))
            )
        rank = sources.ranks.get(layer.module)
        weight = merge_fq_lora(dense, sources.tuned.quantizer(layer.module), rank, layer.module)
        # A sparse base that was given on purpose is a mask to be held; a base's own zeros are only counted.
        lenient = recipe.mask_policy == "strict" and not sources.mask_available(layer.module)
        return hold_mask(weight, weight.mask, layer.module, "keep-codes" if lenient else recipe.mask_policy)
    base: QuantizedWeight | DenseWeight
    sparse = None
    if layer.group_size is not None:
        base = sources.quantized(layer.module)
        sparse = sources.sparse_dense(layer.module) if sources.mask_available(layer.module) else None
    else:
        base = sources.dense(layer.module, layer.rule)
        if sources.mask_available(layer.module):
            sparse = sources.sparse_dense(layer.module)
    branch = None if layer.rank is None else sources.branch(layer.module)
    return merge_layer(
        layer.rule, base, branch, sparse, layer.module, rounding=recipe.rounding, mask_policy=recipe.mask_policy
    )
