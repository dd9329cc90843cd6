"""Run one export: plan, merge layer by layer, write, read back, compare, certify, publish."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.child import Child
from sparseport.compress import compress_folder
from sparseport.errors import FidelityError
from sparseport.merge.layer import Merged
from sparseport.merging import merge_planned
from sparseport.plan import LayerPlan, Plan, make_plan, require_exportable
from sparseport.progress import Progress
from sparseport.publish import check_space, staged_output
from sparseport.recipe import Recipe
from sparseport.sources import Sources, open_sources
from sparseport.targets.openvino import readback
from sparseport.targets.openvino.writer import XML, OpenVinoWriter, as_stored
from sparseport.verify.bits import digest_graph
from sparseport.verify.certificate import FILE_NAME, SCHEMA, Certificate, decimal, file_facts
from sparseport.weights.digest import digest, mask_digest, value_digest
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import sparsity


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where it is, its certificate, and things worth knowing."""

    folder: Path
    certificate: Certificate
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "folder": str(self.folder),
            "notes": self.notes,
            "totals": self.certificate.totals,
            "numerics": self.certificate.body["numerics"],
        }


def plan(recipe: Recipe) -> Plan:
    """What `export` would do, without doing it (`--dry-run`).

    Raises:
        SparseportError: an input cannot be opened or does not fit the others.
    """
    with open_sources(recipe) as sources:
        return make_plan(recipe, sources)


def export(recipe: Recipe, progress: Progress | None = None) -> ExportResult:
    """Export a fine-tuned model; the output folder appears whole, proven and certified, or not at all.

    Args:
        recipe: what to export and how.
        progress: where to report steps; quiet by default.

    Raises:
        SparseportError: any of its subclasses, each with its exit code; nothing is written then.
    """
    progress = progress or Progress("quiet")
    with open_sources(recipe) as sources:
        layers = make_plan(recipe, sources)
        require_exportable(layers)
        for note in layers.notes:
            progress.note(note)
        check_space(recipe.output, layers.output_bytes + layers.scratch_bytes)
        with staged_output(recipe.output, recipe.overwrite, marker=FILE_NAME) as stage:
            certificate = _export_openvino(recipe, sources, layers, stage, progress)
            certificate.write(stage)
    return ExportResult(recipe.output, certificate, layers.notes)


def _export_openvino(recipe: Recipe, sources: Sources, layers: Plan, stage: Path, progress: Progress) -> Certificate:
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=stage) as scratch_name:
        scratch = Path(scratch_name)
        base = sources.base
        small = sources.small_tensors()
        with OpenVinoWriter(stage, scratch, base.path, base.config, small, recipe.tokenizer) as writer:
            with progress.task("merging layers", len(layers.layers)) as step:
                linears = _merge_all(recipe, sources, layers, writer, step)
            layers.notes.extend(_revived_note(linears))
            tensors = _add_tensors(recipe, sources, layers, writer)
            with progress.task("hashing inputs"):
                inputs = sources.facts()
            with progress.task("building the graph"):
                writer.save(_dtype_label(recipe, layers))
            for name in writer.left_out:
                del tensors[name]
            if writer.left_out:
                layers.notes.append(f"{len(writer.left_out)} biases of zeros are left out: the model has no such bias")
        if recipe.compress.mode != "none" or recipe.embedding == "int8":
            with progress.task(f"compressing ({recipe.compress.mode}, embedding {recipe.embedding})"):
                compress_folder(recipe, sources, layers, stage, scratch, linears, tensors)
            if recipe.compress.dataset is not None:
                inputs["dataset"] = {"sha256": file_facts(recipe.compress.dataset)["sha256"]}
    with progress.task("reading back", len(linears)) as step:
        _check_read_back(stage / XML, linears, tensors, step)
    numerics: dict[str, Any] = {"run": False}
    if recipe.numerics:
        with progress.task("comparing logits"):
            numerics = check_numerics(stage)
    return Certificate(
        {
            "schema": SCHEMA,
            "sparseport": version("sparseport"),
            "recipe": _recipe_facts(recipe),
            "inputs": inputs,
            "linears": linears,
            "tensors": tensors,
            "totals": _totals(linears),
            "numerics": numerics,
            "versions": {**writer.versions, "numpy": np.__version__},
            "files": {
                path.relative_to(stage).as_posix(): file_facts(path)
                for path in sorted(stage.rglob("*"))
                if path.is_file()
            },
        }
    )


