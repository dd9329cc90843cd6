"""What a certificate says of an export: of each layer, of each other tensor, of all together, and of the recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sparseport.merge.layer import Merged
from sparseport.plan import LayerPlan, Plan
from sparseport.recipe import Recipe, Target
from sparseport.sources import Sources
from sparseport.verify.certificate import decimal
from sparseport.weights.digest import digest, mask_digest
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import sparsity

Facts = dict[str, dict[str, Any]]
# Fields of a recipe that are places on somebody's machine.
_PATHS = ("base", "sparse_base", "adapter", "search_space", "output")
# Fields that say what else is exported in the same run.
_BESIDE = ("draft", "draft_compress", "overwrite")


def linear_facts(layer: LayerPlan, merged: Merged, sources: Sources, recipe: Recipe) -> dict[str, Any]:
    """What the certificate says of a merged layer, whatever target it goes to; `for_target` adds the rest."""
    weight = merged.weight
    facts: dict[str, Any] = {
        "rule": layer.rule,
        "shape": list(layer.shape),
        "source": layer.source,
        "weight_sha256": _written_digest(weight),
        "readback": {},
    }
    if layer.whole_shape is not None:
        facts["whole_shape"] = list(layer.whole_shape)
    if layer.written is not None:
        facts["from"] = layer.module
    merges = layer.rank is not None and layer.rule not in ("carry", "branch")
    if merges:
        facts |= {"rank": layer.rank}
    if merges and sources.adapter is not None:
        facts |= {"scaling": decimal(sources.branch(layer.module).scaling)}
    if layer.rule == "qa_sparse_peft":
        facts |= {"rounding": recipe.rounding.value, "compute_dtype": "float32"}
    elif layer.rule == "fq_lora":
        facts |= {"base_dtype": recipe.nncf_base_dtype, "compute_dtype": "float32"}
    elif layer.rule in ("lora", "sparse_peft"):
        facts |= {"compute_dtype": "float32"}
    if layer.module == sources.base.embedding_name and sources.base.tied_head:
        facts["tied_head"] = True
    if isinstance(weight, QuantizedWeight):
        facts |= {
            "bits": weight.bits,
            "group_size": weight.group_size,
            "act_order": weight.input_order is not None,
        }
    if weight.mask is not None:
        facts |= {
            "mask_sha256": mask_digest(weight.mask),
            "sparsity": decimal(sparsity(weight.mask)),
            "pruned": int(weight.mask.size - np.count_nonzero(weight.mask)),
            "revived": merged.revived,
        }
    if merged.re_pruned:
        facts["re_pruned"] = merged.re_pruned
    return facts


def _written_digest(weight: QuantizedWeight | DenseWeight) -> str:
    """Digest of the weight as the target stores it: bfloat16 is widened to float32, which changes no value."""
    if isinstance(weight, DenseWeight) and weight.values.dtype.name == "bfloat16":
        return digest(replace(weight, values=weight.values.astype(np.float32)))
    if isinstance(weight, QuantizedWeight) and weight.scales.dtype.name == "bfloat16":
        return digest(replace(weight, scales=weight.scales.astype(np.float32)))
    return digest(weight)


def for_target(linears: Facts, layers: Plan, target: Target) -> Facts:
    """A copy of the facts for one target's certificate, with the form in which it holds each layer."""
    own = copy.deepcopy(linears)
    for layer in layers.layers:
        form = layer.stored[target]
        own[layer.name]["stored"] = form.label
        if form.layout is not None:
            own[layer.name]["stored_group_size"] = form.layout.block
        if "branch" in own[layer.name]:
            own[layer.name]["branch"] = own[layer.name]["branch"][target]
    return own


def revived_note(linears: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for checkpoints that move pruned weights: NNCF's adapters know no mask."""
    found = [facts for facts in linears.values() if facts["rule"] == "fq_lora" and facts.get("revived")]
    if not found:
        return []
    revived, pruned = sum(facts["revived"] for facts in found), sum(facts["pruned"] for facts in found)
    return [
        f"{revived:,} of {pruned:,} pruned weights of the base are not zero any more ({revived / pruned:.2%}): NNCF's "
        "FQ_LORA adapters have no mask; `--mask-policy reapply` prunes them again, SparsePEFT never moves them"
    ]


def totals(linears: Facts) -> dict[str, Any]:
    """Sums over all linear layers."""
    weights = sum(int(np.prod(facts["shape"])) for facts in linears.values())
    masked = [facts for facts in linears.values() if "pruned" in facts]
    pruned = sum(facts["pruned"] for facts in masked)
    covered = sum(int(np.prod(facts["shape"])) for facts in masked)
    return {
        "linears": len(linears),
        "weights": weights,
        "masked_weights": covered,
        "pruned": pruned,
        "revived": sum(facts["revived"] for facts in masked),
        "sparsity": decimal(pruned / covered) if covered else "0.000000",
        "int4_linears": sum(1 for facts in linears.values() if facts.get("bits") == 4),
    }


def recipe_facts(recipe: Recipe, target: str) -> dict[str, Any]:
    """What one target's folder owes to the recipe, without paths and without real numbers.

    The same folder comes out whether its target was exported alone or beside another one, or beside a draft, so the
    others are not named.
    """
    other = "compress" if target == "onnx" else "onnx"
    data = recipe.model_dump(mode="json", exclude={*_PATHS, *_BESIDE, other})
    data["target"] = [target]
    if "compress" in data:
        data["compress"] = {
            key: decimal(value) if isinstance(value, float) else value
            for key, value in data["compress"].items()
            if key != "dataset"
        }
    if data["sub_adapter"] not in ("maximal", "heuristic", "minimal"):
        data["sub_adapter"] = "custom"
    return data
