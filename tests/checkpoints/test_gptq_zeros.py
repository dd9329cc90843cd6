"""How GPTQ files store zero-points: label, data, the writer's name, and what the user says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from gptq_layer import NAME, quantization_config, read, save, weight
from one_layer import assert_same_weight
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import GptqConfig, gptq_tensors, read_gptq_linear, read_quantization_config
from sparseport.checkpoints.writer_of import always_v1, may_wrap_nibbles, quantised_by_gptqmodel
from sparseport.errors import BadInput
from sparseport.weights.packing import ZeroPointStorage

V1, V2, V1_WORDS = ZeroPointStorage.V1, ZeroPointStorage.V2, ZeroPointStorage.V1_WORDS


def test_wrapped_zero_points_are_reported(tmp_path):
    layer = weight(zero=0)
    path = save(tmp_path / "m", quantization_config(layer, V1), gptq_tensors(NAME, layer, V1))
    with ModelFolder.open(path) as folder:
        read_quantization_config(folder)
        assert any("stored as 15" in warning for warning in folder.warnings)
        assert any("words end in 15s" in warning for warning in folder.warnings)


@pytest.mark.parametrize(
    ("stored", "label", "want"),
    [
        (V1, "gptq", V1),
        (V1, ..., V1),
        (V2, "gptq_v2", V2),
        (V2, ..., V2),
    ],
)
def test_symmetric_storage(tmp_path, stored, label, want):
    layer = weight(zero=8)
    path = save(
        tmp_path / "m",
        quantization_config(layer, stored, sym=True, checkpoint_format=label),
        gptq_tensors(NAME, layer, stored),
    )
    with ModelFolder.open(path) as folder:
        config = read_quantization_config(folder)
        assert config == GptqConfig(4, 32, True, False, want)
        assert_same_weight(read_gptq_linear(folder, NAME, config), layer)


@pytest.mark.parametrize(("stored", "label", "fix"), [(V2, "gptq", "v2"), (V1, "gptq_v2", "v1")])
def test_symmetric_contradiction_asks(tmp_path, stored, label, fix):
    layer = weight(zero=8)
    path = save(
        tmp_path / "m",
        quantization_config(layer, stored, sym=True, checkpoint_format=label),
        gptq_tensors(NAME, layer, stored),
    )
    with pytest.raises(BadInput, match=f"--gptq-zeros {fix}") as caught:
        read(path)
    assert caught.value.code == "E_ZEROS" and f"{NAME}.qzeros" in str(caught.value) and str(path) in str(caught.value)
    assert_same_weight(read(path, zero_storage=stored), layer)
    with pytest.raises(BadInput, match=f"--gptq-zeros {fix}"):
        read(path, zero_storage=V1 if stored is V2 else V2)


@pytest.mark.parametrize(("stored", "label"), [(V2, "gptq"), (V2, ...), (V1, "gptq_v2")])
def test_asymmetric_contradiction_asks(tmp_path, stored, label):
    layer = weight(64, 128)
    path = save(
        tmp_path / "m", quantization_config(layer, stored, checkpoint_format=label), gptq_tensors(NAME, layer, stored)
    )
    with pytest.raises(BadInput, match="--gptq-zeros") as caught:
        read(path)
    assert caught.value.code == "E_ZEROS" and f"{NAME}.qzeros" in str(caught.value)
    assert_same_weight(read(path, zero_storage=stored), layer)


@pytest.mark.parametrize(("stored", "label"), [(V1, "gptq"), (V1, ...), (V2, "gptq_v2")])
def test_asymmetric_storage_agrees(tmp_path, stored, label):
    layer = weight(64, 128)
    path = save(
        tmp_path / "m", quantization_config(layer, stored, checkpoint_format=label), gptq_tensors(NAME, layer, stored)
    )
    assert_same_weight(read(path), layer)


def test_sym_with_varying_zero_points(tmp_path):
    layer = weight()
    path = save(tmp_path / "m", quantization_config(layer, V1, sym=True), gptq_tensors(NAME, layer, V1))
    with pytest.raises(BadInput, match="sym") as caught:
        read(path)
    assert caught.value.code == "E_ZEROS" and f"{NAME}.qzeros" in str(caught.value)


def test_settings_made_by_hand_are_checked_too(tmp_path):
    layer = weight(zero=8)
    path = save(tmp_path / "m", quantization_config(layer, V1, sym=True), gptq_tensors(NAME, layer, V1))
    with ModelFolder.open(path) as folder, pytest.raises(BadInput, match="sym") as caught:
        read_gptq_linear(folder, NAME, GptqConfig(4, 32, True, False, V2))
    assert caught.value.code == "E_ZEROS" and f"{NAME}.qzeros" in str(caught.value)


def test_layers_that_store_differently(tmp_path):
    layer = weight(zero=8)
    tensors = {**gptq_tensors(NAME, layer, V1), **gptq_tensors("model.layers.1.mlp.up_proj", layer, V2)}
    path = save(tmp_path / "m", quantization_config(layer, V1, sym=True, checkpoint_format=...), tensors)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj\.qzeros"):
        read(path)


@pytest.mark.shared
def test_autoround_labelled_v2_is_noticed(shared_dir, tmp_path):
    source = shared_dir / "checkpoints" / "gptq-v1-asym-g64-autoround"
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with ModelFolder.open(tmp_path) as folder, pytest.raises(BadInput, match="--gptq-zeros"):
        read_quantization_config(folder)


def test_gptqmodel_takes_one_off_whole_words(tmp_path):
    """z = 0, 15, 8, 8, 8, 8, 8, 8: the 0 borrows from the 15. Read as nibbles, the 15 would be a 14."""
    layer = weight()
    points = np.full_like(layer.zero_points, 8)
    points[0], points[1] = 0, 15
    layer = replace(layer, zero_points=points)
    tensors = gptq_tensors(NAME, layer, ZeroPointStorage.V1_WORDS)
    assert {int(word) & 0xFFFFFFFF for word in tensors[f"{NAME}.qzeros"][:, 0]} == {0x777777DF}
    config = quantization_config(layer, V1, meta={"quantizer": ["gptqmodel:7.7.0"]})
    assert_same_weight(read(save(tmp_path / "gptqmodel", config, tensors)), layer)
    # AutoGPTQ and SQFT wrap each nibble; without a name that is what a file means.
    tensors = gptq_tensors(NAME, layer, V1)
    assert {int(word) & 0xFFFFFFFF for word in tensors[f"{NAME}.qzeros"][:, 0]} == {0x777777EF}
    plain = save(tmp_path / "plain", quantization_config(layer, V1), tensors)
    assert_same_weight(read(plain), layer)
    other = read(plain, zero_storage=ZeroPointStorage.V1_WORDS)
    assert other.zero_points[0, 0] == 0 and other.zero_points[1, 0] == 0 and other.zero_points[2, 0] == 9


# --- no label ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-0.5, -0.4, 0.4, 0.45, 0.5])
@pytest.mark.parametrize("stored", [V1, V2])
def test_data_between_the_two_is_not_guessed(tmp_path, stored, shift):
    """Read as V1 all weights might be off by one step: nothing in the file says."""
    layer = weight(64, 128, shift=shift)
    tensors = gptq_tensors(NAME, layer, stored)
    path = save(tmp_path, quantization_config(layer, stored, checkpoint_format=...), tensors)
    with pytest.raises(BadInput, match="does not say") as caught:
        read(path)
    assert caught.value.code == "E_ZEROS" and "--gptq-zeros v1" in caught.value.fix
    assert caught.value.where == f"{path}, tensor {NAME}.qzeros"
    assert_same_weight(read(path, zero_storage=stored), layer)
    label = "gptq" if stored is V1 else "gptq_v2"
    labelled = save(tmp_path, quantization_config(layer, stored, checkpoint_format=label), tensors)
    assert_same_weight(read(labelled), layer)


@pytest.mark.parametrize("stored", [V1, V2])
def test_too_few_codes_are_no_evidence(tmp_path, stored):
    layer = weight()
    path = save(tmp_path, quantization_config(layer, stored, checkpoint_format=...), gptq_tensors(NAME, layer, stored))
    with pytest.raises(BadInput, match="too few codes") as caught:
        read(path)
    assert caught.value.code == "E_ZEROS"
    assert_same_weight(read(path, zero_storage=stored), layer)


def test_codes_of_all_sampled_layers_count_together(tmp_path):
    layers = {NAME.replace("0", str(n)): weight(seed=n, shift=0.35 if n % 2 else -0.35) for n in range(8)}
    for stored, fits in ((V1, True), (V2, False)):
        tensors = {}
        for name, layer in layers.items():
            tensors |= gptq_tensors(name, layer, stored)
        config = quantization_config(layers[NAME], stored, checkpoint_format=...)
        path = save(tmp_path / stored.value, config, tensors)
        if fits:
            assert_same_weight(read(path), layers[NAME])
        else:
            with pytest.raises(BadInput, match="off centre"):
                read(path)


def test_flat_codes_are_no_evidence(tmp_path):
    layer = weight(64, 128)
    layer = replace(layer, codes=np.repeat(layer.zero_points, 32, axis=1) // 11 + np.uint8(7))
    path = save(tmp_path, quantization_config(layer, V1, checkpoint_format=...), gptq_tensors(NAME, layer, V1))
    with pytest.raises(BadInput, match="all the same"):
        read(path)


AUTO_ROUND = [{"autoround_version": "0.16.1"}, {"provider": "auto-round"}]
AUTO_GPTQ = [{"meta": {"quantizer": ["optimum:1.23", "auto_gptq:0.7.1"]}}, {"quantizer": "AutoGPTQ:0.6"}]


@pytest.mark.parametrize("named", [*AUTO_ROUND, *AUTO_GPTQ], ids=str)
def test_some_writers_are_as_good_as_a_label(tmp_path, named):
    layer = weight()
    config = quantization_config(layer, V1, checkpoint_format=..., **named)
    assert_same_weight(read(save(tmp_path / "small", config, gptq_tensors(NAME, layer, V1))), layer)
    # The data may still contradict it.
    other = weight(64, 128)
    path = save(tmp_path / "large", config, gptq_tensors(NAME, other, V2))
    with pytest.raises(BadInput, match="says V1 zero-points, but the data says V2"):
        read(path)
    assert_same_weight(read(path, zero_storage=V2), other)


# --- the writer's name ------------------------------------------------------------------------------------------------

GPTQMODEL = [
    {"meta": {"quantizer": ["optimum:1.27.0", "gptqmodel:4.2.5"]}},
    {"meta": {"quantizer": ["gptqmodel:7.7.0"]}},
    {"meta": {"quantizer": "gptqmodel:7.7.0"}},
    {"meta": {"quantizer": "optimum:1.27.0, GPTQModel:4.2.5"}},
    {"meta": {"quantizer": [7, None, "gptqmodel"]}},
    {"quantizer": ["optimum:1.27.0", "gptqmodel:4.2.5"]},
    {"quantizer": "optimum:1.27.0", "meta": {"quantizer": ["gptqmodel:4.2.5"]}},
    {"provider": "gptqmodel"},
]


@pytest.mark.parametrize("named", GPTQMODEL, ids=str)
def test_gptqmodel_is_found_among_all_names(tmp_path, named):
    """0x88888880 - 0x11111111: read as nibbles, the first two would be 0 and 7."""
    assert quantised_by_gptqmodel(named) and not always_v1(named)
    layer = weight(8, 32)
    tensors = gptq_tensors(NAME, layer, V1)
    tensors[f"{NAME}.qzeros"] = np.array([[0x88888880 - 0x11111111]], np.uint32).view(np.int32)
    found = read(save(tmp_path, quantization_config(layer, V1, **named), tensors))
    assert found.zero_points[:, 0].tolist() == [0, 8, 8, 8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"meta": None},
        {"meta": {"quantizer": None}},
        {"meta": {"quantizer": [1, {}]}},
        {"meta": ["gptqmodel"]},
        {"provider": 7},
        {"quantizer": ""},
        {"quantizer": ":7"},
        *AUTO_ROUND,
        *AUTO_GPTQ,
    ],
    ids=str,
)
def test_writers_that_wrap_each_nibble(tmp_path, named):
    """Without any name too: so AutoGPTQ's and SQFT's files look, and those of this package."""
    assert not quantised_by_gptqmodel(named) and may_wrap_nibbles(named)
    layer = weight(8, 32)
    layer = replace(layer, zero_points=np.array([[0], [15], *[[8]] * 6], np.uint8))
    path = save(tmp_path, quantization_config(layer, V1, **named), gptq_tensors(NAME, layer, V1))
    assert_same_weight(read(path), layer)
    with ModelFolder.open(path) as folder:
        read_quantization_config(folder)
        assert any("1 zero-points are stored as 15" in warning for warning in folder.warnings)


@pytest.mark.parametrize(
    ("named", "writer"),
    [
        ({"meta": {"quantizer": ["optimum:1.27.0"]}}, "optimum 1.27.0"),
        ({"meta": {"quantizer": "quark:0.9"}}, "quark 0.9"),
        ({"quantizer": "mytool"}, "mytool"),
        ({"provider": "mytool"}, "mytool"),
        ({"meta": {"quantizer": [3, "mytool:1"]}}, "another tool"),
    ],
    ids=str,
)
def test_fifteens_of_an_unknown_tool_are_not_guessed(tmp_path, named, writer):
    layer = weight(8, 32)
    layer = replace(layer, zero_points=np.array([[0], [15], *[[8]] * 6], np.uint8))
    for storage in (V1, V1_WORDS):
        path = save(tmp_path, quantization_config(layer, V1, **named), gptq_tensors(NAME, layer, storage))
        with pytest.raises(BadInput, match="stored as 15") as caught:
            read(path)
        assert caught.value.code == "E_ZEROS" and caught.value.found == writer
        assert "--gptq-zeros v1 " in caught.value.fix and "--gptq-zeros v1-words" in caught.value.fix
        assert caught.value.where == f"{path}, tensor {NAME}.qzeros"
        assert_same_weight(read(path, zero_storage=storage), layer)
    # Without a zero-point of 0 there is nothing to guess.
    layer = replace(layer, zero_points=np.array([[1], [15], *[[8]] * 6], np.uint8))
    path = save(tmp_path, quantization_config(layer, V1, **named), gptq_tensors(NAME, layer, V1))
    assert_same_weight(read(path), layer)
    # V2 stores a zero-point of 15 as 15.
    path = save(tmp_path, quantization_config(layer, V2, **named), gptq_tensors(NAME, layer, V2))
    assert_same_weight(read(path), layer)
