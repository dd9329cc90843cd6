"""What an export will do to each layer, decided from headers before any weight is touched."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.dialect import LayerFormat
from sparseport.checkpoints.safetensors_header import numpy_dtype
from sparseport.errors import BadInput, EnvironmentProblem, FidelityError, SparseportError, Unsupported
from sparseport.merge.fq_lora import merge_fq_lora
from sparseport.merge.layer import Merged, merge_layer, prune_again
from sparseport.recipe import Recipe
from sparseport.sources import SPARSE_FROM, Sources
from sparseport.weights.grouping import openvino_group_size, openvino_layout
from sparseport.weights.linear import DenseWeight, QuantizedWeight

# What the frontend process (torch, transformers, optimum-intel and the traced graph) takes beside one matrix, measured.
_FRONTEND_MIB = 450
# The logit check holds the model in float32 twice: in torch, and compiled by OpenVINO; plus its libraries.
_NUMERICS_MIB = 500
_NUMERICS_BYTES_PER_WEIGHT = 8.5
# NNCF holds the model it compresses and its result; plus its libraries.
_NNCF_MIB = 600
_NNCF_BYTES_PER_WEIGHT = 6
_STORED_NAMES = {"bfloat16": "BF16", "float32": "F32"}
# Buffers that old checkpoints stored although every implementation computes them.
_COMPUTED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer's way through the export.

    rule          carry, lora, sparse_peft, qa_sparse_peft or fq_lora
    source        format in the checkpoint (`int4 g64 asym`, `float16`)
    stored        format in the output (`u4 g64`, `f16`)
    group_size    columns per group in the source, or None
    stored_group  columns per group in the output, or None
    rank          active adapter rank, or None
    refusal       why this layer cannot be exported, or None
    """

    module: str
    rule: str
    shape: tuple[int, int]
    source: str
    stored: str
    group_size: int | None = None
    stored_group: int | None = None
    rank: int | None = None
    refusal: SparseportError | None = None

    @property
    def refused(self) -> str | None:
        """The refusal in one line."""
        return None if self.refusal is None else str(self.refusal)


@dataclass(frozen=True)
class Plan:
    """All layers, the other tensors, and what the export will need.

    memory_mib           peak of the export without the logit check
    numerics_memory_mib  peak of the logit check; 0 if it will not run
    """

    layers: list[LayerPlan]
    tensors: list[str]
    output_bytes: int
    scratch_bytes: int
    memory_mib: int
    numerics_memory_mib: int
    notes: list[str] = field(default_factory=list)

    @property
    def refusals(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.refused]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "layers": [{**vars(layer), "refusal": layer.refused} for layer in self.layers],
            "tensors": self.tensors,
            "estimates": {
                "output_mib": self.output_bytes >> 20,
                "scratch_mib": self.scratch_bytes >> 20,
                "memory_mib": self.memory_mib,
                "numerics_memory_mib": self.numerics_memory_mib,
            },
            "refused": len(self.refusals),
            "notes": self.notes,
        }


