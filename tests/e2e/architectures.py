"""Tiny random models of every architecture that docs/architectures.md speaks of, made by transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# 64 tokens of sliding window lie below the 112 that are compared. Twice the inner size is not the vocabulary's: the
# builder takes any linear layer with as many rows as tokens for the head.
COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The same under the names of GPT-2 and its kin.
GPT = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256} | {
    key: COMMON[key] for key in ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
}
# Four layers: enough for three to be traced and one to be stamped.
FOUR = {"num_hidden_layers": 4}
# Gemma multiplies its embedding by the square root of the hidden size: one that no short number is equal to.
ROOT = {"head_dim": 16, "hidden_size": 96}
GEMMA = {**ROOT, "query_pre_attn_scalar": 16, "sliding_window": 64}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    name     of its classes in transformers, without `Config` and `ForCausalLM`
    extra    settings beside COMMON's, or instead of them
    common   what the settings start from; names that a config class does not know would be kept, unused
    config   name of the config class where it is another one
    """

    name: str
    extra: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=lambda: COMMON)
    config: str | None = None


def _without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in COMMON.items() if key not in keys}


NO_GROUPS = _without("num_key_value_heads")
ARCHITECTURES: dict[str, Architecture] = {
    "arcee": Architecture("Arcee"),
    "bloom": Architecture("Bloom", {"n_layer": 2, "n_head": 4}, _without("num_hidden_layers", "num_attention_heads")),
    "cohere": Architecture("Cohere"),
    "cohere2, sliding window": Architecture("Cohere2", {"sliding_window": 64}),
    "ernie4_5": Architecture("Ernie4_5", {"head_dim": 16}),
    "exaone4, sliding window": Architecture("Exaone4", {"sliding_window": 64}),
    "falcon": Architecture("Falcon", {}, NO_GROUPS),
    "gemma": Architecture("Gemma", ROOT),
    "gemma2": Architecture("Gemma2", GEMMA),
    "gemma3_text": Architecture("Gemma3", GEMMA, config="Gemma3TextConfig"),
    "glm": Architecture("Glm", {"head_dim": 16}),
    "glm4": Architecture("Glm4", {"head_dim": 16}),
    "gpt2": Architecture("GPT2", {}, GPT),
    "gpt_bigcode": Architecture("GPTBigCode", {"n_inner": 128}, GPT),
    "gpt_neox": Architecture("GPTNeoX", {}, NO_GROUPS),
    "gptj": Architecture("GPTJ", {"rotary_dim": 8}, GPT),
    "granite": Architecture("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "hunyuan_v1_dense": Architecture("HunYuanDenseV1", {"head_dim": 16}),
    "llama": Architecture("Llama", {"tie_word_embeddings": True, **FOUR}),
    "llama, biases": Architecture("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": Architecture("Llama", {"rope_parameters": LLAMA_3}),
    "mamba": Architecture("Mamba", {"state_size": 8}),
    "mistral, sliding window": Architecture("Mistral", {"sliding_window": 64, **FOUR}),
    "mixtral": Architecture("Mixtral", EXPERTS),
    "mpt": Architecture("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, GPT),
    "nemotron": Architecture("Nemotron", {"num_attention_heads": 2}),
    "olmo": Architecture("Olmo"),
    "olmo2": Architecture("Olmo2"),
    "opt": Architecture("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}, NO_GROUPS),
    "persimmon": Architecture("Persimmon", {}, NO_GROUPS),
    "phi": Architecture("Phi", {"num_attention_heads": 2}, NO_GROUPS),
    "phi3": Architecture("Phi3", {"original_max_position_embeddings": 256}),
    "qwen2": Architecture("Qwen2", {"tie_word_embeddings": True, **FOUR}),
    "qwen3": Architecture("Qwen3", {"head_dim": 16, **FOUR}),
    "qwen3_moe": Architecture("Qwen3Moe", {"head_dim": 16, **EXPERTS}),
    "smollm3": Architecture("SmolLM3"),
    "stablelm": Architecture("StableLm"),
    "starcoder2": Architecture("Starcoder2"),
}


def make_model(name: str, folder: Path) -> Path:
    """Write the model of a name in float16."""
    return save_model(ARCHITECTURES[name], folder)


def save_model(architecture: Architecture, folder: Path) -> Path:
    """Write a random model in float16. Norms and biases that are all alike would hide one in another's place."""
    config = getattr(transformers, architecture.config or f"{architecture.name}Config")
    kinds = [f"{architecture.name}{ending}" for ending in ("ForCausalLM", "LMHeadModel")]
    kind = next(getattr(transformers, kind) for kind in kinds if hasattr(transformers, kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**{**architecture.common, **architecture.extra}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    middle = 0.0 if "Gemma" in architecture.name or name.endswith("bias") else 1.0
                    parameter.copy_(middle + 0.1 * torch.randn_like(parameter))
    model.half().save_pretrained(folder)
    return folder
