"""The real model on ONNX Runtime: the weights of the OpenVINO folder, and torch's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.verify.folder import unequal_weights, verify
from sparseport.verify.runs import empty_cache, onnx_session

pytestmark = pytest.mark.model

PROMPTS = (
    "The capital of France is",
    "To bake a loaf of rye bread, first",
    "def median(values):",
    "Water boils at a lower temperature in the mountains because",
)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(real_both: Any) -> Path:
    return Path(real_both[0].output / "onnx")


@pytest.fixture(scope="module")
def wanted(real_both: Any, folder: Path) -> list[list[int]]:
    """Greedy tokens of torch with the weights that were merged, not those of a folder."""
    import torch
    from transformers import AutoTokenizer

    from sparseport.nls.reference import load_merged

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load_merged(real_both[0])
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append([int(token) for token in out[0]])
    return found


def test_the_weights_are_those_of_the_openvino_folder(real_both: Any) -> None:
    openvino, onnx = (export.certificate for export in real_both[1].exports)
    assert {m: f["weight_sha256"] for m, f in onnx.linears.items()} == {
        m: f["weight_sha256"] for m, f in openvino.linears.items()
    }
    assert onnx.totals == openvino.totals and onnx.totals["int4_linears"] == 210
    verdicts = [verify(export.folder) for export in real_both[1].exports]
    assert [verdict.differences for verdict in verdicts] == [[], []] and unequal_weights(verdicts) == []


def test_weights_are_stored_once(folder: Path) -> None:
    weights = 106_168_320 * (4 + (16 + 4) / 64) / 8  # codes, and a scale and a zero-point per group
    embedding = 49_152 * 576 * 2
    rotary = 2 * 8192 * 32 * 4
    assert (folder / "model.onnx.data").stat().st_size == pytest.approx(weights + embedding + rotary, rel=0.02)
    assert (folder / "model.onnx").stat().st_size < 1 << 20


def test_plain_onnx_runtime(folder: Path, wanted: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    session = onnx_session(folder)
    empty = empty_cache(folder, [port.name for port in session.get_inputs()])
    names = [port.name for port in session.get_outputs()]
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        found = list(tokenizer(prompt)["input_ids"])
        step, cache = list(found), dict(empty)
        while len(found) < len(tokens):
            feed = {"input_ids": np.array([step]), "attention_mask": np.ones((1, len(found)), np.int64), **cache}
            result = dict(zip(names, session.run(None, feed), strict=True))
            step = [int(result.pop("logits")[0, -1].argmax())]
            found += step
            cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
        assert found == tokens, prompt


def test_genai_generates_and_streams(folder: Path, wanted: list[list[int]]) -> None:
    import onnxruntime_genai as genai
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(folder)
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(tokens))
        generator, stream, text = genai.Generator(model, parameters), tokenizer.create_stream(), ""
        generator.append_tokens(tokenizer.encode(prompt))
        while not generator.is_done():
            generator.generate_next_token()
            text += stream.decode(int(generator.get_next_tokens()[0]))
        assert [int(token) for token in generator.get_sequence(0)] == tokens, prompt
        assert prompt + text == original.decode(tokens, skip_special_tokens=True)


def test_openvino_runs_the_same_file(folder: Path, wanted: list[list[int]]) -> None:
    """Groups of 64 are ones that both runtimes take, so the folder is portable without having been asked to be."""
    from sparseport.verify.runs import OPENVINO_FULL_PRECISION, openvino_logits_of_onnx

    tokens = wanted[0]
    logits = openvino_logits_of_onnx(folder, tokens[:-1], OPENVINO_FULL_PRECISION)
    assert [int(token) for token in logits.argmax(axis=1)[-NEW_TOKENS:]] == tokens[-NEW_TOKENS:]


def test_numbers(real_both: Any) -> None:
    numerics = real_both[1].exports[1].certificate.body["numerics"]
    full = numerics["full_precision"]
    assert float(full["judged_max_abs"]) <= max(1e-3, 2 * float(full.get("float32_noise", 0)))
    assert numerics["default"]["kl"] == full["kl"] and float(full["kl"]) < 1e-8
    assert float(numerics["fast"]["kl"]) > 1e-4  # which is why it is not the default
