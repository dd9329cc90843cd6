"""SentencePiece models inside GGUF files: the same pieces as SentencePiece's own rule gives, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_files import SAMPLES, ids, pieces, settings_of, spelled, write_gguf
from sparseport.checkpoints.gguf import GgufTokenizer, build_tokenizer, check_gguf, read_tokenizer
from sparseport.checkpoints.gguf_sentencepiece import merges_of
from sparseport.errors import BadInput, Unsupported

pytest.importorskip("transformers")


def by_the_rule(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, naively: join the neighbours with the highest score, the leftmost of equals, and again.

    scores  piece -> score, for pieces that text is divided into; characters without one become bytes
    """
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joined = [a + b for a, b in pairwise(parts)]
        found = [(-scores[piece], at) for at, piece in enumerate(joined) if piece in scores]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        name for part in parts for name in ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


def normal_scores(description: GgufTokenizer) -> dict[str, float]:
    every = zip(description.tokens, description.scores, description.token_types, strict=True)
    return {token: score for token, score, kind in every if kind == 1}


@pytest.mark.parametrize("text", [*SAMPLES, "the other then, in rings", "\u2581the", " a", "a ", "12 12\t12"])
@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_are_those_of_the_rule(text: str, prefix: bool) -> None:
    plain = [token for token, kind in zip(pieces().tokens, pieces().token_types, strict=True) if kind != 4]
    # Without tokens of a user, which are taken out of the text first.
    only = pieces(
        tokens=plain,
        token_types=[kind for kind in pieces().token_types if kind != 4],
        scores=[score for score, kind in zip(pieces().scores, pieces().token_types, strict=True) if kind != 4],
        space_prefix=prefix,
    )
    tokenizer = build_tokenizer(only)
    expected = by_the_rule(f" {text}" if prefix and text else text, normal_scores(only))
    assert spelled(tokenizer, text) == ["<s>", *expected]
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == text.replace("\u2581", " ")


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[float]]:
    """Pieces over three letters and a space, and a score for each, all different."""
    letters = ["\u2581", "a", "b", "c"]
    longer = draw(st.lists(st.text("\u2581abc", min_size=2, max_size=5), unique=True, max_size=20))
    order = draw(st.permutations(range(len(letters) + len(longer))))
    return [*letters, *longer], [-float(rank) for rank in order]


@given(vocabularies(), st.text("abc d", max_size=12))
def test_any_vocabulary_divides_text_as_the_rule_does(vocabulary: tuple[list[str], list[float]], text: str) -> None:
    """The order of the list that `tokenizers` goes by is SentencePiece's, whatever the scores are."""
    names, scores = vocabulary
    tokenizer = build_tokenizer(with_normal(names, scores))
    assert spelled(tokenizer, text) == ["<s>", *by_the_rule(text, dict(zip(names, scores, strict=True)))]


def with_normal(names: Sequence[str], scores: Sequence[float]) -> GgufTokenizer:
    """A SentencePiece model with the given pieces, the bytes and the named tokens."""
    named = [*pieces().tokens[:5], *[f"<0x{value:02X}>" for value in range(256)]]
    return pieces(
        tokens=[*named, *names],
        token_types=[3, 3, 3, 2, 3, *[6] * 256, *[1] * len(names)],
        scores=[*[0.0] * len(named), *scores],
    )


def test_merges_are_those_of_transformers_converter() -> None:
    from transformers.convert_slow_tokenizer import generate_merges

    description = pieces()
    scores = normal_scores(description)
    vocabulary = {token: index for index, token in enumerate(description.tokens) if token in scores}
    theirs = generate_merges(vocabulary, scores)
    assert merges_of(description, "here") == [tuple(pair) for pair in theirs] and len(theirs) > 10


def test_tokens_of_a_user_are_taken_out_of_the_text_first() -> None:
    tokenizer = build_tokenizer(pieces())
    assert spelled(tokenizer, "a  the\n\n\n<b>")[1:] == ["a", "  ", "t", "he", "\n\n", "\n", "<b>"]
    assert spelled(tokenizer, "    ")[1:] == ["   ", "\u2581"]
    assert tokenizer.decode(ids(tokenizer, "a  the\n\n\n<b>"), skip_special_tokens=True) == "a  the\n\n\n<b>"


