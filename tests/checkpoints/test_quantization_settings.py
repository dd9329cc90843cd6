"""Where a folder's quantisation settings stand: config.json, or AutoGPTQ's quantize_config.json beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gptq_layer import weight
from one_layer import LAYER, assert_same_weight, random_layer, read_layer, write_layer
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import gptq_tensors, read_gptq_linear, read_quantization_config
from sparseport.checkpoints.quantization_settings import quantization_settings
from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.errors import BadInput, SparseportError, Unsupported
from sparseport.weights.packing import ZeroPointStorage

# As AutoGPTQ 0.5 wrote it: neither quant_method nor checkpoint_format.
NATIVE = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": "/some/where/else",
    "model_file_base_name": "gptq_model-4bit-32g",
}
FILE = "gptq_model-4bit-32g.safetensors"


def native(path, layer, storage=ZeroPointStorage.V1, *, config=None, file=FILE, **changes):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    raw = {key: value for key, value in {**NATIVE, **changes}.items() if value is not ...}
    (path / "quantize_config.json").write_text(json.dumps(raw))
    tensors = gptq_tensors(LAYER, layer, storage)
    write_safetensors(path / file, [spec_of(name, array) for name, array in tensors.items()])
    return path


def refused(path, kind=BadInput, **options) -> SparseportError:
    with pytest.raises(kind) as caught:
        read_layer(path, **options)
    return caught.value


def test_folder_of_autogptq(tmp_path):
    layer = weight(zero=8)
    path = native(tmp_path, layer)
    assert_same_weight(read_layer(path), layer)
    with ModelFolder.open(path) as folder:
        assert open_linears(folder).packed.name == "GPTQ v1"
        assert len(folder.warnings) == 2
        assert FILE in folder.warnings[0] and "quantize_config.json" in folder.warnings[1]
        assert sorted(folder.sha256()) == ["config.json", FILE, "quantize_config.json"]
        assert_same_weight(read_gptq_linear(folder, LAYER, read_quantization_config(folder)), layer)


def test_unlabelled_zero_points_go_by_the_data(tmp_path):
    layer = weight(64, 128)
    assert_same_weight(read_layer(native(tmp_path / "a", layer, sym=False)), layer)
    path = native(tmp_path / "b", layer, ZeroPointStorage.V2, sym=False)
    assert refused(path).code == "E_ZEROS"
    assert_same_weight(read_layer(path, gptq_zeros=ZeroPointStorage.V2), layer)
    labelled = native(tmp_path / "c", layer, ZeroPointStorage.V2, sym=False, checkpoint_format="gptq_v2")
    assert_same_weight(read_layer(labelled), layer)


def test_settings_in_config_json_count_if_there_are_any(tmp_path):
    layer = weight(zero=8)
    stated = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}}
    path = native(tmp_path / "a", layer, config=stated, file="model.safetensors")
    with ModelFolder.open(path) as folder:
        found = quantization_settings(folder)
        assert found.raw == stated["quantization_config"] and found.where == str(path / "config.json")
        assert folder.warnings == []
    error = refused(native(tmp_path / "b", layer, config=stated, group_size=64))
    assert error.code == "E_QUANT_CONFIG" and "disagree about group_size" in error.what


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"bits": 8}, Unsupported, "E_BITS"),
        ({"bits": ...}, BadInput, "E_QUANT_CONFIG"),
        ({"group_size": 0}, BadInput, "E_GROUP"),
        ({"is_marlin_format": True}, Unsupported, "E_QUANT_CONFIG"),
        ({"quant_method": "hqq"}, Unsupported, "E_QUANT_METHOD"),
        ({"checkpoint_format": "marlin"}, Unsupported, "E_QUANT_CONFIG"),
        ({"dynamic": {"+:x": {"adapter": {"rank": 4}}}}, Unsupported, "E_QUANT_CONFIG"),
    ],
)
def test_settings_that_are_refused_name_their_file(tmp_path, change, kind, code):
    path = native(tmp_path, weight(zero=8), **change)
    error = refused(path, kind)
    assert error.code == code and error.where.startswith(str(path / "quantize_config.json"))


def test_another_method_beside_config_json(tmp_path):
    """quantize_config.json of GPTQModel may say awq."""
    layer = random_layer("awq-gemm")
    path = write_layer(tmp_path, "awq-gemm", layer)
    config = json.loads((path / "config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (path / "config.json").write_text(json.dumps(config))
    assert_same_weight(read_layer(path), layer)
    with ModelFolder.open(path) as folder, pytest.raises(Unsupported, match="not read as GPTQ"):
        read_quantization_config(folder)


def test_settings_without_packed_layers_are_left_over(tmp_path):
    """A model that was dequantised in its folder: the file is not looked at, however broken."""
    values = np.ones((8, 8), np.float16)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "quantize_config.json").write_text("[")
    write_safetensors(tmp_path / "model.safetensors", [spec_of(f"{LAYER}.weight", values)])
    with ModelFolder.open(tmp_path) as folder:
        assert quantization_settings(folder) is None and open_linears(folder).packed is None
        assert folder.warnings == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"bits": 4, "bits": 8}'])
def test_damaged_file(tmp_path, content):
    path = native(tmp_path, weight(zero=8))
    (path / "quantize_config.json").write_bytes(content)
    assert "quantize_config.json" in refused(path).where


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    path = native(tmp_path / "m", weight(zero=8))
    (path / "quantize_config.json").rename(tmp_path / "elsewhere.json")
    (path / "quantize_config.json").symlink_to(tmp_path / "elsewhere.json")
    assert refused(path).code == "E_PATH"
