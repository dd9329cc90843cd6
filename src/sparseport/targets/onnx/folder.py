"""The file that makes an ONNX folder load in onnxruntime-genai: `genai_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.errors import BadInput

NAME = "genai_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_genai_config(built: Path, folder: Path, *, shared_cache: bool = True) -> None:
    """Complete the builder's `genai_config.json` and write it beside the model.

    The builder guesses token ids from whatever tokenizer it finds. Generation has to stop where the model's own
    `generation_config.json` says, or else its config.json; a list of end tokens stays a list.

    Args:
        built: folder that the builder wrote its `genai_config.json` into.
        folder: folder of the model, with its config.json and `generation_config.json`.
        shared_cache: whether the graph can write the KV cache in place, as GroupQueryAttention does.

    Raises:
        BadInput: the model names no end token, so generation would never stop.
    """
    config: dict[str, Any] = read_json(built / NAME, what=NAME)
    generation = read_json(folder / "generation_config.json", what="generation_config.json")
    own = read_json(folder / "config.json", what="config.json")
    model = config["model"]
    for key in _IDS:
        model.pop(key, None)
        value = own.get(key) if generation.get(key) is None else generation[key]
        if value is not None:
            model[key] = value
    # The format wants one; a model without a begin token has no use for it.
    model.setdefault("bos_token_id", 1)
    if model.get("eos_token_id") is None:
        raise BadInput(
            "the model names no end token, and generation would never stop",
            where=folder / "generation_config.json",
            fix='add "eos_token_id" to generation_config.json',
            code="E_CONFIG",
        )
    if model.get("pad_token_id") is None:
        ends = model["eos_token_id"]
        model["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    # Greedy unless the application says otherwise: the same prompt gives the same answer everywhere.
    config["search"]["do_sample"] = False
    if not shared_cache:
        config["search"]["past_present_share_buffer"] = False
    write_json(folder / NAME, config)
