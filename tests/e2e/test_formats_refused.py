"""What cannot be carried exactly is refused before any work, with the way out: the second table of docs/formats.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dialects import quantised_llama
from e2e.formats import Refusal, refused, settle
from sparseport.errors import BadInput, FidelityError, SparseportError, Unsupported
from sparseport.pipeline import plan
from sparseport.plan import require_exportable
from sparseport.recipe import make_recipe

Config = dict[str, Any]


def _refuse(name: str, error: SparseportError) -> None:
    assert error.fix, "a refusal names the way out"
    # How many layers are refused is a matter of this model.
    message = error.what.partition(" (10 of ")[0]
    settle(Refusal(name, str(error.exit_code), message.replace("|", "/"), error.fix.replace("|", "/")))


def _refusal(**inputs: Any) -> SparseportError:
    with pytest.raises((Unsupported, FidelityError)) as caught:
        require_exportable(plan(make_recipe({"output": "never-written", "tokenizer": False, **inputs})))
    assert not Path("never-written").exists()
    return caught.value


def _with_settings(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(settings)
    file.write_text(json.dumps(config))


def _change_weights(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(settings)
    file.write_text(json.dumps(config))


METHODS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "HQQ": {"quant_method": "hqq", "quant_config": {}},
    "FP8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "MXFP4": {"quant_method": "mxfp4"},
    "AQLM": {"quant_method": "aqlm", "in_group_size": 8},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
}


@refused(method={method: method for method in METHODS})
def test_other_quantisation_methods(method: str, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": METHODS[method]}))
    _refuse(method, _refusal(base=tmp_path / "base"))


LAYOUTS: dict[str, tuple[str, Config]] = {
    "GPTQ, 8 bits": ("gptq-v1", {"bits": 8}),
    "GPTQ, 3 bits": ("gptq-v1", {"bits": 3}),
    "GPTQ for Marlin": ("gptq-v1", {"checkpoint_format": "marlin"}),
    "AWQ, version marlin": ("awq-gemm", {"version": "marlin"}),
    "AWQ, version gemv_fast": ("awq-gemm", {"version": "gemv_fast"}),
    "AWQ, 8 bits": ("awq-gemm", {"bits": 8}),
    "AutoRound, fp8": ("auto-round-gptq", {"packing_format": "auto_round:fp8_static", "data_type": "fp"}),
    "AutoRound, MLX packing": ("auto-round-gptq", {"packing_format": "mlx"}),
    "AutoRound, quantised activations": ("auto-round-gptq", {"act_bits": 8}),
    "compressed-tensors, KV cache scheme": ("ct-pack-asym", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}),
    "compressed-tensors, transforms": ("ct-pack-asym", {"transform_config": {"config_groups": {"R1": {}}}}),
    "compressed-tensors, other sparsity format": ("ct-pack-asym", {"sparsity_config": {"format": "marlin-24"}}),
}


@refused(name={name: name for name in LAYOUTS})
def test_other_layouts(name: str, tiny_base: Path, tmp_path: Path) -> None:
    dialect, settings = LAYOUTS[name]
    quantised_llama(tiny_base, tmp_path / "base", dialect)
    _with_settings(tmp_path / "base", **settings)
    _refuse(name, _refusal(base=tmp_path / "base"))


FORMS = ("marlin-24", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")


@refused(form={form: f"compressed-tensors {form}" for form in FORMS})
def test_other_compressed_tensors_formats(form: str, tiny_base: Path, tmp_path: Path) -> None:
    quantised_llama(tiny_base, tmp_path / "base", "ct-pack-asym")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format"] = form
    config["quantization_config"]["config_groups"]["group_0"]["format"] = form
    file.write_text(json.dumps(config))
    _refuse(f"compressed-tensors {form}", _refusal(base=tmp_path / "base"))


WEIGHTS: dict[str, Config] = {
    "8 bits": {"num_bits": 8},
    "floating-point weights": {"type": "float"},
    "strategy tensor": {"strategy": "tensor", "group_size": None},
    "strategy block": {"strategy": "block", "group_size": None},
}


@refused(name={name: f"compressed-tensors pack-quantized, {name}" for name in WEIGHTS})
def test_other_compressed_tensors_weights(name: str, tiny_base: Path, tmp_path: Path) -> None:
    quantised_llama(tiny_base, tmp_path / "base", "ct-pack-asym")
    _change_weights(tmp_path / "base", **WEIGHTS[name])
    _refuse(f"compressed-tensors pack-quantized, {name}", _refusal(base=tmp_path / "base"))


@refused("compressed-tensors, quantised activations (W4A8)")
def test_quantised_activations(tiny_base: Path, tmp_path: Path) -> None:
    quantised_llama(tiny_base, tmp_path / "base", "ct-pack-asym")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    file.write_text(json.dumps(config))
    _refuse("compressed-tensors, quantised activations (W4A8)", _refusal(base=tmp_path / "base"))


OPTIONS: dict[str, Config] = {
    "DoRA": {"use_dora": True},
    "trained biases": {"bias": "lora_only"},
    "whole modules beside LoRA": {"modules_to_save": ["lm_head"]},
    "PiSSA initialisation": {"init_lora_weights": "pissa"},
    "weights stored [in, out]": {"fan_in_fan_out": True},
}


@refused(name={name: f"PEFT adapter, {name}" for name in OPTIONS})
def test_adapter_options(name: str, tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **OPTIONS[name]}))
    _refuse(f"PEFT adapter, {name}", _refusal(base=tiny_base, adapter=tmp_path / "adapter"))


def _dense_adapter(adapter: Path, out: Path) -> Path:
    shutil.copytree(adapter, out)
    file = out / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "sparse_adapter": False, "quantization_aware": False}))
    return out


@refused("Shears: dense adapter merged into a sparse base")
def test_dense_adapter_on_a_sparse_base(tiny_sparse: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = _dense_adapter(tiny_adapter, tmp_path / "adapter")
    _refuse("Shears: dense adapter merged into a sparse base", _refusal(base=tiny_sparse, adapter=adapter))


@refused("SQFT: floating-point adapter merged into an INT4 base")
def test_dense_adapter_on_an_int4_base(tiny_int4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = _dense_adapter(tiny_adapter, tmp_path / "adapter")
    _refuse("SQFT: floating-point adapter merged into an INT4 base", _refusal(base=tiny_int4, adapter=adapter))


BRANCHED = {"SparsePEFT": "SparsePEFT adapter, un-merged", "QA": "QA-SparsePEFT adapter, un-merged"}


@refused(kind=BRANCHED)
def test_adapters_that_are_merged_stay_so(
    kind: str, tiny_sparse: Path, tiny_int4: Path, tiny_adapter: Path, tiny_adapter_sparse: Path
) -> None:
    base, adapter = (tiny_sparse, tiny_adapter_sparse) if kind == "SparsePEFT" else (tiny_int4, tiny_adapter)
    with pytest.raises(BadInput) as caught:
        require_exportable(
            plan(make_recipe({"output": "never", "base": base, "adapter": adapter, "branches": "graph"}))
        )
    _refuse(BRANCHED[kind], caught.value)


@refused("LoNAS sub-network that cuts gate or up alone")
def test_channels_that_are_multiplied_are_cut_together(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = _dense_adapter(tiny_adapter, tmp_path / "adapter")
    (adapter / "elastic_adapter_config.json").unlink()
    root = "PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]"
    module = f"{root}/LlamaDecoderLayer[0]/LlamaMLP[mlp]/Linear[up_proj]"
    names = [f"{module}/NNCFLinear[self_linear]/linear_0", f"{module}/ModuleDict[lora_B]/NNCFLinear[default]/linear_0"]
    width = {"overwrite_groups": [names], "overwrite_groups_widths": [[128, 96, 64]]}
    space = {"bootstrapNAS": {"training": {"elasticity": {"width": width}}}}
    (tmp_path / "nncf_lonas.json").write_text(json.dumps(space))
    inputs = {"base": tiny_base, "adapter": adapter, "search_space": tmp_path / "nncf_lonas.json"}
    require_exportable(plan(make_recipe({"output": "never-written", "tokenizer": False, **inputs})))  # full width
    with pytest.raises(BadInput) as caught:
        plan(make_recipe({"output": "never-written", "tokenizer": False, **inputs, "sub_adapter": "minimal"}))
    _refuse("LoNAS sub-network that cuts gate or up alone", caught.value)
