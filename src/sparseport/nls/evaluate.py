"""Exact-match accuracy of greedy answers, in torch and in OpenVINO GenAI, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseport.nls.finetune import prompt_ids
from sparseport.nls.tasks import Example

MAX_NEW_TOKENS = 16
_BATCH = 25


@torch.no_grad()
def answers_torch(
    model: nn.Module, tokenizer: Any, items: Sequence[Example], on_batch: Callable[[], None] = lambda: None
) -> list[str]:
    """Greedy answers of a torch model, one per item."""
    answers: list[str] = []
    for start in range(0, len(items), _BATCH):
        rows = [prompt_ids(tokenizer, item.prompt) for item in items[start : start + _BATCH]]
        width = max(map(len, rows))
        # Padding on the left keeps every prompt next to what it generates.
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        answers.extend(tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, width:])
        on_batch()
    return answers


def answers_openvino(folder: Path, items: Sequence[Example], on_item: Callable[[], None] = lambda: None) -> list[str]:
    """Greedy answers of an exported folder, through `openvino_genai.LLMPipeline` as an application would use it."""
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU")
    config = openvino_genai.GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, apply_chat_template=True)
    config.set_eos_token_id(pipeline.get_tokenizer().get_eos_token_id())
    answers = []
    for item in items:
        answers.append(str(pipeline.generate(item.prompt, config)).strip())
        on_item()
    return answers


def accuracy(answers: Sequence[str], items: Sequence[Example]) -> float:
    """Share of answers that are exactly right, 0..1."""
    return sum(answer == item.answer for answer, item in zip(answers, items, strict=True)) / len(items)
