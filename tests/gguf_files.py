"""Tiny random decoders as GGUF files, written with the format's own writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.checkpoints.gguf import GgufTokenizer
from sparseport.checkpoints.gguf_vocabulary import SENTENCE_PIECE

TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
SAMPLES = [
    "def f(x):\n\treturn x**2  # square\n\n",
    "12345 + 67,890.00 = 3.14e-5",
    "  two  spaces   three \n\n end ",
    "naïve 日本語 ñ é 🙂🚀👩‍👩‍👧",
    "don't we'll , . ! 's",
    "",
]
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 32, 64, 4, 2
# Gemma 3 has its first block without a window as the sixth.
LAYERS_OF = {"gemma3": 7}
HEAD_DIM = {"llama": 8, "qwen2": 8, "qwen3": 16, "gemma3": 16}
MODEL_TYPES = {"gemma3": "gemma3_text"}
WINDOW = 8
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}


def byte_alphabet() -> list[str]:
    """GPT-2's printable spelling of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(other))]


def description(**changes: Any) -> GgufTokenizer:
    merges = ["1 2", "Ġ t", "h e", "Ġt he", "r e"]
    tokens = ["<|none|>", "<|start|>", "<|end|>", "<tool>", *byte_alphabet(), *(m.replace(" ", "") for m in merges)]
    types = [3, 3, 3, 4] + [1] * (len(tokens) - 4)
    base = GgufTokenizer(
        tokens, types, merges, "smollm", bos_id=1, eos_id=2, pad_id=2, unk_id=0, chat_template=TEMPLATE, max_length=64
    )
    return replace(base, **changes)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def spelled(tokenizer: Any, text: str) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(ids(tokenizer, text))
    return found


def pieces(**changes: Any) -> GgufTokenizer:
    """A SentencePiece model as Gemma has it: no space prefix, and runs of spaces and of line ends as tokens of a user.

    Scores fall with the number of a piece, as SentencePiece's trainer writes them.
    """
    letters = "\u2581etaoinshrdlucmfwypvbgkjqxz0123456789.,!'"
    joined = ["\u2581t", "he", "\u2581the", "in", "er", "an", "re", "on", "\u2581a", "\u2581s", "or", "ing", "12"]
    named = ["<pad>", "</s>", "<s>", "<unk>", "<turn>", "\n", "\n\n", "  ", "   ", "<b>"]
    raw = [f"<0x{value:02X}>" for value in range(256)]
    tokens = [*named, *raw, *joined, *letters]
    types = [3, 3, 3, 2, 3, *[4] * 5, *[6] * 256, *[1] * (len(tokens) - 266)]
    scores = [*[-1000.0] * 10, *[0.0] * 256, *[float(-rank) for rank in range(len(tokens) - 266)]]
    base = GgufTokenizer(
        tokens,
        types,
        (),
        "",
        model=SENTENCE_PIECE,
        scores=scores,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        unk_id=3,
        add_bos=True,
        chat_template=TEMPLATE,
        max_length=64,
    )
    return replace(base, **changes)


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the query and key rows of a Llama with the two rotary halves interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def settings_of(kind: str) -> dict[str, Any]:
    """What llama.cpp's converter writes into the header."""
    tokens = tokenizer_of(kind)
    found = {
        "general.name": "a name that is not for the config",
        f"{kind}.block_count": LAYERS_OF.get(kind, LAYERS),
        f"{kind}.context_length": 64,
        f"{kind}.embedding_length": HIDDEN,
        f"{kind}.feed_forward_length": INNER,
        f"{kind}.attention.head_count": HEADS,
        f"{kind}.attention.head_count_kv": KV_HEADS,
        f"{kind}.attention.key_length": HEAD_DIM[kind],
        f"{kind}.attention.value_length": HEAD_DIM[kind],
        f"{kind}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{kind}.rope.freq_base": 50000.0,
        f"{kind}.rope.dimension_count": HEAD_DIM[kind],
        f"{kind}.vocab_size": len(tokens.tokens),
        "tokenizer.ggml.model": tokens.model,
        "tokenizer.ggml.tokens": list(tokens.tokens),
        "tokenizer.ggml.token_type": list(tokens.token_types),
        "tokenizer.ggml.bos_token_id": tokens.bos_id,
        "tokenizer.ggml.eos_token_id": tokens.eos_id,
        "tokenizer.ggml.padding_token_id": tokens.pad_id,
        "tokenizer.ggml.unknown_token_id": tokens.unk_id,
        "tokenizer.ggml.add_bos_token": tokens.add_bos,
        "tokenizer.chat_template": TEMPLATE,
    }
    if tokens.model == SENTENCE_PIECE:
        found |= {"tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": list(tokens.scores)}
        found |= {"tokenizer.ggml.add_space_prefix": tokens.space_prefix, f"{kind}.attention.sliding_window": WINDOW}
    else:
        found |= {"tokenizer.ggml.pre": tokens.pre, "tokenizer.ggml.merges": list(tokens.merges)}
    return found


