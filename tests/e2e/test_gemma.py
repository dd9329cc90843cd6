"""Gemma 3 270M, a real model with a SentencePiece vocabulary, windows and norms plus 1.

Runs where SPARSEPORT_GEMMA names its GGUF file (`python benchmarks/models.py --folder DIR gemma3`); it takes minutes,
and its licence is Gemma's, so nothing downloads it by itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.verify.folder import unequal_weights, verify

pytestmark = pytest.mark.model

PROMPT = "The capital of France is"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def gemma_gguf() -> Path:
    path = os.environ.get("SPARSEPORT_GEMMA")
    if path is None:
        pytest.skip("set SPARSEPORT_GEMMA to the GGUF file that benchmarks/models.py makes")
    return Path(path)


@pytest.fixture(scope="module")
def base(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparseport.checkpoints.gguf import convert_gguf

    return convert_gguf(gemma_gguf, tmp_path_factory.mktemp("gemma") / "base")


@pytest.fixture(scope="module")
def exported(run_export: Any, base: Path) -> Any:
    return run_export(base=base, target=["openvino", "onnx"])[1]


@pytest.fixture(scope="module")
def wanted(base: Path) -> list[int]:
    """Greedy tokens of torch."""
    import torch
    from transformers import AutoTokenizer

    from sparseport.nls.load import load_dense

    ids = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")["input_ids"]
    model: Any = load_dense(base)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return [int(token) for token in out[0]]


def test_both_folders_hold_the_weights_and_compute_the_model(exported: Any) -> None:
    verdicts = [verify(one.folder) for one in exported.exports]
    assert [verdict.differences for verdict in verdicts] == [[], []] and unequal_weights(verdicts) == []
    for one in exported.exports:
        full = one.certificate.body["numerics"]["full_precision"]
        assert float(full["judged_max_abs"]) <= float(full["allowed"]) and float(full["top1"]) == 1.0
        assert one.certificate.totals["linears"] == 18 * 7


def test_openvino_genai(exported: Any, base: Path, wanted: list[int]) -> None:
    import openvino_genai
    from transformers import AutoTokenizer

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    pipe = openvino_genai.LLMPipeline(str(exported.exports[0].folder), "CPU", **exact)
    config = openvino_genai.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, apply_chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert PROMPT + str(pipe.generate(PROMPT, config)) == tokenizer.decode(wanted, skip_special_tokens=True)


def test_onnxruntime_genai(exported: Any, wanted: list[int]) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(exported.exports[1].folder))
    tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(wanted), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(PROMPT))
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)] == wanted


@pytest.mark.shared
def test_perplexity_on_wikitext(base: Path, shared_dir: Path) -> None:
    """Another tokenizer, a norm without its 1 or another rotary base send it into the thousands."""
    import torch
    from transformers import AutoTokenizer

    from sparseport.nls.load import load_dense

    text = (shared_dir / "data" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    begin, *ids = AutoTokenizer.from_pretrained(base)(text[:12_000])["input_ids"][: 1 + 3 * 511]
    model: Any = load_dense(base)
    losses = []
    with torch.no_grad():
        for window in np.array(ids).reshape(3, 511):
            tokens = torch.tensor([begin, *window])[None]
            losses.append(float(model(tokens, labels=tokens).loss))
    assert 40 < float(np.exp(np.mean(losses))) < 80
