"""What is in this folder or file, what exporting it would keep and lose, and which command to run next."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.checkpoints.elastic import CHOICES, open_search_space
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.nncf_fq import NncfCheckpoint, read_nls_ranks
from sparseport.checkpoints.peft import CONFIG as ADAPTER_CONFIG
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput, SparseportError
from sparseport.plan import LayerPlan, Plan, make_plan
from sparseport.recipe import make_recipe
from sparseport.sources import SPARSE_FROM, Sources, is_nncf_checkpoint, open_sources
from sparseport.verify.certificate import FILE_NAME as CERTIFICATE
from sparseport.verify.certificate import Certificate, certified_folders
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import find_n_m, mask_of

Step = Callable[[], None]
WITH_EMBEDDING = "with the embedding"
_EXPORT = ("sparseport", "export", "--target", "openvino")


class Placeholder(str):
    """A word of a command that the user has to replace; every other word is quoted where a shell would act on it."""


@dataclass(frozen=True)
class _Reading:
    """How the user wants a checkpoint to be read; fields of `Recipe`."""

    allow_pickle: bool
    gptq_zeros: str | None
    ignore_extra: bool

    @property
    def words(self) -> list[str]:
        """The options as words of a command."""
        return [
            *(["--allow-pickle"] if self.allow_pickle else []),
            *(["--gptq-zeros", self.gptq_zeros] if self.gptq_zeros else []),
            *(["--ignore-extra"] if self.ignore_extra else []),
        ]


@dataclass(frozen=True)
class LayerReport:
    """One linear layer as it lies in the checkpoint, and as it would leave.

    format       how it is stored (`int4 g64 asym`)
    scales       dtype of the scales, or of the values
    zero_points  smallest and largest zero-point, or None
    act_order    whether columns lie in another order than the inputs
    zeros        weights that are exactly zero
    pruned       weights that the checkpoint itself says are pruned, or None where it says nothing
    pattern      2:4 or 4:8 where the zeros keep it, else empty
    stored       format in the output (`u4 g64`)
    refused      why it cannot be exported, or None
    """

    module: str
    shape: tuple[int, int]
    format: str
    scales: str
    zero_points: tuple[int, int] | None
    act_order: bool
    zeros: int
    pruned: int | None
    pattern: str
    stored: str
    refused: str | None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class Inspection:
    """What was found.

    kind     base, adapter, export or gguf
    title    one line: what this is
    writer   tool and version as the files tell, or empty
    facts    short label -> value, in the order to print
    layers   linear layers of a base
    keeps    what an export carries exactly
    loses    what it does not, or cannot
    next     commands to run, quoted for a POSIX shell; a placeholder such as BASE stands for what is not known
    """

    kind: str
    title: str
    writer: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    keeps: list[str] = field(default_factory=list)
    loses: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**vars(self), "layers": [vars(layer) for layer in self.layers]}


def inspect(
    path: Path,
    *,
    allow_pickle: bool = False,
    gptq_zeros: str | None = None,
    ignore_extra: bool = False,
    on_layer: Step = lambda: None,
) -> Inspection:
    """Look at a checkpoint folder, an adapter folder, an exported folder or a GGUF file.

    Every weight is read once, one layer at a time; nothing is written.

    Args:
        path: what to look at.
        allow_pickle, gptq_zeros, ignore_extra: how to read it, as in a recipe; the commands that follow name them too.
        on_layer: called after each linear layer.

    Raises:
        BadInput: there is nothing here that sparseport knows, or it is damaged.
        Unsupported: a base of a kind that cannot be carried exactly; the message says which and the way out.
        VerificationError: an exported folder whose certificate is damaged.
    """
    path, reading = Path(path), _Reading(allow_pickle, gptq_zeros, ignore_extra)
    found = _inspect(path, reading, on_layer)
    if found.kind != "base":
        for option, given in (("--gptq-zeros", reading.gptq_zeros), ("--ignore-extra", reading.ignore_extra)):
            if given:
                found.warnings.append(f"{option} has nothing to do: it is for the folder of a base model")
    return found


def _inspect(path: Path, reading: _Reading, on_layer: Step) -> Inspection:
    if path.is_file() and path.suffix == ".gguf":
        return _inspect_gguf(path)
    if not path.is_dir() and not (path.is_file() and is_nncf_checkpoint(path)):
        raise BadInput(
            "nothing to inspect here",
            where=path,
            expected="a folder with config.json or adapter_config.json, or a .gguf file",
            found="a file" if path.exists() else "nothing",
            code="E_MISSING",
        )
    if (path / CERTIFICATE).is_file():
        return _inspect_export(path)
    if exported := certified_folders(path):
        return _inspect_exports(path, exported)
    if (path / ADAPTER_CONFIG).is_file():
        return _inspect_adapter(path, reading)
    if is_nncf_checkpoint(path):
        return _inspect_nncf(path, reading)
    return _inspect_base(path, reading, on_layer)


def _inspect_base(path: Path, reading: _Reading, on_layer: Step) -> Inspection:
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
    command = [*_EXPORT, "--base", _word(path), *options]
    found.next.append(_command([*command, "--output", _output_for(path)]))
    adapter = ["--adapter", Placeholder("ADAPTER")]
    if any(layer.format.startswith("int") for layer in layers):
        adapter = ["--sparse-base", Placeholder("SPARSE-BASE"), "--adapter", Placeholder("QA-SPARSEPEFT-ADAPTER")]
    found.next.append(_command([*command, *adapter, "--output", Placeholder("OUT")]))
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


def _inspect_adapter(path: Path, reading: _Reading) -> Inspection:
    with AdapterFolder.open(path, allow_pickle=reading.allow_pickle) as adapter:
        kind, needs = "LoRA", ["--base", Placeholder("BASE")]
        if adapter.quantization_aware:
            kind = "QA-SparsePEFT"
            needs = ["--base", Placeholder("INT4-BASE"), "--sparse-base", Placeholder("SPARSE-BASE")]
        elif adapter.sparse_adapter:
            kind, needs = "SparsePEFT", ["--base", Placeholder("SPARSE-BASE")]
        ranks = adapter.ranks()
        found = Inspection("adapter", f"{kind} adapter for {len(ranks)} layers")
        release = adapter.config.get("peft_version")
        found.writer = f"peft {release}" if isinstance(release, str) else ""
        found.facts = {
            "r": str(adapter.r),
            "lora_alpha": f"{adapter.alpha:g}",
            "scaling": ", ".join(f"{s:g}" for s in sorted({adapter.scaling_of(module) for module in ranks})),
            "tensor ranks": ", ".join(f"{count} x {rank}" for rank, count in sorted(Counter(ranks.values()).items())),
            "modules": ", ".join(adapter.target_modules),
            "trained on": adapter.base_model_name or "not said",
        }
        found.warnings = list(adapter.warnings)
        if adapter.no_op():
            found.warnings.append("the adapter changes nothing: every lora_B is zero")
        space_file = adapter.search_space_file()
        lower = sum(1 for rank in ranks.values() if rank < adapter.r)
    if lower:
        found.warnings.append(
            f"{lower} layers have tensors of lower rank than r = {adapter.r}: an extracted sub-adapter; its scaling "
            "stays alpha / r, while peft fails on it or scales it wrongly"
        )
    choices = ["maximal"]
    if space_file is not None:
        space = open_search_space(space_file, layers=_layers_of(ranks))
        spaces = Counter(f"{group.kind} {list(group.ranks)}" for group in space.groups)
        found.facts["search space"] = ", ".join(f"{count} groups of {text}" for text, count in spaces.items())
        choices = list(CHOICES)
    found.keeps.append(
        {
            "LoRA": "a dense base is merged; a sparse or INT4 base is refused, because the merge would break it",
            "SparsePEFT": "every pruned weight of the base stays zero in the merge",
            "QA-SparsePEFT": "zero-points and scales of the INT4 base stay; every pruned weight has code == zero-point",
        }[kind]
    )
    pickle = ["--allow-pickle"] if reading.allow_pickle else []
    found.next = _choices([*_EXPORT, *needs, "--adapter", _word(path), *pickle], choices)
    return found


def _choices(command: list[str], choices: list[str]) -> list[str]:
    """A command for each sub-adapter; the maximal one is what an export takes when none is named."""
    named = [[] if choice == "maximal" else ["--sub-adapter", choice] for choice in choices]
    return [_command([*command, *words, "--output", Placeholder("OUT")]) for words in named]


def _inspect_nncf(path: Path, reading: _Reading) -> Inspection:
    with NncfCheckpoint.open(path, allow_pickle=reading.allow_pickle) as tuned:
        modules, ranks, elastic = tuned.modules(), tuned.ranks(), tuned.elastic_ranks()
        kinds: Counter[str] = Counter()
        for module in modules:
            quantizer = tuned.quantizer(module) if not tuned.has_model_state else None
            if quantizer is not None:
                group = "one group per row" if quantizer.group_size == -1 else f"g{quantizer.group_size}"
                kinds[f"int{quantizer.bits} {group} {'sym' if quantizer.symmetric else 'asym'}"] += 1
            tuned.release()
        result = tuned.result_json
        found = Inspection(
            "adapter", f"NNCF {'FQ_LORA_NLS' if elastic else 'FQ_LORA'} checkpoint for {len(modules)} layers"
        )
        found.warnings = list(tuned.warnings)
    found.writer = "nncf"
    found.facts = {
        "quantisers": ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        or "known with the base only",
        "tensor ranks": ", ".join(f"{count} x {rank}" for rank, count in sorted(Counter(ranks.values()).items())),
        "searched ranks": result.name if result else "no result.json",
    }
    found.keeps.append("codes, zero-points and scales as nncf.strip gives them, embedding and head among them")
    found.loses.append(
        "pruned weights of a sparse base: NNCF's adapters have no mask; an export counts what they revive"
    )
    found.warnings.append(
        "the dtype that the base had decides the codes: DTYPE is float32 for a model that NNCF's own example exports, "
        "bfloat16 for one that was stripped as it was tuned in bfloat16, stored for the dtype of the base's files"
    )
    choices = ["maximal"]
    if elastic and result is None:
        found.warnings.append(
            "the adapters are elastic, and there is no result.json with the ranks that were searched: an export takes "
            "the largest ranks, or those of --sub-adapter FILE"
        )
    elif elastic and result is not None:
        try:
            read_nls_ranks(result, elastic)
            choices.append("heuristic")
        except SparseportError as error:
            found.warnings.append(f"the searched ranks cannot be used: {error}")
    base = ["--base", Placeholder("BASE"), "--nncf-base-dtype", Placeholder("DTYPE")]
    found.next = _choices([*_EXPORT, *base, "--adapter", _word(path), "--allow-pickle"], choices)
    return found


def _layers_of(ranks: dict[str, int]) -> int | None:
    """How many decoder layers an adapter spans: one more than the largest number in its modules' names."""
    numbers = [int(part) for module in ranks for part in module.split(".") if part.isdecimal()]
    return max(numbers) + 1 if numbers else None


