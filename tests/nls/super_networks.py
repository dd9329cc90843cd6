"""Super-networks of several architectures for the tests, and the same models cut by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sparseport.checkpoints.elastic import Selection
from sparseport.nls.elastic import elastic_layers
from sparseport.nls.load import load_for_training
from sparseport.recipe import FinetuneRecipe

LAYERS = 4
_COMMON = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}
# Names of (query, key, value, output), (rows of the MLP), its last layer, and the adapters.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "config": lambda: transformers.LlamaConfig(
            **_COMMON, **_SPECIAL, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
            attention_bias=True, tie_word_embeddings=False,
        ),
        "target": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "elastic": ["q_proj", "v_proj"],
        "width": ["gate_proj", "up_proj"],
        "taker": "mlp.down_proj",
        "mlp": ["mlp.gate_proj", "mlp.up_proj"],
        "output": "self_attn.o_proj",
        "path": "model.layers",
    },
    "opt": {
        "config": lambda: transformers.OPTConfig(
            **_COMMON, **{**_SPECIAL, "bos_token_id": 0}, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64,
        ),
        "target": ["q_proj", "v_proj", "fc1"],
        "elastic": ["q_proj", "v_proj"],
        "width": ["fc1"],
        "taker": "fc2",
        "mlp": ["fc1"],
        "output": "self_attn.out_proj",
        "path": "model.decoder.layers",
    },
    "gpt_neox": {
        "config": lambda: transformers.GPTNeoXConfig(
            **_COMMON, **_SPECIAL, intermediate_size=128, num_attention_heads=4, tie_word_embeddings=False,
        ),
        "target": ["query_key_value", "dense_h_to_4h"],
        "elastic": ["query_key_value"],
        "width": ["dense_h_to_4h"],
        "taker": "mlp.dense_4h_to_h",
        "mlp": ["mlp.dense_h_to_4h"],
        "output": "attention.dense",
        "path": "gpt_neox.layers",
    },
}  # fmt: skip


def folder_of(kind: str, out: Path) -> Path:
    """A random model of an architecture with four decoder layers, as a folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]["config"]())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(start + 0.15 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def recipe_of(kind: str, **changes: object) -> FinetuneRecipe:
    """LoNAS with every elastic dimension that the architecture has."""
    facts = KINDS[kind]
    fields = {
        "method": "lonas",
        "target_modules": facts["target"],
        "elastic_modules": facts["elastic"],
        "search_space": [8, 6, 4],
        "alpha": 16,
        "widths": [1.0, 0.75, 0.5],
        "width_modules": facts["width"],
        "heads": [] if kind == "gpt_neox" else [2, 1] if kind == "llama" else [4, 3, 1],
        "elastic_blocks": [0, 2],
        **changes,
    }
    return FinetuneRecipe.model_validate(fields)


def super_network(base: Path, recipe: FinetuneRecipe) -> Any:
    """A super-network whose adapters do something, ready to evaluate."""
    model = load_for_training(base, recipe).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for _, layer in elastic_layers(model):
            layer.b.copy_(0.1 * torch.randn_like(layer.b))
    return model


def cut_by_hand(model: nn.Module, kind: str, selection: Selection) -> Any:
    """The sub-network as a smaller model of its own: adapters merged, weights sliced, blocks gone."""
    facts = KINDS[kind]
    small: Any = copy.deepcopy(model)
    path = facts["path"]
    layers = small.get_submodule(path)
    for number, layer in enumerate(layers):
        for name, part in list(layer.named_modules()):
            if hasattr(part, "active_rows"):
                _replace(layer, name, _plain(part, selection.ranks.get(f"{path}.{number}.{name}")))
        for name in facts["mlp"]:
            if (width := selection.widths.get(f"{path}.{number}.{name}")) is not None:
                _slice(layer, name, width, None)
                _slice(layer, facts["taker"], None, width)
        if (heads := selection.heads.get(f"{path}.{number}.self_attn")) is not None:
            shared = 2 if kind == "llama" else 1
            _slice(layer, "self_attn.q_proj", heads * shared * 16, None)
            _slice(layer, "self_attn.k_proj", heads * 16, None)
            _slice(layer, "self_attn.v_proj", heads * 16, None)
            _slice(layer, facts["output"], None, heads * shared * 16)
            if kind == "opt":
                layer.self_attn.num_heads = heads
    kept = [layer for number, layer in enumerate(layers) if f"{path}.{number}" not in selection.removed]
    for number, layer in enumerate(kept):
        for part in layer.modules():
            if "layer_idx" in vars(part):
                part.layer_idx = number
    parent, _, last = path.rpartition(".")
    setattr(small.get_submodule(parent), last, nn.ModuleList(kept))
    small.config.num_hidden_layers = len(kept)
    return small


def _plain(part: Any, rank: int | None) -> nn.Linear:
    """The layer with the leading ranks of its adapter, if it has one, in its weight."""
    linear = nn.Linear(part.shape[1], part.shape[0])
    with torch.no_grad():
        base = part.base if hasattr(part, "base") else part
        linear.weight.copy_(base.weight)
        linear.bias.copy_(torch.zeros(part.shape[0]) if base.bias is None else base.bias)
        if hasattr(part, "base"):
            linear.weight += part.scaling * part.b[:, :rank] @ part.a[:rank]
    return linear


def _slice(layer: nn.Module, name: str, rows: int | None, columns: int | None) -> None:
    old = layer.get_submodule(name)
    linear = nn.Linear(columns or old.in_features, rows or old.out_features)
    with torch.no_grad():
        linear.weight.copy_(old.weight[:rows, :columns])
        linear.bias.copy_(torch.zeros(linear.out_features) if old.bias is None else old.bias[:rows])
    _replace(layer, name, linear)


def _replace(layer: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, part)
