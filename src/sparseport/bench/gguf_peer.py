"""A Llama checkpoint as a GGUF file of Q4_0, without a vocabulary: for measuring llama.cpp on the same weights.

Written with the gguf package. Names and settings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import Unsupported

F32 = npt.NDArray[np.float32]

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: str, output: str) -> dict[str, Any]:
    """Write the file: matrices Q4_0, embedding and head Q8_0, vectors F32.

    Raises:
        Unsupported: the model is no plain Llama.
    """
    import gguf

    with ModelFolder.open(Path(checkpoint)) as model:
        config = model.config
        heads, kv_heads = (int(config[key]) for key in ("num_attention_heads", "num_key_value_heads"))
        scaling = (config.get("rope_parameters") or {}).get("rope_type", "default")
        if config["model_type"] != "llama" or config.get("rope_scaling") or scaling != "default":
            raise Unsupported("the GGUF peer is written for plain Llama models", found=config["model_type"])
        writer = gguf.GGUFWriter(output, "llama")
        _settings(writer, config, heads, kv_heads)
        count = 0
        for name in model.names():
            if model.tied_head and name == "lm_head.weight":
                continue
            values = np.asarray(model.read(name), np.float32)
            own = gguf_name(name)
            if own.endswith(("attn_q.weight", "attn_k.weight")):
                values = interleaved(values, heads if own.endswith("attn_q.weight") else kv_heads)
            kinds = gguf.GGMLQuantizationType
            kind = kinds.F32 if values.ndim == 1 else kinds.Q8_0 if own in _TABLES else kinds.Q4_0
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(own, packed, raw_dtype=kind)
            count += 1
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    return {"tensors": count}


_TABLES = ("token_embd.weight", "output.weight")


def gguf_name(name: str) -> str:
    """What a tensor of a Llama checkpoint is called in GGUF.

    Raises:
        Unsupported: no Llama has such a tensor.
    """
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    _, _, rest = module.partition("model.layers.")
    number, _, inner = rest.partition(".")
    if inner not in _BLOCK or leaf != "weight":
        raise Unsupported("the GGUF peer is written for plain Llama models", where=name)
    return f"blk.{number}.{_BLOCK[inner]}.{leaf}"


def interleaved(values: F32, heads: int) -> F32:
    """Rows of q or k [heads * size, in] as llama.cpp rotates them: pairs side by side, not half a head apart."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _settings(writer: Any, config: dict[str, Any], heads: int, kv_heads: int) -> None:
    hidden = int(config["hidden_size"])
    size = int(config.get("head_dim") or hidden // heads)
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    writer.add_name("peer")
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_tokenizer_model("no_vocab")


if __name__ == "__main__":
    from sparseport.child import serve

    serve(write_gguf)
