"""Which architectures reach ONNX Runtime: tiny random models, exported and compared with transformers' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.in_process import in_process
from sparseport.errors import FidelityError, Unsupported
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.folder import verify

pytest.importorskip("onnxruntime_genai")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# 64 tokens of sliding window lie below the 112 that are compared.
COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with biases": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA_3}),
    "mistral, sliding window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}


def _model(config: str, kind: str, extra: dict[str, Any], folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**COMMON, **extra))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # norms and biases that are all alike would hide one in another's place
                    middle = 0.0 if "emma" in config or name.endswith("bias") else 1.0
                    parameter.copy_(middle + 0.1 * torch.randn_like(parameter))
    model.half().save_pretrained(folder)
    return folder


def _export(base: Path, out: Path, **onnx: Any) -> Any:
    recipe = make_recipe({"base": base, "output": out, "target": ["onnx"], "tokenizer": False, "onnx": onnx})
    with in_process():
        return export(recipe)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    base = _model(*MODELS[name], tmp_path / "base")
    for form in ("nbits", "qdq"):
        result = _export(base, tmp_path / form, format=form)
        assert float(result.certificate.body["numerics"]["full_precision"]["judged_max_abs"]) < 1e-4
        assert verify(result.folder).differences == []
        gemma = name.startswith("gemma")
        assert {facts.get("added") for facts in result.certificate.tensors.values()} == ({1, None} if gemma else {None})


def test_a_model_that_the_builder_gets_wrong_is_refused(tmp_path: Path) -> None:
    """OLMo's norms have no weights and subtract the mean; the builder makes norms of another kind."""
    base = _model("OlmoConfig", "OlmoForCausalLM", {}, tmp_path / "base")
    with pytest.raises(FidelityError, match="logits differ") as caught:
        _export(base, tmp_path / "out")
    assert caught.value.code == "E_NUMERICS" and not (tmp_path / "out").exists()


def test_a_model_whose_layers_the_builder_takes_apart_is_refused(tmp_path: Path) -> None:
    base = _model("Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 256}, tmp_path / "base")
    with pytest.raises(Unsupported, match="takes a layer of this model apart"):
        _export(base, tmp_path / "out")


def test_a_model_that_the_builder_does_not_know_is_refused(tmp_path: Path) -> None:
    base = _model("StableLmConfig", "StableLmForCausalLM", {}, tmp_path / "base")
    with pytest.raises(Unsupported, match="builder cannot build") as caught:
        _export(base, tmp_path / "out")
    assert "export to OpenVINO" in str(caught.value)


def test_a_head_size_that_the_kernel_does_not_take(tmp_path: Path) -> None:
    base = _model("LlamaConfig", "LlamaForCausalLM", {"head_dim": 12}, tmp_path / "base")
    with pytest.raises(Unsupported, match="multiple of 8") as caught:
        _export(base, tmp_path / "out")
    assert "--onnx-format qdq" in str(caught.value)
    result = _export(base, tmp_path / "out", format="qdq")
    assert float(result.certificate.body["numerics"]["full_precision"]["judged_max_abs"]) < 1e-4
