"""AWQ in both versions: literal words, round trips with a naive writer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialects import AWQ, save, write_folder
from one_layer import LAYER, SCALE_DTYPES, assert_same_weight, layers, random_layer, read_layer, refusal, write_layer
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import QuantizedWeight


def i32(*rows):
    return np.array(rows, np.uint32).view(np.int32)


def stored(path, tensors, **settings):
    config = {"quant_method": "awq", "bits": 4, "zero_point": True, **settings}
    config = {key: value for key, value in config.items() if value is not ...}
    return save(
        path,
        {"model_type": "llama", "quantization_config": config},
        {f"{LAYER}.{leaf}": array for leaf, array in tensors.items()},
    )


# Two inputs, eight outputs: outputs 0 2 4 6 stand in the low half of a word, 1 3 5 7 in the high half.
GEMM = {
    "qweight": i32([0x75316420], [0x8ACE9BDF]),
    "qzeros": i32([0x888F8880]),
    "scales": np.array([[0.5, 1, 2, 4, 0.25, 8, 16, 32]], np.float16),
}
# Two outputs, sixteen inputs in two groups; rows of scales and zero-points are filled up to a whole word.
GEMV = {
    "qweight": i32([0x76543210, 0xFEDCBA98], [0x11111111, 0x22222222]),
    "qzeros": i32([0xF3], [0x0C]),
    "scales": np.array([[1, 2] + [0] * 6, [4, 8] + [0] * 6], np.float16),
}


def test_golden_words_of_gemm(tmp_path):
    weight = read_layer(stored(tmp_path, GEMM, version="gemm", group_size=2))
    assert isinstance(weight, QuantizedWeight)
    assert weight.codes.tolist() == [[output, 15 - output] for output in range(8)]
    assert weight.zero_points[:, 0].tolist() == [0, 15, 8, 8, 8, 8, 8, 8]  # stored as they are, without GPTQ's - 1
    assert weight.scales[:, 0].tolist() == [0.5, 1, 2, 4, 0.25, 8, 16, 32]
    assert weight.group_size == 2 and weight.input_order is None


def test_golden_words_of_gemv(tmp_path):
    weight = read_layer(stored(tmp_path, GEMV, version="gemv", group_size=8))
    assert weight.codes.tolist() == [list(range(16)), [1] * 8 + [2] * 8]
    assert weight.zero_points.tolist() == [[3, 15], [12, 0]]
    assert weight.scales.tolist() == [[1, 2], [4, 8]]
    assert weight.group_size == 8


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("awq")


@given(st.data(), st.sampled_from(AWQ), st.sampled_from(SCALE_DTYPES))
def test_round_trip(scratch, data, dialect, scale_dtype):
    weight = data.draw(layers(dialect, scale_dtype))
    assert_same_weight(read_layer(write_layer(scratch, dialect, weight)), weight)


@pytest.mark.parametrize("dialect", AWQ)
def test_every_pair_of_code_and_zero_point(tmp_path, dialect):
    codes = np.tile(np.arange(16, dtype=np.uint8), (16, 2))
    weight = QuantizedWeight(codes, np.ones((16, 1), np.float16), np.arange(16, dtype=np.uint8)[:, None], 32)
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, weight)), weight)


@pytest.mark.parametrize("dialect", AWQ)
@pytest.mark.parametrize(("columns", "group_size"), [(128, 32), (192, 64), (256, 128), (384, 128), (64, 64)])
def test_group_sizes_of_the_tool(tmp_path, dialect, columns, group_size):
    weight = random_layer(dialect, columns=columns, group_size=group_size)
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, weight)), weight)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_one_group_per_row(tmp_path, version):
    weight = random_layer(f"awq-{version}", columns=64, group_size=64)
    path = write_layer(tmp_path, f"awq-{version}", weight, settings=lambda raw: raw.update(group_size=-1))
    assert_same_weight(read_layer(path), weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"version": "GEMM", "group_size": 2},  # as the tool's own config spelt it
        {"version": ..., "format": "gemm", "group_size": 2},
        {"version": ..., "group_size": 2},
        {"bits": ..., "w_bit": 4, "group_size": ..., "q_group_size": 2},
        {"bits": ..., "group_size": -1},
        {"zero_point": ..., "group_size": 2},
    ],
)
def test_names_of_settings_over_the_years(tmp_path, settings):
    assert_same_weight(
        read_layer(stored(tmp_path / "a", GEMM, **settings)),
        read_layer(stored(tmp_path / "b", GEMM, version="gemm", group_size=2)),
    )


def test_group_size_is_128_unless_said(tmp_path):
    weight = random_layer("awq-gemm", columns=256, group_size=128)
    path = write_layer(
        tmp_path / "a", "awq-gemm", weight, settings=lambda raw: {k: raw[k] for k in raw if k != "group_size"}
    )
    assert_same_weight(read_layer(path), weight)
    refused = random_layer("awq-gemm", columns=256, group_size=64)
    path = write_layer(
        tmp_path / "b", "awq-gemm", refused, settings=lambda raw: {k: raw[k] for k in raw if k != "group_size"}
    )
    assert refusal(path, BadInput, "scales").code == "E_GROUP"


def test_layers_with_groups_of_their_own_and_dense_ones(tmp_path):
    weights = {
        "model.layers.0.mlp.up_proj": random_layer("awq-gemm", group_size=16),
        "model.layers.0.mlp.down_proj": random_layer("awq-gemm", columns=96, group_size=96),
        "model.layers.0.mlp.gate_proj": random_layer("dense"),
    }
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    for extra in ({}, {"extra_config": {"model.layers.0.mlp.down_proj": {"group_size": 96}}}):
        path = write_folder(
            tmp_path / str(len(extra)), "awq-gemm", weights, {}, {"quantization_config": {**settings, **extra}}
        )
        with ModelFolder.open(path) as folder:
            linears = open_linears(folder)
            assert_same_weight(linears.read("model.layers.0.mlp.gate_proj"), weights["model.layers.0.mlp.gate_proj"])
            if extra:
                for module, weight in weights.items():
                    assert_same_weight(linears.read(module), weight)
                assert linears.format_of("model.layers.0.mlp.down_proj").group_size == 96
            else:
                with pytest.raises(BadInput, match="group size"):
                    linears.format_of("model.layers.0.mlp.down_proj")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["scales", "qzeros"])
def test_gemv_rows_that_are_not_filled_with_zeros(tmp_path, leaf):
    damaged = GEMV[leaf].copy()
    damaged[1, -1] += np.array(1 << 8 if leaf == "qzeros" else 1, damaged.dtype)
    path = stored(tmp_path, {**GEMV, leaf: damaged}, version="gemv", group_size=8)
    assert refusal(path, BadInput, "scales").code == "E_GROUP"


def test_gemv_with_a_group_size_that_is_too_large(tmp_path):
    # One group of 16 would leave the second scale unread.
    assert refusal(stored(tmp_path, GEMV, version="gemv", group_size=16), BadInput, "scales").code == "E_GROUP"


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("group_size", [-1, 2, 8])
def test_layers_without_inputs(tmp_path, version, group_size):
    empty = {
        "gemm": {"qweight": np.zeros((0, 1), np.int32), "qzeros": GEMM["qzeros"], "scales": GEMM["scales"]},
        "gemv": {"qweight": np.zeros((2, 0), np.int32), "qzeros": GEMV["qzeros"], "scales": GEMV["scales"]},
    }[version]
    refusal(stored(tmp_path, empty, version=version, group_size=group_size), BadInput, "scales")


@pytest.mark.parametrize("dialect", ["awq-gemm", "awq-gemv"])
def test_zero_points_that_the_config_denies(tmp_path, dialect):
    weight = random_layer(dialect)
    path = write_layer(tmp_path / "a", dialect, weight, settings=lambda raw: raw.update(zero_point=False))
    error = refusal(path, BadInput, "qzeros")
    assert error.code == "E_ZEROS" and "zero_point" in error.fix
    middle = QuantizedWeight(weight.codes, weight.scales, np.full_like(weight.zero_points, 8), weight.group_size)
    path = write_layer(tmp_path / "b", dialect, middle, settings=lambda raw: raw.update(zero_point=False))
    assert_same_weight(read_layer(path), middle)


@pytest.mark.parametrize("settings", [{"extra_config": {LAYER: {"bits": 8}}}, {"dynamic": {LAYER: {"bits": 8}}}])
def test_eight_bit_layer_among_others(tmp_path, settings):
    eight = {
        "qweight": np.zeros((64, 4), np.int32),
        "qzeros": np.zeros((2, 4), np.int32),
        "scales": np.ones((2, 16), np.float16),
    }
    path = stored(tmp_path, eight, version="gemm", group_size=32, **settings)
    assert refusal(path, Unsupported, "qweight").code == "E_BITS"


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"bits": 3}, Unsupported, "E_BITS"),
        ({"bits": 5}, Unsupported, "E_BITS"),
        ({"bits": 8}, Unsupported, "E_BITS"),
        ({"bits": "4"}, Unsupported, "E_BITS"),
        ({"bits": ..., "w_bit": 3}, Unsupported, "E_BITS"),
        ({"version": "gemv_fast"}, Unsupported, "E_QUANT_METHOD"),
        ({"version": "marlin"}, Unsupported, "E_QUANT_METHOD"),
        ({"version": "exllama"}, Unsupported, "E_QUANT_METHOD"),
        ({"version": None}, Unsupported, "E_QUANT_METHOD"),
        ({"version": 1}, Unsupported, "E_QUANT_METHOD"),
        ({"version": "gemv", "extra_config": {"x": {"group_size": 64}}}, Unsupported, "E_QUANT_CONFIG"),
        ({"data_type": "nv_fp4"}, Unsupported, "E_QUANT_CONFIG"),
        ({"act_bits": 8}, Unsupported, "E_QUANT_CONFIG"),
        ({"zero_point": "yes"}, BadInput, "E_QUANT_CONFIG"),
        ({"zero_point": 1}, BadInput, "E_QUANT_CONFIG"),
        ({"group_size": 0}, BadInput, "E_GROUP"),
        ({"group_size": -2}, BadInput, "E_GROUP"),
        ({"group_size": 32.0}, BadInput, "E_GROUP"),
        ({"group_size": None}, BadInput, "E_GROUP"),
        ({"group_size": True}, BadInput, "E_GROUP"),
    ],
)
def test_settings_that_are_refused(tmp_path, change, kind, code):
    assert refusal(stored(tmp_path, GEMM, **{"version": "gemm", "group_size": 2, **change}), kind).code == code
