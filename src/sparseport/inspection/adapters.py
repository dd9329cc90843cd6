"""Look at an adapter: a PEFT folder, or an NNCF checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sparseport.checkpoints.elastic import CHOICES, open_search_space
from sparseport.checkpoints.nncf_fq import NncfCheckpoint, read_nls_ranks
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import SparseportError
from sparseport.inspection.report import EXPORT, Inspection, Placeholder, Reading, as_command, word


def inspect_adapter(path: Path, reading: Reading) -> Inspection:
    """A PEFT adapter: kind, ranks, search space; raises as `AdapterFolder.open`."""
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
        spaces = Counter(f"{group.kind} {list(group.sizes)}" for group in space.groups)
        found.facts["search space"] = ", ".join(f"{count} groups of {text}" for text, count in spaces.items())
        choices = list(CHOICES)
    found.keeps.append(
        {
            "LoRA": "a dense base is merged; on a sparse or INT4 base, which the merge would break, --branches graph "
            "or --branches adapter keeps the adapter beside it, un-merged and exact",
            "SparsePEFT": "every pruned weight of the base stays zero in the merge",
            "QA-SparsePEFT": "zero-points and scales of the INT4 base stay; every pruned weight has code == zero-point",
        }[kind]
    )
    pickle = ["--allow-pickle"] if reading.allow_pickle else []
    command = [*EXPORT, *needs, "--adapter", word(path), *pickle]
    found.next = _choices(command, choices)
    if kind == "LoRA":
        found.next += [
            line for form in ("graph", "adapter") for line in _choices([*command, "--branches", form], choices[:1])
        ]
    return found


def inspect_nncf(path: Path, reading: Reading) -> Inspection:
    """An NNCF FQ_LORA or FQ_LORA_NLS checkpoint; raises as `NncfCheckpoint.open`."""
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
    found.next = _choices([*EXPORT, *base, "--adapter", word(path), "--allow-pickle"], choices)
    return found


def _choices(command: list[str], choices: list[str]) -> list[str]:
    """A command for each sub-adapter; the maximal one is what an export takes when none is named."""
    named = [[] if choice == "maximal" else ["--sub-adapter", choice] for choice in choices]
    return [as_command([*command, *words, "--output", Placeholder("OUT")]) for words in named]


def _layers_of(ranks: dict[str, int]) -> int | None:
    """How many decoder layers an adapter spans: one more than the largest number in its modules' names."""
    numbers = [int(part) for module in ranks for part in module.split(".") if part.isdecimal()]
    return max(numbers) + 1 if numbers else None