def _merge_all(
    recipe: Recipe, sources: Sources, layers: Plan, writer: OpenVinoWriter, step: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Merge every layer, hand it to the writer, and return what the certificate says of it."""
    facts = {}
    for layer in layers.layers:
        merged = merge_planned(recipe, sources, layer)
        writer.add_linear(layer.module, merged.weight, layer.stored_group)
        facts[layer.module] = _linear_facts(layer, merged, sources, recipe)
        sources.release()
        step()
    return facts


def _revived_note(linears: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for checkpoints that move pruned weights: NNCF's adapters know no mask."""
    found = [facts for facts in linears.values() if facts["rule"] == "fq_lora" and facts.get("revived")]
    if not found:
        return []
    revived, pruned = sum(facts["revived"] for facts in found), sum(facts["pruned"] for facts in found)
    return [
        f"{revived:,} of {pruned:,} pruned weights of the base are not zero any more ({revived / pruned:.2%}): NNCF's "
        "FQ_LORA adapters have no mask; `--mask-policy reapply` prunes them again, SparsePEFT never moves them"
    ]


def _linear_facts(layer: LayerPlan, merged: Merged, sources: Sources, recipe: Recipe) -> dict[str, Any]:
    weight = merged.weight
    facts: dict[str, Any] = {
        "rule": layer.rule,
        "shape": list(layer.shape),
        "source": layer.source,
        "stored": layer.stored,
        "weight_sha256": _written_digest(weight),
        "readback": {},
    }
    if layer.rank is not None:
        facts |= {"rank": layer.rank}
    if layer.rank is not None and sources.adapter is not None:
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
            "stored_group_size": layer.stored_group,
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


def _add_tensors(recipe: Recipe, sources: Sources, layers: Plan, writer: OpenVinoWriter) -> dict[str, dict[str, Any]]:
    """Hand embedding, head and other tensors over; small ones are in the graph already."""
    facts: dict[str, dict[str, Any]] = {}
    for name in layers.tensors:
        values = sources.base.read(name)
        changed = 0
        stored = values
        if values.ndim >= 2:
            stored, changed = as_stored(values, recipe.embedding, name)
            writer.add_tensor(name, stored)
        facts[name] = {
            "shape": list(values.shape),
            "source_dtype": values.dtype.name,
            "changed": changed,
            "readback": {},
            "value_sha256": value_digest(stored),
        }
        sources.release()
    return facts


def _check_read_back(
    xml: Path, linears: dict[str, dict[str, Any]], tensors: dict[str, dict[str, Any]], step: Callable[[], None]
) -> None:
    """Read the written model and compare every weight; on success the digests enter the facts.

    Raises:
        FidelityError: a weight in the file is not the one that was merged, or the graph uses one that nobody merged.
    """
    found = digest_graph(readback.read_model(xml), linears, tensors, step)
    if found.unproven:
        raise FidelityError(
            "the graph uses a matrix that no input gave", where=f"{xml.name}, {found.unproven[0]}", code="E_READBACK"
        )
    for module, facts in linears.items():
        expected = facts.get("compressed_sha256", facts["weight_sha256"])
        if found.linears.get(module) != expected:
            raise FidelityError(
                "the written weight is not the merged one",
                where=f"{xml.name}, {module}",
                expected=expected[:16],
                found=str(found.linears.get(module))[:16],
                code="E_READBACK",
            )
        facts["readback"]["openvino"] = found.linears[module]
        # What the plan expected is not always what is best to store: all zero-points of 8 make u4 an i4.
        stored_group = facts.get("stored_group_size")
        facts["stored"] = found.kinds[module] + (f" g{stored_group}" if stored_group else "")
    for name, facts in tensors.items():
        same = (
            found.tensors.get(name) == facts["compressed_sha256"]
            if "compressed_sha256" in facts
            else found.values.get(name) == facts["value_sha256"]
        )
        if not same:
            raise FidelityError(
                "the written tensor is not the source's", where=f"{xml.name}, {name}", code="E_READBACK"
            )
        facts["readback"]["openvino"] = found.tensors[name]


def check_numerics(folder: Path) -> dict[str, Any]:
    """Compare the folder's logits with the dequantised reference, in a process of its own.

    Raises:
        FidelityError: they differ by more than the tolerance at full precision, or are not finite.
    """
    with Child("sparseport.verify.numerics", {"folder": str(folder)}) as child:
        return judge_numerics(child.result(), folder.name)


def judge_numerics(result: dict[str, Any], where: str) -> dict[str, Any]:
    """The comparison of logits as the certificate has it, if it may pass.

    Args:
        result: what `verify.numerics.compare_logits` found.
        where: name of the folder, for messages.

    Raises:
        FidelityError: the logits differ by more than the tolerance at full precision, or are not finite.
    """
    for label in ("full_precision", "default"):
        # Infinities and NaN at the settings that applications use would be a broken model, whatever the weights are.
        if not all(math.isfinite(float(result[label][key])) for key in ("max_abs", "kl")):
            raise FidelityError(
                "logits are not finite",
                where=f"{where}, {label.replace('_', ' ')} settings",
                found=result[label]["max_abs"],
                code="E_NUMERICS",
                fix="the model overflows in the runtime's precision: use a base in a wider range, or report this",
            )
    full = result["full_precision"]
    if not float(full["judged_max_abs"]) <= float(full["allowed"]):
        raise FidelityError(
            "logits differ from the dequantised reference at full precision",
            where=where,
            expected=f"max |difference| <= {full['allowed']}",
            found=f"{full['judged_max_abs']} against {full['judged_against']}",
            code="E_NUMERICS",
            fix="report this with the model's config; `--no-numerics` skips the check",
        )
    return {"run": True, **result}


def _totals(linears: dict[str, dict[str, Any]]) -> dict[str, Any]:
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


def _dtype_label(recipe: Recipe, layers: Plan) -> str:
    if any(layer.stored_group for layer in layers.layers) or recipe.compress.mode.startswith("int4"):
        return "int4"
    if recipe.compress.mode.startswith("int8"):
        return "int8"
    return "fp32" if any(layer.stored == "f32" for layer in layers.layers) else "fp16"


def _recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The recipe without paths and without real numbers."""
    data = recipe.model_dump(mode="json", exclude={"base", "sparse_base", "adapter", "output", "overwrite"})
    data["compress"] = {
        key: decimal(value) if isinstance(value, float) else value
        for key, value in data["compress"].items()
        if key != "dataset"
    }
    if data["sub_adapter"] not in ("maximal", "heuristic", "minimal"):
        data["sub_adapter"] = "custom"
    return data
