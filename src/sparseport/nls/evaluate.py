"""Greedy written answers on the same prompts: in torch, in OpenVINO GenAI, and in ONNX Runtime's generate()."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
# What the search section of genai_config.json, which comes from the model's generation_config.json, may say otherwise.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


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
    """Greedy answers of a torch model, one per item, whatever the model's own settings of generation say.

    Args:
        model: a causal language model of transformers, on any device.
        tokenizer: its tokenizer.
        items: prompts; those that are no chat are given as plain text.
        on_item: called once for each item, when its batch of 25 is done.
        max_new_tokens: tokens that an answer may have.
        stop: texts at which an answer ends; they are no part of it.
    """
    answers: list[str] = []
    for start in range(0, len(items), _BATCH):
        rows = [encode_prompt(tokenizer, item) for item in items[start : start + _BATCH]]
        for row in _generated(model, tokenizer, rows, max_new_tokens, stop):
            answers.append(cut(tokenizer.decode(row, skip_special_tokens=True), stop))
            on_item()
    return answers


@torch.no_grad()
def tokens_torch(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Greedy tokens of a torch model after each prompt, up to the end token, which is one of them.

    Args:
        model: a causal language model of transformers, on any device.
        tokenizer: its tokenizer.
        prompts: token ids, one or more in each.
        max_new_tokens: tokens that an answer may have.
    """
    answers: list[list[int]] = []
    for start in range(0, len(prompts), _BATCH):
        for row in _generated(model, tokenizer, prompts[start : start + _BATCH], max_new_tokens, ()):
            tokens = row.tolist()
            ends = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            answers.append(tokens[:ends])
    return answers


def _generated(
    model: nn.Module, tokenizer: Any, rows: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str]
) -> torch.Tensor:
    """New tokens int64 [rows, tokens]; those of a row that ended before others are filled up."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    ends = tokenizer.eos_token_id
    # Without a token for filling, any other does: it is masked.
    fill = next(token for token in (tokenizer.pad_token_id, ends, 0) if token is not None)
    width = max(map(len, rows))
    # Padding on the left keeps every prompt next to what it generates.
    ids = torch.tensor([[fill] * (width - len(row)) + [*row] for row in rows], device=device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    with _own_settings(model, GenerationConfig()):
        out: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=fill,
            eos_token_id=ends,
            **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
        )
    return out[:, width:]


@contextmanager
def _own_settings(model: Any, settings: Any) -> Iterator[None]:
    """Generation settings in place of the model's (generation_config.json), which fill up all that a call leaves."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def answers_openvino(
    folder: Path,
    items: Sequence[Example],
    on_item: Callable[[], None] = lambda: None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
    adapter: str | None = None,
) -> list[str]:
    """Greedy answers of an exported folder, through `openvino_genai.LLMPipeline` as an application would use it.

    `settings` are properties of the runtime, as in `verify.runs.OPENVINO_FULL_PRECISION`; `adapter` is a file of the
    folder to switch on.
    """
    import openvino_genai

    active = None if adapter is None else openvino_genai.AdapterConfig(openvino_genai.Adapter(str(folder / adapter)))
    more = {} if active is None else {"adapters": active}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **more, **settings)
    config = openvino_genai.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    if active is not None:
        config.adapters = active
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
    adapter: str | None = None,
) -> list[str]:
    """Greedy answers of an exported folder, through onnxruntime-genai as an application would use it.

    `adapter` is a file of the folder to switch on.
    Only the tokens are turned into text by transformers: onnxruntime-genai's decoder stops at a byte that is no UTF-8.
    """
    import onnxruntime_genai

    from sparseport.targets.tokenizer_files import load_tokenizer

    model = onnxruntime_genai.Model(str(folder))
    tokenizer, decoder = onnxruntime_genai.Tokenizer(model), load_tokenizer(folder)
    adapters = onnxruntime_genai.Adapters(model)
    if adapter is not None:
        adapters.load(str(folder / adapter), adapter)
    answers = []
    for item in items:
        text = item.prompt
        if item.form == "chat":
            message = json.dumps([{"role": "user", "content": item.prompt}])
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        prompt = tokenizer.encode(text)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + max_new_tokens, **_GREEDY)
        generator = onnxruntime_genai.Generator(model, parameters)
        if adapter is not None:
            generator.set_active_adapter(adapters, adapter)
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
