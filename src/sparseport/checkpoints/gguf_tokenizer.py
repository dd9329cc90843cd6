"""The tokenizer inside a GGUF file, rebuilt from its vocabulary and its merges.

transformers gives a byte-level BPE from a Llama-type GGUF the decoder of a SentencePiece model, so it is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.errors import BadInput, Unsupported

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# `tokenizer.ggml.pre` kinds with a known split: True where every digit is split off before the byte-level step.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False}

# What the tokenizer is built from, and what a byte-level BPE has no use for.
_USED = (
    *("model", "pre", "tokens", "token_type", "merges", "add_space_prefix", "add_bos_token", "add_eos_token"),
    *("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id", "scores"),
)


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


def read_tokenizer(gguf_path: str | Path) -> GgufTokenizer:
    """Read the tokenizer's description from a GGUF file; no weight is read.

    Raises:
        BadInput: not a GGUF file, damaged, without a vocabulary, or with settings of the wrong type.
        Unsupported: not a byte-level BPE (`tokenizer.ggml.model` other than "gpt2").
        EnvironmentProblem: the package `gguf` is not installed.
    """
    return tokenizer_of(GgufFile.open(gguf_path))


def tokenizer_of(file: GgufFile) -> GgufTokenizer:
    """The tokenizer's description from a header; raises what `read_tokenizer` raises."""

    def text(key: str) -> str | None:
        return file.value(key, str, code="E_TOKENIZER")

    def number(key: str) -> int | None:
        return file.value(f"tokenizer.ggml.{key}_token_id", int, code="E_TOKENIZER")

    def flag(key: str) -> bool:
        return file.value(f"tokenizer.ggml.add_{key}", bool, code="E_TOKENIZER") or False

    model = text("tokenizer.ggml.model")
    if model != "gpt2":
        raise Unsupported(
            "this kind of GGUF tokenizer is not carried",
            where=f"{file.path}, tokenizer.ggml.model",
            expected="gpt2 (byte-level BPE)",
            found=model,
            fix="start from the model's Hugging Face folder instead",
        )
    if flag("space_prefix"):
        raise Unsupported(
            "a byte-level BPE with a space prefix is not carried",
            where=f"{file.path}, tokenizer.ggml.add_space_prefix",
            fix="start from the model's Hugging Face folder instead",
        )
    tokens = file.values("tokenizer.ggml.tokens", str, code="E_TOKENIZER")
    types = file.values("tokenizer.ggml.token_type", int, code="E_TOKENIZER")
    merges = file.values("tokenizer.ggml.merges", str, code="E_TOKENIZER")
    pre = text("tokenizer.ggml.pre")
    if tokens is None or types is None or merges is None or pre is None:
        parts = {"tokens": tokens, "token_type": types, "merges": merges, "pre": pre}
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
        merges=merges,
        pre=pre,
        bos_id=number("bos"),
        eos_id=number("eos"),
        pad_id=number("padding"),
        unk_id=number("unknown"),
        add_bos=flag("bos_token"),
        add_eos=flag("eos_token"),
        chat_template=text("tokenizer.chat_template"),
        max_length=file.value(f"{file.value('general.architecture', str)}.context_length", int),
    )


def settings_not_carried(file: GgufFile) -> list[str]:
    """Names of the tokenizer's and the sampler's settings that the converted folder does not have, in file order.

    They change no weight and no token of plain text: further end tokens, fill-in-the-middle tokens, named templates,
    default sampling.
    """
    used = {f"tokenizer.ggml.{key}" for key in _USED} | {"tokenizer.chat_template"}
    return [key for key in file.fields if key.startswith(("tokenizer.", "general.sampling.")) and key not in used]


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
        index = getattr(description, name)
        if getattr(description, flag) and index is None:
            raise refuse(f"{flag} is set without a token to add", name, "an id", None)
        # The template that adds it has a syntax of its own: `$A` is the text, `:1` a segment.
        if getattr(description, flag) and (tokens[index].startswith("$") or ":" in tokens[index] or not tokens[index]):
            raise refuse("this token cannot be added around the text", name, "no $ or : in it", tokens[index])


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
