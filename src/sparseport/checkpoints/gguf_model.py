"""What a GGUF file must hold for a kind of decoder: its settings, and each tensor with its place in a Hugging Face
folder.

Nothing is left out: a setting or a tensor that is not known here is refused. Names: llama.cpp's list of standardised
tensor names, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.errors import BadInput, Unsupported

_WAY_OUT = "start from the model's Hugging Face folder instead"
_LARGEST = 2**31 - 1
# llama.cpp's value where the file has none.
_DEFAULT_THETA = 10000.0
# Gemma 3 (arXiv 2503.19786): every sixth block attends to the whole text, the others to a window.
_EVERY_NTH_GLOBAL = 6
# Blocks of the one size of Gemma 3 whose queries are scaled by hidden / heads and not by the size of a head.
_GEMMA_3_27B = 62


@dataclass(frozen=True)
class Architecture:
    """How a decoder differs from the common one (RMS norms, rotary positions, gated MLP).

    interleaved  query and key rows are stored with the two rotary halves of each head interleaved
    qkv_bias     query, key and value projections have a bias
    qk_norm      each head of query and key is normalised
    gemma        norms before and after attention and MLP, all stored plus 1, and windows in most blocks
    model_type   transformers' name for it, where it is another one
    settings     what it reads from the file beside what all read
    """

    interleaved: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    model_type: str | None = None
    settings: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture(interleaved=True),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm=True),
    "gemma3": Architecture(
        qk_norm=True,
        gemma=True,
        model_type="gemma3_text",
        settings=("attention.sliding_window", "rope.freq_base_swa"),
    ),
}

# Settings below `<architecture>.` that are read here, and others that say nothing at the value given.
_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
)
_NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0, "attention.causal": True}

# RMS norms of a block, and where Hugging Face has them.
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GgufModel:
    """The shape of a decoder, as the settings of a GGUF file give it.

    kind         key of ARCHITECTURES
    heads        query heads; kv_heads of key and value
    head_dim     columns of one head, all of them rotated
    vocab        rows of the embedding
    context      longest input in tokens
    eps          of the RMS norms
    theta        base of the rotary frequencies
    tied         the embedding is the output head too
    window       tokens that a block with a window attends to; None where no block has one
    local_theta  base of the rotary frequencies of such blocks
    """

    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    theta: float
    tied: bool
    window: int | None = None
    local_theta: float = _DEFAULT_THETA

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return ARCHITECTURES[self.kind].model_type or self.kind

    def config(self) -> dict[str, Any]:
        """The same as keys of a Hugging Face config."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        config = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
        }
        if self.window is None:
            return config
        local = {"rope_type": "default", "rope_theta": self.local_theta}
        blocks = range(1, self.layers + 1)
        return config | {
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "sliding_window": self.window,
            "layer_types": ["sliding_attention" if n % _EVERY_NTH_GLOBAL else "full_attention" for n in blocks],
            "query_pre_attn_scalar": self.hidden // self.heads if self.layers == _GEMMA_3_27B else self.head_dim,
        }


