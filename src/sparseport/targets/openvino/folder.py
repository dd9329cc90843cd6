"""The files around the IR that make a folder load in Optimum and OpenVINO GenAI: configs and tokenizer files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.paths import bare_file
from sparseport.targets.openvino.tokenizer import TOKENIZER_FILES

# Keys of config.json that describe how the source was stored, or that could make a loader run code.
_DROPPED = ("quantization_config", "auto_map", "_name_or_path", "_attn_implementation_internal")


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write `config.json` without the keys that describe the source's storage: the folder is no GPTQ checkpoint."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED and not key.startswith("_")}
    _write_json(kept, folder / "config.json")


def write_generation_config(base: Path, config: dict[str, Any], folder: Path) -> None:
    """Copy `generation_config.json`, or make one from the token ids in config.json.

    OpenVINO GenAI stops at the ids that this file names; without it generation would never end.
    """
    if (base / "generation_config.json").exists():
        data = read_json(bare_file(base, "generation_config.json", "generation config"), what="generation_config.json")
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        data = {key: config[key] for key in keys if config.get(key) is not None}
    _write_json(
        {key: value for key, value in data.items() if not key.startswith("_")}, folder / "generation_config.json"
    )


def copy_tokenizer_files(base: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's own files; returns their names."""
    copied = []
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(bare_file(base, name, "tokenizer file"), folder / name)
            copied.append(name)
    return copied


def write_openvino_config(folder: Path, dtype: str) -> None:
    """Write `openvino_config.json`, which Optimum reads: weights are in place, nothing is to be quantised on load."""
    _write_json(
        {"dtype": dtype, "input_info": None, "quantization_config": None, "save_onnx_model": False},
        folder / "openvino_config.json",
    )


def _write_json(data: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
