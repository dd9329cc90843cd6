"""The tokenizer inside a GGUF file: rebuilt from its description, and what is refused."""

from __future__ import annotations

import pytest

from gguf_files import SAMPLES, description, ids, spelled
from sparseport.checkpoints.gguf import build_tokenizer
from sparseport.errors import BadInput, Unsupported

pytest.importorskip("transformers")


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "gpt2"])
def test_text_survives_the_round_trip(text, pre):
    tokenizer = build_tokenizer(description(pre=pre))
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_merges_apply_in_order_and_nothing_is_put_before_the_text():
    tokenizer = build_tokenizer(description())
    assert spelled(tokenizer, "the the") == ["t", "he", "Ġthe"]


def test_smollm_splits_digits_and_gpt2_does_not():
    assert spelled(build_tokenizer(description(pre="smollm")), "12") == ["1", "2"]
    assert spelled(build_tokenizer(description(pre="gpt-2")), "12") == ["12"]


def test_control_and_user_tokens_are_one_token_each_and_only_control_is_special():
    tokenizer = build_tokenizer(description())
    encoded = ids(tokenizer, "<|start|>a<tool><|end|>")
    assert tokenizer.convert_ids_to_tokens(encoded) == ["<|start|>", "a", "<tool>", "<|end|>"]
    assert encoded[0] == 1 and encoded[-1] == 2
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "a<tool>"


def test_named_tokens_template_and_length():
    tokenizer = build_tokenizer(description())
    named = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")]
    assert named == [1, 2, 2, 0]
    assert tokenizer.model_max_length == 64
    assert len(tokenizer) == len(description().tokens)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|start|>hi<|end|>"


def test_bos_and_eos_are_added_only_when_the_file_asks():
    tokenizer = build_tokenizer(description(add_bos=True, add_eos=True))
    assert spelled(tokenizer, "a") == ["<|start|>", "a", "<|end|>"]
    assert spelled(build_tokenizer(description(add_bos=True)), "a") == ["<|start|>", "a"]
    assert spelled(build_tokenizer(description()), "a") == ["a"]


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones():
    with pytest.raises(Unsupported, match="expected smollm, gpt-2, gpt2, found llama-bpe"):
        build_tokenizer(description(pre="llama-bpe"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": ["a"]}, r"merges\[0\].*found a"),
        ({"merges": ["t h"]}, r"merges\[0\].*found t h"),
        ({"merges": ["x y z"]}, r"merges\[0\]"),
        ({"eos_id": 5000}, "eos_id.*found 5000"),
        ({"token_types": [1]}, "differ in number"),
        ({"tokens": ["a", "a"], "token_types": [1, 1], "merges": []}, "occurs twice"),
        ({"add_bos": True, "bos_id": None}, "add_bos is set"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        build_tokenizer(description(**changes), where="model.gguf")


def test_an_unknown_token_type_is_refused():
    types = [9, *description().token_types[1:]]
    with pytest.raises(Unsupported, match=r"unknown token type.*\[9\]"):
        build_tokenizer(description(token_types=types))


@pytest.mark.parametrize("token", ["$A", "$x", "a:b", ""])
def test_a_token_that_the_template_would_not_take_literally_is_refused(token):
    tokens = ["<|none|>", token, *description().tokens[2:]]
    assert build_tokenizer(description(tokens=tokens)).bos_token == token
    with pytest.raises(BadInput, match="cannot be added around the text"):
        build_tokenizer(description(tokens=tokens, add_bos=True))
