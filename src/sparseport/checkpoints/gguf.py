"""GGUF files in, Hugging Face folders out.

Weights are dequantised and renamed by transformers, and every value of the result is then compared with the file.
Settings and tokenizer are read here. File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.gguf_header import GgufFile, describe_gguf
from sparseport.checkpoints.gguf_model import GgufModel, Place, place_tensors, read_model
from sparseport.checkpoints.gguf_proof import Rounding, check_kinds, prove
from sparseport.checkpoints.gguf_tokenizer import (
    build_tokenizer,
    read_tokenizer,
    settings_not_carried,
    tokenizer_of,
)
from sparseport.checkpoints.gguf_vocabulary import GgufTokenizer
from sparseport.errors import BadInput, OutputExists, Unsupported

__all__ = [
    "Conversion",
    "GgufTokenizer",
    "build_tokenizer",
    "check_gguf",
    "convert_gguf",
    "convert_with_notes",
    "describe_gguf",
    "read_tokenizer",
]

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Conversion:
    """A converted file.

    folder    the Hugging Face folder
    rounding  what its dtype changed
    notes     what the user should know, one sentence each
    """

    folder: Path
    rounding: Rounding
    notes: tuple[str, ...]


def convert_gguf(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "float16") -> Path:
    """Convert a GGUF file to a Hugging Face folder; `convert_with_notes` without its notes."""
    return convert_with_notes(gguf_path, out_dir, dtype=dtype).folder


def convert_with_notes(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "float16") -> Conversion:
    """Convert a GGUF file to a Hugging Face folder: safetensors, config, generation config and tokenizer.

    Quantised tensors are dequantised and rounded once to `dtype`. Every tensor and every setting of the file is
    accounted for, and every weight compared. The folder appears by one rename, whole or not at all.

    Args:
        gguf_path: the `.gguf` file.
        out_dir: folder to make; it must not exist.
        dtype: "float16", "bfloat16" or "float32".

    Raises:
        BadInput: the file is damaged, or a weight overflows or becomes 0 in `dtype`.
        Unsupported: the architecture, a setting, a tensor, the tokenizer kind or `dtype` is not carried.
        FidelityError: the result is not what the file says.
        OutputExists: `out_dir` is there already.
        EnvironmentProblem: the package `gguf` is not installed.
    """
    source, out = Path(gguf_path), Path(out_dir)
    if dtype not in DTYPES:
        raise Unsupported("unknown dtype", expected=" | ".join(DTYPES), found=dtype)
    if os.path.lexists(out):
        raise OutputExists("the output folder exists", where=out, fix="choose another folder or remove this one")
    file, model, places, description = _read(source)
    tokenizer = build_tokenizer(description, where=str(source))

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".sparseport-tmp-{out.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _save_model(source, staging, dtype, model, description)
        rounding = prove(file, places, staging, dtype)
        _save_tokenizer(tokenizer, staging)
        for item in staging.iterdir():
            item.chmod(0o644)  # safetensors files come out readable by their owner only
        if os.path.lexists(out):
            raise OutputExists("the output folder appeared meanwhile", where=out, fix="choose another folder")
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Conversion(out, rounding, tuple(_notes(file, rounding, dtype)))


def check_gguf(gguf_path: str | Path) -> None:
    """Check everything about a GGUF file that a conversion checks before it reads the weights.

    Raises:
        BadInput, Unsupported, EnvironmentProblem: see `convert_with_notes`.
    """
    _, _, _, description = _read(Path(gguf_path))
    build_tokenizer(description, where=str(gguf_path))


def _read(source: Path) -> tuple[GgufFile, GgufModel, dict[str, Place], GgufTokenizer]:
    file = GgufFile.open(source)
    description = tokenizer_of(file)
    model = read_model(file)
    places = place_tensors(file, model)
    check_kinds(file)
    if model.vocab < len(description.tokens):
        raise BadInput(
            "the vocabulary is larger than the embedding",
            where=source,
            expected=f"at most {model.vocab} tokens",
            found=len(description.tokens),
            code="E_TOKENIZER",
        )
    return file, model, places, description


def _notes(file: GgufFile, rounding: Rounding, dtype: str) -> list[str]:
    notes = []
    if rounding.rounded:
        notes.append(
            f"{file.path.name}: {rounding.rounded:,} of {rounding.values:,} values are rounded by {dtype}, "
            "none becomes 0; --gguf-dtype float32 keeps every value"
        )
    lost = settings_not_carried(file)
    if lost:
        notes.append(f"{file.path.name}: settings for tokenizer and sampling are not carried: {', '.join(lost)}")
    return notes


def _save_model(source: Path, folder: Path, dtype: str, gguf_model: GgufModel, description: GgufTokenizer) -> None:
    """Write weights, config.json and generation_config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    ids = {"bos_token_id": description.bos_id, "eos_token_id": description.eos_id, "pad_token_id": description.pad_id}
    # transformers passes over settings that it does not know, so the config does not come from its own reading.
    config = AutoConfig.for_model(gguf_model.model_type, **gguf_model.config(), **ids)
    # The folder of the source may hold an adapter or a config of its own; transformers must see the one file only.
    with tempfile.TemporaryDirectory(prefix="sparseport-") as alone:
        (Path(alone) / "model.gguf").symlink_to(source.resolve())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file="model.gguf", config=config, dtype=getattr(torch, dtype), local_files_only=True
            )
        except (ValueError, NotImplementedError, KeyError) as error:
            raise Unsupported(
                "this GGUF model cannot be read by transformers",
                where=source,
                found=error,
                fix="start from the model's Hugging Face folder instead",
            ) from error
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder, safe_serialization=True)
    _clean_json(folder / "config.json", {})


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # The class name that transformers 4 and 5 and openvino_tokenizers all read as "take tokenizer.json as it is".
    _clean_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        drop=("is_local", "name_or_path", "local_files_only"),
        nulls=False,
    )


def _clean_json(file: Path, update: dict[str, object], *, drop: Sequence[str] = (), nulls: bool = True) -> None:
    """Leave out keys that say something about the machine that saved the model, and private ones.

    nulls  whether keys without a value stay: onnxruntime-genai wants text where a tokenizer names a template at all
    """
    values = {key: value for key, value in json.loads(file.read_text("utf-8")).items() if nulls or value is not None}
    kept = {key: value for key, value in values.items() if key not in drop and not key.startswith("_")}
    file.write_text(json.dumps(kept | update, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _convert(path: str, output: str, dtype: str) -> dict[str, Any]:
    """The step of the child process: where the folder is, what rounding changed, and the notes."""
    done = convert_with_notes(path, output, dtype=dtype)
    rounding = {"values": done.rounding.values, "rounded": done.rounding.rounded}
    return {"folder": str(done.folder), "notes": list(done.notes), **rounding}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(_convert)
