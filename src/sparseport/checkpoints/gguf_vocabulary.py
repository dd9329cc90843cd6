"""The tokenizer of a GGUF file as plain data, and what every kind of it has to keep to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparseport.errors import BadInput, Unsupported

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Values of `tokenizer.ggml.model`.
BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"

WAY_OUT = "start from the model's Hugging Face folder instead"


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as a GGUF file describes it.

    tokens            the vocabulary; the position is the id. A byte-level BPE spells bytes with GPT-2's printable
                      characters, SentencePiece spells a space as U+2581
    token_types       one of NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE per token
    merges            "left right", best first; empty for SentencePiece
    pre               name of the pre-tokenizer, `tokenizer.ggml.pre`; empty for SentencePiece
    model             BYTE_LEVEL or SENTENCE_PIECE
    scores            per token, the best piece has the highest; empty for a byte-level BPE
    space_prefix      whether a space is put before the text, and after each special token
    bos_id .. unk_id  ids of the named special tokens, None where the file names none
    add_bos, add_eos  whether encoding adds them around the text
    chat_template     Jinja source, kept as text and never run here
    max_length        context length of the model in tokens
    """

    tokens: Sequence[str]
    token_types: Sequence[int]
    merges: Sequence[str]
    pre: str
    model: str = BYTE_LEVEL
    scores: Sequence[float] = ()
    space_prefix: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    max_length: int | None = None

    def special(self) -> dict[str, int]:
        """Ids of the named special tokens that the file has, by the name that transformers gives them."""
        named = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        return {f"{name}_token": index for name, index in named.items() if index is not None}


def damaged(what: str, where: str, key: str, expected: object, found: object) -> BadInput:
    """The error for a vocabulary that contradicts itself."""
    return BadInput(what, where=f"{where}, {key}", expected=expected, found=found, code="E_TOKENIZER")


def check_vocabulary(description: GgufTokenizer, kinds: set[int], where: str) -> None:
    """Refuse a description that the `tokenizers` package would take wrongly or refuse without naming the reason.

    Args:
        description: what the file says.
        kinds: token types that this kind of tokenizer has.
        where: the file, for messages.

    Raises:
        Unsupported: another token type.
        BadInput: vocabulary, token types and special ids contradict each other.
    """
    tokens = description.tokens
    if len(description.token_types) != len(tokens):
        raise damaged(
            "token types and tokens differ in number",
            where,
            "tokenizer.ggml.token_type",
            len(tokens),
            len(description.token_types),
        )
    different = len(set(tokens))
    if different != len(tokens):
        raise damaged(
            "a token occurs twice", where, "tokenizer.ggml.tokens", f"{len(tokens)} different tokens", different
        )
    if unknown := set(description.token_types) - kinds:
        raise Unsupported(
            "unknown token type",
            where=f"{where}, tokenizer.ggml.token_type",
            expected=", ".join(map(str, sorted(kinds))),
            found=sorted(unknown),
            fix=WAY_OUT,
        )
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        index = getattr(description, name)
        if index is not None and not 0 <= index < len(tokens):
            raise damaged("a special token is outside the vocabulary", where, name, f"0..{len(tokens) - 1}", index)
    for flag, name in (("add_bos", "bos_id"), ("add_eos", "eos_id")):
        index = getattr(description, name)
        if getattr(description, flag) and index is None:
            raise damaged(f"{flag} is set without a token to add", where, name, "an id", None)
        # The template that adds it has a syntax of its own: `$A` is the text, `:1` a segment.
        if getattr(description, flag) and (tokens[index].startswith("$") or ":" in tokens[index] or not tokens[index]):
            raise damaged("this token cannot be added around the text", where, name, "no $ or : in it", tokens[index])
