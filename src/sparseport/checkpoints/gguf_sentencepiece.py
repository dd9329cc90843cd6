"""A SentencePiece BPE model from the vocabulary and the scores of a GGUF file (`tokenizer.ggml.model` is "llama").

SentencePiece joins the neighbours that make the piece with the highest score, the leftmost of equals, until no two make
a piece; characters without a piece become bytes (Kudo and Richardson, arXiv 1808.06226; src/bpe_model.cc of
github.com/google/sentencepiece). The `tokenizers` package joins pairs in the order of a list. So every way to divide a
piece into two pieces goes into that list, in the order of the scores.
"""

from __future__ import annotations

import math
from typing import Any

from sparseport.checkpoints.gguf_vocabulary import (
    BYTE,
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

SPACE = "\u2581"
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def sentence_piece_backend(description: GgufTokenizer, where: str) -> Any:
    """The `tokenizers.Tokenizer` of a SentencePiece BPE model, without its special tokens.

    Raises:
        Unsupported: a token type is unknown, or the scores do not say in which order pieces are joined.
        BadInput: the vocabulary, the scores and the special ids contradict each other.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    check_vocabulary(description, {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}, where)
    if len(description.scores) != len(description.tokens):
        raise damaged(
            "scores and tokens differ in number",
            where,
            "tokenizer.ggml.scores",
            len(description.tokens),
            len(description.scores),
        )
    if not all(map(math.isfinite, description.scores)):
        raise damaged("a score is no number", where, "tokenizer.ggml.scores", "finite numbers", "NaN or Inf")
    _check_bytes(description, where)
    if description.unk_id is None:
        raise damaged("no token for what is unknown", where, "tokenizer.ggml.unknown_token_id", "an id", None)
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(description.tokens)},
            merges=merges_of(description, where),
            unk_token=description.tokens[description.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spelled = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if description.space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spelled])
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = spelled
    backend.decoder = decoders.Sequence(steps)
    return backend


def merges_of(description: GgufTokenizer, where: str) -> list[tuple[str, str]]:
    """Every division of a piece into two pieces, those of the piece with the highest score first.

    Pieces of the same score are joined by SentencePiece where they stand farthest to the left. That cannot be said in a
    list, but for runs of one character (Llama has spaces in pieces of up to 16) it is the same as to join those first
    whose left part is the longest.

    Raises:
        Unsupported: pieces that are no such runs have the same score, or one that can be joined is marked as unused:
            SentencePiece takes it apart again, which `tokenizers` cannot.
    """
    kinds = dict(zip(description.tokens, description.token_types, strict=True))
    parts = {token for token, kind in kinds.items() if kind in (NORMAL, UNUSED)}
    found: list[tuple[float, str, str]] = []
    joined: dict[float, list[str]] = {}
    for token, score in zip(description.tokens, description.scores, strict=True):
        if token not in parts:
            continue
        divisions = [
            (score, token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in parts and token[cut:] in parts
        ]
        if divisions and kinds[token] == UNUSED:
            raise Unsupported(
                "a piece that is marked as unused can be joined from others",
                where=f"{where}, tokenizer.ggml.token_type",
                found=repr(token)[:80],
                fix=WAY_OUT,
            )
        if divisions:
            joined.setdefault(score, []).append(token)
            found += divisions
    for score, pieces in joined.items():
        if len(pieces) > 1 and len(set("".join(pieces))) > 1:
            raise Unsupported(
                "the scores do not say in which order pieces are joined",
                where=f"{where}, tokenizer.ggml.scores",
                expected="another score for each piece",
                found=f"{len(pieces)} pieces with {score}",
                fix=WAY_OUT,
            )
    # The order in which Hugging Face's converter lists them.
    found.sort(key=lambda item: (-item[0], -len(item[1]), -len(item[2])))
    return [(left, right) for _, left, right in found]


def _check_bytes(description: GgufTokenizer, where: str) -> None:
    """Refuse a vocabulary that has not a piece for each byte.

    Raises:
        BadInput: names the first that is missing.
    """
    found = [token for token, kind in zip(description.tokens, description.token_types, strict=True) if kind == BYTE]
    if sorted(found) != sorted(_BYTES):
        missing = sorted(set(_BYTES) - set(found)) or sorted(set(found) - set(_BYTES))
        raise damaged(
            "the pieces for single bytes are not 256 of the usual names",
            where,
            "tokenizer.ggml.token_type",
            f"{_BYTES[0]} .. {_BYTES[-1]}",
            f"{len(found)} pieces, not {missing[0]}",
        )
