"""Adapters that stay un-merged: which may, what the writers get, and what the certificate says of them.

graph    the branch is part of the written graph, beside the product of its base weight
adapter  the base is written as it is, and the branches into a file that the runtime switches on and off
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput
from sparseport.recipe import Recipe, Target
from sparseport.sources import Sources
from sparseport.targets.writer import TargetWriter
from sparseport.verify.certificate import decimal
from sparseport.weights.branch import branch_digest, stored_branch, widened
from sparseport.weights.linear import LowRankBranch

ADAPTER_FILES: dict[Target, str] = {"openvino": "adapter.safetensors", "onnx": "adapter.onnx_adapter"}
"""Target -> file that an export with `--branches adapter` writes beside the model."""

WAY_OUT = "--branches graph or --branches adapter keeps it beside its base, un-merged and exact"
_MERGED = "leave --branches away: this adapter is merged, and nothing is lost"


def require_branches(recipe: Recipe, sources: Sources) -> None:
    """Refuse adapters that were trained to be merged.

    Raises:
        BadInput: names the kind of adapter, and what to do.
    """
    if recipe.branches == "refuse":
        return
    if sources.tuned is not None:
        raise BadInput(
            "an NNCF checkpoint cannot stay un-merged: its adapters lie inside the fake quantiser",
            where=sources.tuned.source,
            fix=_MERGED,
            code="E_BRANCH",
        )
    assert sources.adapter is not None
    require_unmerged(sources.adapter)


def require_unmerged(adapter: AdapterFolder) -> None:
    """Refuse an adapter in PEFT's layout that was trained to be merged.

    Raises:
        BadInput: names its kind, and what to do.
    """
    if adapter.quantization_aware:
        raise BadInput(
            "a quantization-aware adapter cannot stay un-merged: it was trained through the rounding of its INT4 base",
            where=adapter.path,
            fix=_MERGED,
            code="E_BRANCH",
        )
    if adapter.sparse_adapter:
        raise BadInput(
            "a SparsePEFT adapter cannot stay un-merged: its update is masked, which no low-rank branch is",
            where=adapter.path,
            fix=_MERGED,
            code="E_BRANCH",
        )


def branch_rule(recipe: Recipe) -> str:
    """The rule of an adapted layer whose adapter stays un-merged."""
    return "branch" if recipe.branches == "graph" else "carry"


def hand_over(
    module: str, branch: LowRankBranch, writers: Mapping[Target, TargetWriter], recipe: Recipe
) -> dict[Target, dict[str, Any]]:
    """Give a layer's branch to every writer; returns target -> what its certificate says of it.

    Raises:
        BadInput: a value overflows the dtype that was asked for.
    """
    facts: dict[Target, dict[str, Any]] = {}
    for target, writer in writers.items():
        # OpenVINO GenAI multiplies with one number for a whole adapter, and takes none from the file.
        fold = recipe.branches == "adapter" and target == "openvino"
        stored, changed = stored_branch(branch, recipe.branch_dtype, module, fold=fold)
        writer.add_branch(module, stored)
        facts[target] = branch_facts(branch, stored, changed, folded=fold)
    return facts


def branch_facts(source: LowRankBranch, stored: LowRankBranch, changed: int, *, folded: bool) -> dict[str, Any]:
    """What a certificate says of a branch, before it is read back.

    Args:
        source: the branch as the adapter has it, which is the same for every target.
        stored: the branch as it is written.
        changed: how many of its values are not the adapter's.
        folded: whether the scaling is in b.
    """
    return {
        "rank": stored.rank,
        "scaling": decimal(source.scaling),
        "source_sha256": branch_digest(widened(source)),
        "dtypes": [stored.a.dtype.name, stored.b.dtype.name],
        "branch_sha256": branch_digest(stored),
        "changed": changed,
        "readback": {},
        **({"scaling_in": "lora_B"} if folded else {}),
    }


def take_adapter(recipe: Recipe, target: Target, linears: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adapter file -> module -> facts: of a file of its own the certificate speaks apart from the base's layers."""
    if recipe.branches != "adapter":
        return {}
    return {ADAPTER_FILES[target]: {m: facts.pop("branch") for m, facts in linears.items() if "branch" in facts}}


def switching_notes(recipe: Recipe) -> list[str]:
    """What an application has to know that switches adapters."""
    if recipe.branches != "adapter" or "openvino" not in recipe.target:
        return []
    return [
        "OpenVINO GenAI 2026.4 takes the beginnings of prompts from its cache whatever adapter was active then: for "
        "right answers give LLMPipeline a scheduler_config with enable_prefix_caching = False"
    ]


def branch_notes(linears: Mapping[str, Mapping[str, Any]], target: Target, dtype: str) -> list[str]:
    """A sentence if values of branches were rounded.

    Args:
        linears: module -> facts of one target.
        target: that target.
        dtype: the recipe's `branch_dtype`.
    """
    changed = sum(facts["branch"]["changed"] for facts in linears.values() if "branch" in facts)
    if not changed:
        return []
    if dtype == "fp16":
        return [f"{target}: {changed:,} values of un-merged branches are rounded to float16 (--branch-dtype fp16)"]
    return [
        f"{target}: {changed:,} values of lora_B are rounded to float32, because OpenVINO GenAI takes no scaling from "
        "an adapter's file and this one is no power of two"
    ]
