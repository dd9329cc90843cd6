"""GGUF files with what the real one in the tests does not have: a SentencePiece vocabulary, norms plus 1, windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from e2e.both import export_to_both
from e2e.formats import Line, settle, shown
from e2e.in_process import in_process
from gguf_files import SAMPLES, ids, write_gguf
from sparseport.targets.openvino import readback
from sparseport.weights.linear import DenseWeight

pytest.importorskip("gguf")

GEMMA_3 = "GGUF file of gemma3, SentencePiece vocabulary (F32 values, to float16)"


@shown(GEMMA_3)
def test_gemma_3(tmp_path: Path) -> None:
    """Weights and tokenizer arrive on both runtimes; each export compares ids, text and logits by itself too."""
    import onnxruntime_genai
    import openvino_genai
    from transformers import AutoTokenizer

    # 112 tokens are compared, and the window is 8.
    settings = {"gemma3.context_length": 256}
    model = write_gguf(tmp_path / "tiny.gguf", kind="gemma3", tied=True, settings=settings)
    with in_process():
        result = export_to_both(tmp_path, base=tmp_path / "tiny.gguf", tokenizer=True)
    expected = {name: value.numpy() for name, value in model.state_dict().items() if not name.startswith("lm_head")}
    found = {}
    for item in readback.weights(readback.read_model(result.folder / "openvino_model.xml")):
        assert isinstance(item.weight, DenseWeight)
        values = np.array(item.weight.values, np.float32).reshape(expected[item.name].shape)
        found[item.name] = values - np.float32(item.added)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    ours = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(result.folder.parent / "onnx")))
    ours.update_options(add_special_tokens="true")
    theirs = openvino_genai.Tokenizer(str(result.folder))
    for text in [*filter(None, SAMPLES), "<turn>the 12\n\n", "a    b"]:
        assert ours.encode(text).tolist() == ids(tokenizer, text)
        assert np.array(theirs.encode(text).input_ids.data)[0].tolist() == ids(tokenizer, text)
    count = len(result.certificate.linears)
    settle(Line(GEMMA_3, "this repository", "GGUF v3", f"{count} layers", "values: equal, norms less 1", "f16"))
