"""The model's own files that every runtime's folder needs: configs and tokenizer files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.checkpoints.paths import bare_file
from sparseport.targets.tokenizer_files import TOKENIZER_FILES

# Keys of config.json that describe how the source was stored, or that could make a loader run code.
_DROPPED = ("quantization_config", "compression_config", "auto_map", "_name_or_path", "_attn_implementation_internal")

# Tokenizer files in which a library writes where it found things on the machine that saved them.
_WITH_PATHS = ("tokenizer_config.json", "special_tokens_map.json")
_PATH_KEYS = (
    "name_or_path",
    "_name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
)
# What transformers 5 calls a plain tokenizers-library tokenizer when it saves one, and what both versions load.
_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write `config.json` without the keys that describe the source's storage: the folder is no GPTQ checkpoint."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED and not key.startswith("_")}
    write_json_file(kept, folder / "config.json")


def write_generation_config(base: Path, config: dict[str, Any], folder: Path) -> None:
    """Copy `generation_config.json`, or make one from the token ids in config.json.

    OpenVINO GenAI stops at the ids that this file names; without it generation would never end.
    """
    if (base / "generation_config.json").exists():
        data = read_json(bare_file(base, "generation_config.json", "generation config"), what="generation_config.json")
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        data = {key: config[key] for key in keys if config.get(key) is not None}
    write_json_file(
        {key: value for key, value in data.items() if not key.startswith("_")}, folder / "generation_config.json"
    )


def copy_tokenizer_files(base: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's own files; returns their names.

    Paths of the machine that saved the tokenizer, and references to code (`auto_map`), are left out, and the class that
    only transformers 5 knows is given the name that version 4 knows as well; any other file is copied byte for byte.

    Raises:
        BadInput: a file is missing behind a link, leaves the folder, or is not valid JSON.
    """
    copied = []
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            source = bare_file(base, name, "tokenizer file")
            data = read_json(source, what=name) if name in _WITH_PATHS else None
            kept = _without_traces(data)
            if isinstance(kept, dict) and kept.get("tokenizer_class") == _NEW_CLASS:
                kept["tokenizer_class"] = _OLD_CLASS
            if kept == data:
                shutil.copyfile(source, folder / name)
            else:
                write_json(folder / name, kept)
            copied.append(name)
    return copied


def _without_traces(value: Any) -> Any:
    """JSON data without `auto_map`, and without the keys of `_PATH_KEYS` whose value is a path, at every depth."""
    if isinstance(value, list):
        return [_without_traces(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_traces(item)
        for key, item in value.items()
        if key != "auto_map" and not (key in _PATH_KEYS and _is_path(key, item))
    }


def _is_path(key: str, value: object) -> bool:
    """Whether a text leads through folders; `owner/name` is a model's name on a hub where a name is allowed."""
    if not isinstance(value, str) or (key.endswith("name_or_path") and _HUB_NAME.fullmatch(value)):
        return False
    return any(separator in value for separator in "/\\") or value.startswith("~") or value[1:2] == ":"


def write_json_file(data: dict[str, Any], path: Path) -> None:
    """Write indented JSON with sorted keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
