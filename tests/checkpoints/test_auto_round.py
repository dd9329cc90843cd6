"""AutoRound's own format: which packing means which words, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialects import save, write_folder
from one_layer import LAYER, SCALE_DTYPES, assert_same_weight, layers, random_layer, read_layer, refusal, write_layer
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.packing import ZeroPointStorage

DIALECTS = ("auto-round-gptq", "auto-round", "auto-round-awq")


def i32(*rows):
    return np.array(rows, np.uint32).view(np.int32)


def stored(path, tensors, **settings):
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 8, "sym": False, "data_type": "int", **settings}
    config = {key: value for key, value in config.items() if value is not ...}
    return save(
        path,
        {"model_type": "llama", "quantization_config": config},
        {f"{LAYER}.{leaf}": array for leaf, array in tensors.items()},
    )


# Eight inputs, eight outputs, one group: the same words mean another layer in each packing.
WORDS = {
    "qweight": i32([0x76543210] * 8),
    "qzeros": i32([0xF8765430]),
    "scales": np.ones((1, 8), np.float16),
}
AWQ_WORDS = {**WORDS, "qweight": WORDS["qweight"].T}
GPTQ_CODES = [list(range(8))] * 8
AWQ_CODES = [[code] * 8 for code in (0, 4, 1, 5, 2, 6, 3, 7)]


@pytest.mark.parametrize(
    ("packing", "codes", "zero_points", "name"),
    [
        ("auto_round", GPTQ_CODES, [0, 3, 4, 5, 6, 7, 8, 15], "GPTQ v2"),
        ("auto_round:gptqmodel", GPTQ_CODES, [0, 3, 4, 5, 6, 7, 8, 15], "GPTQ v2"),
        ("auto_round:exllamav2", GPTQ_CODES, [0, 3, 4, 5, 6, 7, 8, 15], "GPTQ v2"),
        ("auto_round:auto_gptq", GPTQ_CODES, [1, 4, 5, 6, 7, 8, 9, 0], "GPTQ v1"),
        ("auto_round:gptq:exllamav2", GPTQ_CODES, [1, 4, 5, 6, 7, 8, 9, 0], "GPTQ v1"),
        ("auto_round:auto_gptq:exllamav2", GPTQ_CODES, [1, 4, 5, 6, 7, 8, 9, 0], "GPTQ v1"),
        ("auto_round:auto_awq", AWQ_CODES, [0, 6, 3, 7, 4, 8, 5, 15], "AWQ gemm"),
        ("auto_round:awq:gemm", AWQ_CODES, [0, 6, 3, 7, 4, 8, 5, 15], "AWQ gemm"),
    ],
)
@pytest.mark.parametrize("key", ["packing_format", "backend"])
def test_the_packing_decides_what_words_mean(tmp_path, packing, codes, zero_points, name, key):
    words = AWQ_WORDS if "awq" in packing else WORDS
    path = stored(tmp_path, words, autoround_version="0.16.1", **{key: packing})
    weight = read_layer(path)
    assert isinstance(weight, QuantizedWeight)
    assert weight.codes.tolist() == codes
    assert weight.zero_points[:, 0].tolist() == zero_points
    with ModelFolder.open(path) as folder:
        packed = open_linears(folder).packed
        assert packed.name == f"AutoRound {packing} ({name})" and packed.writer == "auto-round 0.16.1"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("auto_round")


@given(st.data(), st.sampled_from(DIALECTS), st.sampled_from(SCALE_DTYPES))
def test_round_trip(scratch, data, dialect, scale_dtype):
    weight = data.draw(layers(dialect, scale_dtype))
    assert_same_weight(read_layer(write_layer(scratch, dialect, weight)), weight)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_negative_scales_keep_their_sign(tmp_path, dialect):
    """AutoRound's symmetric schemes give a group the sign of its largest weight."""
    weight = random_layer(dialect)
    weight.scales[::2] *= -1
    back = read_layer(write_layer(tmp_path, dialect, weight))
    assert_same_weight(back, weight)
    assert (back.scales < 0).any() and (back.scales > 0).any()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_symmetric_layers(tmp_path, dialect):
    weight = random_layer(dialect)
    weight = QuantizedWeight(weight.codes, weight.scales, np.full_like(weight.zero_points, 8), weight.group_size)
    path = write_layer(tmp_path, dialect, weight)
    assert '"sym": true' in (path / "config.json").read_text()
    assert_same_weight(read_layer(path), weight)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_zero_points_that_the_config_denies(tmp_path, dialect):
    path = write_layer(tmp_path, dialect, random_layer(dialect), settings=lambda raw: raw.update(sym=True))
    error = refusal(path, BadInput, "qzeros")
    assert error.code == "E_ZEROS" and "config.json" in error.fix


