"""What an export will do to each layer, decided before any weight is merged.

Headers decide nearly everything. Two questions need the weights of adapted layers, which are read one at a time and let
go: whether a floating-point layer was pruned, and how an NNCF quantiser groups.
"""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.branches import WAY_OUT, branch_rule, require_branches, switching_notes
from sparseport.checkpoints.dialect import LayerFormat
from sparseport.cuts import cut_notes, cut_weights, require_columns, require_cuttable
from sparseport.errors import BadInput, EnvironmentProblem, FidelityError, SparseportError, Unsupported
from sparseport.merge.subnetwork import cut_group_size
from sparseport.recipe import Recipe, Target
from sparseport.sources import Sources
from sparseport.stored_forms import StoredForm, floating_form, quantized_form, require_head_size

# What the process that builds a target's graph (torch, transformers, the exporter) takes beside one matrix, measured.
_FRONTEND_MIB = {"openvino": 450, "onnx": 550}
# The logit check holds the model in float32 twice: in torch, and compiled by OpenVINO; plus its libraries. In torch it
# is the whole model, whatever is cut out of it.
_NUMERICS_MIB = 500
_NUMERICS_BYTES_PER_WEIGHT = 8.5
_TORCH_BYTES_PER_WEIGHT = 4
# NNCF holds the model it compresses and its result; plus its libraries.
_NNCF_MIB = 600
_NNCF_BYTES_PER_WEIGHT = 6
_WHY_REGROUPED = {
    "openvino": "OpenVINO computes the original group size wrongly",
    "onnx": "ONNX Runtime's MatMulNBits does not take the original group size",
}
# Buffers that old checkpoints stored although every implementation computes them.
_COMPUTED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer's way through the export.

    module        name in the checkpoint
    rule          carry, lora, sparse_peft, qa_sparse_peft, fq_lora, or branch (carried, with its adapter beside it)
    shape         [out, in] of what leaves
    source        format in the checkpoint (`int4 g64 asym`, `float16`)
    stored        target -> form in the output
    group_size    columns per group in the source, or None
    rank          active adapter rank, or None; of a carried layer it is that of a branch in an adapter's file
    refusal       why this layer cannot be exported, or None
    whole_shape   [out, in] in the checkpoint, if a sub-network cuts the layer
    written       name in what is written, if a sub-network numbers its blocks anew
    """

    module: str
    rule: str
    shape: tuple[int, int]
    source: str
    stored: dict[Target, StoredForm] = field(default_factory=dict)
    group_size: int | None = None
    rank: int | None = None
    refusal: SparseportError | None = None
    whole_shape: tuple[int, int] | None = None
    written: str | None = None

    @property
    def name(self) -> str:
        """Name in what is written."""
        return self.written or self.module

    @property
    def refused(self) -> str | None:
        """The refusal in one line."""
        return None if self.refusal is None else str(self.refusal)


@dataclass(frozen=True)
class Plan:
    """All layers, the other tensors, and what the export will need.

    layers               one entry for each linear layer: rule, forms, rank, refusal
    tensors              names of everything else that is written: embedding, head, norms, biases
    output_bytes         size of all targets' weights
    scratch_bytes        what lies on the disk beside them for a while
    notes                sentences worth knowing before the export
    memory_mib           peak of the export without the logit check
    numerics_memory_mib  peak of the logit check; 0 if it will not run
    problem              why a target refuses the model, whatever its layers are, or None
    draft                the plan of the draft that is exported beside it, or None
    """

    layers: list[LayerPlan]
    tensors: list[str]
    output_bytes: int
    scratch_bytes: int
    memory_mib: int
    numerics_memory_mib: int
    notes: list[str] = field(default_factory=list)
    problem: SparseportError | None = None
    draft: Plan | None = None

    @property
    def refusals(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.refused]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "layers": [
                {
                    **vars(layer),
                    "stored": {target: form.label for target, form in layer.stored.items()},
                    "refusal": layer.refused,
                }
                for layer in self.layers
            ],
            "tensors": self.tensors,
            "estimates": {
                "output_mib": self.output_bytes >> 20,
                "scratch_mib": self.scratch_bytes >> 20,
                "memory_mib": self.memory_mib,
                "numerics_memory_mib": self.numerics_memory_mib,
            },
            "refused": len(self.refusals),
            "notes": self.notes,
            **({} if self.draft is None else {"draft": self.draft.as_dict()}),
        }


def make_plan(recipe: Recipe, sources: Sources) -> Plan:
    """Choose rule and format for every linear layer.

    A layer that cannot be exported is listed with its reason; `require_exportable` turns that into an error.
    """
    adapted = sources.adapter_modules()
    layers = []
    for module in planned_modules(sources):
        if sources.written_name(module) is None:
            continue  # the sub-network leaves this block out
        if module == sources.base.head_name and module not in adapted and not sources.format_of(module).quantized:
            continue  # an untouched head travels like the embedding
        try:
            layers.append(_with_names(_plan_layer(module, module in adapted, recipe, sources), sources))
        except SparseportError as error:
            layers.append(LayerPlan(module, "none", (0, 0), "?", refusal=error))
    linear_tensors = {part for layer in layers for part in sources.linears.parts(layer.module)}
    tensors = [
        name
        for name in sources.base.names()
        if name not in linear_tensors
        and sources.written_name(name) is not None
        and not _is_tied_copy(name, sources)
        and not name.endswith(_COMPUTED)
    ]
    stored = sum(form.bytes for layer in layers for form in layer.stored.values())
    stored += _branch_bytes(recipe, layers) * len(recipe.target)
    other = sum(int(np.prod(sources.base.info(name).shape)) for name in tensors)
    other *= 4 if recipe.embedding == "fp32" else 2
    shapes = {layer.module: layer.shape for layer in layers}
    weights = sum(rows * columns for rows, columns in shapes.values()) + other // 2
    checking = weights * _NUMERICS_BYTES_PER_WEIGHT
    if sources.cut is not None:
        whole, kept = cut_weights(sources, shapes)
        checking += (whole - kept) * _TORCH_BYTES_PER_WEIGHT
    matrices = [layer.shape for layer in layers] + [sources.base.info(name).shape for name in tensors]
    largest = max(int(np.prod(shape)) for shape in matrices)
    # The processes that build the targets' graphs run side by side.
    memory = sum(_FRONTEND_MIB[target] for target in recipe.target) + (largest * 6 >> 20)
    compressing = "openvino" in recipe.target and (recipe.compress.mode != "none" or recipe.embedding == "int8")
    if compressing:
        memory = max(memory, _NNCF_MIB + int(weights * _NNCF_BYTES_PER_WEIGHT) // 2**20)
    # NNCF starts from the floating-point IR, which lies on the disk beside the store and the result for a while.
    floating = sum(2 * layer.shape[0] * layer.shape[1] for layer in layers if layer.group_size is None)
    return Plan(
        layers=layers,
        tensors=tensors,
        output_bytes=stored + other * len(recipe.target),
        scratch_bytes=stored + other * len(recipe.target) + (2 * (floating + other) if compressing else 0),
        memory_mib=memory,
        numerics_memory_mib=_NUMERICS_MIB + int(checking) // 2**20 if recipe.numerics else 0,
        notes=_notes(recipe, sources, layers),
        problem=_problem(recipe, sources),
    )


def _branch_bytes(recipe: Recipe, layers: list[LayerPlan]) -> int:
    """Size of un-merged branches on disk, for one target; at most, because some adapters are stored in 16 bits."""
    if recipe.branches == "refuse":
        return 0
    width = 2 if recipe.branch_dtype == "fp16" else 4
    return sum(width * (layer.rank or 0) * sum(layer.shape) for layer in layers)


def _problem(recipe: Recipe, sources: Sources) -> SparseportError | None:
    try:
        require_head_size(recipe, sources.base.config, str(sources.base.path))
        require_branches(recipe, sources)
        require_cuttable(sources)
    except SparseportError as error:
        return error
    return None


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
        SparseportError: why the model is refused, or the refusal of the first layer, with the number of others.
        EnvironmentProblem: less memory is free than the logit check needs.
    """
    if plan.problem is not None:
        raise plan.problem
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
    if plan.draft is not None:
        require_exportable(plan.draft)


