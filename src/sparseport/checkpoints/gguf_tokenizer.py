"""The tokenizer inside a GGUF file, rebuilt from its vocabulary.

transformers gives a byte-level BPE from a Llama-type GGUF the decoder of a SentencePiece model, and Gemma's BPE another
algorithm (Unigram), so it is not asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.checkpoints.gguf_byte_level import byte_level_backend
from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.checkpoints.gguf_sentencepiece import sentence_piece_backend
from sparseport.checkpoints.gguf_vocabulary import (
    BYTE_LEVEL,
    CONTROL,
    SENTENCE_PIECE,
    UNKNOWN,
    USER_DEFINED,
    WAY_OUT,
    GgufTokenizer,
)
from sparseport.errors import BadInput, Unsupported

# What a tokenizer is built from, and what it has no use for: the name of a split that only a byte-level BPE makes, and
# merges or scores that the other kind of tokenizer goes by.
_USED = (
    *("model", "pre", "tokens", "token_type", "merges", "add_space_prefix", "add_bos_token", "add_eos_token"),
    *("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id", "scores"),
)
# Normalisation before SentencePiece, which the models read here do not have.
_NORMALISING = ("precompiled_charsmap", "remove_extra_whitespaces")


def read_tokenizer(gguf_path: str | Path) -> GgufTokenizer:
    """Read the tokenizer's description from a GGUF file; no weight is read.

    Raises:
        BadInput: not a GGUF file, damaged, without a vocabulary, or with settings of the wrong type.
        Unsupported: neither a byte-level BPE nor a SentencePiece BPE, or with a setting that cannot be kept.
        EnvironmentProblem: the package `gguf` is not installed.
    """
    return tokenizer_of(GgufFile.open(gguf_path))


def tokenizer_of(file: GgufFile) -> GgufTokenizer:
    """The tokenizer's description from a header; raises what `read_tokenizer` raises.

    Where the file does not say whether a SentencePiece model puts BOS and a space before the text, it does: that is
    llama.cpp's default.
    """

    def text(key: str) -> str | None:
        return file.value(key, str, code="E_TOKENIZER")

    def number(key: str) -> int | None:
        return file.value(f"tokenizer.ggml.{key}_token_id", int, code="E_TOKENIZER")

    def flag(key: str, default: bool = False) -> bool:
        value = file.value(f"tokenizer.ggml.add_{key}", bool, code="E_TOKENIZER")
        return default if value is None else value

    model = text("tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCE_PIECE):
        raise Unsupported(
            "this kind of GGUF tokenizer is not carried",
            where=f"{file.path}, tokenizer.ggml.model",
            expected=f"{BYTE_LEVEL} (byte-level BPE) | {SENTENCE_PIECE} (SentencePiece BPE)",
            found=model,
            fix=WAY_OUT,
        )
    pieces = model == SENTENCE_PIECE
    prefix = flag("space_prefix", default=pieces)
    if prefix and not pieces:
        raise Unsupported(
            "a byte-level BPE with a space prefix is not carried",
            where=f"{file.path}, tokenizer.ggml.add_space_prefix",
            fix=WAY_OUT,
        )
    if pieces:
        _refuse_normalising(file)
    tokens = file.values("tokenizer.ggml.tokens", str, code="E_TOKENIZER")
    types = file.values("tokenizer.ggml.token_type", int, code="E_TOKENIZER")
    scores = file.values("tokenizer.ggml.scores", float, code="E_TOKENIZER") if pieces else None
    merges = None if pieces else file.values("tokenizer.ggml.merges", str, code="E_TOKENIZER")
    pre = None if pieces else text("tokenizer.ggml.pre")
    parts = {
        "tokens": tokens,
        "token_type": types,
        **({"scores": scores} if pieces else {"merges": merges, "pre": pre}),
    }
    if tokens is None or types is None or None in parts.values():
        raise BadInput(
            "the tokenizer in the file is incomplete",
            where=file.path,
            expected=", ".join(f"tokenizer.ggml.{key}" for key, value in parts.items() if value is None),
            found="nothing",
            code="E_TOKENIZER",
        )
    return GgufTokenizer(
        tokens=tokens,
        token_types=types,
        merges=merges or (),
        pre=pre or "",
        model=model,
        scores=scores or (),
        space_prefix=prefix,
        bos_id=number("bos"),
        eos_id=number("eos"),
        pad_id=number("padding"),
        unk_id=number("unknown"),
        add_bos=flag("bos_token", default=pieces),
        add_eos=flag("eos_token"),
        chat_template=text("tokenizer.chat_template"),
        max_length=file.value(f"{file.value('general.architecture', str)}.context_length", int),
    )


def _refuse_normalising(file: GgufFile) -> None:
    """Refuse a SentencePiece model that changes the text before it takes it apart."""
    for key in _NORMALISING:
        if file.fields.get(f"tokenizer.ggml.{key}"):
            raise Unsupported(
                "a SentencePiece model that normalises its text is not carried",
                where=f"{file.path}, tokenizer.ggml.{key}",
                fix=WAY_OUT,
            )


def settings_not_carried(file: GgufFile) -> list[str]:
    """Names of the tokenizer's and the sampler's settings that the converted folder does not have, in file order.

    They change no weight and no token of plain text: further end tokens, fill-in-the-middle tokens, named templates,
    default sampling.
    """
    used = {f"tokenizer.ggml.{key}" for key in _USED} | {"tokenizer.chat_template"}
    found = [key for key in file.fields if key.startswith(("tokenizer.", "general.sampling.")) and key not in used]
    return [key for key in found if file.fields[key] is not False]


def build_tokenizer(description: GgufTokenizer, *, where: str = "the GGUF tokenizer") -> Any:
    """Build the tokenizer that a GGUF file describes.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        Unsupported: the pre-tokenizer kind or a token type is unknown, or the order of joining pieces is not given.
        BadInput: vocabulary, merges or scores, and special ids contradict each other.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    make = sentence_piece_backend if description.model == SENTENCE_PIECE else byte_level_backend
    backend = make(description, where)
    tokens = description.tokens
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, description.token_types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    _add_template(backend, description)
    options: dict[str, Any] = {name: tokens[index] for name, index in description.special().items()}
    if description.max_length is not None:
        options["model_max_length"] = int(description.max_length)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=description.chat_template, **options
    )


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
