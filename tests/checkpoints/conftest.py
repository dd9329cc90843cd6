"""Small checkpoints, made on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.checkpoints.safetensors import spec_of, write_safetensors

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """config.json of a two-layer Llama with hidden size 64 and a tied head."""
    return dict(TINY)


@pytest.fixture
def tiny_tensors() -> dict[str, np.ndarray]:
    """The tensors of that model, float16, random but always the same."""
    random = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": random.normal(size=(32, 64)).astype(np.float16)}
    for layer in range(2):
        for module, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{module}.weight"] = random.normal(size=shape).astype(np.float16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(64, np.float16)
    tensors["model.norm.weight"] = np.ones(64, np.float16)
    return tensors


@pytest.fixture
def save_folder() -> Callable[..., Path]:
    """Write a model folder: save_folder(path, config, tensors)."""

    def save(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        write_safetensors(path / "model.safetensors", [spec_of(name, array) for name, array in tensors.items()])
        return path

    return save


@pytest.fixture
def raw_safetensors() -> Callable[..., bytes]:
    """Bytes of a safetensors file from a header (object or JSON bytes) and the data behind it."""

    def make(header: object, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    return make
