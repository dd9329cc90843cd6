"""Look at the folder of a base model, layer by layer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.folder import ModelFolder
from sparseport.inspection.report import (
    EXPORT,
    WITH_EMBEDDING,
    Inspection,
    LayerReport,
    Placeholder,
    Reading,
    Step,
    as_command,
    output_for,
    word,
)
from sparseport.plan import LayerPlan, Plan, make_plan
from sparseport.recipe import make_recipe
from sparseport.sources import SPARSE_FROM, Sources, open_sources
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import find_n_m, mask_of


def inspect_base(path: Path, reading: Reading, on_layer: Step) -> Inspection:
    """A base model, every weight of it read once; raises as `open_sources`."""
    recipe = make_recipe({"base": path, "output": path, "numerics": False, **vars(reading)})
    with open_sources(recipe) as sources:
        plan = make_plan(recipe, sources)
        layers = []
        for module in sources.base.linear_names():
            layers.append(_look_at(module, sources, plan))
            sources.release()
            on_layer()
        packed = sources.linears.packed
        found = Inspection("base", _title(sources, layers), packed.writer if packed else "", layers=layers)
        found.facts = _base_facts(sources.base, layers)
        found.warnings = list(sources.base.warnings)
        _judge_layers(found, plan)
        options = [*reading.words, *_judge_matrices(found, sources, plan)]
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        found.loses.append(
            "the folder has no tokenizer: the export needs --no-tokenizer, and applications one of theirs"
        )
        options.append("--no-tokenizer")
    if any(layer.refused for layer in layers):
        return found  # no command would run through
    command = [*EXPORT, "--base", word(path), *options]
    found.next.append(as_command([*command, "--output", output_for(path)]))
    adapter = ["--adapter", Placeholder("ADAPTER")]
    if any(layer.format.startswith("int") for layer in layers):
        adapter = ["--sparse-base", Placeholder("SPARSE-BASE"), "--adapter", Placeholder("QA-SPARSEPEFT-ADAPTER")]
    found.next.append(as_command([*command, *adapter, "--output", Placeholder("OUT")]))
    pruned = any(layer.zeros > SPARSE_FROM * layer.weights for layer in layers if layer.stored != WITH_EMBEDDING)
    if pruned or any(layer.format.startswith("int") for layer in layers):
        beside = ["--adapter", Placeholder("DENSE-ADAPTER"), "--branches", "graph"]
        found.next.append(as_command([*command, *beside, "--output", Placeholder("OUT")]))
    return found


def _look_at(module: str, sources: Sources, plan: Plan) -> LayerReport:
    planned = next((layer for layer in plan.layers if layer.module == module), None)
    weight = sources.linears.read(module)
    form = sources.format_of(module)
    zero_points = None
    if isinstance(weight, QuantizedWeight):
        kept = weight.codes != np.repeat(weight.zero_points, weight.group_size, axis=1)
        zero_points = (int(weight.zero_points.min()), int(weight.zero_points.max()))
        pruned = None
    else:
        kept = mask_of(weight.values) if weight.mask is None else weight.mask
        pruned = None if weight.mask is None else int(weight.mask.size - np.count_nonzero(weight.mask))
    zeros = int(kept.size - np.count_nonzero(kept)) if pruned is None else _zeros(weight)
    pattern = find_n_m(kept) if zeros else None
    return LayerReport(
        module=module,
        shape=form.shape,
        format=form.label,
        scales=form.dtype,
        zero_points=zero_points,
        act_order=isinstance(weight, QuantizedWeight) and weight.input_order is not None,
        zeros=zeros,
        pruned=pruned,
        pattern="" if pattern is None else f"{pattern[0]}:{pattern[1]}",
        stored=_stored(planned) if planned else WITH_EMBEDDING,
        refused=planned.refused if planned else None,
    )


def _stored(layer: LayerPlan) -> str:
    """The form in OpenVINO's folder, which is what the plan of an inspection is for; a refused layer has none."""
    return layer.stored["openvino"].label if layer.stored else "-"


def _zeros(weight: QuantizedWeight | DenseWeight) -> int:
    assert isinstance(weight, DenseWeight)
    return int(weight.values.size - np.count_nonzero(mask_of(weight.values)))


def _title(sources: Sources, layers: list[LayerReport]) -> str:
    kinds = Counter(layer.format for layer in layers)
    most = kinds.most_common(1)[0][0] if kinds else "no linear layers"
    most = f"mostly {most}" if len(kinds) > 1 else most
    packed = sources.linears.packed
    name = packed.name if packed else "plain tensors"
    zeros = sum(layer.zeros for layer in layers if layer.stored != WITH_EMBEDDING)
    weights = sum(layer.weights for layer in layers if layer.stored != WITH_EMBEDDING)
    share = zeros / weights if weights else 0.0
    sparse = f", {share:.1%} of the linear weights are exactly zero" if share > SPARSE_FROM else ""
    return f"{sources.base.config.get('model_type', 'unknown')} model, {name}, {most}{sparse}"


