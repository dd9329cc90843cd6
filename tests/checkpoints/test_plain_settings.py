"""Options that are not carried: refused for the whole folder and for a single layer, whatever the method."""

from __future__ import annotations

import numpy as np
import pytest

from dialects import BITMASK, QUANTIZED
from one_layer import LAYER, assert_same_weight, random_layer, read_layer, refusal, write_layer
from sparseport.checkpoints.plain_settings import check_plain, layer_settings
from sparseport.errors import BadInput, Unsupported

PACKED = (*QUANTIZED, *BITMASK)
REFUSED = {
    "pack_dtype": ["int16", "int8", "int64", 32],
    "data_type": ["mx_fp", "nv_fp", "fp", "float", "int_asym_dq"],
    "is_marlin_format": [True, "yes"],
    "super_bits": [6],
    "act_bits": [8, 4, "16"],
    "adapter": [{"rank": 8}, "lora"],
    "rotation": ["hadamard", "random"],
    "rotation_config": [{"hadamard_type": "hadamard"}],
    "spinquant_config": [{"r1": True}],
    "transform_config": [{"config_groups": {"u": {}}}],
    "kv_cache_scheme": [{"num_bits": 8}],
}
ALL = [(key, value) for key, values in REFUSED.items() for value in values]
PLAIN = {
    "pack_dtype": ["int32", "INT32"],
    "data_type": ["int"],
    "is_marlin_format": [False],
    "super_bits": [None],
    "act_bits": [16, 32],
    "adapter": [{}, ""],
    "rotation": ["", {}],
    "rotation_config": [{}],
    "spinquant_config": [{}],
    "transform_config": [{}],
    "kv_cache_scheme": [{}],
}
METHODS = ("gptq", "awq", "auto-round", "compressed-tensors")
OWN = [("extra_config", LAYER), ("dynamic", f"+:.*{LAYER}"), ("dynamic", "-:.*lm_head")]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values[:1]])
@pytest.mark.parametrize("dialect", PACKED)
def test_no_dialect_is_read_with_such_a_setting(tmp_path, dialect, key, value):
    path = write_layer(tmp_path, dialect, random_layer(dialect), settings=lambda raw: raw.update({key: value}))
    error = refusal(path, Unsupported)
    assert error.code == "E_QUANT_CONFIG" and key in error.what and error.found == repr(value)
    if dialect in BITMASK:
        return
    for place, name in OWN:
        own = {place: {name: {key: value}}}
        path = write_layer(tmp_path, dialect, random_layer(dialect), settings=lambda raw, own=own: raw.update(own))
        error = refusal(path, Unsupported)
        assert error.code == "E_QUANT_CONFIG" and key in error.what and error.where.endswith(f"{place} {name}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("key", "value"), ALL)
def test_every_value_that_is_refused(method, key, value):
    raw = {"quant_method": method, key: value}
    with pytest.raises(Unsupported, match=key):
        check_plain(raw, "f")
    # A value that stands for the whole folder is refused there already, so it is the folder's that is named.
    with pytest.raises(Unsupported, match=key) as caught:
        check_plain({**raw, "dynamic": {"+:x": {key: value}}}, "f")
    assert caught.value.where == "f"


@pytest.mark.parametrize("method", METHODS)
def test_plain_values_pass_everywhere(method):
    for key, values in PLAIN.items():
        for value in (None, *values):
            check_plain({"quant_method": method, key: value}, "f")
            for place, name in OWN:
                check_plain({"quant_method": method, place: {name: {key: value}}}, "f")


@pytest.mark.parametrize("key", ["quant_method", "method", "checkpoint_format", "format", "packing_format", "backend"])
def test_all_layers_have_the_layout_of_the_folder(key):
    for method, value in (("auto-round", "auto_round:auto_awq"), ("auto-round", "auto_round")):
        same = {"quant_method": method, key: value} if key != "quant_method" else {"quant_method": value}
        check_plain({**same, "extra_config": {"x": {key: value}, "y": {key: None}}}, "f")
        with pytest.raises(Unsupported, match=key) as caught:
            check_plain({**same, "extra_config": {"x": {key: value}, "y": {key: "auto_round:auto_gptq"}}}, "f")
        assert caught.value.where == "f, extra_config y"
        with pytest.raises(Unsupported, match=key):
            check_plain({"quant_method": method, "dynamic": {"+:x": {key: value + "2"}}}, "f")


@pytest.mark.parametrize("backend", ["llm-awq", "LLM-AWQ", "gemv_fast", "ipex", 3])
def test_kernels_that_lay_words_out_otherwise(tmp_path, backend):
    weight = random_layer("awq-gemm")
    path = write_layer(tmp_path, "awq-gemm", weight, settings=lambda raw: raw.update(backend=backend))
    assert "backend" in refusal(path, Unsupported).what


@pytest.mark.parametrize("backend", [None, "auto", "autoawq", "marlin", "torch_awq", "GEMM"])
def test_kernels_of_the_loader(tmp_path, backend):
    weight = random_layer("awq-gemm")
    path = write_layer(tmp_path, "awq-gemm", weight, settings=lambda raw: raw.update(backend=backend))
    assert_same_weight(read_layer(path), weight)
    # GPTQ's backend is a kernel in every case.
    check_plain({"quant_method": "gptq", "backend": backend}, "f")


@pytest.mark.parametrize("data_type", ["float", "fp", "FP16", "bfloat16", "int", None])
def test_layers_that_the_quantiser_left_alone(data_type):
    entry = {"bits": 16, "act_bits": 16, "act_data_type": "float", "data_type": data_type, "super_group_size": None}
    check_plain({"quant_method": "auto-round", "extra_config": {"lm_head": entry}}, "f")
    if data_type not in ("int", None):
        for bits in (4, 8, "16", True, None):
            with pytest.raises(Unsupported, match="data_type"):
                check_plain({"quant_method": "auto-round", "extra_config": {"x": {**entry, "bits": bits}}}, "f")
    with pytest.raises(Unsupported, match="data_type"):
        check_plain({"quant_method": "auto-round", "extra_config": {"x": {**entry, "data_type": "mx_fp"}}}, "f")


@pytest.mark.parametrize("key", ["extra_config", "dynamic"])
@pytest.mark.parametrize("value", ["x", [1], 3, True, {"x": "y"}, {"x": [1]}, {"x": 3}, {"x": {"bits": 4}, "y": True}])
def test_settings_of_layers_that_are_no_mapping(tmp_path, key, value):
    path = write_layer(tmp_path, "gptq-v1", random_layer("gptq-v1"), settings=lambda raw: raw.update({key: value}))
    error = refusal(path, BadInput)
    assert error.code == "E_QUANT_CONFIG" and key in error.where


def test_empty_settings_of_layers_are_none():
    for raw in ({}, {"extra_config": None, "dynamic": {}}, {"dynamic": {"-:x": {}, "-:y": None}}):
        assert list(layer_settings(raw, "f")) == []
    raw = {"extra_config": {"a": {"bits": 4}}, "dynamic": {"+:b": {"bits": 8}, "-:c": {}}}
    assert list(layer_settings(raw, "f")) == [("extra_config a", {"bits": 4}), ("dynamic +:b", {"bits": 8})]


def test_act_order_of_a_single_layer_needs_its_indices(tmp_path):
    weight = random_layer("gptq-act-order")
    own = {"desc_act": False, "dynamic": {"+:.*up_proj": {"desc_act": True}}}
    path = write_layer(tmp_path / "a", "gptq-act-order", weight, settings=lambda raw: raw.update(own))
    assert_same_weight(read_layer(path), weight)
    path = write_layer(
        tmp_path / "b", "gptq-act-order", weight, settings=lambda raw: raw.update(own), damage={"g_idx": None}
    )
    assert refusal(path, BadInput, "g_idx").code == "E_G_IDX"
    own["dynamic"] = {"+:x": {"desc_act": "yes"}}
    path = write_layer(tmp_path / "c", "gptq-act-order", weight, settings=lambda raw: raw.update(own))
    assert refusal(path, BadInput).code == "E_QUANT_CONFIG"


def test_long_names_do_not_fill_the_screen():
    with pytest.raises(Unsupported) as caught:
        check_plain({"extra_config": {"x" * 10_000: {"adapter": "y" * 10_000}}}, "f")
    assert len(str(caught.value)) < 600
    with pytest.raises(BadInput) as caught:
        check_plain({"extra_config": {"x" * 10_000: np.arange(3000).tolist()}}, "f")
    assert len(str(caught.value)) < 600
