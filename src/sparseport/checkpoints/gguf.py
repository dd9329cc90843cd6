"""GGUF files in, Hugging Face folders out.

Weights are dequantised and renamed by transformers. The tokenizer is rebuilt here from the vocabulary and the merges
inside the file, because transformers gives a byte-level BPE from a Llama-type GGUF the decoder of a SentencePiece
model. File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, Unsupported

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# `tokenizer.ggml.pre` kinds with a known split: True where every digit is split off before the byte-level step.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False}
DTYPES = ("float16", "bfloat16", "float32")

# Written by the machine that saved the model, not facts about the model.
_LOCAL_KEYS = ("_name_or_path", "_model_name_or_path", "_commit_hash")


@dataclass(frozen=True)
class GgufTokenizer:
    """A byte-level BPE tokenizer as a GGUF file describes it.

    tokens            the vocabulary; the position is the id; bytes are spelled with GPT-2's printable characters
    token_types       one of NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED per token
    merges            "left right", best first
    pre               name of the pre-tokenizer, `tokenizer.ggml.pre`
    bos_id .. unk_id  ids of the named special tokens, None where the file names none
    add_bos, add_eos  whether encoding adds them around the text
    chat_template     Jinja source, kept as text and never run here
    max_length        context length of the model in tokens
    """

    tokens: Sequence[str]
    token_types: Sequence[int]
    merges: Sequence[str]
    pre: str
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    max_length: int | None = None


def convert_gguf(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "float16") -> Path:
    """Convert a GGUF file to a Hugging Face folder: safetensors, config, generation config and tokenizer.

    Quantised tensors are dequantised and rounded once to `dtype`. The folder appears by one rename, whole or not at
    all.

    Args:
        gguf_path: the `.gguf` file.
        out_dir: folder to make; it must not exist.
        dtype: "float16", "bfloat16" or "float32".

    Returns:
        The path of the new folder.

    Raises:
        BadInput: the file is damaged, or a weight does not fit into `dtype`.
        Unsupported: the architecture, the tokenizer kind or `dtype` is not carried.
        OutputExists: `out_dir` is there already.
        EnvironmentProblem: the package `gguf` is not installed.
    """
    source, out = Path(gguf_path), Path(out_dir)
    if dtype not in DTYPES:
        raise Unsupported("unknown dtype", expected=" | ".join(DTYPES), found=dtype)
    if os.path.lexists(out):
        raise OutputExists("the output folder exists", where=out, fix="choose another folder or remove this one")
    description = read_tokenizer(source)
    tokenizer = build_tokenizer(description, where=str(source))

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".sparseport-tmp-{out.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _save_model(source, staging, dtype, description)
        _save_tokenizer(tokenizer, staging)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors files come out readable by their owner only
        if os.path.lexists(out):
            raise OutputExists("the output folder appeared meanwhile", where=out, fix="choose another folder")
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def read_tokenizer(gguf_path: str | Path) -> GgufTokenizer:
    """Read the tokenizer's description from a GGUF file; no weight is read.

    Raises:
        BadInput: not a GGUF file, damaged, or without a vocabulary.
        Unsupported: not a byte-level BPE (`tokenizer.ggml.model` other than "gpt2").
        EnvironmentProblem: the package `gguf` is not installed.
    """
    path = Path(gguf_path)
    field = _fields(path)
    model = field.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise Unsupported(
            "this kind of GGUF tokenizer is not carried",
            where=f"{path}, tokenizer.ggml.model",
            expected="gpt2 (byte-level BPE)",
            found=model,
            fix="start from the model's Hugging Face folder instead",
        )
    if field.get("tokenizer.ggml.add_space_prefix", False):
        raise Unsupported(
            "a byte-level BPE with a space prefix is not carried",
            where=f"{path}, tokenizer.ggml.add_space_prefix",
            fix="start from the model's Hugging Face folder instead",
        )
    missing = [k for k in ("tokens", "token_type", "merges", "pre") if f"tokenizer.ggml.{k}" not in field]
    if missing:
        raise BadInput(
            "the tokenizer in the file is incomplete",
            where=path,
            expected=", ".join(f"tokenizer.ggml.{k}" for k in missing),
            found="nothing",
            code="E_TOKENIZER",
        )
    return GgufTokenizer(
        tokens=field["tokenizer.ggml.tokens"],
        token_types=field["tokenizer.ggml.token_type"],
        merges=field["tokenizer.ggml.merges"],
        pre=field["tokenizer.ggml.pre"],
        bos_id=field.get("tokenizer.ggml.bos_token_id"),
        eos_id=field.get("tokenizer.ggml.eos_token_id"),
        pad_id=field.get("tokenizer.ggml.padding_token_id"),
        unk_id=field.get("tokenizer.ggml.unknown_token_id"),
        add_bos=bool(field.get("tokenizer.ggml.add_bos_token", False)),
        add_eos=bool(field.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=field.get("tokenizer.chat_template"),
        max_length=field.get(f"{field.get('general.architecture')}.context_length"),
    )


def build_tokenizer(description: GgufTokenizer, *, where: str = "the GGUF tokenizer") -> Any:
    """Build the tokenizer that a GGUF file describes.

    Bytes that have no token of their own are dropped, as other readers of such files do.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        Unsupported: the pre-tokenizer kind or a token type is unknown.
        BadInput: the vocabulary, the merges and the special ids contradict each other.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _check(description, where)
    tokens = description.tokens
    merges = [tuple(merge.split(" ")) for merge in description.merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if SPLITS_DIGITS[description.pre]:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, description.token_types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    _add_template(backend, description)

    names = {"bos": description.bos_id, "eos": description.eos_id, "pad": description.pad_id, "unk": description.unk_id}
    special: dict[str, Any] = {f"{name}_token": tokens[index] for name, index in names.items() if index is not None}
    if description.max_length is not None:
        special["model_max_length"] = int(description.max_length)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=description.chat_template, **special
    )


