"""Which files make a tokenizer, texts to try it with, and what its ids may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.errors import BadInput

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)

ROUND_TRIP_SAMPLES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x):\n    return x ** 2  # 3.14159",
    "  two  spaces, tabs\tand newlines\n\n",
    "naïve café, 北京, ünïcödé, 😀🎉",
)


def load_tokenizer(source: Path, vocab_size: int | None = None) -> Any:
    """The Hugging Face tokenizer of a folder, padding on the left.

    Args:
        source: folder with the tokenizer's files.
        vocab_size: rows of the model's embedding; None takes it from the config.json in `source`.

    Raises:
        BadInput: there is no tokenizer in `source`, it cannot be loaded, or it gives ids that the model does not have.
    """
    from transformers import AutoTokenizer

    from sparseport.targets.empty_model import load_config

    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise BadInput(
            "the base model has no tokenizer",
            where=source.name,
            code="E_TOKENIZER",
            fix="put the tokenizer's files beside the model, or give --no-tokenizer",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.padding_side = "left"
        tokenizer.truncation_side = "left"
    except Exception as error:
        raise BadInput(
            "the tokenizer cannot be loaded",
            where=source.name,
            found=f"{type(error).__name__}: {error}",
            code="E_TOKENIZER",
            fix="mend the tokenizer, or give --no-tokenizer",
        ) from error
    if vocab_size is None:
        vocab_size = load_config(source / "config.json").get_text_config().vocab_size
    check_ids(tokenizer.get_vocab(), vocab_size, source.name)
    return tokenizer


def check_ids(vocabulary: dict[str, int], vocab_size: int, where: str) -> None:
    """Refuse a tokenizer with ids beyond the embedding: the model would fail, or read past it, at the first such token.

    Args:
        vocabulary: token -> id, added tokens included. It may have fewer ids than the embedding has rows.
        vocab_size: rows of the model's embedding.
        where: the tokenizer's folder, for the message.

    Raises:
        BadInput: the largest id is `vocab_size` or more.
    """
    if not vocabulary:
        raise BadInput("the tokenizer has no tokens", where=where, code="E_TOKENIZER")
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        beyond = sum(index >= vocab_size for index in vocabulary.values())
        raise BadInput(
            f"the tokenizer gives ids that the model does not have ({beyond} tokens)",
            where=where,
            expected=f"ids below {vocab_size}, the vocab_size of config.json",
            found=f"{token!r} with id {largest}",
            code="E_TOKENIZER",
            fix="use the tokenizer that the model was trained with, remove the added tokens, or give --no-tokenizer",
        )