def available_memory_mib() -> int | None:
    """Memory that can be had without swapping, in MiB; None where the system does not say (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return None


def _plan_layer(module: str, adapted: bool, recipe: Recipe, sources: Sources) -> LayerPlan:
    form = sources.format_of(module)
    shape = form.shape if sources.cut is None else sources.cut.shape(module, form.shape)
    rank = None
    rule = "carry"
    if adapted and sources.tuned is not None:
        return _plan_fq_lora(module, form, recipe, sources)
    if adapted:
        rank = sources.rank_of(module)
        rule = branch_rule(recipe) if recipe.branches != "refuse" else _rule(module, form.quantized, sources)
    require_columns(module, sources)
    if form.group_size is not None:
        assert form.bits is not None
        group = form.group_size if shape[1] == form.shape[1] else cut_group_size(form.group_size, shape[1])
        targets = {
            target: quantized_form(target, recipe, shape, group, form.bits, bool(form.symmetric), module)
            for target in recipe.target
        }
        return LayerPlan(module, rule, shape, form.label, targets, group, rank)
    targets = {target: floating_form(target, recipe, shape, form.dtype, module) for target in recipe.target}
    return LayerPlan(module, rule, shape, form.label, targets, rank=rank)


def _with_names(layer: LayerPlan, sources: Sources) -> LayerPlan:
    """The plan with what the chosen sub-network makes of the layer's name and shape."""
    whole, written = sources.format_of(layer.module).shape, sources.written_name(layer.module)
    return replace(
        layer,
        whole_shape=None if whole == layer.shape else whole,
        written=None if written == layer.module else written,
    )