def _check(description: GgufTokenizer, where: str) -> None:
    """Refuse a description that the `tokenizers` package would take wrongly or refuse without naming the reason."""
    if description.pre not in SPLITS_DIGITS:
        raise Unsupported(
            "unknown pre-tokenizer kind",
            where=f"{where}, tokenizer.ggml.pre",
            expected=", ".join(SPLITS_DIGITS),
            found=description.pre,
            fix="start from the model's Hugging Face folder instead",
        )

    def refuse(what: str, key: str, expected: object, found: object) -> BadInput:
        return BadInput(what, where=f"{where}, {key}", expected=expected, found=found, code="E_TOKENIZER")

    tokens = description.tokens
    if len(description.token_types) != len(tokens):
        raise refuse(
            "token types and tokens differ in number",
            "tokenizer.ggml.token_type",
            len(tokens),
            len(description.token_types),
        )
    known = set(tokens)
    if len(known) != len(tokens):
        raise refuse("a token occurs twice", "tokenizer.ggml.tokens", f"{len(tokens)} different tokens", len(known))
    kinds = set(description.token_types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}
    if kinds:
        raise Unsupported(
            "unknown token type", where=f"{where}, tokenizer.ggml.token_type", expected="1..5", found=sorted(kinds)
        )
    for index, merge in enumerate(description.merges):
        pair = merge.split(" ")
        if len(pair) != 2 or not {pair[0], pair[1], pair[0] + pair[1]} <= known:
            raise refuse(
                "a merge does not fit the vocabulary",
                f"tokenizer.ggml.merges[{index}]",
                "two tokens that join to a token",
                merge,
            )
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        index = getattr(description, name)
        if index is not None and not 0 <= index < len(tokens):
            raise refuse("a special token is outside the vocabulary", name, f"0..{len(tokens) - 1}", index)
    for flag, name in (("add_bos", "bos_id"), ("add_eos", "eos_id")):
        if getattr(description, flag) and getattr(description, name) is None:
            raise refuse(f"{flag} is set without a token to add", name, "an id", None)


