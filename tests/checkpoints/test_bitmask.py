"""compressed-tensors' bitmask layouts: literal bytes, round trips with a naive writer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dialects import BITMASK, save
from one_layer import LAYER, SCALE_DTYPES, assert_same_weight, random_layer, read_layer, refusal, write_layer
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import DenseWeight


def stored(path, layout, tensors):
    settings = {"quant_method": "compressed-tensors", "sparsity_config": {"format": layout}, "version": "0.12.2"}
    config = {"model_type": "llama", "quantization_config": settings}
    return save(path, config, {f"{LAYER}.{leaf}": a for leaf, a in tensors.items() if a is not None})


# Ten columns, so the second byte of a row has two bits; the fourth kept value is a zero.
SPARSE = {
    "shape": np.array([2, 10]),
    "bitmask": np.array([[0x01, 0x02], [0x86, 0x01]], np.uint8),
    "compressed": np.array([1, 2, 3, 0, 5, 6], np.float16),
    "row_offsets": np.array([0, 2]),
}
TWO_OF_FOUR = {
    "shape": np.array([[1], [12]]),
    "bitmask": np.array([[0b10100011, 0b0110]], np.uint8),
    "compressed": np.array([[1, 2, 3, 0, -5, 6]], np.float16),
}


def test_golden_bytes_of_sparse_bitmask(tmp_path):
    weight = read_layer(stored(tmp_path, "sparse-bitmask", SPARSE))
    assert isinstance(weight, DenseWeight) and weight.values.dtype == np.float16
    assert weight.values.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0, 2], [0, 3, 0, 0, 0, 0, 0, 5, 6, 0]]
    # Column 2 of the second row is zero and kept: the mask is what the file says, not what is not zero.
    assert np.argwhere(weight.mask).tolist() == [[0, 0], [0, 9], [1, 1], [1, 2], [1, 7], [1, 8]]


def test_golden_bytes_of_sparse_24_bitmask(tmp_path):
    weight = read_layer(stored(tmp_path, "sparse-24-bitmask", TWO_OF_FOUR))
    assert weight.values.tolist() == [[1, 2, 0, 0, 0, 3, 0, 0, 0, -5, 6, 0]]
    assert np.argwhere(weight.mask)[:, 1].tolist() == [0, 1, 5, 7, 9, 10]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_of_either_width(tmp_path, dtype):
    narrow = {**SPARSE, "shape": SPARSE["shape"].astype(dtype), "row_offsets": SPARSE["row_offsets"].astype(dtype)}
    weight = read_layer(stored(tmp_path, "sparse-bitmask", narrow))
    assert weight.values[1, 8] == 6


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bitmask")


def bits_of(dtype):
    return {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]


@given(st.data(), st.sampled_from(SCALE_DTYPES))
def test_round_trip(scratch, data, dtype):
    """Any bit pattern as a value, also NaN and minus zero; any mask, with empty and full rows."""
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    mask = data.draw(hnp.arrays(np.bool_, shape))
    values = np.where(mask, data.draw(hnp.arrays(bits_of(dtype), shape)), 0).astype(bits_of(dtype)).view(dtype)
    weight = DenseWeight(values, mask)
    assert_same_weight(read_layer(write_layer(scratch, "sparse-bitmask", weight)), weight)


@given(st.data(), st.sampled_from(SCALE_DTYPES))
def test_round_trip_of_two_in_four(scratch, data, dtype):
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    keeps = [
        [True, True, False, False],
        [False, True, True, False],
        [True, False, False, True],
        [False] * 2 + [True] * 2,
    ]
    chosen = data.draw(st.lists(st.sampled_from(keeps), min_size=rows * blocks, max_size=rows * blocks))
    mask = np.array(chosen).reshape(rows, 4 * blocks)
    values = np.where(mask, data.draw(hnp.arrays(bits_of(dtype), mask.shape)), 0).astype(bits_of(dtype)).view(dtype)
    weight = DenseWeight(values, mask)
    assert_same_weight(read_layer(write_layer(scratch, "sparse-24-bitmask", weight)), weight)


@pytest.mark.parametrize("dialect", BITMASK)
def test_a_pruned_model_with_kept_zeros(tmp_path, dialect):
    weight = random_layer(dialect, scale_dtype=ml_dtypes.bfloat16)
    assert (weight.values[weight.mask] == 0).any()
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, weight)), weight)


def test_a_layer_that_is_all_pruned(tmp_path):
    weight = DenseWeight(np.zeros((3, 5), np.float32), np.zeros((3, 5), bool))
    assert_same_weight(read_layer(write_layer(tmp_path, "sparse-bitmask", weight)), weight)


@pytest.mark.parametrize("layout", BITMASK)
def test_dense_layers_stand_beside_sparse_ones(tmp_path, layout):
    dense = random_layer("dense")
    path = write_layer(tmp_path, layout, random_layer(layout))
    other = "model.layers.0.mlp.down_proj"
    weight = read_layer(write_layer(path, layout, random_layer(layout), damage={"weight": None}))
    assert weight.mask is not None
    tensors = {f"{other}.weight": dense.values}
    tensors |= {f"{LAYER}.{leaf}": a for leaf, a in (SPARSE if layout == "sparse-bitmask" else TWO_OF_FOUR).items()}
    settings = {"quant_method": "compressed-tensors", "sparsity_config": {"format": layout}}
    save(path, {"quantization_config": settings}, tensors)
    assert_same_weight(read_layer(path, other), dense)
    assert read_layer(path).mask is not None


# --- damage -----------------------------------------------------------------------------------------------------------


def changed(array, index, value):
    copy = array.copy()
    copy[index] = value
    return copy


BITS, OFFSETS = SPARSE["bitmask"], SPARSE["row_offsets"]
DAMAGE = {
    "a bit more": ("bitmask", changed(BITS, (0, 0), 0x03), "bitmask", "E_BITMASK"),
    "a bit less": ("bitmask", changed(BITS, (0, 0), 0x00), "bitmask", "E_BITMASK"),
    "a bit moved to another row": (
        "bitmask",
        np.array([[0x03, 0x02], [0x82, 0x01]], np.uint8),
        "row_offsets",
        "E_BITMASK",
    ),
    "a bit beyond the columns": ("bitmask", changed(BITS, (0, 1), 0x04), "bitmask", "E_BITMASK"),
    "a value more": ("compressed", np.ones(7, np.float16), "bitmask", "E_BITMASK"),
    "a value less": ("compressed", np.ones(5, np.float16), "bitmask", "E_BITMASK"),
    "no values": ("compressed", np.ones(0, np.float16), "bitmask", "E_BITMASK"),
    "values of 2:4": ("compressed", np.ones((2, 3), np.float16), "compressed", "E_SHAPE"),
    "values as integers": ("compressed", np.ones(6, np.int32), "compressed", "E_SHAPE"),
    "offsets falling": ("row_offsets", np.array([2, 0]), "row_offsets", "E_BITMASK"),
    "offsets of the ends": ("row_offsets", np.array([2, 6]), "row_offsets", "E_BITMASK"),
    "offsets negative": ("row_offsets", np.array([0, -4]), "row_offsets", "E_BITMASK"),
    "offsets wrapped": ("row_offsets", np.array([0, 2 + 2**32]), "row_offsets", "E_BITMASK"),
    "offsets short": ("row_offsets", OFFSETS[:1], "row_offsets", "E_SHAPE"),
    "offsets long": ("row_offsets", np.array([0, 2, 6]), "row_offsets", "E_SHAPE"),
    "offsets float": ("row_offsets", OFFSETS.astype(np.float32), "row_offsets", "E_SHAPE"),
    "mask as int8": ("bitmask", BITS.view(np.int8), "bitmask", "E_SHAPE"),
    "mask flat": ("bitmask", BITS.reshape(-1), "bitmask", "E_SHAPE"),
    "mask of one row": ("bitmask", BITS[:1], "bitmask", "E_SHAPE"),
    "mask too wide": ("bitmask", np.zeros((2, 3), np.uint8), "bitmask", "E_SHAPE"),
    "shape too wide": ("shape", np.array([2, 17]), "bitmask", "E_SHAPE"),
    "shape too narrow": ("shape", np.array([2, 9]), "bitmask", "E_BITMASK"),
    "shape transposed": ("shape", np.array([10, 2]), "bitmask", "E_SHAPE"),
    "shape enormous": ("shape", np.array([2**40, 2**40]), "bitmask", "E_SHAPE"),
    "shape negative": ("shape", np.array([2, -10]), "shape", "E_SHAPE"),
    "shape empty": ("shape", np.array([0, 10]), "shape", "E_SHAPE"),
    "shape of three": ("shape", np.array([1, 2, 10]), "shape", "E_SHAPE"),
    "shape as floats": ("shape", np.array([2.0, 10.0], np.float32), "shape", "E_SHAPE"),
    "no offsets": ("row_offsets", None, "row_offsets", "E_TENSOR"),
    "no mask": ("bitmask", None, "bitmask", "E_TENSOR"),
    "no shape": ("shape", None, "shape", "E_TENSOR"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sparse_bitmask(tmp_path, case):
    leaf, array, named, code = DAMAGE[case]
    assert refusal(stored(tmp_path, "sparse-bitmask", {**SPARSE, leaf: array}), BadInput, named).code == code


DAMAGE_24 = {
    "three in a block": ("bitmask", np.array([[0b10100111, 0b0100]], np.uint8), "bitmask", "E_BITMASK"),
    "a bit less": ("bitmask", np.array([[0b10100001, 0b0110]], np.uint8), "bitmask", "E_BITMASK"),
    "a bit beyond the columns": ("bitmask", np.array([[0b10100011, 0b10110]], np.uint8), "bitmask", "E_BITMASK"),
    "values in a row": ("compressed", np.ones(6, np.float16), "compressed", "E_SHAPE"),
    "a column less": ("compressed", np.ones((1, 5), np.float16), "compressed", "E_SHAPE"),
    "no mask": ("bitmask", None, "bitmask", "E_TENSOR"),
    "no shape": ("shape", None, "shape", "E_TENSOR"),
}


@pytest.mark.parametrize("case", DAMAGE_24)
def test_damaged_sparse_24_bitmask(tmp_path, case):
    leaf, array, named, code = DAMAGE_24[case]
    assert refusal(stored(tmp_path, "sparse-24-bitmask", {**TWO_OF_FOUR, leaf: array}), BadInput, named).code == code


@pytest.mark.parametrize(("named", "other", "tensors"), [(*BITMASK, TWO_OF_FOUR), (*BITMASK[::-1], SPARSE)])
def test_the_other_layout_than_the_config_says(tmp_path, named, other, tensors):
    assert refusal(stored(tmp_path / "a", named, tensors), BadInput, "compressed").code == "E_SHAPE"
    read_layer(stored(tmp_path / "b", other, tensors))


def test_bad_row_is_named(tmp_path):
    error = refusal(
        stored(tmp_path, "sparse-bitmask", {**SPARSE, "row_offsets": np.array([0, 3])}), BadInput, "row_offsets"
    )
    assert error.where.endswith("row 1")


def test_two_in_four_of_columns_that_fill_no_blocks(tmp_path):
    ten = {"shape": np.array([[1], [10]]), "compressed": np.ones((1, 5), np.float16)}
    path = stored(tmp_path, "sparse-24-bitmask", {**TWO_OF_FOUR, "bitmask": np.array([[0x33, 1]], np.uint8), **ten})
    error = refusal(path, BadInput, "compressed")
    assert error.code == "E_SHAPE" and error.found == "10"


@pytest.mark.parametrize("layout", BITMASK)
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "E_QUANT_CONFIG"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "E_QUANT_CONFIG"),
        ({"config_groups": {"group_0": {}}}, "E_QUANT_METHOD"),
    ],
)
def test_settings_beyond_sparsity(tmp_path, layout, change, code):
    path = write_layer(tmp_path, layout, random_layer(layout), settings=lambda raw: raw.update(change))
    assert refusal(path, Unsupported).code == code


@pytest.mark.parametrize("layout", ["sparse-quantized", "bitmask", 24, None])
def test_unknown_sparse_layout(tmp_path, layout):
    path = write_layer(
        tmp_path,
        "sparse-bitmask",
        random_layer("sparse-bitmask"),
        settings=lambda raw: raw.update(sparsity_config={"format": layout}),
    )
    assert refusal(path, Unsupported).code == "E_QUANT_METHOD"


@pytest.mark.parametrize("spare", [None, "dense"])
def test_a_pruned_model_that_was_saved_plainly(tmp_path, spare):
    """llm-compressor writes its settings even when it stores plain tensors."""
    dense = random_layer("dense")
    settings = {"quant_method": "compressed-tensors", "version": "0.12.2"}
    settings["sparsity_config"] = {"format": "dense", "global_sparsity": 0.5} if spare is None else spare
    path = save(tmp_path, {"quantization_config": settings}, {f"{LAYER}.weight": dense.values})
    if spare is None:
        assert_same_weight(read_layer(path), dense)
    else:
        assert refusal(path, BadInput).code == "E_QUANT_CONFIG"