@dataclass(frozen=True)
class Place:
    """Where a GGUF tensor goes.

    name      tensor of the Hugging Face folder
    shape     rows first
    heads     heads whose rows are interleaved; 0 where the rows keep their order
    plus_one  the file has the values plus 1
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    plus_one: bool = False


def read_model(file: GgufFile) -> GgufModel:
    """The decoder that a header describes.

    Raises:
        BadInput: a setting is missing, of the wrong type, or impossible.
        Unsupported: another architecture, or a setting that would be lost.
    """
    kind = file.value("general.architecture", str)
    if kind not in ARCHITECTURES:
        raise Unsupported(
            "this GGUF architecture is not carried",
            where=f"{file.path}, general.architecture",
            expected=", ".join(ARCHITECTURES),
            found=kind,
            fix=_WAY_OUT,
        )
    _refuse_other_files(file)
    _refuse_unknown(file, kind)

    def natural(key: str, default: int | None = None) -> int:
        value = file.value(f"{kind}.{key}", int)
        value = default if value is None else value
        if value is None or not 1 <= value <= _LARGEST:
            raise _impossible(file, f"{kind}.{key}", f"1..{_LARGEST}", value)
        return value

    def positive(key: str, default: float | None = None) -> float:
        value = file.value(f"{kind}.{key}", float)
        value = default if value is None else value
        if value is None or not (math.isfinite(value) and value > 0):
            raise _impossible(file, f"{kind}.{key}", "a number above 0", value)
        return value

    hidden, heads = natural("embedding_length"), natural("attention.head_count")
    kv_heads = natural("attention.head_count_kv", heads)
    for key, whole, part in (("head_count", hidden, heads), ("head_count_kv", heads, kv_heads)):
        if whole % part:
            raise _impossible(file, f"{kind}.attention.{key}", f"a divisor of {whole}", part)
    head_dim = natural("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if natural(key, head_dim) != head_dim or head_dim % 2:
            raise Unsupported(
                "attention heads of this shape are not carried",
                where=f"{file.path}, {kind}.{key}",
                expected=f"{head_dim} like the keys, and even",
                found=natural(key, head_dim),
                fix=_WAY_OUT,
            )
    tokens = file.values("tokenizer.ggml.tokens", str, code="E_TOKENIZER") or []
    return GgufModel(
        kind=kind,
        layers=natural("block_count"),
        hidden=hidden,
        intermediate=natural("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=natural("vocab_size", len(tokens)),
        context=natural("context_length"),
        eps=positive("attention.layer_norm_rms_epsilon"),
        theta=positive("rope.freq_base", _DEFAULT_THETA),
        tied="output.weight" not in file.tensors,
        window=natural("attention.sliding_window") if ARCHITECTURES[kind].gemma else None,
        local_theta=positive("rope.freq_base_swa", _DEFAULT_THETA),
    )


def place_tensors(file: GgufFile, model: GgufModel) -> dict[str, Place]:
    """The place of every tensor of the file, in file order.

    Raises:
        BadInput: a tensor is missing, or has another shape than the settings say.
        Unsupported: a tensor that this architecture does not have.
    """
    # The settings can ask for any number of layers; the file has to name a tensor for each.
    if model.layers > len(file.tensors):
        raise _impossible(file, f"{model.kind}.block_count", f"at most {len(file.tensors)}", model.layers)
    places = _places(model)
    extra = [name for name in file.tensors if name not in places]
    if extra:
        raise Unsupported(
            f"the file holds tensors that a {model.kind} model does not have",
            where=file.path,
            found=f"{len(extra)}: {', '.join(extra[:3])}",
            fix=_WAY_OUT,
        )
    missing = [name for name in places if name not in file.tensors]
    if missing:
        raise BadInput(
            "tensors are missing",
            where=file.path,
            expected=f"{len(missing)} more: {', '.join(missing[:3])}",
            fix="download the file again",
            code="E_TENSOR",
        )
    for name, tensor in file.tensors.items():
        if tensor.shape != places[name].shape:
            raise BadInput(
                "a tensor has another shape than the settings say",
                where=f"{file.path}, tensor {name}",
                expected=places[name].shape,
                found=tensor.shape,
                code="E_TENSOR",
            )
    return {name: places[name] for name in file.tensors}


def _places(model: GgufModel) -> dict[str, Place]:
    """Every tensor that a file of this model holds."""
    form = ARCHITECTURES[model.kind]
    hidden, inner = model.hidden, model.intermediate
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    places = {
        "token_embd.weight": Place("model.embed_tokens.weight", (model.vocab, hidden)),
        "output_norm.weight": Place("model.norm.weight", (hidden,), plus_one=form.gemma),
    }
    if not model.tied:
        places["output.weight"] = Place("lm_head.weight", (model.vocab, hidden))
    for layer in range(model.layers):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        for short, long, rows, columns in (
            ("attn_q", "self_attn.q_proj", query, hidden),
            ("attn_k", "self_attn.k_proj", key, hidden),
            ("attn_v", "self_attn.v_proj", key, hidden),
            ("attn_output", "self_attn.o_proj", hidden, query),
            ("ffn_gate", "mlp.gate_proj", inner, hidden),
            ("ffn_up", "mlp.up_proj", inner, hidden),
            ("ffn_down", "mlp.down_proj", hidden, inner),
        ):
            heads = {"attn_q": model.heads, "attn_k": model.kv_heads}.get(short, 0) if form.interleaved else 0
            places[f"{ours}.{short}.weight"] = Place(f"{theirs}.{long}.weight", (rows, columns), heads)
            if form.qkv_bias and short in ("attn_q", "attn_k", "attn_v"):
                places[f"{ours}.{short}.bias"] = Place(f"{theirs}.{long}.bias", (rows,))
        names = _GEMMA_NORMS if form.gemma else _NORMS
        norms = {short: (long, hidden) for short, long in names.items()}
        if form.qk_norm:
            norms |= {f"attn_{x}_norm": (f"self_attn.{x}_norm", model.head_dim) for x in ("q", "k")}
        for short, (long, length) in norms.items():
            places[f"{ours}.{short}.weight"] = Place(f"{theirs}.{long}.weight", (length,), plus_one=form.gemma)
    return places


def _refuse_other_files(file: GgufFile) -> None:
    purpose = file.value("general.type", str)
    if purpose not in (None, "model"):
        raise Unsupported("this GGUF file is no model", where=f"{file.path}, general.type", found=purpose)
    parts = file.value("split.count", int)
    if parts is not None and parts > 1:
        raise Unsupported(
            "one part of a GGUF model that was split",
            where=f"{file.path}, split.count",
            found=parts,
            fix="join the parts with llama.cpp's `llama-gguf-split --merge`",
        )


def _refuse_unknown(file: GgufFile, kind: str) -> None:
    """Refuse a setting of the architecture that the config would not have; loaders read no other namespace."""
    for key, value in file.fields.items():
        if not key.startswith(f"{kind}."):
            continue
        short = key.removeprefix(f"{kind}.")
        read = short in _READ or short in ARCHITECTURES[kind].settings
        if not read and not (short in _NEUTRAL and value == _NEUTRAL[short]):
            raise Unsupported(
                "a setting of the GGUF model would be lost",
                where=f"{file.path}, {key}",
                found=repr(value)[:80],
                fix=_WAY_OUT,
            )


def _impossible(file: GgufFile, key: str, expected: str, found: object) -> BadInput:
    return BadInput(
        "a setting of the GGUF model is missing or impossible",
        where=f"{file.path}, {key}",
        expected=expected,
        found="nothing" if found is None else found,
        fix="download the file again",
        code="E_GGUF",
    )