def _add_template(backend: Any, description: GgufTokenizer) -> None:
    """Let encoding add BOS and EOS where the file asks for them."""
    from tokenizers import processors

    before = [description.bos_id] if description.add_bos else []
    after = [description.eos_id] if description.add_eos else []
    ids = [index for index in before + after if index is not None]
    if ids:
        named = [description.tokens[i] for i in ids]
        parts = named[: len(before)] + ["$A"] + named[len(before) :]
        backend.post_processor = processors.TemplateProcessing(
            single=parts,
            pair=[*parts, *(p.replace("$A", "$B") + ":1" for p in parts)],
            special_tokens=list(dict(zip(named, ids, strict=True)).items()),
        )


def describe_gguf(path: str | Path) -> tuple[dict[str, str], dict[str, int]]:
    """What a GGUF file says about itself, and how many tensors it holds of each type; no weight is read.

    Returns:
        facts (`architecture`, `name`, `layers`, ...) and type name (`Q4_K`) -> number of tensors, the most first.

    Raises:
        BadInput: not a GGUF file, or damaged.
        EnvironmentProblem: the package `gguf` is not installed.
    """
    fields, types = _header(Path(path))
    architecture = fields.get("general.architecture")
    wanted = {
        "architecture": "general.architecture",
        "name": "general.name",
        "layers": f"{architecture}.block_count",
        "hidden size": f"{architecture}.embedding_length",
        "tokenizer": "tokenizer.ggml.model",
    }
    facts = {label: str(fields[key]) for label, key in wanted.items() if key in fields}
    return facts, dict(Counter(types).most_common())


def _fields(path: Path) -> dict[str, Any]:
    """The key-value header of a GGUF file as plain Python values."""
    return _header(path)[0]


def _header(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The key-value header of a GGUF file as plain Python values, and the type of every tensor."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EnvironmentProblem("the package gguf is not installed", fix="pip install 'sparseport[train]'") from error
    if not path.is_file():
        raise BadInput("no such GGUF file", where=path, code="E_FILE")
    try:
        reader = GGUFReader(path)
        types = [tensor.tensor_type.name for tensor in reader.tensors]
        return {name: field.contents() for name, field in reader.fields.items()}, types
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise BadInput(
            "not a readable GGUF file",
            where=path,
            expected="GGUF version 2 or 3",
            found=error,
            fix="download the file again",
            code="E_GGUF",
        ) from error


def _save_model(source: Path, folder: Path, dtype: str, description: GgufTokenizer) -> None:
    """Write weights, config.json and generation_config.json."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    # The folder of the source may hold an adapter or a config of its own; transformers must see the one file only.
    with tempfile.TemporaryDirectory(prefix="sparseport-") as alone:
        (Path(alone) / "model.gguf").symlink_to(source.resolve())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file="model.gguf", dtype=getattr(torch, dtype), local_files_only=True
            )
        except (ValueError, NotImplementedError, KeyError) as error:
            raise Unsupported(
                "this GGUF model cannot be read by transformers",
                where=source,
                found=error,
                fix="start from the model's Hugging Face folder instead",
            ) from error
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(description.tokens):
        raise BadInput(
            "the vocabulary is larger than the embedding",
            where=source,
            expected=f"at most {rows} tokens",
            found=len(description.tokens),
            code="E_TOKENIZER",
        )
    for name, tensor in model.state_dict().items():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise BadInput(
                f"{bad} weights are not finite in {dtype}",
                where=f"{source}, {name}",
                expected="finite weights",
                fix="use dtype float32 or bfloat16",
                code="E_RANGE",
            )
    ids = {"bos_token_id": description.bos_id, "eos_token_id": description.eos_id, "pad_token_id": description.pad_id}
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder, safe_serialization=True)
    _clean_json(folder / "config.json", _LOCAL_KEYS, {})


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # The class name that transformers 4 and 5 and openvino_tokenizers all read as "take tokenizer.json as it is".
    _clean_json(
        folder / "tokenizer_config.json",
        ("is_local", "name_or_path", "local_files_only", *_LOCAL_KEYS),
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _clean_json(file: Path, drop: Sequence[str], update: dict[str, object]) -> None:
    values = {k: v for k, v in json.loads(file.read_text("utf-8")).items() if k not in drop}
    values.update(update)
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _convert(path: str, output: str, dtype: str) -> dict[str, str]:
    return {"folder": str(convert_gguf(path, output, dtype=dtype))}


if __name__ == "__main__":
    from sparseport.child import serve

    serve(_convert)
