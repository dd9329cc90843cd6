"""A byte-level BPE from the vocabulary and the merges of a GGUF file (`tokenizer.ggml.model` is "gpt2")."""

from __future__ import annotations

from typing import Any

from sparseport.checkpoints.gguf_vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WAY_OUT,
    GgufTokenizer,
    check_vocabulary,
    damaged,
)
from sparseport.errors import Unsupported

# `tokenizer.ggml.pre` kinds with a known split: True where every digit is split off before the byte-level step.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False}


def byte_level_backend(description: GgufTokenizer, where: str) -> Any:
    """The `tokenizers.Tokenizer` of a byte-level BPE, without its special tokens.

    Bytes that have no token of their own are dropped, as other readers of such files do.

    Raises:
        Unsupported: the pre-tokenizer kind or a token type is unknown.
        BadInput: the vocabulary, the merges and the special ids contradict each other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if description.pre not in SPLITS_DIGITS:
        raise Unsupported(
            "unknown pre-tokenizer kind",
            where=f"{where}, tokenizer.ggml.pre",
            expected=", ".join(SPLITS_DIGITS),
            found=description.pre,
            fix=WAY_OUT,
        )
    check_vocabulary(description, {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}, where)
    known = set(description.tokens)
    for index, merge in enumerate(description.merges):
        pair = merge.split(" ")
        if len(pair) != 2 or not {pair[0], pair[1], pair[0] + pair[1]} <= known:
            raise damaged(
                "a merge does not fit the vocabulary",
                where,
                f"tokenizer.ggml.merges[{index}]",
                "two tokens that join to a token",
                merge,
            )
    vocabulary = {token: index for index, token in enumerate(description.tokens)}
    merges = [tuple(merge.split(" ")) for merge in description.merges]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if SPLITS_DIGITS[description.pre]:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    return backend
