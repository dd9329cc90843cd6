"""Texts to tokens, the same for training and for every engine that is measured.

Plain text is encoded as lm-evaluation-harness 0.4 does for causal models (its `_encode_pair` and `tok_encode`): context
and continuation are encoded as one text, and the continuation is what that has more than the context alone.
"""

from __future__ import annotations

from typing import Any

from sparseport.errors import BadInput
from sparseport.nls.tasks import Example


def chat_text(tokenizer: Any, prompt: str) -> str:
    """A user's message through the model's own chat template, as a chat application would send it."""
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `chat_text`."""
    return list(tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def prompt_text(tokenizer: Any, example: Example) -> str:
    """The text that a model is given to go on from."""
    return chat_text(tokenizer, example.prompt) if example.form == "chat" else example.prompt


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, with the tokenizer's own special tokens unless the text begins with the start token."""
    start = tokenizer.decode([_start_token(tokenizer)])
    return list(tokenizer.encode(text, **({"add_special_tokens": False} if text.startswith(start) else {})))


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it.

    Spaces at the end of the context go to the continuation, where most tokenizers keep them. After an empty context
    the model's start token (or end token, if it has no other) is what the continuation is conditioned on.

    Raises:
        BadInput: the continuation has no token of its own.
    """
    if not context:
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        start = _start_token(tokenizer)
        first, rest = ([start], ids) if ids[:1] != [start] else (ids[:1], ids[1:])
    else:
        bare = context.rstrip()
        if not bare:
            raise BadInput("a context of nothing but white space", where=repr(context))
        continuation = context[len(bare) :] + continuation
        first = text_ids(tokenizer, bare)
        rest = text_ids(tokenizer, bare + continuation)[len(first) :]
    if not rest:
        raise BadInput("a continuation without a token of its own", where=repr(context), found=repr(continuation))
    return first, rest


def encode_prompt(tokenizer: Any, example: Example) -> list[int]:
    """Token ids of what a model is given to go on from."""
    return prompt_ids(tokenizer, example.prompt) if example.form == "chat" else text_ids(tokenizer, example.prompt)


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of an item's prompt and of its answer, as training wants them.

    The answer ends with the end token, except in the form `continuation`, whose text is not at its end.

    Raises:
        BadInput: the answer has no token of its own.
    """
    if example.form == "chat":
        answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
        return prompt_ids(tokenizer, example.prompt), [*answer, tokenizer.eos_token_id]
    prompt, answer = encode_pair(tokenizer, example.prompt, example.answer)
    return prompt, answer if example.form == "continuation" else [*answer, tokenizer.eos_token_id]


def _start_token(tokenizer: Any) -> int:
    """The token before any text: the start token, or the end token of models that have none."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise BadInput("the tokenizer has neither a start token nor an end token", where=tokenizer.name_or_path)
    return int(start)