@pytest.mark.parametrize(
    ("written", "said"), [("auto-round-gptq", "auto_round"), ("auto-round", "auto_round:auto_gptq")]
)
def test_the_packing_must_fit_the_data(tmp_path, written, said):
    """Zero-points off by one shift every weight: noticed for symmetric layers, and for large asymmetric ones."""
    weight = random_layer(written, 64, 128)
    middle = QuantizedWeight(weight.codes, weight.scales, np.full_like(weight.zero_points, 8), weight.group_size)
    path = write_layer(tmp_path / "a", written, middle, settings=lambda raw: raw.update(packing_format=said))
    error = refusal(path, BadInput, "qzeros")
    assert error.code == "E_ZEROS" and "--gptq-zeros" in error.fix
    storage = ZeroPointStorage.V1 if written == "auto-round-gptq" else ZeroPointStorage.V2
    assert_same_weight(read_layer(path, gptq_zeros=storage), middle)

    random = np.random.default_rng(0)
    zeros = np.repeat(weight.zero_points // 2 + 4, weight.group_size, axis=1)
    codes = np.clip(zeros + np.rint(random.normal(0, 2, zeros.shape)), 0, 15).astype(np.uint8)
    trained = QuantizedWeight(codes, weight.scales, weight.zero_points // 2 + 4, weight.group_size)
    path = write_layer(tmp_path / "b", written, trained)
    assert_same_weight(read_layer(path), trained)
    path = write_layer(tmp_path / "c", written, trained, settings=lambda raw: raw.update(packing_format=said))
    assert "--gptq-zeros" in refusal(path, BadInput, "qzeros").fix


@pytest.mark.parametrize("dialect", DIALECTS)
def test_layers_with_groups_of_their_own_and_dense_ones(tmp_path, dialect):
    weights = {
        "model.layers.0.mlp.up_proj": random_layer(dialect, group_size=16),
        "model.layers.0.mlp.down_proj": random_layer(dialect, columns=96, group_size=96),
        "model.layers.0.mlp.gate_proj": random_layer("dense"),
    }
    extra = {"model.layers.0.mlp.down_proj": {"group_size": 96}, "model.layers.0.mlp.gate_proj": {"bits": 16}}
    write_folder(tmp_path, dialect, weights, {}, {})
    with ModelFolder.open(tmp_path) as folder:
        settings = {**folder.config["quantization_config"], "extra_config": extra}
    write_folder(tmp_path, dialect, weights, {}, {"quantization_config": settings})
    for module, weight in weights.items():
        assert_same_weight(read_layer(tmp_path, module), weight)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"packing_format": "auto_round:fp8"}, Unsupported, "E_QUANT_METHOD"),
        ({"packing_format": "auto_round:llm_compressor"}, Unsupported, "E_QUANT_METHOD"),
        ({"packing_format": "mlx"}, Unsupported, "E_QUANT_METHOD"),
        ({"packing_format": "auto_round:nv_fp4"}, Unsupported, "E_QUANT_METHOD"),
        ({"packing_format": None}, Unsupported, "E_QUANT_METHOD"),
        ({"packing_format": ["auto_round"]}, Unsupported, "E_QUANT_METHOD"),
        ({"packing_format": ...}, Unsupported, "E_QUANT_METHOD"),
        ({"act_bits": 8}, Unsupported, "E_QUANT_CONFIG"),
        ({"data_type": "fp4"}, Unsupported, "E_QUANT_CONFIG"),
        ({"data_type": "mx_fp"}, Unsupported, "E_QUANT_CONFIG"),
        ({"rotation_config": {"hadamard_type": "hadamard"}}, Unsupported, "E_QUANT_CONFIG"),
        ({"spinquant_config": {"r1": True}}, Unsupported, "E_QUANT_CONFIG"),
        ({"super_bits": 6}, Unsupported, "E_QUANT_CONFIG"),
        ({"bits": 2}, Unsupported, "E_BITS"),
        ({"bits": 3}, Unsupported, "E_BITS"),
        ({"bits": 5}, Unsupported, "E_BITS"),
        ({"bits": 8}, Unsupported, "E_BITS"),
        ({"group_size": 0}, BadInput, "E_GROUP"),
        ({"group_size": -3}, BadInput, "E_GROUP"),
        ({"group_size": ...}, BadInput, "E_QUANT_CONFIG"),
        ({"group_size": "8"}, BadInput, "E_QUANT_CONFIG"),
        ({"sym": "false"}, BadInput, "E_QUANT_CONFIG"),
        ({"sym": ...}, BadInput, "E_QUANT_CONFIG"),
    ],
)
def test_settings_that_are_refused(tmp_path, change, kind, code):
    error = refusal(stored(tmp_path, WORDS, **{"packing_format": "auto_round", **change}), kind)
    assert error.code == code


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"bits": 8}, Unsupported, "E_BITS"),
        ({"super_bits": 6}, Unsupported, "E_QUANT_CONFIG"),
        ({"act_bits": 8}, Unsupported, "E_QUANT_CONFIG"),
        ({"group_size": 0}, BadInput, "E_GROUP"),
        ({"sym": "false"}, BadInput, "E_QUANT_CONFIG"),
        ({"sym": ...}, BadInput, "E_QUANT_CONFIG"),
    ],
)
def test_settings_that_are_refused_for_awq_words(tmp_path, change, kind, code):
    assert (
        refusal(stored(tmp_path, AWQ_WORDS, **{"packing_format": "auto_round:auto_awq", **change}), kind).code == code
    )


@pytest.mark.parametrize("value", [16, 32, None])
def test_plain_activations_are_no_hindrance(tmp_path, value):
    weight = read_layer(stored(tmp_path, WORDS, packing_format="auto_round", act_bits=value, rotation_config={}))
    assert weight.codes.tolist() == GPTQ_CODES
