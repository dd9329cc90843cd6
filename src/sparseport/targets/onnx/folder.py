"""The file that makes an ONNX folder load in onnxruntime-genai: `genai_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.errors import BadInput

NAME = "genai_config.json"
DISABLE_QDQ = "session.disable_quant_qdq"
"""ONNX Runtime's session entry that lets it fold DequantizeLinear like any other operator on constants."""

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token_ids(folder: Path, base: str) -> dict[str, Any]:
    """Begin, end and padding tokens as `genai_config.json` wants them.

    The model's own `generation_config.json` says where generation has to stop, or else its config.json; a list of end
    tokens stays a list.

    Args:
        folder: folder of the model, with its config.json and `generation_config.json`.
        base: name of the folder that both came from, for the message.

    Raises:
        BadInput: the model names no end token, so generation would never stop, or an id that is none of its tokens.
    """
    generation = read_json(folder / "generation_config.json", what="generation_config.json")
    own = read_json(folder / "config.json", what="config.json")
    ids = {key: own.get(key) if generation.get(key) is None else generation[key] for key in _IDS}
    ends = ids["eos_token_id"]
    if ends is None or ends == []:
        raise BadInput(
            "the model names no end token, and generation would never stop",
            where=f"{base}, generation_config.json",
            fix='add "eos_token_id" to generation_config.json',
            code="E_CONFIG",
        )
    size = own.get("vocab_size")
    for key, value in ids.items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (type(token) is not int or token < 0 or (type(size) is int and token >= size)):
                raise BadInput(
                    f"{key} is no token of the model",
                    where=f"{base}, generation_config.json",
                    expected=f"whole numbers below {size}",
                    found=token,
                    fix="correct it there, or in config.json",
                    code="E_CONFIG",
                )
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    if ids["bos_token_id"] is None:
        ids["bos_token_id"] = 1  # the format wants one; a model without a begin token has no use for it
    return ids


def write_genai_config(
    built: Path, folder: Path, ids: Mapping[str, Any], *, shared_cache: bool = True, fold: bool = False
) -> None:
    """Complete the builder's `genai_config.json` and write it beside the model.

    Args:
        built: folder that the builder wrote its `genai_config.json` into, with token ids guessed from what it found.
        folder: folder of the model.
        ids: the model's own, see `token_ids`.
        shared_cache: whether the graph can write the KV cache in place, as GroupQueryAttention does.
        fold: whether ONNX Runtime is to dequantise weights once, when it loads; left alone it does so for every token.
    """
    config: dict[str, Any] = read_json(built / NAME, what=NAME)
    config["model"] |= ids
    generation = read_json(folder / "generation_config.json", what="generation_config.json")
    config["search"]["do_sample"] = False  # as transformers, unless the model says otherwise
    config["search"] |= {key: generation[key] for key in _SAMPLING if generation.get(key) is not None}
    if fold:
        config["model"]["decoder"]["session_options"][DISABLE_QDQ] = "1"
    if not shared_cache:
        config["search"]["past_present_share_buffer"] = False
    write_json(folder / NAME, config)
