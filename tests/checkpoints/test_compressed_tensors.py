"""compressed-tensors pack-quantized: literal words, round trips with a naive writer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialects import PACK_QUANTIZED, save, write_folder
from one_layer import LAYER, SCALE_DTYPES, assert_same_weight, layers, random_layer, read_layer, refusal, write_layer
from sparseport.checkpoints.compressed_tensors import read_schemes
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import QuantizedWeight


def i32(*rows):
    return np.array(rows, np.uint32).view(np.int32)


def settings(**weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False, **weights},
            }
        },
    }


# Nine outputs, ten inputs in two groups: neither fills whole words.
GOLDEN = {
    "weight_packed": i32([0x76543210, 0x98], *([row * 0x11111111, row * 0x11] for row in range(1, 9))),
    "weight_scale": np.full((9, 2), 0.5, np.float16),
    "weight_zero_point": i32([0x76543210, 0xFFFFFFFF], [0x8, 0xF]),
    "weight_shape": np.array([9, 10]),
}


def golden(tmp_path, *, change=(), **tensors):
    stored = {leaf: array for leaf, array in {**GOLDEN, **tensors}.items() if array is not None}
    config = {"model_type": "llama", "quantization_config": settings(**{"group_size": 5, **dict(change)})}
    return save(tmp_path, config, {f"{LAYER}.{leaf}": array for leaf, array in stored.items()})


def test_golden_words(tmp_path):
    weight = read_layer(golden(tmp_path))
    assert isinstance(weight, QuantizedWeight)
    assert weight.codes.tolist() == [list(range(10)), *([row] * 10 for row in range(1, 9))]
    assert weight.zero_points.tolist() == [[row, 15] for row in range(9)]
    assert weight.codes.dtype == weight.zero_points.dtype == np.uint8
    assert weight.group_size == 5 and weight.input_order is None and weight.mask is None


def test_older_zero_points_are_signed_bytes(tmp_path):
    signed = np.array([[-8, 7]] * 8 + [[0, -1]], np.int8)
    weight = read_layer(golden(tmp_path, weight_zero_point=signed))
    assert weight.zero_points.tolist() == [[0, 15]] * 8 + [[8, 7]]


def test_symmetric_layers_need_no_zero_points(tmp_path):
    weight = read_layer(golden(tmp_path, change={"symmetric": True}, weight_zero_point=None))
    assert weight.zero_points.tolist() == [[8, 8]] * 9
    stored = golden(tmp_path / "stored", change={"symmetric": True}, weight_zero_point=MIDDLE)
    assert_same_weight(read_layer(stored), weight)


def test_symmetric_is_the_default_of_the_tool(tmp_path):
    path = golden(tmp_path, weight_zero_point=None)
    scheme = settings(group_size=5)["config_groups"]["group_0"]
    del scheme["weights"]["symmetric"]
    (parsed,) = read_schemes({"config_groups": {"g": scheme}, "format": "pack-quantized"}, "f")
    assert parsed.symmetric and not parsed.act_order and parsed.group_size == 5
    refusal(path, BadInput, "weight_zero_point")  # said to be asymmetric


MIDDLE = i32([0x88888888] * 2, [0x8] * 2)
G_IDX = [1, 0] * 5


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_columns_come_sorted_by_group(tmp_path, dtype):
    weight = read_layer(golden(tmp_path, change={"actorder": "group"}, weight_g_idx=np.array(G_IDX, dtype)))
    assert weight.input_order.tolist() == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]
    assert weight.codes[0].tolist() == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]
    # Column 0 belongs to group 1 by the file, and comes in the second half of the sorted columns.
    assert weight.zero_points[3].tolist() == [3, 15]


@pytest.mark.parametrize("actorder", ["group", "Group", "weight", "WEIGHT", "static", False, None])
def test_indices_of_minus_one_mean_no_order(tmp_path, actorder):
    path = golden(tmp_path, change={"actorder": actorder}, weight_g_idx=np.full(10, -1, np.int32))
    assert_same_weight(read_layer(path), read_layer(golden(tmp_path / "plain")))


def test_one_scale_per_row(tmp_path):
    path = golden(
        tmp_path,
        change={"strategy": "channel", "group_size": None},
        weight_scale=GOLDEN["weight_scale"][:, :1],
        weight_zero_point=GOLDEN["weight_zero_point"][:, :1],
    )
    weight = read_layer(path)
    assert weight.group_size == 10 and weight.zero_points.tolist() == [[row] for row in range(9)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compressed")


@given(st.data(), st.sampled_from(PACK_QUANTIZED), st.sampled_from(SCALE_DTYPES))
def test_round_trip(scratch, data, dialect, scale_dtype):
    weight = data.draw(layers(dialect, scale_dtype))
    assert_same_weight(read_layer(write_layer(scratch, dialect, weight)), weight)


@pytest.mark.parametrize("dialect", ["ct-pack-asym", "ct-pack-int8-zeros"])
def test_every_pair_of_code_and_zero_point(tmp_path, dialect):
    codes = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
    weight = QuantizedWeight(codes, np.ones((16, 1), np.float32), np.arange(16, dtype=np.uint8)[:, None], 16)
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, weight)), weight)


def test_layers_with_groups_of_their_own_and_dense_ones(tmp_path):
    """Two config groups, a channel-wise layer and a plain one, as mixed recipes give."""
    weights = {
        "model.layers.0.mlp.up_proj": random_layer("ct-pack-asym", group_size=16),
        "model.layers.0.mlp.down_proj": random_layer("ct-pack-sym", columns=96, group_size=96),
        "model.layers.0.mlp.gate_proj": random_layer("dense"),
    }
    groups = {
        "group_0": {**settings(group_size=16)["config_groups"]["group_0"], "format": "pack-quantized"},
        "group_1": {
            "targets": [r"re:.*layers\.\d+\.mlp\.down_proj$"],
            "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True},
        },
    }
    config = {"quantization_config": {**settings(), "format": "mixed-precision", "config_groups": groups}}
    tensors = {}
    for module, weight in weights.items():
        dialect = "ct-pack-sym" if "down" in module else "ct-pack-asym"
        write_folder(tmp_path, dialect, {module: weight}, tensors, config)
        with ModelFolder.open(tmp_path) as folder:
            tensors = {name: np.array(folder.read(name)) for name in folder.names()}
    with ModelFolder.open(tmp_path) as folder:
        linears = open_linears(folder)
        for module, weight in weights.items():
            assert_same_weight(linears.read(module), weight)
        assert linears.format_of("model.layers.0.mlp.down_proj").label == "int4 g96 sym"
        assert linears.format_of("model.layers.0.mlp.up_proj").label == "int4 g16 asym"
        assert linears.format_of("model.layers.0.mlp.gate_proj").label == "float16"
        assert linears.part_names() == {name for name in tensors if name != "model.norm.weight"}


@pytest.mark.shared
def test_a_real_file_reads_as_its_tool_means_it(shared_dir):
    """The definition of the format, element by element, against a file from llm-compressor."""
    with ModelFolder.open(shared_dir / "checkpoints" / "compressed-tensors-pack-asym-g64") as folder:
        linears = open_linears(folder)
        assert linears.packed is not None and linears.packed.name == "compressed-tensors pack-quantized"
        assert linears.packed.writer == "compressed-tensors 0.19.0"
        for module in folder.linear_names():
            weight = linears.read(module)
            assert linears.format_of(module).label == "int4 g64 asym" and weight.scales.dtype == np.float32
            packed = folder.read(f"{module}.weight_packed").view(np.uint32)
            zeros = folder.read(f"{module}.weight_zero_point").view(np.uint32)
            out, columns = weight.shape
            assert (out, columns) == tuple(folder.read(f"{module}.weight_shape"))
            for row, column in np.random.default_rng(0).integers(0, [out, columns], (200, 2)).tolist():
                assert weight.codes[row, column] == packed[row, column // 8] >> 4 * (column % 8) & 15
                group = column // 64
                assert weight.zero_points[row, group] == zeros[row // 8, group] >> 4 * (row % 8) & 15
            # A wrong offset would shift all weights to one side.
            steps = weight.codes.astype(float) - np.repeat(weight.zero_points.astype(float), 64, axis=1)
            assert abs(steps.mean()) < 0.3


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([9, 16], None),
        ([9, 17], "[9, 9..16]"),
        ([9, 8], "[9, 9..16]"),
        ([8, 10], "[9, 9..16]"),
        ([9, -10], "[9, 9..16]"),
        ([10, 9], "[9, 9..16]"),
        ([9, 2**62], "[9, 9..16]"),
    ],
)
def test_shape_that_disagrees_with_the_words(tmp_path, shape, expected):
    error = refusal(
        golden(tmp_path, weight_shape=np.array(shape)),
        BadInput,
        "weight_packed" if expected is None else "weight_shape",
    )
    # Sixteen columns would fill the words, but not in groups of five.
    assert error.code == ("E_GROUP" if expected is None else "E_SHAPE")
    assert expected is None or expected in str(error)


@pytest.mark.parametrize(
    ("leaf", "array"),
    [
        ("weight_packed", i32([0x76543210, 0xF98], *([row * 0x11111111, row * 0x11] for row in range(1, 9)))),
        ("weight_zero_point", i32([0x76543210, 0xFFFFFFFF], [0x8, 0xFF])),
    ],
)
def test_filling_that_is_not_zero(tmp_path, leaf, array):
    assert "beyond" in refusal(golden(tmp_path, **{leaf: array}), BadInput, leaf).what


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_signed_zero_point_out_of_range(tmp_path, value):
    signed = np.zeros((9, 2), np.int8)
    signed[4, 1] = value
    error = refusal(golden(tmp_path, weight_zero_point=signed), BadInput, "weight_zero_point")
    assert error.code == "E_ZEROS" and error.found == str(value)


@pytest.mark.parametrize(
    ("zeros", "code"),
    [
        (GOLDEN["weight_zero_point"], "E_ZEROS"),
        (np.ones((9, 2), np.int8), "E_ZEROS"),
        (np.full((9, 2), -8, np.int8), "E_ZEROS"),
        (np.zeros((9, 3), np.int8), "E_SHAPE"),
        (i32(*[[0x88888888] * 3] * 2), "E_SHAPE"),
        (i32([0x88888888] * 2, [0x8] * 2, [0, 0]), "E_SHAPE"),
        (np.zeros((9, 2), np.float16), "E_SHAPE"),
    ],
)
def test_zero_points_of_a_symmetric_layer(tmp_path, zeros, code):
    path = golden(tmp_path, change={"symmetric": True}, weight_zero_point=zeros)
    assert refusal(path, BadInput, "weight_zero_point").code == code


@pytest.mark.parametrize("actorder", ["group", "GROUP", "dynamic", "Dynamic", True])
def test_act_order_without_its_indices(tmp_path, actorder):
    path = golden(tmp_path, change={"actorder": actorder})
    assert refusal(path, BadInput, "weight_g_idx").code == "E_TENSOR"


# --- settings ---------------------------------------------------------------------------------------------------------

CHANGES = {
    "group 0": ({"group_size": 0}, BadInput, "E_GROUP"),
    "group -1": ({"group_size": -1}, BadInput, "E_GROUP"),
    "group missing": ({"group_size": None}, BadInput, "E_GROUP"),
    "group as text": ({"group_size": "5"}, BadInput, "E_GROUP"),
    "group true": ({"group_size": True}, BadInput, "E_GROUP"),
    "symmetric as text": ({"symmetric": "no"}, BadInput, "E_QUANT_CONFIG"),
    "3 bits": ({"num_bits": 3}, Unsupported, "E_BITS"),
    "5 bits": ({"num_bits": 5}, Unsupported, "E_BITS"),
    "8 bits": ({"num_bits": 8}, Unsupported, "E_BITS"),
    "no bits": ({"num_bits": None}, Unsupported, "E_BITS"),
    "fp4": ({"type": "float"}, Unsupported, "E_BITS"),
    "per tensor": ({"strategy": "tensor"}, Unsupported, "E_QUANT_CONFIG"),
    "per block": ({"strategy": "block"}, Unsupported, "E_QUANT_CONFIG"),
    "per token": ({"strategy": "token"}, Unsupported, "E_QUANT_CONFIG"),
    "dynamic": ({"dynamic": True}, Unsupported, "E_QUANT_CONFIG"),
    "locally dynamic": ({"dynamic": "local"}, Unsupported, "E_QUANT_CONFIG"),
    "unknown order": ({"actorder": "groups"}, Unsupported, "E_QUANT_CONFIG"),
    "empty order": ({"actorder": ""}, Unsupported, "E_QUANT_CONFIG"),
    "order as number": ({"actorder": 1}, Unsupported, "E_QUANT_CONFIG"),
    "order 0": ({"actorder": 0}, Unsupported, "E_QUANT_CONFIG"),
    "order as list": ({"actorder": ["group"]}, Unsupported, "E_QUANT_CONFIG"),
    "no strategy": ({"strategy": None}, Unsupported, "E_QUANT_CONFIG"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_scheme_that_is_refused(tmp_path, case):
    change, kind, code = CHANGES[case]
    assert refusal(golden(tmp_path, change=change), kind).code == code


@pytest.mark.parametrize(("group_size", "code"), [(4, "E_GROUP"), (20, "E_GROUP"), (2, "E_SHAPE"), (10, "E_SHAPE")])
def test_group_size_of_another_layer(tmp_path, group_size, code):
    tensor = "weight_packed" if code == "E_GROUP" else "weight_scale"
    assert refusal(golden(tmp_path, change={"group_size": group_size}), BadInput, tensor).code == code


FORMATS = ["marlin-24", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "dense", None, 7]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("inner", [False, True])
def test_other_formats_are_refused_with_a_way_out(tmp_path, form, inner):
    def change(raw):
        raw["format"] = form
        raw["config_groups"]["group_0"]["format"] = form if inner else None

    path = write_layer(tmp_path, "ct-pack-asym", random_layer("ct-pack-asym"), settings=change)
    error = refusal(path, Unsupported)
    assert error.code == "E_QUANT_METHOD" and repr(form) in error.what and "pack-quantized" in error.fix


def _set(path, value):
    *keys, last = path.split(".")

    def change(raw):
        for key in keys:
            raw = raw[key]
        raw[last] = value

    return change


ACTIVATIONS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
CONFIGS = {
    "too many targets": ("config_groups.group_0.targets", ["Linear"] * 10_001, BadInput, "E_LIMIT"),
    "input activations": ("config_groups.group_0.input_activations", ACTIVATIONS, Unsupported, "E_QUANT_CONFIG"),
    "output activations": ("config_groups.group_0.output_activations", ACTIVATIONS, Unsupported, "E_QUANT_CONFIG"),
    "kv cache": ("kv_cache_scheme", {"num_bits": 8, "type": "float"}, Unsupported, "E_QUANT_CONFIG"),
    "transforms": ("transform_config", {"config_groups": {"u": {}}}, Unsupported, "E_QUANT_CONFIG"),
    "sparse on top": ("sparsity_config", {"format": "sparse-24-bitmask"}, Unsupported, "E_QUANT_METHOD"),
    "unknown sparsity": ("sparsity_config", {"format": "csr"}, Unsupported, "E_QUANT_METHOD"),
    "hostile pattern": ("config_groups.group_0.targets", ["re:(a+)+$"], Unsupported, "E_PATTERN"),
    "hostile pattern behind": ("config_groups.group_0.targets", ["Linear", "re:(a+)+$"], Unsupported, "E_PATTERN"),
    "no groups": ("config_groups", {}, BadInput, "E_QUANT_CONFIG"),
    "groups as a list": ("config_groups", [1], BadInput, "E_QUANT_CONFIG"),
    "group as text": ("config_groups.group_0", "W4A16", BadInput, "E_QUANT_CONFIG"),
    "group without weights": ("config_groups.group_0.weights", None, BadInput, "E_QUANT_CONFIG"),
    "no targets": ("config_groups.group_0.targets", [], BadInput, "E_QUANT_CONFIG"),
    "targets as text": ("config_groups.group_0.targets", "Linear", BadInput, "E_QUANT_CONFIG"),
    "target as number": ("config_groups.group_0.targets", ["Linear", 3], BadInput, "E_QUANT_CONFIG"),
    "empty target": ("config_groups.group_0.targets", ["Linear", ""], BadInput, "E_QUANT_CONFIG"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_refused(tmp_path, case):
    path, value, kind, code = CONFIGS[case]
    folder = write_layer(tmp_path, "ct-pack-asym", random_layer("ct-pack-asym"), settings=_set(path, value))
    assert refusal(folder, kind).code == code


def test_packed_layer_that_no_group_targets(tmp_path):
    change = _set("config_groups.group_0.targets", ["re:.*q_proj", "model.layers.1.mlp.up_proj"])
    path = write_layer(tmp_path, "ct-pack-asym", random_layer("ct-pack-asym"), settings=change)
    error = refusal(path, BadInput, "weight_packed")
    assert error.code == "E_QUANT_CONFIG" and "targets" in error.what


@pytest.mark.parametrize("key", ["kv_cache_scheme", "transform_config", "sparsity_config"])
@pytest.mark.parametrize("value", [None, {}])
def test_unset_options_are_no_hindrance(tmp_path, key, value):
    weight = random_layer("ct-pack-asym")
    assert_same_weight(read_layer(write_layer(tmp_path, "ct-pack-asym", weight, settings=_set(key, value))), weight)
