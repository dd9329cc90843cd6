"""Every kind of damage to any part of a packed layer, in every dialect, is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from dialects import (
    AWQ,
    BITMASK,
    GPTQ,
    PACK_QUANTIZED,
    QUANTIZED,
    layer_tensors,
    save,
    write_folder,
)
from one_layer import LAYER, SCALE_DTYPES, assert_same_weight, random_layer, read_layer, refusal, write_layer
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput, Unsupported

PACKED = (*QUANTIZED, *BITMASK)
INDEXED = ("gptq-v1", "gptq-v2", "gptq-act-order", "ct-pack-group-order")
MAIN = {**dict.fromkeys(PACK_QUANTIZED, "weight_packed"), **dict.fromkeys(BITMASK, "compressed")}


def main_leaf(dialect):
    return MAIN.get(dialect, "qweight")


def scale_leaf(dialect):
    return "weight_scale" if dialect in PACK_QUANTIZED else "scales"


def zeros_leaf(dialect):
    return "weight_zero_point" if dialect in PACK_QUANTIZED else "qzeros"


def index_leaf(dialect):
    return "weight_g_idx" if dialect in PACK_QUANTIZED else "g_idx"


# --- scales ---------------------------------------------------------------------------------------------------------


NO_SCALES = [(dialect, value) for dialect in QUANTIZED for value in (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0)]


# AutoRound's scales may be negative, see test_auto_round.
@pytest.mark.parametrize(("dialect", "value"), [(d, v) for d, v in NO_SCALES if v != -1 or "auto-round" not in d])
def test_scale_that_is_no_scale(tmp_path, dialect, value):
    weight = random_layer(dialect, scale_dtype=SCALE_DTYPES[QUANTIZED.index(dialect) % 3])
    weight.scales[5, -1] = value
    error = refusal(write_layer(tmp_path, dialect, weight), BadInput, scale_leaf(dialect))
    assert error.code == "E_SCALE" and error.where.endswith(f"row 5, group {weight.groups - 1}")


# --- parts ----------------------------------------------------------------------------------------------------------


def leaves(dialect):
    return [name.rpartition(".")[2] for name in layer_tensors(dialect, LAYER, random_layer(dialect))]


PARTS = [(dialect, leaf) for dialect in PACKED for leaf in leaves(dialect)]
# Readers do without the group indices of plain GPTQ; they only say what is known already.
OPTIONAL = [(dialect, "g_idx") for dialect in GPTQ if dialect != "gptq-act-order"]


@pytest.mark.parametrize(("dialect", "leaf"), [part for part in PARTS if part not in OPTIONAL])
def test_missing_part(tmp_path, dialect, leaf):
    path = write_layer(tmp_path, dialect, random_layer(dialect), damage={leaf: None})
    with pytest.raises(BadInput) as caught:
        read_layer(path)
    error = caught.value
    assert str(tmp_path) in error.where and error.code in ("E_TENSOR", "E_G_IDX") and error.fix
    if leaf == main_leaf(dialect):
        # Without its words the layer is no layer any more; what is left of it, or the whole folder, is named.
        assert LAYER in error.where or error.where == str(tmp_path / "config.json")
    else:
        assert f"tensor {LAYER}.{leaf}" in error.where


@pytest.mark.parametrize(("dialect", "leaf"), OPTIONAL)
def test_part_that_may_be_missing(tmp_path, dialect, leaf):
    weight = random_layer(dialect)
    assert_same_weight(read_layer(write_layer(tmp_path, dialect, weight, damage={leaf: None})), weight)


@pytest.mark.parametrize("dialect", PACKED)
def test_one_of_two_layers_without_its_words(tmp_path, dialect):
    """The layer would not be listed at all, and so be left out of the export."""
    weight = random_layer(dialect)
    tensors = {**layer_tensors(dialect, LAYER, weight), **layer_tensors(dialect, "model.layers.1.mlp.up_proj", weight)}
    del tensors[f"{LAYER}.{main_leaf(dialect)}"]
    with ModelFolder.open(write_layer(tmp_path / "a", dialect, weight)) as folder:
        config = dict(folder.config)
    path = save(tmp_path / "b", config, tensors)
    with ModelFolder.open(path) as folder, pytest.raises(BadInput) as caught:
        open_linears(folder)
    assert caught.value.code == "E_TENSOR" and caught.value.where.startswith(f"{path}, tensor {LAYER}.")


RESHAPED = {
    "a row less": lambda a: a[:-1],
    "a row more": lambda a: np.concatenate([a, a[:1]]),
    "a column less": lambda a: a[..., :-1],
    "flat": lambda a: a.reshape(-1) if a.ndim > 1 else a[:, None],
    "no rows": lambda a: a[:0],
    "a number": lambda a: a.reshape(-1)[:1].reshape(()),
    "three axes": lambda a: a[None, None, ...],
}
DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.float16, np.float64, np.bool_]


def is_read(dialect, leaf, dtype):
    """Whether a part may be stored in this dtype, whatever its writer chose."""
    if leaf in ("weight_shape", "shape", "row_offsets", "weight_g_idx"):
        return dtype in (np.int32, np.int64)
    if leaf in ("scales", "weight_scale", "compressed"):
        return dtype == np.float16
    if leaf == "weight_zero_point":
        return dtype in (np.int8, np.int32)
    return dtype == (np.uint8 if leaf == "bitmask" else np.int32)


@pytest.mark.parametrize(("dialect", "leaf"), PARTS)
def test_part_of_another_shape(tmp_path, dialect, leaf):
    weight = random_layer(dialect)
    original = layer_tensors(dialect, LAYER, weight)[f"{LAYER}.{leaf}"]
    for how, change in RESHAPED.items():
        changed = change(original)
        if changed.shape == original.shape or (leaf == "shape" and changed.shape in ((2,), (2, 1))):
            continue
        path = write_layer(tmp_path / how, dialect, weight, damage={leaf: changed})
        with pytest.raises(BadInput) as caught, ModelFolder.open(path) as folder:
            open_linears(folder).read(LAYER)
        assert caught.value.where.startswith(f"{path}, tensor {LAYER}."), how
        assert caught.value.code in ("E_SHAPE", "E_GROUP", "E_BITMASK") and caught.value.fix, how


def without(array, axis):
    return array[tuple(slice(0) if n == axis else slice(None) for n in range(array.ndim))]


@pytest.mark.parametrize("dialect", [*PACKED, "dense"])
@pytest.mark.parametrize("axis", [0, 1])
def test_layer_without_inputs_or_outputs(tmp_path, dialect, axis):
    """Every part is empty along its axis, so that the parts fit each other."""
    settings = {"weight_shape": [[0, 64], [16, 0]][axis], "shape": [[0, 64], [16, 0]][axis]}
    damage = {}
    for leaf in leaves(dialect):
        if leaf in settings:
            damage[leaf] = np.array(settings[leaf], np.int64)
        else:
            packed_along_inputs = dialect.startswith(("gptq", "auto-round", "awq-gemm")) and dialect != "awq-gemv"
            place = 1 - axis if packed_along_inputs and leaf != "g_idx" else axis
            damage[leaf] = lambda array, place=place: without(array, min(place, array.ndim - 1))
    path = write_layer(tmp_path, dialect, random_layer(dialect), damage=damage)
    with ModelFolder.open(path) as folder, pytest.raises(BadInput) as caught:
        open_linears(folder).format_of(LAYER)
    assert caught.value.where.startswith(f"{path}, tensor {LAYER}.") and caught.value.fix


@pytest.mark.parametrize(("dialect", "leaf"), PARTS)
def test_part_of_another_dtype(tmp_path, dialect, leaf):
    weight = random_layer(dialect)
    original = layer_tensors(dialect, LAYER, weight)[f"{LAYER}.{leaf}"]
    assert is_read(dialect, leaf, original.dtype)
    for dtype in DTYPES:
        if not is_read(dialect, leaf, dtype):
            path = write_layer(
                tmp_path / dtype.__name__, dialect, weight, damage={leaf: np.ones(original.shape, dtype)}
            )
            assert refusal(path, BadInput, leaf).code == "E_SHAPE"


@pytest.mark.parametrize("dialect", PACKED)
@pytest.mark.parametrize("leaf", ["weight", "hadamard_matrix", "lora_A", "input_scale"])
def test_a_packed_layer_with_a_tensor_too_many(tmp_path, dialect, leaf):
    """A weight beside the words would be dropped; a matrix inside the layer would change what it computes."""
    path = write_layer(tmp_path, dialect, random_layer(dialect), damage={leaf: np.ones((16, 64), np.float16)})
    error = refusal(path, BadInput if leaf == "weight" else Unsupported, leaf)
    assert error.code == "E_TENSOR"


@pytest.mark.parametrize("dialect", PACKED)
def test_a_bias_is_a_tensor_of_its_own(tmp_path, dialect):
    weight = random_layer(dialect)
    path = write_layer(tmp_path, dialect, weight, damage={"bias": np.ones(16, np.float16)})
    assert_same_weight(read_layer(path), weight)
    with ModelFolder.open(path) as folder:
        assert f"{LAYER}.bias" not in open_linears(folder).part_names()


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_zero_point", "qzeros", "scales", "g_idx", "bitmask"])
@pytest.mark.parametrize("dialect", ["dense", "ct-pack-asym", "awq-gemm", "sparse-bitmask"])
def test_part_beside_a_plain_weight(tmp_path, dialect, leaf):
    """Fake-quantised layers are stored so; the weight alone is not what the model computes with."""
    other = "model.layers.0.mlp.gate_proj"
    tensors = {f"{other}.weight": np.ones((8, 8), np.float16), f"{other}.{leaf}": np.ones((8, 1), np.float16)}
    weight = random_layer(dialect)
    path = write_folder(tmp_path, dialect, {LAYER: weight}, tensors, {"model_type": "llama"})
    with ModelFolder.open(path) as folder, pytest.raises(BadInput) as caught:
        open_linears(folder)
    assert caught.value.where == f"{path}, tensor {other}.{leaf}" and caught.value.fix


# --- group indices --------------------------------------------------------------------------------------------------

G_IDX = {
    "out of range": lambda a: np.where(a == a.max(), a.max() + 1, a),
    "negative": lambda a: a - 1,
    "one negative": lambda a: np.where(np.arange(a.size) == 7, -1, a),
    "enormous": lambda a: np.where(np.arange(a.size) == 7, 2**31 - 1, a),
    "short": lambda a: a[:-8],
    "long": lambda a: np.concatenate([a, a]),
    "floats": lambda a: a.astype(np.float32),
    "two axes": lambda a: a[None],
    "empty": lambda a: a[:0],
    "one group taken twice": lambda a: np.where(np.arange(a.size) == int(np.argmax(a == a.max())), 0, a),
}


@pytest.mark.parametrize("dialect", INDEXED)
@pytest.mark.parametrize("case", G_IDX)
def test_damaged_group_indices(tmp_path, dialect, case):
    leaf = index_leaf(dialect)

    def change(array):
        changed = G_IDX[case](array)
        return changed if changed.dtype.kind == "f" else changed.astype(array.dtype)

    path = write_layer(tmp_path, dialect, random_layer(dialect), damage={leaf: change})
    error = refusal(path, BadInput, leaf)
    assert error.code in ("E_G_IDX", "E_SHAPE")


@pytest.mark.parametrize("dialect", INDEXED)
def test_an_order_of_columns_is_never_ignored(tmp_path, dialect):
    """Also where the settings do not speak of act-order."""
    weight = random_layer(dialect, columns=64, group_size=16)
    g_idx = np.random.default_rng(9).permutation(np.repeat(np.arange(4), 16)).astype(np.int32)
    found = read_layer(write_layer(tmp_path, dialect, weight, damage={index_leaf(dialect): g_idx}))
    assert np.array_equal(found.input_order, np.argsort(g_idx, kind="stable"))
    in_order = write_layer(tmp_path / "x", dialect, weight, damage={index_leaf(dialect): np.sort(g_idx)})
    plain = read_layer(in_order)
    assert plain.input_order is None
    assert np.array_equal(found.codes, plain.codes[:, found.input_order])


# --- group sizes and bits ---------------------------------------------------------------------------------------------


def at_weights(change):
    """Change the part of the settings that speaks of weights, wherever the dialect keeps it."""

    def apply(raw):
        groups = raw.get("config_groups")
        change(groups["group_0"]["weights"] if groups else raw)

    return apply


def rename(raw, key):
    return {"bits": "num_bits", "sym": "symmetric"}.get(key, key) if "num_bits" in raw else key


GROUPED = [d for d in QUANTIZED if d not in ("gptq-channel", "ct-pack-channel")]


@pytest.mark.parametrize("dialect", GROUPED)
@pytest.mark.parametrize("size", [0, -2, 1.5, "32", True, [32], {}])
def test_impossible_group_size(tmp_path, dialect, size):
    settings = at_weights(lambda raw: raw.update(group_size=size))
    error = refusal(write_layer(tmp_path, dialect, random_layer(dialect), settings=settings), BadInput)
    assert error.code in ("E_GROUP", "E_QUANT_CONFIG")


@pytest.mark.parametrize("dialect", GROUPED)
def test_missing_group_size(tmp_path, dialect):
    settings = at_weights(lambda raw: raw.pop("group_size"))
    path = write_layer(tmp_path, dialect, random_layer(dialect), settings=settings)
    # AWQ has a default, 128; it does not fit this layer.
    refusal(path, BadInput, "scales" if dialect in AWQ else None)


@pytest.mark.parametrize("dialect", GROUPED)
@pytest.mark.parametrize("size", [1, 16, 24, 48, 64, 128, 2**40])
def test_group_size_that_is_not_the_layers(tmp_path, dialect, size):
    settings = at_weights(lambda raw: raw.update(group_size=size))
    path = write_layer(tmp_path, dialect, random_layer(dialect), settings=settings)
    with pytest.raises(BadInput) as caught:
        read_layer(path)
    assert caught.value.code in ("E_GROUP", "E_SHAPE", "E_SCALE") and caught.value.fix
    assert caught.value.where.startswith(f"{path}, tensor {LAYER}.")


@pytest.mark.parametrize("dialect", QUANTIZED)
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 8, 16])
def test_other_than_four_bits(tmp_path, dialect, bits):
    settings = at_weights(lambda raw: raw.update({rename(raw, "bits"): bits}))
    error = refusal(write_layer(tmp_path, dialect, random_layer(dialect), settings=settings), Unsupported)
    assert error.code == "E_BITS" and "4" in error.fix and str(bits) in error.found


@pytest.mark.parametrize("dialect", QUANTIZED)
def test_floating_point_codes(tmp_path, dialect):
    key = "type" if dialect in PACK_QUANTIZED else "data_type"
    settings = at_weights(lambda raw: raw.update({key: "float" if dialect in PACK_QUANTIZED else "fp4"}))
    refusal(write_layer(tmp_path, dialect, random_layer(dialect), settings=settings), Unsupported)


@pytest.mark.parametrize("dialect", [d for d in QUANTIZED if d != "ct-pack-sym"])
def test_settings_say_symmetric_but_zero_points_vary(tmp_path, dialect):
    change = {"zero_point": False} if dialect.startswith("awq") else {"sym": True}
    settings = at_weights(lambda raw: raw.update({rename(raw, key): value for key, value in change.items()}))
    error = refusal(
        write_layer(tmp_path, dialect, random_layer(dialect), settings=settings), BadInput, zeros_leaf(dialect)
    )
    assert error.code == "E_ZEROS" and "config.json" in error.fix
