"""`sparseport inspect`: what a folder is, what an export keeps and loses, and commands that really work next."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from sparseport.cli import main
from sparseport.errors import BadInput, SparseportError, Unsupported
from sparseport.inspection import inspect


def test_int4_base(tiny_int4: Path) -> None:
    found = inspect(tiny_int4)
    assert found.kind == "base" and found.title.startswith("llama model, GPTQ v1, mostly int4 g32 asym, 5")
    linears = [layer for layer in found.layers if layer.module != "lm_head"]
    assert len(linears) == 14
    for layer in linears:
        assert layer.format == "int4 g32 asym" and layer.scales == "float16" and layer.stored == "u4 g32"
        assert layer.zeros >= layer.weights // 2 and layer.pruned is None and not layer.act_order
        assert layer.zero_points is not None and 0 <= layer.zero_points[0] <= layer.zero_points[1] <= 15
    assert "codes, zero-points and scales of 14 layers, bit for bit" in found.keeps
    assert any("no mask comes with INT4 codes" in line for line in found.loses)
    assert found.next[0] == f"sparseport export --target openvino --base {tiny_int4} --output int4-openvino"


def test_sparse_base_and_its_pattern(tiny_sparse: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    found = inspect(tiny_sparse)
    layers = {layer.module: layer for layer in found.layers}
    layer = layers["model.layers.0.mlp.up_proj"]
    assert layer.zeros == layer.weights // 2 and layer.pattern == "" and layer.format == "float16"
    assert layers["lm_head"].stored == "with the embedding" and layers["lm_head"].zeros == 0
    assert "50.0% of the linear weights are exactly zero" in found.title

    copy = tmp_path / "two of four"
    shutil.copytree(tiny_sparse, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim == 2 and "layers" in name:
            tensors[name] = np.where(np.arange(values.shape[1]) % 4 < 2, values, 0).astype(values.dtype)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = inspect(copy)
    assert {layer.pattern for layer in found.layers if layer.module != "lm_head"} == {"2:4"}
    assert shlex.quote(str(copy)) in found.next[0]


def test_what_is_rounded_is_counted(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "wide"
    shutil.copytree(tiny_base, copy)
    tensors = load_file(copy / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    embedding[3, :5] = 1 + 2.0**-16
    tensors["model.embed_tokens.weight"] = embedding
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "tokenizer.json").unlink()
    found = inspect(copy)
    assert any(line.startswith("5 values of model.embed_tokens.weight are rounded to float16") for line in found.loses)
    assert any("no tokenizer" in line for line in found.loses) and "--no-tokenizer" in found.next[0]


def test_adapters(tiny_adapter: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    found = inspect(tiny_adapter)
    assert found.kind == "adapter" and found.title == "QA-SparsePEFT adapter for 10 layers"
    assert found.facts["scaling"] == "2" and found.facts["search space"] == "2 groups of rank [8, 6, 4]"
    assert len(found.next) == 3 and all("--sparse-base SPARSE-BASE" in command for command in found.next)
    found = inspect(tiny_adapter_sparse)
    assert found.title == "SparsePEFT adapter for 10 layers" and "--base SPARSE-BASE" in found.next[0]

    extracted = tmp_path / "extracted"
    shutil.copytree(tiny_adapter_sparse, extracted)
    (extracted / "elastic_adapter_config.json").unlink()
    config = json.loads((extracted / "adapter_config.json").read_text())
    (extracted / "adapter_config.json").write_text(json.dumps({**config, "r": 16, "lora_alpha": 32}))
    found = inspect(extracted)
    assert any("lower rank than r = 16" in line for line in found.warnings) and len(found.next) == 1


def test_third_party_samples(shared_dir: Path) -> None:
    found = inspect(shared_dir / "checkpoints" / "compressed-tensors-pack-asym-g64")
    assert found.writer == "compressed-tensors 0.19.0"
    assert {layer.format for layer in found.layers} == {"int4 g64 asym"}
    assert {layer.scales for layer in found.layers} == {"float32"}
    found = inspect(shared_dir / "checkpoints" / "gptq-v1-asym-g64-autoround")
    assert found.writer == "auto-round 0.16.1" and "GPTQ v1" in found.title
    found = inspect(shared_dir / "checkpoints" / "peft-lora-r8-smollm2")
    assert found.title == "LoRA adapter for 150 layers" and found.writer == "peft 0.21.2"


def test_declared_pattern_is_compared(repo_root: Path, tmp_path: Path) -> None:
    sample = repo_root / "tests" / "data" / "samples" / "compressed-tensors-sparse-24-bitmask"
    found = inspect(sample)
    assert found.facts["declared sparsity"] == "2:4, kept by 7 of 7 layers"
    assert "the mask that is stored with the weights" in found.keeps
    assert all(layer.pruned == layer.weights // 2 for layer in found.layers if layer.module != "lm_head")
    other = tmp_path / "other"
    shutil.copytree(sample.parent / "compressed-tensors-sparse-bitmask", other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["sparsity_structure"] = "2:4"
    (other / "config.json").write_text(json.dumps(config))
    assert inspect(other).facts["declared sparsity"].startswith("2:4, kept by 0 of ")


def test_the_command_line(tiny_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_int4), "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "base" and len(data["layers"]) == 15
    assert main(["inspect", str(tiny_int4), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "int4 g32 asym" in text and "next:  sparseport export" in text
    assert main(["inspect", str(tiny_int4), "--quiet", "--layers"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nothing"), "--quiet"]) == 3
    assert "nothing to inspect here" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(tmp_path: Path, tiny_int4: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json"):
        inspect(tmp_path)
    copy = tmp_path / "eight bits"
    shutil.copytree(tiny_int4, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= {"bits": 8}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="4-bit"):
        inspect(copy)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SparseportError, match="GGUF"):
        inspect(tmp_path / "x.gguf")