def _plan_fq_lora(module: str, form: LayerFormat, recipe: Recipe, sources: Sources) -> LayerPlan:
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
    if quantizer.bits == 8 and group != columns:
        raise Unsupported(
            "8-bit layers are carried with one group per row", where=module, expected=columns, found=group,
            fix="compress with NNCF's default for 8-bit layers", code="E_GROUP",
        )  # fmt: skip
    kind = "sym" if quantizer.symmetric else "asym"
    targets = {
        target: quantized_form(target, recipe, form.shape, group, quantizer.bits, quantizer.symmetric, module)
        for target in recipe.target
    }
    source = f"{form.label} + NNCF int{quantizer.bits} g{group} {kind}"
    return LayerPlan(module, "fq_lora", form.shape, source, targets, group, sources.rank_of(module))


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
            fix=f"{WAY_OUT}; or train it with quantization_aware (QA-SparsePEFT)",
        )
    if adapter.sparse_adapter:
        pruned = sources.dense(module).mask is not None
        sources.release()
        if not pruned:
            raise BadInput(
                "the adapter was trained on a sparse base, but this base layer has next to no zeros",
                where=module,
                fix="give the pruned model as --base",
                code="E_PAIRING",
            )
        return "sparse_peft"
    mask = sources.dense(module).mask
    sources.release()
    if mask is not None and not mask.all():
        raise FidelityError(
            "a dense LoRA merge would fill the pruned weights of a sparse base",
            where=module,
            found=f"{int(mask.size - np.count_nonzero(mask))} of {mask.size} weights are zero",
            code="E_RULE",
            fix=f"{WAY_OUT}; or train it with sparse_adapter (SparsePEFT)",
        )
    return "lora"


def _is_tied_copy(name: str, sources: Sources) -> bool:
    head = sources.base.head_name
    return sources.base.tied_head and head is not None and name == f"{head}.weight"


