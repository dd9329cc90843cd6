"""Greedy answers in torch: the likeliest token each time, whatever the model's folder says of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sparseport.nls.evaluate import answers_torch  # noqa: E402
from sparseport.nls.tasks import Example  # noqa: E402

ITEMS = [Example(text, "", "text") for text in ("Say hello", "Say good bye now", "x")]
# What folders of published models say, made strong enough to change every answer.
SETTINGS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(60, 200)),
    "num_beams": 3,
    "forced_eos_token_id": 3,
}


def _model(folder: Path, **settings: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(**settings)
    return model


def _tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def _by_hand(model: Any, tokenizer: Any, count: int) -> list[str]:
    answers = []
    for item in ITEMS:
        ids = tokenizer(item.prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < start + count and int(ids[0, -1]) != tokenizer.eos_token_id:
                ids = torch.cat([ids, model(ids).logits[0, -1].argmax().reshape(1, 1)], dim=1)
        answers.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_greedy(name: str, tiny_base: Path) -> None:
    tokenizer = _tokenizer(tiny_base)
    wanted = _by_hand(_model(tiny_base), tokenizer, 12)
    model = _model(tiny_base, **{name: SETTINGS[name]})
    before = model.generation_config
    assert answers_torch(model, tokenizer, ITEMS, max_new_tokens=12) == wanted
    assert model.generation_config is before


@pytest.mark.parametrize("without", ["pad", "eos"])
def test_a_tokenizer_without_a_token_for_filling(without: str, tiny_base: Path) -> None:
    tokenizer = _tokenizer(tiny_base)
    wanted = _by_hand(_model(tiny_base), tokenizer, 8)
    tokenizer.pad_token = None
    if without == "eos":
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, None
    assert tokenizer.pad_token_id is None
    model = _model(tiny_base)
    assert answers_torch(model, tokenizer, ITEMS, max_new_tokens=8) == wanted


def test_prompts_go_where_the_model_is(tiny_base: Path) -> None:
    """A model that only says where it is and where its inputs are."""

    class Elsewhere(torch.nn.Module):
        generation_config = None

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))

        def generate(self, input_ids: Any, attention_mask: Any, **options: Any) -> Any:
            assert input_ids.device == attention_mask.device == self.weight.device
            return torch.zeros((input_ids.shape[0], input_ids.shape[1] + 1), dtype=torch.int64)

    assert answers_torch(Elsewhere(), _tokenizer(tiny_base), ITEMS) == [""] * 3