def tokenizer_of(kind: str) -> GgufTokenizer:
    """The tokenizer that models of a kind have here."""
    return pieces() if kind == "gemma3" else description()


def model_of(kind: str, *, tied: bool = False) -> Any:
    """A random model whose every value float16 can hold; no tensor is like another."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 50000.0}
    gemma: dict[str, Any] = {}
    if kind == "gemma3":
        # Window, scale and the base of the rotary frequencies in windows are what Gemma 3 has without a word.
        gemma = {"sliding_window": WINDOW, "query_pre_attn_scalar": HEAD_DIM[kind]}
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config = transformers.AutoConfig.for_model(
        MODEL_TYPES.get(kind, kind),
        vocab_size=len(tokenizer_of(kind).tokens),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS_OF.get(kind, LAYERS),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM[kind],
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        **gemma,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1)).half())
    return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a model as llama.cpp's converter names, orders and shifts them, float32."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    gemma = model.config.model_type == "gemma3_text"
    places = {f"{short}.weight": f"{long}.weight" for short, long in OUTSIDE.items()}
    for layer in range(model.config.num_hidden_layers):
        for short, long in (GEMMA_NAMES if gemma else NAMES).items():
            for leaf in ("weight", "bias"):
                places[f"blk.{layer}.{short}.{leaf}"] = f"model.layers.{layer}.{long}.{leaf}"
    found = {ours: state.pop(theirs) for ours, theirs in places.items() if theirs in state}
    assert not state, "a tensor without a GGUF name"
    for name, values in found.items():
        if model.config.model_type == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            found[name] = rotary_order(values, HEADS if "attn_q" in name else KV_HEADS)
        if gemma and name.endswith("norm.weight"):
            found[name] = values + np.float32(1)
    return found


def write_gguf(
    path: Path,
    *,
    kind: str = "llama",
    tied: bool = False,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    stored: dict[str, str] | None = None,
    big_endian: bool = False,
) -> Any:
    """Write a random model and return it.

    settings  changed or added; None leaves one out
    tensors   the same for tensors
    stored    tensor -> block type; those of type uint8 are taken as blocks, others are quantised
    """
    gguf = pytest.importorskip("gguf")
    model = model_of(kind, tied=tied)
    endianess = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, kind, endianess=endianess)
    for key, value in {**settings_of(kind), **(settings or {})}.items():
        if key == "general.architecture":
            writer.kv_data[0].pop(key)
        if value is not None:
            writer.add_key_value(key, value, *_types(gguf, value))
    for name, values in {**tensors_of(model), **(tensors or {})}.items():
        block = gguf.GGMLQuantizationType[(stored or {}).get(name, "F32")]
        if values is None:
            continue
        if values.dtype == np.uint8 or block == gguf.GGMLQuantizationType.I8:
            writer.add_tensor(name, values, raw_dtype=block)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), block), raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _types(gguf: Any, value: Any) -> tuple[Any, Any]:
    kinds = gguf.GGUFValueType
    single = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if isinstance(value, list):
        return kinds.ARRAY, single[type(value[0])]
    return single[type(value)], None
