"""What the facts of an exported folder mean, in sentences."""

from __future__ import annotations

from sparseport.model_card.facts import ModelFacts, Run
from sparseport.model_card.numbers import count, percent

TARGETS = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
ARTICLES = {"openvino": "an OpenVINO", "onnx": "an ONNX Runtime"}

# Merge rules from the one that says most about a model to the one that says least.
_KINDS = {
    "qa_sparse_peft": "a sparse INT4 model; its adapter was merged on the grid that training froze (QA-SparsePEFT)",
    "fq_lora": "an INT4 model; its adapter was merged inside NNCF's fake quantisers (FQ_LORA)",
    "sparse_peft": "a sparse model; its adapter was merged under the mask, so pruned weights stay zero (SparsePEFT)",
    "lora": "a fine-tuned model; its low-rank adapter was merged (LoRA)",
    "branch": "a base model with its adapter un-merged beside it in the graph",
}
_RUNS = {
    "full_precision": "full precision",
    "default": "default settings",
    "fast": "fast products (int8 activations)",
    "openvino_full_precision": "full precision, run by OpenVINO",
    "openvino": "default settings, run by OpenVINO",
}


def kind(facts: ModelFacts) -> str:
    """What sort of model this is, as the part of a sentence behind `This is`."""
    rule = next((rule for rule in _KINDS if rule in facts.rules), None)
    if rule is not None:
        return _KINDS[rule]
    if facts.adapters:
        return "a base model with adapters in files of their own, which the runtime switches on and off"
    quantised = "an INT4 model" if set(facts.by_bits) == {4} else "a model"
    return f"{quantised}, carried over as it was; nothing was merged into it"


def base_name(facts: ModelFacts) -> str | None:
    """The base model's name without its owner; None where no input names it."""
    base = facts.origin.get("base_model")
    return (
        str(base["name"]).rpartition("/")[2] if isinstance(base, dict) and isinstance(base.get("name"), str) else None
    )


def architecture(facts: ModelFacts) -> str:
    """`Llama`."""
    return facts.architecture.partition(",")[0].removesuffix("ForCausalLM") or facts.model_type or "unknown"


def form(facts: ModelFacts) -> str:
    """`INT4, 50.0% sparse, 30 blocks`: the model in a few words."""
    parts = [bits_label(facts)]
    if facts.sparsity is not None:
        parts.append(f"{percent(facts.sparsity)} sparse")
    if facts.blocks:
        parts.append(f"{len(facts.kept)} of {facts.blocks} blocks" if facts.cut_blocks else f"{facts.blocks} blocks")
    return ", ".join(parts)


def bits_label(facts: ModelFacts) -> str:
    """`INT4`, `INT4 and INT8`, `16 bit`."""
    names = [bits_name(bits) for bits in facts.by_bits]
    return " and ".join(names)


def bits_name(bits: int) -> str:
    """`INT4`, `INT8`, `16 bit`."""
    return f"INT{bits}" if bits <= 8 else f"{bits} bit"


def bits_sentence(facts: ModelFacts) -> str:
    """How many layers are stored in how many bits."""
    if len(facts.by_bits) == 1:
        return f"All {count(len(facts.layers))} linear layers are stored in {bits_label(facts)}."
    parts = [f"{count(layers)} in {bits_name(bits)}" for bits, layers in facts.by_bits.items()]
    return f"Of {count(len(facts.layers))} linear layers {', '.join(parts)}."


def sparsity_sentence(facts: ModelFacts) -> str:
    """How much is pruned, and whether it stayed zero."""
    if facts.sparsity is None:
        return "No layer has a mask: the model is not sparse."
    where = (
        ""
        if facts.masked == facts.weights
        else f" of the layers that have a mask ({percent(facts.masked / facts.weights)})"
    )
    told = f"{count(facts.pruned)} of {count(facts.masked)} weights{where} are pruned ({percent(facts.sparsity)})"
    if facts.revived:
        return f"{told}; {count(facts.revived)} of them are not zero any more."
    return f"{told}, and every one of them is exactly zero."


def cut_sentence(facts: ModelFacts) -> str | None:
    """What a sub-network leaves out; None for a whole model."""
    parts = [f"{len(facts.kept)} of {facts.blocks} decoder blocks are left"] if facts.cut_blocks else []
    if facts.narrower:
        parts.append(
            f"{count(facts.narrower)} of {count(len(facts.layers))} layers are narrower than in the whole model"
        )
    return f"It is a sub-network: {', and '.join(parts)}." if parts else None


def draft_sentence(facts: ModelFacts) -> str | None:
    """What a draft is for; None for any other model."""
    return (
        "It is a draft for speculative decoding: it says tokens ahead for the larger model of the same super-network "
        "that it was exported with, and is not meant to answer alone."
        if facts.draft
        else None
    )


def adapters_sentence(facts: ModelFacts) -> str | None:
    """Which adapters lie un-merged beside or in the graph; None if all was merged."""
    beside = sum(layer.beside is not None for layer in facts.layers)
    parts = [f"{count(beside)} layers have an un-merged low-rank branch in the graph"] if beside else []
    parts += [f"{file} holds branches for {count(layers)} layers" for file, layers in facts.adapters.items()]
    return f"{'; '.join(parts)}." if parts else None


def run_name(run: Run) -> str:
    """What a run of the comparison of logits is called."""
    return _RUNS.get(run.label, run.label.replace("_", " "))


def drift_words(kl: float) -> str:
    """How far a distribution of next tokens is from the reference's, by its mean KL divergence in nats."""
    if kl < 1e-6:
        return "no difference beyond rounding"
    if kl < 1e-3:
        return "hardly any drift"
    return "small drift" if kl < 1e-2 else "clear drift" if kl < 1e-1 else "another model"
