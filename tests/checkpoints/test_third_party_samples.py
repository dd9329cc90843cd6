"""Folders that other tools wrote, against those tools' own dequantised values: not one bit may differ.

tests/data/samples/<name>/ is a tiny random model as the tool saved it, without tokenizer; expected.json beside it has
the SHA-256 of every linear weight as the tool's own code dequantises it. benchmarks/second_opinion.py makes both.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.packing import unpack_words_low_first
from sparseport.weights.rounding import dequantize

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "samples"
NAMES = [
    "auto-round-asym-g32",
    "auto-round-asym-g32-mixed",
    "auto-round-awq-asym-g32",
    "auto-round-gptq-asym-g32",
    "auto-round-gptq-asym-g32-mixed",
    "auto-round-sym-g32",
    "autoawq-gemm-asym-g32",
    "autoawq-gemv-asym-g64",
    "compressed-tensors-pack-asym-channel-odd",
    "compressed-tensors-pack-asym-g12-odd",
    "compressed-tensors-pack-asym-g32",
    "compressed-tensors-pack-asym-g32-actorder-group",
    "compressed-tensors-pack-asym-g32-actorder-weight",
    "compressed-tensors-pack-mixed",
    "compressed-tensors-pack-sym-channel",
    "compressed-tensors-pack-sym-g32",
    "compressed-tensors-sparse-24-bitmask",
    "compressed-tensors-sparse-bitmask",
    "compressed-tensors-sparse-bitmask-odd",
    "gptqmodel-v1-asym-channel",
    "gptqmodel-v1-asym-g32-actorder",
    "gptqmodel-v2-asym-g32",
    "gptqmodel-v2-sym-g32",
]
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
LAYER = "model.layers.0"


def real_values(weight):
    return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.values.astype(np.float32)


def digest(values) -> str:
    """SHA-256 of a weight as little-endian C-order float32; -0 counts as 0, as in expected.json."""
    return hashlib.sha256((values.astype(np.float32) + np.float32(0)).astype("<f4").tobytes()).hexdigest()


def differing(folder: ModelFolder, expected) -> list[str]:
    """Layers whose values are not the tool's: in its own dtype after one rounding, or in float32."""
    linears = open_linears(folder)
    wrong = []
    for module, layer in expected["layers"].items():
        values = real_values(linears.read(module))
        assert list(values.shape) == layer["shape"], module
        if digest(values.astype(DTYPES[layer["dtype"]])) != layer["sha256"]:
            wrong.append(f"{module} in {layer['dtype']}")
        if "float32_sha256" in layer and digest(values) != layer["float32_sha256"]:
            wrong.append(f"{module} in float32")
    return wrong


@pytest.fixture
def sample(request):
    with ModelFolder.open(SAMPLES / request.param) as folder:
        yield folder


def on(*names):
    """Run a test on the named samples."""
    return pytest.mark.parametrize("sample", names, indirect=True)


def test_every_sample_is_tested():
    assert sorted(path.name for path in SAMPLES.iterdir() if path.is_dir()) == NAMES


@on(*NAMES)
def test_values_are_those_of_the_tool(sample):
    expected = json.loads((sample.path / "expected.json").read_text(encoding="utf-8"))
    assert set(sample.linear_names()) == set(expected["layers"])
    assert differing(sample, expected) == []


@pytest.mark.shared
@pytest.mark.parametrize("name", ["compressed-tensors-pack-asym-g64", "gptq-v1-asym-g64-autoround"])
def test_values_of_larger_checkpoints_are_those_of_the_tool(shared_dir, name):
    expected = json.loads((SAMPLES / f"shared-{name}.json").read_text(encoding="utf-8"))
    with ModelFolder.open(shared_dir / "checkpoints" / name) as folder:
        assert set(folder.linear_names()) == set(expected["layers"])
        assert differing(folder, expected) == []


# --- that the samples hold what they are named for -------------------------------------------------------------------


@on("gptqmodel-v1-asym-g32-actorder", "compressed-tensors-pack-asym-g32-actorder-group")
def test_act_order_samples_are_out_of_order(sample):
    weight = open_linears(sample).read(f"{LAYER}.mlp.down_proj")
    assert weight.input_order is not None and (np.diff(weight.input_order) < 0).any()


