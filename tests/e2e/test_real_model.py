"""The real model, SmolLM2-135M-Instruct: what users' applications load, and what they get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.verify.folder import verify

pytestmark = pytest.mark.model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def reference_text(real_qa: Any) -> str:
    """Greedy continuation by torch, with the merged weights."""
    import torch
    from transformers import AutoTokenizer

    from sparseport.nls.reference import load_merged

    recipe, result = real_qa
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    model: Any = load_merged(recipe)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_certificate_and_verify(real_qa: Any) -> None:
    _, result = real_qa
    totals = result.certificate.totals
    assert totals["linears"] == totals["int4_linears"] == 210
    assert totals["weights"] == 106_168_320 and totals["revived"] == 0
    assert totals["sparsity"] == "0.250000"
    full = result.certificate.body["numerics"]["full_precision"]
    # This made-up model has a token at which float32 itself is off by 3e-3, so float64 is the judge.
    assert float(full["judged_max_abs"]) <= max(1e-3, 2 * float(full.get("float32_noise", 0)))
    assert float(full["kl"]) < 1e-8 and float(full["top1"]) == 1.0
    assert verify(result.folder).differences == []


def test_tied_embedding_is_stored_once(real_qa: Any) -> None:
    _, result = real_qa
    weights = 106_168_320 * (4 + (16 + 4) / 64) / 8  # codes, and a scale and a zero-point per group
    embedding = 49_152 * 576 * 2
    size = (result.folder / "openvino_model.bin").stat().st_size
    assert size == pytest.approx(weights + embedding, rel=0.005)


def test_llm_pipeline(real_qa: Any, reference_text: str) -> None:
    import openvino_genai

    pipe = openvino_genai.LLMPipeline(
        str(real_qa[1].folder),
        "CPU",
        INFERENCE_PRECISION_HINT="f32",
        DYNAMIC_QUANTIZATION_GROUP_SIZE=0,
        KV_CACHE_PRECISION="f32",
    )
    config = openvino_genai.GenerationConfig(max_new_tokens=12, do_sample=False, apply_chat_template=False)
    assert str(pipe.generate(PROMPT, config)) == reference_text


def test_optimum_model_and_pipelines(real_qa: Any, reference_text: str) -> None:
    from optimum.intel import OVModelForCausalLM
    from optimum.intel import pipeline as optimum_pipeline
    from transformers import AutoTokenizer, pipeline

    folder = real_qa[1].folder
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=exact)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    for make, extra in ((pipeline, {}), (optimum_pipeline, {"accelerator": "openvino"})):
        generate = make("text-generation", model=model, tokenizer=tokenizer, **extra)
        assert generate(PROMPT, **options)[0]["generated_text"] == reference_text


def test_optimum_pipeline_loads_the_folder_itself(real_qa: Any) -> None:
    from optimum.intel import pipeline

    generate = pipeline("text-generation", model=str(real_qa[1].folder), accelerator="openvino")
    assert generate(PROMPT, max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith(PROMPT)


@pytest.mark.shared
def test_base_perplexity_on_wikitext(demo_base: Path, shared_dir: Path) -> None:
    """A subtly wrong tokenizer still round-trips short text, but sends perplexity into the thousands."""
    import torch
    from transformers import AutoTokenizer

    from sparseport.nls.load import load_dense

    text = (shared_dir / "data" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(demo_base)(text[:60_000])["input_ids"][: 3 * 512]
    model: Any = load_dense(demo_base)
    losses = []
    with torch.no_grad():
        for window in np.array(ids).reshape(3, 512):
            tokens = torch.tensor(window)[None]
            losses.append(float(model(tokens, labels=tokens).loss))
    assert 20 < float(np.exp(np.mean(losses))) < 34