def test_special_tokens_and_bytes() -> None:
    tokenizer = build_tokenizer(pieces())
    assert spelled(tokenizer, "<turn>the") == ["<s>", "<turn>", "t", "he"]
    assert spelled(tokenizer, "\u00f1") == ["<s>", "<0xC3>", "<0xB1>"]
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")] == [2, 1, 0, 3]
    assert tokenizer.decode([2, 4, *ids(tokenizer, "the \u00f1")], skip_special_tokens=True) == "the \u00f1"
    assert build_tokenizer(pieces(add_bos=False))("the")["input_ids"] == ids(tokenizer, "the")[1:]


def test_the_prefix_is_put_after_special_tokens_too() -> None:
    """As llama.cpp and Hugging Face's normaliser do."""
    tokenizer = build_tokenizer(pieces(space_prefix=True))
    assert spelled(tokenizer, "the<turn>the") == ["<s>", "\u2581the", "<turn>", "\u2581the"]


def test_what_the_file_leaves_out_has_llama_cpp_s_default(tmp_path) -> None:
    left_out = ("add_bos_token", "add_space_prefix", "add_eos_token", "pre")
    write_gguf(tmp_path / "tiny.gguf", kind="gemma3", settings={f"tokenizer.ggml.{key}": None for key in left_out})
    found = read_tokenizer(tmp_path / "tiny.gguf")
    assert (found.add_bos, found.space_prefix, found.add_eos) == (True, True, False)
    write_gguf(tmp_path / "whole.gguf", kind="gemma3")
    found = read_tokenizer(tmp_path / "whole.gguf")
    assert found == replace(pieces(), tokens=found.tokens, token_types=found.token_types, scores=found.scores)
    assert (list(found.tokens), list(found.scores)) == (list(pieces().tokens), list(pieces().scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "scores and tokens differ in number"),
        ({"scores": [float("nan")] * len(pieces().tokens)}, "a score is no number"),
        ({"unk_id": None}, "no token for what is unknown"),
        ({"token_types": [1 if kind == 6 else kind for kind in pieces().token_types]}, "single bytes.*0 pieces, not"),
        ({"tokens": [token.replace("<0x41>", "<0x041>") for token in pieces().tokens]}, "single bytes.*not <0x41>"),
        ({"bos_id": None}, "add_bos is set"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(changes, message) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        build_tokenizer(pieces(**changes), where="model.gguf")
    assert caught.value.code == "E_TOKENIZER" and "model.gguf" in str(caught.value)


def test_scores_that_give_no_order_are_refused() -> None:
    scores = [0.0] * len(pieces().tokens)
    with pytest.raises(Unsupported, match=r"in which order.*13 pieces with 0\.0"):
        build_tokenizer(pieces(scores=scores))


def test_an_unused_piece_that_can_be_joined_is_refused() -> None:
    types = [5 if token == "ing" else kind for token, kind in zip(pieces().tokens, pieces().token_types, strict=True)]
    with pytest.raises(Unsupported, match=r"marked as unused.*'ing'"):
        build_tokenizer(pieces(token_types=types))


@pytest.mark.parametrize(
    ("key", "value"), [("precompiled_charsmap", [1, 2]), ("remove_extra_whitespaces", True), ("model", "t5")]
)
def test_other_sentencepiece_models_are_refused(tmp_path, key, value) -> None:
    write_gguf(tmp_path / "tiny.gguf", kind="gemma3", settings={f"tokenizer.ggml.{key}": value})
    with pytest.raises(Unsupported, match=rf"not carried.*{key}"):
        check_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("key", ["tokens", "token_type", "scores"])
def test_an_incomplete_model_is_refused(tmp_path, key) -> None:
    assert f"tokenizer.ggml.{key}" in settings_of("gemma3")
    write_gguf(tmp_path / "short.gguf", kind="gemma3", settings={f"tokenizer.ggml.{key}": None})
    with pytest.raises(BadInput, match=rf"incomplete.*tokenizer\.ggml\.{key}"):
        read_tokenizer(tmp_path / "short.gguf")
