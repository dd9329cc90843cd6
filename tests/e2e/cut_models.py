"""Small models that sub-networks are cut out of, and the same sub-networks as masks on the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseport.checkpoints.elastic import ElasticGroup, save_search_space

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama with biases": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, tied": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "layer_types": LAYER_TYPES},
    ),
}
MLP = ("gate_proj", "up_proj")


def make_model(folder: Path, config: str, kind: str, extra: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**COMMON, **extra))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    middle = 0.0 if "emma" in config or name.endswith("bias") else 1.0
                    parameter.copy_(middle + 0.1 * torch.randn_like(parameter))
    model.half().save_pretrained(folder)
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def space(folder: Path, sizes: list[int], layers: int = 4) -> dict[str, Any]:
    """A space of widths, heads and blocks, and a list of sizes of it: fields of a recipe."""
    groups = []
    for number in range(layers):
        block = f"model.layers.{number}"
        groups.append(ElasticGroup(tuple(f"{block}.mlp.{leaf}" for leaf in MLP), (128, 96, 64), "width"))
        groups.append(ElasticGroup((f"{block}.self_attn",), (2, 1), "heads"))
        groups.append(ElasticGroup((block,), (1, 0), "block"))
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    return {"search_space": save_search_space(folder, groups), "sub_adapter": str(folder / "sizes.json")}


# Block 2 is left out; the others differ from each other.
MIXED = [96, 2, 1] + [64, 1, 1] + [128, 2, 0] + [128, 1, 1]


def mask(model: Any, sizes: list[int]) -> Any:
    """The whole model with activations set to zero where the sub-network has none: no weight is looked at."""
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    size = model.model.layers[0].self_attn.head_dim
    for number, layer in enumerate(model.model.layers):
        width, kept, there = sizes[3 * number : 3 * number + 3]

        def cut(module: Any, inputs: Any, columns: int) -> Any:
            masked = inputs[0].clone()
            masked[..., columns:] = 0
            return (masked, *inputs[1:])

        layer.mlp.down_proj.register_forward_pre_hook(lambda m, i, c=width: cut(m, i, c))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, i, c=kept * heads * size: cut(m, i, c))
        if not there:
            layer.forward = lambda hidden, *_, **__: hidden
    return model
