"""Tokens of contexts, continuations and training items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sparseport.errors import BadInput  # noqa: E402
from sparseport.nls.encoding import encode_example, encode_pair, encode_prompt, prompt_ids, text_ids  # noqa: E402
from sparseport.nls.tasks import Example  # noqa: E402


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    return tokenizer


@pytest.fixture
def merging(tiny_base: Path) -> Any:
    """A tokenizer that puts a start token first and joins `b c` into one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<s>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, " ": 5, " b": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c"), (" ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def test_chat_items_are_encoded_as_before(tokenizer: Any) -> None:
    prompt, answer = encode_example(tokenizer, Example("hi", "yo"))
    assert tokenizer.decode(prompt) == "<hi>" and prompt == prompt_ids(tokenizer, "hi")
    assert answer == [*tokenizer("yo")["input_ids"], tokenizer.eos_token_id]
    assert encode_prompt(tokenizer, Example("hi", "yo")) == prompt


def test_plain_items_have_no_template(tokenizer: Any) -> None:
    for form, end in (("text", [tokenizer.eos_token_id]), ("continuation", [])):
        prompt, answer = encode_example(tokenizer, Example("a b", " c", form))  # type: ignore[arg-type]
        assert tokenizer.decode(prompt) == "a b" and answer == [*tokenizer(" c")["input_ids"], *end]
        assert encode_prompt(tokenizer, Example("a b", " c", form)) == prompt  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("a", " b", ([0, 1], [6])),
        ("a ", "b", ([0, 1], [6])),  # the space goes with the continuation
        ("ab", "c", ([0, 1, 2], [])),  # one token of both: nothing is left to score
        ("<s>a", "b", ([0, 1], [2])),  # the start token is not put twice
        ("", "ab", ([0], [1, 2])),
        ("", "<s>b", ([0], [2])),
    ],
)
def test_pairs(merging: Any, context: str, continuation: str, expected: tuple[list[int], list[int]]) -> None:
    if not expected[1]:
        with pytest.raises(BadInput, match="without a token"):
            encode_pair(merging, context, continuation)
        return
    assert encode_pair(merging, context, continuation) == expected


@pytest.mark.parametrize("context", ["a", "a b", "a ", "ab  ", "<s>a b", ""])
@pytest.mark.parametrize("continuation", ["b", " b c", "a", " bc"])
def test_pairs_are_those_of_the_harness(merging: Any, context: str, continuation: str) -> None:
    """lm-evaluation-harness' own function, given a stand-in for its model class."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM

    class Stand:
        tokenizer, add_bos_token, backend, prefix_token_id = merging, None, "causal", merging.bos_token_id
        tok_encode, _encode_pair, loglikelihood = HFLM.tok_encode, HFLM._encode_pair, TemplateLM.loglikelihood

        def _loglikelihood_tokens(self, requests: Any, **_: object) -> Any:
            return requests

    class Request:
        args = (context, continuation)

    ((_, first, rest),) = Stand().loglikelihood([Request()], disable_tqdm=True)  # type: ignore[arg-type, list-item]
    if rest:
        assert encode_pair(merging, context, continuation) == (first, rest)
    else:
        with pytest.raises(BadInput):
            encode_pair(merging, context, continuation)


def test_start_token_is_put_once(merging: Any) -> None:
    assert text_ids(merging, "ab") == [0, 1, 2] and text_ids(merging, "<s>ab") == [0, 1, 2]