def _base_facts(base: ModelFolder, layers: list[LayerReport]) -> dict[str, str]:
    config = base.config
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    facts = {"architecture": ", ".join(names) or str(config.get("model_type"))}
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if key in config:
            facts[key] = str(config[key])
    facts["linear layers"] = f"{len(layers)}, {sum(layer.weights for layer in layers):,} weights"
    facts["formats"] = ", ".join(f"{count} x {label}" for label, count in Counter(x.format for x in layers).items())
    if declared := _declared_pattern(config):
        inner = [layer for layer in layers if layer.module != base.head_name]
        kept = sum(1 for layer in inner if layer.pattern == declared)
        facts["declared sparsity"] = f"{declared}, kept by {kept} of {len(inner)} layers"
    facts["head"] = "tied to the embedding" if base.tied_head else "stored on its own"
    return facts


def _declared_pattern(config: dict[str, Any]) -> str | None:
    """The N:M pattern that compressed-tensors' metadata names, or None."""
    for key in ("quantization_config", "compression_config"):
        sparsity = config[key].get("sparsity_config") if isinstance(config.get(key), dict) else None
        pattern = sparsity.get("sparsity_structure") if isinstance(sparsity, dict) else None
        if pattern in ("2:4", "4:8"):
            return str(pattern)
    return None


def _judge_layers(found: Inspection, plan: Plan) -> None:
    """What becomes of the linear layers that leave as layers (an untouched head does not)."""
    carried = [layer for layer in found.layers if layer.refused is None and layer.stored != WITH_EMBEDDING]
    quantized = [layer for layer in carried if layer.zero_points is not None]
    dense = [layer for layer in carried if layer.zero_points is None]
    for some, what in ((quantized, "codes, zero-points and scales of {} layers"), (dense, "values and zeros of {} {}")):
        if some:
            widened = any(layer.scales == "bfloat16" for layer in some)
            exactly = "exactly (bfloat16 leaves as float32, which holds it)" if widened else "bit for bit"
            found.keeps.append(f"{what.format(len(some), 'floating-point layers')}, {exactly}")
    if any(layer.act_order for layer in carried):
        found.keeps.append("act-order: columns stay as quantised, the activation is gathered to fit")
    if any(layer.pruned is not None for layer in carried):
        found.keeps.append("the mask that is stored with the weights")
    found.keeps += [note for note in plan.notes if "filled up" in note or "split losslessly" in note]
    for layer in found.layers:
        if layer.refused is not None:
            found.loses.append(f"{layer.module} is refused: {layer.refused}")
    if quantized:
        found.loses.append(
            "no mask comes with INT4 codes: weights that are zero by rounding look like pruned ones; "
            "--sparse-base gives the mask"
        )


def _judge_matrices(found: Inspection, sources: Sources, plan: Plan) -> list[str]:
    """What becomes of embedding and head, which leave as float16; returns options without which the export fails."""
    kept, options = [], []
    for name in plan.tensors:
        if len(sources.base.info(name).shape) < 2:
            continue
        is_head = name == f"{sources.base.head_name}.weight"
        label = f"{name} (the head travels with the embedding)" if is_head else name
        rounded, overflowing = _changed_by_f16(sources, name)
        sources.release()
        if overflowing:
            found.loses.append(f"{overflowing:,} values of {label} overflow float16: the export needs --embedding fp32")
            options = ["--embedding", "fp32"]
        elif rounded:
            found.loses.append(f"{rounded:,} values of {label} are rounded to float16; --embedding fp32 keeps them")
        else:
            kept.append(label)
    if kept:
        found.keeps.append(f"every value of {', '.join(kept)}")
    return options


def _changed_by_f16(sources: Sources, name: str) -> tuple[int, int]:
    """How many values of a tensor float16 rounds, and how many it makes infinite; counted in blocks of rows."""
    values = sources.base.read(name)
    if values.dtype == np.float16:
        return 0, 0
    rounded, overflowing = 0, 0
    for start in range(0, values.shape[0], 1024):
        wide = values[start : start + 1024].astype(np.float32)
        with np.errstate(over="ignore", under="ignore"):
            narrow = wide.astype(np.float16).astype(np.float32)
        infinite = np.isinf(narrow) & np.isfinite(wide)
        overflowing += int(np.count_nonzero(infinite))
        rounded += int(np.count_nonzero((narrow != wide) & ~infinite))
    return rounded, overflowing
