"""Optimum's ONNX loader: greedy tokens of a folder, run inside an environment that has optimum-onnx.

    python with_optimum_onnx.py FOLDER JOB.json ANSWER.json

JOB has `prompts` (`text` and `tokens` each) and `new_tokens`. ANSWER gets the tokens of every prompt, generated alone
and once more as one batch padded on the left; whether the tokenizer gives the same tokens; and what was logged.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from optimum.onnxruntime import pipeline as ort_pipeline
from transformers import AutoTokenizer


class _Kept(logging.Handler):
    """Keeps the first sentence of every warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().split(". ")[0])


def main(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    kept = _Kept()
    logging.getLogger("optimum").addHandler(kept)
    logging.getLogger("optimum").setLevel(logging.WARNING)  # the variable TRANSFORMERS_VERBOSITY may say less
    model = ORTModelForCausalLM.from_pretrained(folder)
    prompts = [prompt["tokens"] for prompt in job["prompts"]]
    generation = {"max_new_tokens": job["new_tokens"], "min_new_tokens": job["new_tokens"], "do_sample": False}
    width = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    batch = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "versions": {name: version(name) for name in ("optimum", "optimum-onnx", "onnxruntime", "transformers")},
        "input_names": [name for name in model.input_names if "past_key_values" not in name],
        "alone": [_generate(model, [prompt], [[1] * len(prompt)], generation)[0] for prompt in prompts],
        "batch": _generate(model, batch, mask, generation),
        "tokenizer": _tokenizer(folder, job["prompts"]),
        "pipeline": _pipeline(folder, job["prompts"][0]["text"]),
        "warnings": sorted(set(kept.lines)),
    }


def _generate(model: Any, tokens: list[list[int]], mask: list[list[int]], generation: dict[str, Any]) -> Any:
    ids = torch.tensor(tokens)
    return model.generate(input_ids=ids, attention_mask=torch.tensor(mask), **generation)[:, ids.shape[1] :].tolist()


def _tokenizer(folder: Path, prompts: list[dict[str, Any]]) -> str:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ValueError as error:  # a class that this transformers does not have
        return f"does not load: {error}"
    same = sum(tokenizer(prompt["text"])["input_ids"] == prompt["tokens"] for prompt in prompts)
    return f"{same} of {len(prompts)} the same"


def _pipeline(folder: Path, text: str) -> str:
    try:
        generator = ort_pipeline("text-generation", model=str(folder))
    except ValueError as error:
        return f"does not load: {error}"
    return str(generator(text, max_new_tokens=16, do_sample=False, return_full_text=False)[0]["generated_text"])


if __name__ == "__main__":
    place, question, reply = map(Path, sys.argv[1:])
    result = main(place, json.loads(question.read_text(encoding="utf-8")))
    reply.write_text(json.dumps(result), encoding="utf-8")
