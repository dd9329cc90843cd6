"""Formats that only the real model shows: its GGUF file, and an adapter that stock PEFT wrote for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.both import export_to_both
from e2e.formats import Line, settle, shown
from e2e.in_process import in_process
from sparseport.checkpoints.folder import ModelFolder
from sparseport.targets.openvino import readback
from sparseport.weights.linear import DenseWeight

pytestmark = pytest.mark.model
VERIFIED = "0 differences, logits agree"


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


def _through(tmp_path: Path, **inputs: Any) -> dict[str, np.ndarray]:
    result = export_to_both(tmp_path, **inputs)
    model = readback.read_model(result.folder / "openvino_model.xml")
    found = {}
    for item in readback.weights(model):
        assert isinstance(item.weight, DenseWeight)
        found[item.name] = np.array(item.weight.values)
    return found


@shown("GGUF file (Q4_1 blocks, dequantised to float16)")
def test_gguf(demo_gguf: Path, tmp_path: Path) -> None:
    import gguf

    found = _through(tmp_path, base=demo_gguf)
    # The gguf package's own dequantisation, and a second un-permutation: of each head of q and k, the file has the two
    # members of a rotated pair side by side.
    names = {"ffn_up": "mlp.up_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj"}
    names |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    reader, count = gguf.GGUFReader(demo_gguf), 0
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for tensor in reader.tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        short = rest.removesuffix(".weight")
        if short not in names:
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        ours = found[f"model.layers.{block}.{names[short]}.weight"]
        if short in heads:
            pairs = values.reshape(reader.fields[heads[short]].contents(), -1, 2, values.shape[1])
            values = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(values.shape)
        assert np.array_equal(values.view(np.uint16), ours.view(np.uint16)), tensor.name
        count += 1
    assert count == 210
    settle(
        Line(
            "GGUF file (Q4_1 blocks, dequantised to float16)",
            "llama.cpp",
            "GGUF v3",
            f"{count} layers",
            f"values: equal to gguf {_version('gguf')}'s, rounded to float16",
            "f16",
            VERIFIED,
        )
    )


@shown("PEFT LoRA adapter (`peft-lora-r8-smollm2`)")
def test_peft_adapter_of_the_real_model(shared_dir: Path, demo_base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    adapter = shared_dir / "checkpoints" / "peft-lora-r8-smollm2"
    found = _through(tmp_path, base=demo_base, adapter=adapter, numerics=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    count, different = 0, 0
    with ModelFolder.open(demo_base) as base:
        for module in base.linear_names():
            values, ours = base.read(f"{module}.weight"), found[f"{module}.weight"]
            key = f"base_model.model.{module}.lora_A.weight"
            if key in tensors:
                product = tensors[key.replace("lora_A", "lora_B")].astype(np.float64) @ tensors[key].astype(np.float64)
                update = np.float32(config["lora_alpha"] / config["r"]) * product.astype(np.float32)
                values = (values.astype(np.float32) + update).astype(np.float16)
                count += 1
            different += int(np.count_nonzero(values != ours))
            step = np.spacing(np.maximum(np.abs(values), np.abs(ours))).astype(np.float64)
            assert (np.abs(values.astype(np.float64) - ours.astype(np.float64)) <= step).all(), module
    # The float64 product is not exact; where it straddles a rounding edge, ours is the exact one.
    assert count == 150 and different <= 2
    settle(
        Line(
            "PEFT LoRA adapter (`peft-lora-r8-smollm2`)",
            "peft",
            config["peft_version"],
            f"{count} layers",
            "merged values: equal to the formula in float64, at most 2 of them one step of float16 away",
            "f16",
            VERIFIED,
        )
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
