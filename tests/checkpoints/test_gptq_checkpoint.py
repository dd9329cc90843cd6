"""GPTQ checkpoints: literal words, round trips, act-order and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptq_layer import NAME, quantization_config, read, save, weight
from one_layer import assert_same_weight
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import (
    GptqConfig,
    gptq_config_dict,
    gptq_tensors,
    read_gptq_linear,
    read_quantization_config,
)
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.packing import ZeroPointStorage

V1, V2 = ZeroPointStorage.V1, ZeroPointStorage.V2


def test_golden_words():
    codes = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    codes[1] = 15
    zeros = np.array([[8], [0], [1], [15], [8], [8], [8], [8]], np.uint8)
    layer = QuantizedWeight(codes, np.full((8, 1), 0.5, np.float16), zeros, 8)
    for storage, word in ((V1, 0x7777E0F7), (V2, 0x8888F108)):
        tensors = gptq_tensors("m", layer, storage)
        assert list(tensors) == ["m.qweight", "m.qzeros", "m.scales", "m.g_idx"]
        words = [0x76543210, 0xFFFFFFFF] + [0x76543210] * 6
        assert tensors["m.qweight"].dtype == np.int32
        assert tensors["m.qweight"].view(np.uint32).tolist() == [words]
        assert tensors["m.qzeros"].view(np.uint32).tolist() == [[word]]
        assert tensors["m.scales"].dtype == np.float16 and tensors["m.scales"].tolist() == [[0.5] * 8]
        assert tensors["m.g_idx"].dtype == np.int32 and tensors["m.g_idx"].tolist() == [0] * 8


def test_golden_config():
    assert gptq_config_dict(group_size=128, sym=True, storage=V1, extra={"damp_percent": 0.1}) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "damp_percent": 0.1,
    }
    assert gptq_config_dict(group_size=64, sym=False, storage=V2)["checkpoint_format"] == "gptq_v2"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gptq")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_round_trip(data, scratch):
    out, groups = 8 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    group = data.draw(st.sampled_from([8, 16]))
    codes = data.draw(hnp.arrays(np.uint8, (out, groups * group), elements=st.integers(0, 15)))
    zeros = data.draw(hnp.arrays(np.uint8, (out, groups), elements=st.integers(0, 15)))
    scales = data.draw(hnp.arrays(np.float16, (out, groups), elements=st.floats(2**-24, 60000, width=16)))
    order = None
    if data.draw(st.booleans()):
        g_idx = np.array(data.draw(st.permutations(np.repeat(np.arange(groups), group).tolist())))
        stable = np.argsort(g_idx, kind="stable").astype(np.int32)
        order = None if np.array_equal(stable, np.arange(len(g_idx))) else stable
    layer = QuantizedWeight(codes, scales, zeros, group, input_order=order)
    storage = data.draw(st.sampled_from([V1, V2]))
    path = save(
        scratch / "model",
        quantization_config(layer, storage, desc_act=order is not None),
        gptq_tensors(NAME, layer, storage),
    )
    assert_same_weight(read(path), layer)


@pytest.mark.parametrize("storage", [V1, V2])
def test_all_pairs_of_code_and_zero_point(storage, scratch):
    codes = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
    layer = QuantizedWeight(codes, np.ones((16, 1), np.float16), np.arange(16, dtype=np.uint8)[:, None], 16)
    path = save(scratch / "pairs", quantization_config(layer, storage), gptq_tensors(NAME, layer, storage))
    assert_same_weight(read(path), layer)


@pytest.mark.parametrize("label", ["gptq", ...])
def test_scales_keep_their_dtype(label, tmp_path):
    layer = weight(64, 128)
    tensors = gptq_tensors(NAME, layer, V1)
    tensors[f"{NAME}.scales"] = tensors[f"{NAME}.scales"].astype(np.float32) * np.float32(1.0001)
    got = read(save(tmp_path / "m", quantization_config(layer, V1, checkpoint_format=label), tensors))
    assert got.scales.dtype == np.float32
    assert np.array_equal(got.scales, tensors[f"{NAME}.scales"].T)


def test_one_group_for_all_columns(tmp_path):
    layer = weight(group=64)
    path = save(tmp_path / "m", quantization_config(layer, V1, group_size=-1), gptq_tensors(NAME, layer, V1))
    assert_same_weight(read(path), layer)


def test_act_order_keeps_the_permutation(tmp_path):
    layer = weight()
    tensors = gptq_tensors(NAME, layer, V1)
    g_idx = np.array([1, 0] * 32, np.int32)
    tensors[f"{NAME}.g_idx"] = g_idx
    got = read(save(tmp_path / "m", quantization_config(layer, V1, desc_act=True), tensors))
    assert got.input_order.tolist() == list(range(1, 64, 2)) + list(range(0, 64, 2))
    # The dense weight by the format's own definition, column by column.
    want = layer.scales[:, g_idx] * (layer.codes.astype(int) - layer.zero_points.astype(int)[:, g_idx])
    dense = np.empty_like(want)
    dense[:, got.input_order] = np.repeat(got.scales, 32, 1) * (
        got.codes.astype(int) - np.repeat(got.zero_points.astype(int), 32, 1)
    )
    assert np.array_equal(dense, want)
    assert all(np.array_equal(array, tensors[name]) for name, array in gptq_tensors(NAME, got, V1).items())


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"bits": 3}, Unsupported),
        ({"bits": 8}, Unsupported),
        ({"bits": "4"}, BadInput),
        ({"bits": ...}, BadInput),
        ({"quant_method": "awq"}, Unsupported),
        ({"quant_method": "auto-round"}, Unsupported),
        ({"quant_method": ...}, Unsupported),
        ({"checkpoint_format": "marlin"}, Unsupported),
        ({"checkpoint_format": 7}, Unsupported),
        ({"format": "gptq_v2"}, BadInput),
        ({"group_size": 0}, BadInput),
        ({"group_size": -2}, BadInput),
        ({"group_size": 1.0}, BadInput),
        ({"group_size": 48}, BadInput),
        ({"sym": ...}, BadInput),
        ({"sym": 1}, BadInput),
        ({"desc_act": "no"}, BadInput),
        ({"data_type": "fp4"}, Unsupported),
        ({"packing_format": "auto_round:auto_awq"}, Unsupported),
        ({"pack_dtype": "int8"}, Unsupported),
        ({"super_bits": 6}, Unsupported),
        ({"act_bits": 8}, Unsupported),
        ({"is_marlin_format": True}, Unsupported),
        ({"adapter": {"path": "x"}}, Unsupported),
        ({"rotation": "hadamard"}, Unsupported),
    ],
)
def test_settings_that_are_refused(tmp_path, change, kind):
    layer = weight()
    path = save(tmp_path / "m", quantization_config(layer, V1, **change), gptq_tensors(NAME, layer, V1))
    with pytest.raises(kind) as caught:
        read(path)
    assert str(path) in str(caught.value)


# --- layers with settings of their own ----------------------------------------------------------------------------

OTHER = "model.layers.0.mlp.down_proj"
VARYING = [{"dynamic": {"+:.*down_proj": {"group_size": 128}}}, {"extra_config": {OTHER: {"group_size": 128}}}]


def read_all(path: Path, **options) -> dict[str, QuantizedWeight | DenseWeight]:
    with ModelFolder.open(path) as folder:
        linears = open_linears(folder, **options)
        for module in folder.linear_names():
            form = linears.format_of(module)
            assert form.shape == linears.read(module).shape
            assert not form.quantized or form.group_size == linears.read(module).group_size
        return {module: linears.read(module) for module in folder.linear_names()}


@pytest.mark.parametrize("varying", VARYING, ids=lambda v: next(iter(v)))
@pytest.mark.parametrize(("group", "columns"), [(16, 64), (128, 128), (64, 64), (96, 192)])
@pytest.mark.parametrize("storage", [V1, V2])
def test_layers_with_other_group_sizes(tmp_path, varying, group, columns, storage):
    """The settings of one layer are matched by patterns that are not read: the shapes tell its group size."""
    layer, other = weight(), weight(columns=columns, group=group, seed=1)
    tensors = {**gptq_tensors(NAME, layer, storage), **gptq_tensors(OTHER, other, storage)}
    found = read_all(save(tmp_path / "a", quantization_config(layer, storage, **varying), tensors))
    assert_same_weight(found[NAME], layer)
    assert_same_weight(found[OTHER], other)
    with pytest.raises(BadInput, match=rf"{OTHER}\.q"):
        read_all(save(tmp_path / "b", quantization_config(layer, storage), tensors))


@pytest.mark.parametrize("varying", VARYING, ids=lambda v: next(iter(v)))
def test_other_group_sizes_with_act_order(tmp_path, varying):
    order = np.random.default_rng(0).permutation(128).reshape(2, 64)
    order = np.sort(order, axis=1).reshape(-1).astype(np.int32)
    layer, other = weight(), weight(columns=128, group=64, order=order)
    tensors = {**gptq_tensors(NAME, layer, V1), **gptq_tensors(OTHER, other, V1)}
    found = read_all(save(tmp_path, quantization_config(layer, V1, desc_act=True, **varying), tensors))
    assert_same_weight(found[NAME], layer)
    assert_same_weight(found[OTHER], other)


@pytest.mark.parametrize("varying", [{}, *VARYING], ids=lambda v: next(iter(v), "none"))
def test_dense_layers_among_quantised_ones(tmp_path, varying):
    layer = weight()
    plain = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float16)
    tensors = {**gptq_tensors(NAME, layer, V1), f"{OTHER}.weight": plain}
    found = read_all(save(tmp_path, quantization_config(layer, V1, **varying), tensors))
    assert_same_weight(found[NAME], layer)
    assert isinstance(found[OTHER], DenseWeight) and found[OTHER].mask is None
    assert np.array_equal(found[OTHER].values, plain)


@pytest.mark.parametrize("varying", VARYING, ids=lambda v: next(iter(v)))
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "label"), [(2, "gptq"), (3, "gptq"), (8, "gptq"), (8, "gptq_v2"), (8, ...)])
def test_a_layer_of_other_bits_is_refused_as_such(tmp_path, varying, sym, bits, label):
    """Not as damaged zero-points, which is what its words look like to a reader of four bits."""
    layer = weight(zero=8 if sym else None)
    storage = V2 if label == "gptq_v2" else V1
    other = {
        f"{OTHER}.qweight": np.zeros((64 * bits // 32, 32), np.int32),
        f"{OTHER}.qzeros": np.full((2, 32 * bits // 32), 0x7F7F7F7F, np.int32),
        f"{OTHER}.scales": np.ones((2, 32), np.float16),
        f"{OTHER}.g_idx": (np.arange(64) // 32).astype(np.int32),
    }
    config = quantization_config(layer, storage, sym=sym, checkpoint_format=label, **varying)
    path = save(tmp_path, config, {**gptq_tensors(NAME, layer, storage), **other})
    with pytest.raises(Unsupported) as caught:
        read_all(path)
    assert caught.value.code == "E_BITS" and caught.value.found == str(bits) and caught.value.fix
    assert caught.value.where == f"{path}, tensor {OTHER}.qweight"


@pytest.mark.parametrize("rows", [3, 0])
def test_shapes_that_tell_no_group_size(tmp_path, rows):
    layer = weight()
    tensors = gptq_tensors(NAME, layer, V1)
    tensors[f"{NAME}.scales"] = np.ones((rows, 16), np.float16)
    tensors[f"{NAME}.qzeros"] = np.zeros((max(rows, 1), 2), np.int32)
    with pytest.raises(BadInput, match="shape"):
        read_all(save(tmp_path, quantization_config(layer, V1, **VARYING[0]), tensors))


def test_no_settings(tmp_path):
    path = save(tmp_path / "m", None, gptq_tensors(NAME, weight(), V1))
    with pytest.raises(BadInput, match="quantization_config"):
        read(path)


@pytest.mark.parametrize("file", ["quantize_config.json", "quantization_config.json"])
def test_two_settings_that_disagree(tmp_path, file):
    layer = weight()
    config = quantization_config(layer, V1)
    path = save(tmp_path / "m", config, gptq_tensors(NAME, layer, V1))
    (path / file).write_text(json.dumps({**config, "damp_percent": 1}))
    assert_same_weight(read(path), layer)
    (path / file).write_text(json.dumps({**config, "group_size": 64}))
    with pytest.raises(BadInput, match="disagree about group_size") as caught:
        read(path)
    assert file in str(caught.value)


# --- tensors ------------------------------------------------------------------------------------------------------


def nan_scale(scales):
    return np.where(np.arange(scales.size).reshape(scales.shape) == 5, np.float16("nan"), scales)


DAMAGE = {
    "qweight missing": ("qweight", lambda a: None),
    "qzeros missing": ("qzeros", lambda a: None),
    "scales missing": ("scales", lambda a: None),
    "qweight short": ("qweight", lambda a: a[:-1]),
    "qweight int64": ("qweight", lambda a: a.astype(np.int64)),
    "qweight flat": ("qweight", lambda a: a.reshape(-1)),
    "qweight empty": ("qweight", lambda a: a[:0]),
    "qweight 12 rows out": ("qweight", lambda a: a[:, :12].copy()),
    "qzeros short": ("qzeros", lambda a: a[:, :-1].copy()),
    "qzeros uint8": ("qzeros", lambda a: a.view(np.uint8)),
    "scales transposed": ("scales", lambda a: a.T.copy()),
    "scales int": ("scales", lambda a: a.astype(np.int16)),
    "scales NaN": ("scales", nan_scale),
    "scales zero": ("scales", lambda a: a * np.float16(0)),
    "scales negative": ("scales", lambda a: -a),
    "scales infinite": ("scales", lambda a: a + np.float16("inf")),
    "g_idx short": ("g_idx", lambda a: a[:-1]),
    "g_idx int64": ("g_idx", lambda a: a.astype(np.int64)),
    "g_idx float": ("g_idx", lambda a: a.astype(np.float32)),
    "g_idx high": ("g_idx", lambda a: a + np.int32(1)),
    "g_idx negative": ("g_idx", lambda a: a - np.int32(1)),
    "g_idx unequal": ("g_idx", lambda a: a * np.int32(0)),
    "g_idx two axes": ("g_idx", lambda a: a[None].copy()),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensor_is_named(case, tmp_path):
    part, change = DAMAGE[case]
    layer = weight()
    tensors = gptq_tensors(NAME, layer, V1)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
    tensors = {name: array for name, array in tensors.items() if array is not None}
    path = save(tmp_path / "m", quantization_config(layer, V1), tensors)
    with pytest.raises(BadInput) as caught:
        read(path)
    assert str(path) in str(caught.value) and NAME in str(caught.value)
    assert case.startswith("qweight") or part in str(caught.value)


def test_act_order_without_group_indices(tmp_path):
    layer = weight()
    tensors = gptq_tensors(NAME, layer, V1)
    del tensors[f"{NAME}.g_idx"]
    assert_same_weight(read(save(tmp_path / "m", quantization_config(layer, V1), tensors)), layer)
    with pytest.raises(BadInput, match="g_idx"):
        read(save(tmp_path / "m", quantization_config(layer, V1, desc_act=True), tensors))


def test_layers_that_cannot_be_written():
    layer = weight()
    wide = QuantizedWeight(layer.codes, layer.scales.astype(np.float32) * np.float32(1.0001), layer.zero_points, 32)
    with pytest.raises(FidelityError, match="float16"):
        gptq_tensors(NAME, wide, V1)
    large = QuantizedWeight(layer.codes, np.full(layer.scales.shape, 1e6, np.float32), layer.zero_points, 32)
    with pytest.raises(FidelityError, match="float16"):
        gptq_tensors(NAME, large, V1)
    narrow = QuantizedWeight(layer.codes[:4], layer.scales[:4], layer.zero_points[:4], 32)
    with pytest.raises(Unsupported, match="multiples of 8"):
        gptq_tensors(NAME, narrow, V1)


@pytest.mark.shared
def test_autoround_file_comes_back_byte_for_byte(shared_dir):
    with ModelFolder.open(shared_dir / "checkpoints" / "gptq-v1-asym-g64-autoround") as folder:
        config = read_quantization_config(folder)
        assert config == GptqConfig(4, 64, False, False, V1, signed_scales=True)
        for name in folder.linear_names():
            layer = read_gptq_linear(folder, name, config)
            for tensor, array in gptq_tensors(name, layer, V1).items():
                stored = folder.read(tensor)
                assert array.dtype == stored.dtype and np.array_equal(array, stored)
