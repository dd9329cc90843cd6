"""Every dialect is recognised by its settings, and settings that are not read, or contradict the data, are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dialects import (
    BITMASK,
    DIALECTS,
    GPTQ,
    PACK_QUANTIZED,
    QUANTIZED,
    layer_tensors,
    quantised_llama,
    quantization_config,
    save,
    write_folder,
)
from one_layer import LAYER, SCALE_DTYPES, assert_same_weight, random_layer, read_layer, refusal, write_layer
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.leaves import MAIN, PARTS, WEIGHT_PARTS
from sparseport.checkpoints.leaves import PACKED as PACKED_LEAVES
from sparseport.checkpoints.quantization_settings import METHODS
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import QuantizedWeight
from sparseport.weights.packing import ZeroPointStorage

NAMES = {
    "gptq-v1": ("GPTQ v1", "gptqmodel 7.7.0"),
    "gptq-v2": ("GPTQ v2", "gptqmodel 7.7.0"),
    "gptq-act-order": ("GPTQ v1 act-order", "gptqmodel 7.7.0"),
    "gptq-channel": ("GPTQ v1", "gptqmodel 7.7.0"),
    "auto-round-gptq": ("AutoRound auto_round:auto_gptq (GPTQ v1)", "auto-round 0.16.1"),
    "auto-round": ("AutoRound auto_round (GPTQ v2)", "auto-round 0.16.1"),
    "auto-round-awq": ("AutoRound auto_round:auto_awq (AWQ gemm)", "auto-round 0.16.1"),
    "awq-gemm": ("AWQ gemm", ""),
    "awq-gemv": ("AWQ gemv", ""),
    "ct-pack-asym": ("compressed-tensors pack-quantized", "compressed-tensors 0.19.0"),
    "ct-pack-sym": ("compressed-tensors pack-quantized", "compressed-tensors 0.19.0"),
    "ct-pack-channel": ("compressed-tensors pack-quantized", "compressed-tensors 0.19.0"),
    "ct-pack-group-order": ("compressed-tensors pack-quantized", "compressed-tensors 0.19.0"),
    "ct-pack-int8-zeros": ("compressed-tensors pack-quantized", "compressed-tensors 0.7.0"),
    "sparse-bitmask": ("compressed-tensors sparse-bitmask", "compressed-tensors 0.12.2"),
    "sparse-24-bitmask": ("compressed-tensors sparse-24-bitmask", "compressed-tensors 0.12.2"),
    "dense": (None, None),
}
PACKED = (*QUANTIZED, *BITMASK)


def main_leaf(dialect):
    named = {**dict.fromkeys(PACK_QUANTIZED, "weight_packed"), **dict.fromkeys(BITMASK, "compressed")}
    return named.get(dialect, "qweight")


# --- recognition ----------------------------------------------------------------------------------------------------


def test_every_dialect_is_tried():
    assert set(NAMES) == set(DIALECTS)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialect_is_recognised_and_read(tmp_path, dialect):
    weight = random_layer(dialect)
    path = write_layer(tmp_path, dialect, weight)
    with ModelFolder.open(path) as folder:
        linears = open_linears(folder)
        found = (None, None) if linears.packed is None else (linears.packed.name, linears.packed.writer)
        assert found == NAMES[dialect]
        assert linears.of(LAYER).holds(LAYER) and linears.has(LAYER) and not linears.has("model.other")
        assert linears.part_names() == set(layer_tensors(dialect, LAYER, weight))
        assert all("wraps around" in warning for warning in folder.warnings)
    assert_same_weight(read_layer(path), weight)


@pytest.mark.parametrize("dialect", QUANTIZED)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_scales_are_never_cast(tmp_path, dialect, dtype):
    weight = random_layer(dialect, scale_dtype=dtype)
    found = read_layer(write_layer(tmp_path, dialect, weight))
    assert found.scales.dtype == dtype and found.scales.tobytes() == weight.scales.tobytes()


@pytest.mark.parametrize("dialect", [d for d in QUANTIZED if d != "ct-pack-sym"])
@pytest.mark.parametrize("value", [0, 1, 7, 8, 9, 15])
def test_zero_points_at_both_ends(tmp_path, dialect, value):
    """GPTQ v1 wraps at 15; a zero-point of 8 everywhere makes the model symmetric."""
    weight = random_layer(dialect)
    zeros = np.full_like(weight.zero_points, value)
    wanted = QuantizedWeight(weight.codes, weight.scales, zeros, weight.group_size, input_order=weight.input_order)
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, wanted)), wanted)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_whole_model(tmp_path, tiny_base, dialect):
    """Fourteen layers of different shapes beside embedding, norms and head; the tokenizer comes along."""
    wanted = quantised_llama(tiny_base, tmp_path / "m", dialect, seed=3)
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    with ModelFolder.open(tmp_path / "m") as folder, ModelFolder.open(tiny_base) as base:
        folder.check_layers()
        linears = open_linears(folder)
        assert set(folder.linear_names()) == {*wanted, "lm_head"} == set(base.linear_names())
        for module, weight in wanted.items():
            assert_same_weight(linears.read(module), weight)
        parts = linears.part_names() - {"lm_head.weight"}
        rest = [name for name in folder.names() if name not in parts]
        assert all(folder.read(name).tobytes() == base.read(name).tobytes() for name in rest)
        assert len(rest) == 2 + 2 * 2 + 1


# --- settings that are not read ---------------------------------------------------------------------------------------

FOREIGN = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4}}},
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fbgemm_fp8": {},
    "mxfp4": {},
    "modelopt": {"quant_algo": "NVFP4"},
    "quanto": {"weights": "int4"},
    "torchao": {"quant_type": {"default": {}}},
    "eetq": {},
    "aqlm": {"nbits_per_codebook": 16},
    "GPTQ": {"bits": 4},
    "": {},
}


@pytest.mark.parametrize("method", [*FOREIGN, None, 4, ["gptq"]])
@pytest.mark.parametrize("dialect", ["dense", "gptq-v1"])
def test_foreign_methods_are_refused_with_a_way_out(tmp_path, dialect, method):
    raw = {"quant_method": method, **FOREIGN.get(method if isinstance(method, str) else "", {})}
    path = write_layer(tmp_path, "gptq-v1", random_layer("gptq-v1"), settings=lambda _: raw)
    if dialect == "dense":
        path = save(tmp_path, {"quantization_config": raw}, {f"{LAYER}.weight": np.ones((4, 4), np.float16)})
    error = refusal(path, Unsupported)
    assert error.code == "E_QUANT_METHOD" and repr(method) in error.what
    assert all(known in error.expected for known in METHODS)


def test_settings_without_a_method(tmp_path):
    path = write_layer(tmp_path, "gptq-v1", random_layer("gptq-v1"), settings=lambda _: {"load_in_4bit": True})
    assert refusal(path, Unsupported).code == "E_QUANT_METHOD"


@pytest.mark.parametrize("value", ["gptq", 4, ["gptq"], True, 0, ""])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_that_are_no_mapping(tmp_path, key, value):
    path = save(tmp_path, {key: value}, {f"{LAYER}.weight": np.ones((4, 4), np.float16)})
    assert refusal(path, BadInput).code == "E_QUANT_CONFIG"


@pytest.mark.parametrize("dialect", PACKED)
def test_packed_layers_without_settings(tmp_path, dialect):
    path = write_folder(
        tmp_path, dialect, {LAYER: random_layer(dialect)}, {}, {"model_type": "llama", "quantization_config": None}
    )
    error = refusal(path, BadInput, main_leaf(dialect))
    assert error.code == "E_QUANT_CONFIG" and "config.json" in error.fix


@pytest.mark.parametrize("dialect", PACKED)
def test_settings_without_packed_layers(tmp_path, dialect):
    packed = random_layer(dialect)
    with ModelFolder.open(write_layer(tmp_path / "a", dialect, packed)) as folder:
        config = dict(folder.config)
    path = save(tmp_path / "b", config, {f"{LAYER}.weight": np.ones((8, 8), np.float16)})
    with ModelFolder.open(path) as folder, pytest.raises(BadInput, match="no layer is stored so") as caught:
        open_linears(folder)
    assert caught.value.code == "E_TENSOR" and str(path) in caught.value.where


# Settings of the first kind, words of the second; v1 and v2 differ in nothing but the label (see the GPTQ tests).
ALIKE = [
    ("gptq-v1", ("gptq-act-order",)),
    ("awq-gemm", ("auto-round-awq",)),
    ("ct-pack-asym", ("ct-pack-group-order", "ct-pack-int8-zeros")),
]
LABEL_ONLY = ("gptq-v2", "auto-round", "auto-round-gptq")


@pytest.mark.parametrize(("said", "dialect"), [(said, dialect) for said, others in ALIKE for dialect in others])
def test_settings_of_a_dialect_with_the_same_words(tmp_path, said, dialect):
    weight = random_layer(dialect)
    settings = quantization_config(said, {LAYER: random_layer(said)})
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, weight, settings=lambda _: settings)), weight)


@pytest.mark.parametrize(
    ("said", "dialect"),
    [
        (said, dialect)
        for said in ("gptq-v1", "awq-gemm", "awq-gemv", "ct-pack-asym", *BITMASK)
        for dialect in PACKED
        if said != dialect
        and dialect not in dict(ALIKE).get(said, ())
        and not (said == "gptq-v1" and dialect in LABEL_ONLY)
    ],
)
def test_settings_of_another_dialect(tmp_path, said, dialect):
    settings = quantization_config(said, {LAYER: random_layer(said)})
    path = write_layer(tmp_path, dialect, random_layer(dialect), settings=lambda _: settings)
    with pytest.raises(BadInput) as caught:
        read_layer(path)
    assert str(path) in caught.value.where and caught.value.fix


@pytest.mark.parametrize("file", ["quantize_config.json", "quantization_config.json"])
@pytest.mark.parametrize(
    ("dialect", "key", "value"),
    [
        ("gptq-v1", "bits", 8),
        ("gptq-v1", "checkpoint_format", "gptq_v2"),
        ("auto-round", "packing_format", "auto_round:auto_gptq"),
        ("auto-round-awq", "group_size", 64),
        ("auto-round-gptq", "sym", True),
        ("awq-gemm", "version", "gemv"),
        ("awq-gemm", "zero_point", False),
        ("awq-gemv", "quant_method", "gptq"),
        ("ct-pack-asym", "format", "marlin-24"),
        ("sparse-bitmask", "quant_method", "awq"),
    ],
)
def test_two_settings_that_disagree(tmp_path, file, dialect, key, value):
    weight = random_layer(dialect)
    path = write_layer(tmp_path, dialect, weight)
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    settings |= {"damp_percent": 0.5}
    if "version" in settings and dialect == "awq-gemm":
        settings["version"] = settings["version"].upper()  # the tool's own file spells it so
    (path / file).write_text(json.dumps(settings))
    assert_same_weight(read_layer(path), weight)
    (path / file).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(BadInput, match=f"disagree about {key}") as caught:
        read_layer(path)
    assert caught.value.where == str(path / file) and file in caught.value.fix


def test_older_name_of_the_settings(tmp_path):
    weight = random_layer("ct-pack-asym")
    path = write_layer(tmp_path, "ct-pack-asym", weight)
    config = json.loads((path / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    config["compression_config"] = settings
    (path / "config.json").write_text(json.dumps(config))
    assert_same_weight(read_layer(path), weight)

    (path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert_same_weight(read_layer(path), weight)

    both = {**config, "quantization_config": {**settings, "quant_method": "compressed-tensors"}}
    (path / "config.json").write_text(json.dumps(both))
    assert_same_weight(read_layer(path), weight)

    both["compression_config"] = {**settings, "format": "marlin-24"}
    (path / "config.json").write_text(json.dumps(both))
    error = refusal(path, BadInput)
    assert error.code == "E_QUANT_CONFIG" and "disagree" in error.what


@pytest.mark.parametrize("dialect", DIALECTS)
def test_gptq_zeros_is_for_gptq_words_only(tmp_path, dialect):
    weight = random_layer(dialect)
    path = write_layer(tmp_path, dialect, weight)
    one_less = dialect not in ("gptq-v2", "auto-round")
    with ModelFolder.open(path) as folder:
        open_linears(folder, gptq_zeros=ZeroPointStorage.V1 if one_less else ZeroPointStorage.V2)
        heard = "--gptq-zeros has nothing to do: this is no GPTQ folder" not in folder.warnings
    assert heard == (dialect in (*GPTQ, "auto-round", "auto-round-gptq"))


@pytest.mark.parametrize(
    ("change", "writer"),
    [
        ({"meta": {"quantizer": ["gptqmodel:7.7.0", "x"]}}, "gptqmodel 7.7.0"),
        ({"meta": {"quantizer": "auto_gptq:0.7"}}, "auto_gptq 0.7"),
        ({"meta": {"quantizer": []}}, ""),
        ({"meta": {"quantizer": 7}}, ""),
        ({"meta": "x"}, ""),
        ({"meta": {}, "quantizer": "optimum:1.2"}, "optimum 1.2"),
        ({"meta": {}, "provider": "auto-round"}, "auto-round"),
        ({"meta": {}, "provider": 3}, ""),
        ({"autoround_version": "0.16.1"}, "auto-round 0.16.1"),
    ],
)
def test_writer_is_what_the_settings_say(tmp_path, change, writer):
    weight = random_layer("gptq-v1")
    weight.zero_points[weight.zero_points == 0] = 1  # how others than GPTQModel store a 0 depends on the writer
    path = write_layer(tmp_path, "gptq-v1", weight, settings=lambda raw: raw.update(change))
    with ModelFolder.open(path) as folder:
        assert open_linears(folder).packed.writer == writer
    assert_same_weight(read_layer(path), weight)


def test_a_plain_layer_must_be_floating_point(tmp_path):
    for number, array in enumerate([np.ones((4, 4), np.int8), np.ones((4, 4), np.float64), np.ones((4, 4), np.int32)]):
        path = save(tmp_path / str(number), {"model_type": "llama"}, {f"{LAYER}.weight": array})
        error = refusal(path, BadInput, "weight")
        assert error.code == "E_SHAPE" and "quantization_config" in error.fix


@pytest.mark.parametrize("dialect", [*PACKED, "dense"])
def test_every_leaf_has_one_home(dialect):
    found = {name.rpartition(".")[2] for name in layer_tensors(dialect, LAYER, random_layer(dialect))}
    assert found <= set(WEIGHT_PARTS) and len(found & set(MAIN)) == 1
    assert set(PARTS) == set(WEIGHT_PARTS) - {"weight"} and set(PACKED_LEAVES) == set(MAIN) - {"weight"}


@pytest.mark.parametrize("embedding", ["model.embed_tokens", "transformer.wte", "model.embed_positions"])
@pytest.mark.parametrize("dialect", PACKED)
def test_packed_embedding_is_refused_as_such(tmp_path, dialect, embedding):
    weight = random_layer(dialect)
    tensors = layer_tensors(dialect, embedding, weight)
    for number, config in enumerate(({"a": 1}, {"a": 1, "quantization_config": None})):
        path = write_folder(tmp_path / str(number), dialect, {LAYER: weight}, tensors, config)
        with ModelFolder.open(path) as folder, pytest.raises(Unsupported, match="embedding") as caught:
            open_linears(folder)
        assert caught.value.code == "E_EMBEDDING" and caught.value.fix
        assert caught.value.where.startswith(f"{path}, tensor {embedding}.")


def test_shards_hold_parts_apart(tmp_path):
    weight = random_layer("ct-pack-asym")
    path = write_layer(tmp_path, "ct-pack-asym", weight)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    homes = {name: f"model-{number + 1:05}.safetensors" for number, name in enumerate(tensors)}
    for name, home in homes.items():
        save_file({name: tensors[name]}, path / home)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    assert_same_weight(read_layer(path), weight)