def _notes(recipe: Recipe, sources: Sources, layers: list[LayerPlan]) -> list[str]:
    notes = list(sources.base.warnings)
    if sources.sparse is not None:
        notes.extend(sources.sparse.warnings)
    notes += _choices(recipe, sources) + cut_notes(sources, {layer.module: layer.shape for layer in layers})
    if sources.tuned is not None:
        notes.extend(sources.tuned.warnings)
    if sources.adapter is not None:
        notes.extend(sources.adapter.warnings)
        if sources.adapter.no_op():
            notes.append("the adapter changes nothing: every lora_B is zero")
    if computed := _computed_frequencies(sources):
        notes.append(f"{len(computed)} rotary frequency tensors are left out: the graph computes them from the config")
    notes += _regrouping(layers) + switching_notes(recipe)
    if any(layer.group_size and layer.rule in ("carry", "branch") for layer in layers) and sources.sparse is None:
        notes.append(
            "no sparse base was given: pruned weights cannot be told from weights that are zero by rounding, "
            "so the certificate states digests but no mask"
        )
    quantized = any(layer.group_size for layer in layers)
    if recipe.onnx.accuracy == "fast" and not quantized and recipe.embedding != "int8":
        notes.append("--onnx-accuracy fast has nothing to do: no layer is quantised")
    if recipe.compress.mode != "none" and all(layer.group_size for layer in layers):
        notes.append("--compress has nothing to do: every layer is INT4 already and stays as it is")
    return notes


def _choices(recipe: Recipe, sources: Sources) -> list[str]:
    """Choices that change weights and that the user may not know were made."""
    notes = []
    if sources.tuned is not None:
        notes.append(
            f"NNCF codes depend on the base's dtype; it is taken as {recipe.nncf_base_dtype} "
            "(--nncf-base-dtype float32 is what NNCF's own example exports from)"
        )
        if sources.tuned.elastic_ranks() and not sources.ranks:
            notes.append("the NNCF checkpoint is elastic, and the largest rank of every layer is taken")
    elif sources.adapter is not None and recipe.sub_adapter == "maximal" and sources.elastic:
        notes.append(
            "the adapter is elastic, and its maximal sub-adapter is taken; --sub-adapter heuristic is the median"
        )
    return notes


def _computed_frequencies(sources: Sources) -> list[str]:
    """Names of stored rotary frequencies, which the graph computes from the config instead.

    Raises:
        Unsupported: the stored ones are not those of the config.
    """
    names = [name for name in sources.base.names() if name.endswith(_COMPUTED)]
    expected = _default_frequencies(sources.base.config) if names else None
    for name in names if expected is not None else ():
        assert expected is not None
        stored = sources.base.read(name).astype(np.float64).reshape(-1)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=2e-2):
            raise Unsupported(
                "stored rotary frequencies are not those of the config",
                where=f"{sources.base.path}, tensor {name}",
                fix="correct rope_theta or rope_scaling in config.json, or remove the tensor if it is stale",
                code="E_ROPE",
            )
    return names


def _default_frequencies(config: dict[str, Any]) -> npt.NDArray[np.float64] | None:
    """theta ** (-2i / d) for i = 0 .. d/2 - 1 (RoFormer, arXiv 2104.09864); None for other kinds of embedding."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default")) if isinstance(parameters, dict) else None
    theta = config.get("rope_theta", parameters.get("rope_theta") if isinstance(parameters, dict) else None)
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    size = config.get("head_dim") or (hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None)
    if kind != "default" or not isinstance(theta, (int, float)) or not isinstance(size, int) or theta <= 0:
        return None
    return float(theta) ** (-np.arange(0, size, 2, dtype=np.float64) / size)


def _regrouping(layers: list[LayerPlan]) -> list[str]:
    """One sentence per target and group size that differs between source and output."""
    pairs = Counter(
        (target, layer.group_size, form.layout)
        for layer in layers
        for target, form in layer.stored.items()
        if layer.group_size and form.layout and form.layout.block != layer.group_size
    )
    notes = []
    for (target, size, layout), count in sorted(pairs.items(), key=str):
        assert layout is not None
        steps = [f"are split losslessly, group {size} -> {layout.part}"] if layout.part != size else []
        if layout.block != layout.part:
            steps.append(
                f"have their groups of {layout.part} filled up with zeros to {layout.block} columns "
                f"({layout.growth:.2f} x the size)"
            )
        notes.append(f"{count} layers {' and '.join(steps)}, because {_WHY_REGROUPED[target]}")
    return notes
