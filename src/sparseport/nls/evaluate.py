"""Greedy written answers on the same prompts: in torch, in OpenVINO GenAI, and in ONNX Runtime's generate()."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sparseport.nls.encoding import encode_prompt
from sparseport.nls.tasks import Example
from sparseport.nls.tasks.answers import cut

MAX_NEW_TOKENS = 16
_BATCH = 25


@torch.no_grad()
def answers_torch(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Example],
    on_item: Callable[[], None] = lambda: None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = (),
) -> list[str]:
    """Greedy answers of a torch model, one per item.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        items: prompts; those that are no chat are given as plain text.
        on_item: called once for each item, when its batch of 25 is done.
        max_new_tokens: tokens that an answer may have.
        stop: texts at which an answer ends; they are no part of it.
    """
    answers: list[str] = []
    for start in range(0, len(items), _BATCH):
        rows = [encode_prompt(tokenizer, item) for item in items[start : start + _BATCH]]
        width = max(map(len, rows))
        # Padding on the left keeps every prompt next to what it generates.
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
        )
        for row in out[:, width:]:
            answers.append(cut(tokenizer.decode(row, skip_special_tokens=True), stop))
            on_item()
    return answers


def answers_openvino(
    folder: Path,
    items: Sequence[Example],
    on_item: Callable[[], None] = lambda: None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Greedy answers of an exported folder, through `openvino_genai.LLMPipeline` as an application would use it.

    `settings` are properties of the runtime, as in `verify.runs.OPENVINO_FULL_PRECISION`.
    """
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **settings)
    config = openvino_genai.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    config.stop_strings = set(stop)
    config.set_eos_token_id(pipeline.get_tokenizer().get_eos_token_id())
    answers = []
    for item in items:
        config.apply_chat_template = item.form == "chat"
        answers.append(cut(str(pipeline.generate(item.prompt, config)), stop))
        on_item()
    return answers


def answers_onnx(
    folder: Path,
    items: Sequence[Example],
    on_item: Callable[[], None] = lambda: None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = (),
) -> list[str]:
    """Greedy answers of an exported folder, through onnxruntime-genai as an application would use it.

    Only the tokens are turned into text by transformers: onnxruntime-genai's decoder stops at a byte that is no UTF-8.
    """
    import onnxruntime_genai

    from sparseport.targets.tokenizer_files import load_tokenizer

    model = onnxruntime_genai.Model(str(folder))
    tokenizer, decoder = onnxruntime_genai.Tokenizer(model), load_tokenizer(folder)
    answers = []
    for item in items:
        text = item.prompt
        if item.form == "chat":
            message = json.dumps([{"role": "user", "content": item.prompt}])
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        prompt = tokenizer.encode(text)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + max_new_tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        answer = ""
        while not generator.is_done() and not any(end in answer for end in stop):
            generator.generate_next_token()
            written = generator.get_sequence(0)[len(prompt) :]
            answer = str(decoder.decode(written, skip_special_tokens=True))
        answers.append(cut(answer, stop))
        on_item()
    return answers


def accuracy(answers: Sequence[str], items: Sequence[Example]) -> float:
    """Share of answers that are exactly right, 0..1."""
    return sum(answer == item.answer for answer, item in zip(answers, items, strict=True)) / len(items)