def _inspect_export(path: Path) -> Inspection:
    certificate = Certificate.read(path)
    totals = certificate.totals
    found = Inspection("export", "folder exported by sparseport, with its certificate")
    found.writer = f"sparseport {certificate.body['sparseport']}"
    found.facts = {
        "target": certificate.target,
        "linear layers": f"{totals['linears']}, {totals['weights']:,} weights, {totals['int4_linears']} in INT4",
        "pruned": f"{totals['pruned']:,} of {totals['masked_weights']:,}, {totals['revived']:,} of them not zero",
    }
    found.next = [_command(["sparseport", "verify", _word(path)])]
    return found


def _inspect_exports(path: Path, folders: list[Path]) -> Inspection:
    """A folder with a folder for each of several targets."""
    parts = [_inspect_export(folder) for folder in folders]
    found = Inspection("export", f"folder exported by sparseport for {len(parts)} targets, with their certificates")
    found.writer = parts[0].writer
    found.facts = {**parts[0].facts, "target": ", ".join(part.facts["target"] for part in parts)}
    found.next = [_command(["sparseport", "verify", _word(path)])]
    return found


def _inspect_gguf(path: Path) -> Inspection:
    from sparseport.checkpoints.gguf import check_gguf, describe_gguf

    facts, kinds = describe_gguf(path)
    found = Inspection("gguf", f"GGUF file, {facts.get('architecture', 'unknown')} model", facts=facts)
    found.facts["tensors"] = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    command = [*_EXPORT, "--base", _word(path)]
    wide = ["--gguf-dtype", "float32", "--embedding", "fp32"]
    try:
        check_gguf(path)
    except SparseportError as error:
        found.loses.append(f"an export refuses this file: {error}")
    else:
        found.next = [_command([*command, "--output", _output_for(path)])]
    if set(kinds) <= {"F16"}:
        found.keeps.append("the value of every tensor: all are float16 in the file")
        return found
    found.keeps.append(f"the value of every tensor as the file gives it, but only with {' '.join(wide)}")
    found.loses.append(
        "otherwise every tensor, norms and embedding too, is rounded to float16 once; an export counts what changes"
    )
    if set(kinds) - {"F16", "F32", "BF16"}:
        found.loses.append("the blocks themselves (Q4_K and the like): no runtime here computes with them")
    if found.next:
        found.next.append(_command([*command, *wide, "--output", _output_for(path)]))
    return found


def _output_for(path: Path) -> str:
    """Name of a folder to export to, beside what is exported to it."""
    return _word(Path(f"{path.resolve().stem if path.is_file() else path.resolve().name or 'model'}-openvino"))


def _word(path: Path) -> str:
    """A path as a word of a command; one that starts with a dash would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _command(words: list[str]) -> str:
    return " ".join(word if isinstance(word, Placeholder) else shlex.quote(word) for word in words)