def make_plan(recipe: Recipe, sources: Sources) -> Plan:
    """Choose rule and format for every linear layer.

    A layer that cannot be exported is listed with its reason; `require_exportable` turns that into an error.
    """
    adapted = sources.adapter_modules()
    layers = []
    for module in planned_modules(sources):
        if module == sources.base.head_name and module not in adapted and not sources.format_of(module).quantized:
            continue  # an untouched head travels like the embedding
        try:
            layers.append(_plan_layer(module, module in adapted, recipe, sources))
        except SparseportError as error:
            layers.append(LayerPlan(module, "none", (0, 0), "?", "-", refusal=error))
    linear_tensors = {part for layer in layers for part in sources.linears.parts(layer.module)}
    tensors = [
        name
        for name in sources.base.names()
        if name not in linear_tensors and not _is_tied_copy(name, sources) and not name.endswith(_COMPUTED)
    ]
    sizes = [_stored_bytes(layer) for layer in layers]
    other = sum(int(np.prod(sources.base.info(name).shape)) for name in tensors)
    other *= 4 if recipe.embedding == "fp32" else 2
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in layers)) + other // 2
    matrices = [layer.shape for layer in layers] + [sources.base.info(name).shape for name in tensors]
    largest = max(int(np.prod(shape)) for shape in matrices)
    memory = _FRONTEND_MIB + (largest * 6 >> 20)
    compressing = recipe.compress.mode != "none" or recipe.embedding == "int8"
    if compressing:
        memory = max(memory, _NNCF_MIB + int(weights * _NNCF_BYTES_PER_WEIGHT) // 2**20)
    # NNCF starts from the floating-point IR, which lies on the disk beside the store and the result for a while.
    floating = sum(2 * layer.shape[0] * layer.shape[1] for layer in layers if layer.group_size is None)
    return Plan(
        layers=layers,
        tensors=tensors,
        output_bytes=sum(sizes) + other,
        scratch_bytes=sum(sizes) + other + (2 * (floating + other) if compressing else 0),
        memory_mib=memory,
        numerics_memory_mib=_NUMERICS_MIB + int(weights * _NUMERICS_BYTES_PER_WEIGHT) // 2**20
        if recipe.numerics
        else 0,
        notes=_notes(recipe, sources, layers),
    )


def planned_modules(sources: Sources) -> list[str]:
    """Linear layers, and the embedding where an NNCF checkpoint quantises it."""
    modules = sources.base.linear_names()
    embedding = sources.base.embedding_name
    if sources.tuned is not None and embedding in sources.tuned.modules():
        modules.insert(0, embedding)
    return modules


def require_exportable(plan: Plan) -> None:
    """Raise if the plan refuses a layer, or if the machine cannot hold the logit check.

    Raises:
        SparseportError: the refusal of the first layer, with the number of others.
        EnvironmentProblem: less memory is free than the logit check needs.
    """
    if plan.refusals:
        first = plan.refusals[0].refusal
        assert first is not None
        if len(plan.refusals) > 1:
            first = copy(first)
            first.what += f" ({len(plan.refusals)} of {len(plan.layers)} layers are refused, `--dry-run` lists them)"
        raise first
    free = available_memory_mib()
    if free is not None and plan.numerics_memory_mib > free:
        raise EnvironmentProblem(
            "not enough free memory to compare logits",
            expected=f"about {plan.numerics_memory_mib} MiB",
            found=f"{free} MiB",
            fix="`--no-numerics` skips the comparison; the weights are proven all the same",
            code="E_MEM",
        )


def available_memory_mib() -> int | None:
    """Memory that can be had without swapping, in MiB; None where the system does not say (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return None


def merge_planned(recipe: Recipe, sources: Sources, layer: LayerPlan) -> Merged:
    """Merge one planned layer from open sources."""
    if layer.rule == "fq_lora":
        assert sources.tuned is not None
        dense = sources.dense(layer.module)
        if recipe.nncf_base_dtype != "stored":
            dense = replace(
                dense, values=dense.values.astype(numpy_dtype(_STORED_NAMES[recipe.nncf_base_dtype], layer.module))
            )
        tuned = merge_fq_lora(
            dense, sources.tuned.quantizer(layer.module), sources.ranks.get(layer.module), layer.module
        )
        if tuned.revived and recipe.mask_policy == "reapply":
            assert dense.mask is not None
            return Merged(prune_again(tuned.weight, dense.mask), re_pruned=tuned.revived)
        return Merged(tuned.weight, revived=tuned.revived)
    base: QuantizedWeight | DenseWeight
    sparse = None
    if layer.group_size is not None:
        base = sources.quantized(layer.module)
        sparse = sources.sparse_dense(layer.module) if sources.mask_available(layer.module) else None
    else:
        base = sources.dense(layer.module, layer.rule)
        if sources.mask_available(layer.module):
            sparse = sources.sparse_dense(layer.module)
    branch = None if layer.rule == "carry" else sources.branch(layer.module)
    return merge_layer(
        layer.rule, base, branch, sparse, layer.module, rounding=recipe.rounding, mask_policy=recipe.mask_policy
    )


def _plan_layer(module: str, adapted: bool, recipe: Recipe, sources: Sources) -> LayerPlan:
    form = sources.format_of(module)
    shape = form.shape
    rank = None
    rule = "carry"
    if adapted and sources.tuned is not None:
        return _plan_fq_lora(module, form, sources)
    if adapted:
        rank = sources.rank_of(module)
        rule = _rule(module, form.quantized, sources)
    if form.group_size is not None:
        stored_group = openvino_layout(form.group_size, shape[1], module)
        stored = f"{'i4' if form.symmetric else 'u4'} g{stored_group}"
        return LayerPlan(module, rule, shape, form.label, stored, form.group_size, stored_group, rank)
    stored = "f16" if form.dtype == "float16" else "f32"
    if recipe.compress.mode != "none":
        stored = f"nncf {recipe.compress.mode}"
        if recipe.compress.mode.startswith("int4"):
            stored += f" g{_compress_group(recipe.compress.group_size, shape[1], module)}"
    return LayerPlan(module, rule, shape, form.label, stored, rank=rank)


def _plan_fq_lora(module: str, form: LayerFormat, sources: Sources) -> LayerPlan:
    """A layer that NNCF's fake quantiser turns into integers.

    Raises:
        BadInput: the base is quantised already.
    """
    assert sources.tuned is not None
    if form.quantized:
        raise BadInput(
            "an NNCF FQ_LORA checkpoint needs the floating-point base it was tuned on",
            where=module,
            found=form.label,
            fix="give the original model as --base",
            code="E_PAIRING",
        )
    quantizer = sources.tuned.quantizer(module)
    sources.tuned.release()
    columns = form.shape[1]
    group = columns if quantizer.group_size == -1 else quantizer.group_size
    stored = columns if quantizer.bits == 8 else openvino_layout(group, columns, module)
    if quantizer.bits == 8 and group != columns:
        raise Unsupported(
            "8-bit layers are carried with one group per row", where=module, expected=columns, found=group,
            fix="compress with NNCF's default for 8-bit layers", code="E_GROUP",
        )  # fmt: skip
    kind = "sym" if quantizer.symmetric else "asym"
    return LayerPlan(
        module,
        "fq_lora",
        form.shape,
        f"{form.label} + NNCF int{quantizer.bits} g{group} {kind}",
        f"{'i4' if quantizer.symmetric and quantizer.bits == 4 else f'u{quantizer.bits}'} g{stored}",
        group,
        stored,
        sources.rank_of(module),
    )


def _compress_group(group_size: int, columns: int, module: str) -> int:
    """The group size for NNCF, if this layer can have it.

    Raises:
        BadInput: it does not divide the layer's columns.
        Unsupported: OpenVINO computes it wrongly.
    """
    group = columns if group_size == -1 else group_size
    if columns % group:
        raise BadInput(
            "--compress-group-size does not divide the layer's input features",
            where=module,
            expected=f"a divisor of {columns}",
            found=group,
            fix="choose 32 or 64, or -1 for one group per row",
            code="E_GROUP",
        )
    if openvino_group_size(group, columns, module) != group:
        raise Unsupported(
            "OpenVINO computes this group size wrongly",
            where=module,
            expected="8, 16, 32, a multiple of 64, or -1",
            found=group,
            fix="choose --compress-group-size 32 or 64",
            code="E_GROUP",
        )
    return group


def _rule(module: str, quantized: bool, sources: Sources) -> str:
    """The merge rule that the adapter was trained for.

    Raises:
        BadInput: an input that the rule needs is missing.
        FidelityError: the merge would break sparsity or precision; the message names the rule that would keep it.
        Unsupported: the combination has no exact merge.
    """
    adapter = sources.adapter
    assert adapter is not None
    if adapter.quantization_aware:
        if not quantized:
            raise BadInput(
                "a quantization-aware adapter needs the INT4 base it was trained on",
                where=module,
                found="a floating-point base",
                fix="give the GPTQ folder as --base",
                code="E_PAIRING",
            )
        if sources.sparse is None:
            raise BadInput(
                "a quantization-aware adapter needs the sparse base as well",
                where=module,
                fix="give --sparse-base DIR: mask and weights before quantisation",
                code="E_SPARSE_BASE",
            )
        return "qa_sparse_peft"
    if quantized:
        raise FidelityError(
            "merging this adapter into INT4 would re-quantise the base",
            where=module,
            code="E_RULE",
            fix="train it with quantization_aware (QA-SparsePEFT), or merge into the floating-point base",
        )
    if adapter.sparse_adapter:
        if sources.dense(module).mask is None:
            raise BadInput(
                "the adapter was trained on a sparse base, but this base layer has next to no zeros",
                where=module,
                fix="give the pruned model as --base",
                code="E_PAIRING",
            )
        return "sparse_peft"
    if sources.dense(module).mask is not None:
        raise FidelityError(
            f"a dense LoRA merge would fill a base layer that is more than {SPARSE_FROM:.0%} zeros",
            where=module,
            code="E_RULE",
            fix="train with sparse_adapter (SparsePEFT) and merge with rule sparse_peft",
        )
    return "lora"


def _is_tied_copy(name: str, sources: Sources) -> bool:
    head = sources.base.head_name
    return sources.base.tied_head and head is not None and name == f"{head}.weight"


def _stored_bytes(layer: LayerPlan) -> int:
    rows, cols = layer.shape
    if layer.stored_group and layer.group_size:
        groups = cols // min(layer.stored_group, layer.group_size)
        return rows * groups * (layer.stored_group + 5) // 2
    if layer.stored.startswith("nncf int4"):
        return rows * cols * 9 // 16
    if layer.stored.startswith("nncf"):
        return rows * cols
    return rows * cols * (2 if layer.stored == "f16" else 4)


def _notes(recipe: Recipe, sources: Sources, layers: list[LayerPlan]) -> list[str]:
    notes = list(sources.base.warnings)
    if sources.sparse is not None:
        notes.extend(sources.sparse.warnings)
    if sources.tuned is not None:
        notes.extend(sources.tuned.warnings)
    if sources.adapter is not None:
        notes.extend(sources.adapter.warnings)
        if sources.adapter.no_op():
            notes.append("the adapter changes nothing: every lora_B is zero")
    if computed := [name for name in sources.base.names() if name.endswith(_COMPUTED)]:
        notes.append(f"{len(computed)} rotary frequency tensors are left out: the graph computes them from the config")
    notes += _regrouping(layers)
    if any(layer.group_size and layer.rule == "carry" for layer in layers) and sources.sparse is None:
        notes.append(
            "no sparse base was given: pruned weights cannot be told from weights that are zero by rounding, "
            "so the certificate states digests but no mask"
        )
    if recipe.compress.mode != "none" and all(layer.stored_group for layer in layers):
        notes.append("--compress has nothing to do: every layer is INT4 already and stays as it is")
    return notes


def _regrouping(layers: list[LayerPlan]) -> list[str]:
    """One sentence per pair of group sizes that differ between source and output."""
    pairs = Counter(
        (layer.group_size, layer.stored_group)
        for layer in layers
        if layer.group_size and layer.stored_group and layer.group_size != layer.stored_group
    )
    notes = []
    for (size, stored), count in sorted(pairs.items()):
        how = f"are split losslessly, group {size} -> {stored}"
        if stored > size:
            how = (
                f"have their groups of {size} filled up with zeros to {stored} columns ({stored / size:.2f} x the size)"
            )
        notes.append(f"{count} layers {how}, because OpenVINO computes the original group size wrongly")
    return notes