@on("gptqmodel-v1-asym-channel", "gptqmodel-v1-asym-g32-actorder")
def test_v1_samples_hold_a_borrow(sample):
    """GPTQModel subtracts 1 from whole words, so a zero-point of 0 borrows from its neighbour: z = 0, 15 -> 15, 13."""
    stored = unpack_words_low_first(np.ascontiguousarray(sample.read(f"{LAYER}.mlp.down_proj.qzeros").view(np.int32).T))
    assert (stored[:2] == [[15], [13]]).all()


@on("auto-round-sym-g32")
def test_symmetric_autoround_sample_has_negative_scales(sample):
    assert (sample.read(f"{LAYER}.mlp.down_proj.scales") < 0).any()


@on("autoawq-gemv-asym-g64")
def test_gemv_sample_has_padded_scales(sample):
    assert sample.info(f"{LAYER}.mlp.down_proj.scales").shape == (64, 16)  # 3 groups


@on("compressed-tensors-pack-asym-g12-odd", "compressed-tensors-pack-asym-channel-odd")
def test_odd_samples_fill_no_whole_words(sample):
    assert sample.info(f"{LAYER}.mlp.down_proj.weight_packed").shape == (60, 11)  # 84 columns
    assert sample.info(f"{LAYER}.self_attn.k_proj.weight_zero_point").shape[0] == 4  # 30 rows


@on("compressed-tensors-pack-mixed")
def test_mixed_groups_are_told_apart(sample):
    linears = open_linears(sample)
    labels = {
        "self_attn.q_proj": "int4 g32 asym",
        "mlp.gate_proj": "int4 g64 sym",
        "mlp.up_proj": "float16",
        "mlp.down_proj": "int4 g192 asym",
    }
    assert {name: linears.format_of(f"{LAYER}.{name}").label for name in labels} == labels


@on("auto-round-gptq-asym-g32-mixed")
def test_layers_with_settings_of_their_own(sample):
    """`dynamic`: a layer with larger groups, one in 16 bits, and a quantised head."""
    linears = open_linears(sample)
    labels = {name: linears.format_of(name).label for name in sample.linear_names()}
    assert labels[f"{LAYER}.self_attn.q_proj"] == "int4 g32 asym"
    assert labels[f"{LAYER}.self_attn.o_proj"] == "int4 g64 asym"
    assert labels[f"{LAYER}.self_attn.v_proj"] == "float16"
    assert labels["lm_head"] == "int4 g32 asym"


@on("auto-round-asym-g32-mixed")
def test_what_is_stored_counts_not_what_the_config_promises(sample):
    """`extra_config` says that the head has 4 bits; AutoRound stored it as float32."""
    assert sample.config["quantization_config"]["extra_config"]["lm_head"]["bits"] == 4
    linears = open_linears(sample)
    assert linears.format_of("lm_head").label == "float32"
    assert linears.format_of(f"{LAYER}.self_attn.o_proj").label == "int4 g64 asym"


@on("compressed-tensors-sparse-bitmask", "compressed-tensors-sparse-bitmask-odd")
def test_bitmask_is_the_mask(sample):
    weight = open_linears(sample).read(f"{LAYER}.mlp.down_proj")
    assert isinstance(weight, DenseWeight) and weight.mask is not None
    assert weight.mask.mean() == 0.5 and not weight.values[~weight.mask].any()


@on("compressed-tensors-sparse-24-bitmask")
def test_two_of_four_keeps_zeros_where_a_row_is_empty(sample):
    weight = open_linears(sample).read(f"{LAYER}.mlp.down_proj")
    assert isinstance(weight, DenseWeight) and weight.mask is not None
    assert (weight.mask.reshape(-1, 4).sum(axis=1) == 2).all()
    assert not weight.values[2].any()  # the row of zeros


def test_samples_are_small_and_say_nothing_of_a_machine():
    files = [path for path in SAMPLES.rglob("*") if path.is_file()]
    for path in files:
        assert path.suffix in (".json", ".safetensors"), path
        assert path.stat().st_size < 200_000, path
        found = re.search(rb"(?<![\w.:/])/(tmp|home|root|work|usr|var|opt|mnt|Users)/", path.read_bytes())
        assert found is None, (path, found)
    assert sum(path.stat().st_size for path in files) < 2_500_000
