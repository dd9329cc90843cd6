"""One linear layer in a folder: made at random, written in a dialect, damaged on the way, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dialects import (
    ACT_ORDER,
    AWQ,
    BITMASK,
    ONE_GROUP,
    PACK_QUANTIZED,
    Weight,
    layer_tensors,
    quantization_config,
    random_order,
    save,
    stored_as,
)
from sparseport.checkpoints.detect import open_linears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import SparseportError
from sparseport.weights.linear import DenseWeight, QuantizedWeight

LAYER = "model.layers.0.mlp.up_proj"
SCALE_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def random_layer(
    dialect: str,
    out: int = 16,
    columns: int = 64,
    group_size: int = 32,
    *,
    scale_dtype: Any = np.float16,
    seed: int = 0,
) -> Weight:
    """A layer that a dialect can hold; codes and zero-points anywhere in 0..15, not as training would leave them."""
    random = np.random.default_rng(seed)
    if dialect in (*BITMASK, "dense"):
        return stored_as(random.normal(size=(out, columns)).astype(scale_dtype), dialect, group_size, random)
    group_size = columns if dialect in ONE_GROUP else group_size
    groups = columns // group_size
    zero_points = random.integers(0, 16, (out, groups)) if dialect != "ct-pack-sym" else np.full((out, groups), 8)
    return QuantizedWeight(
        codes=random.integers(0, 16, (out, columns)).astype(np.uint8),
        scales=random.uniform(0.01, 0.1, (out, groups)).astype(scale_dtype),
        zero_points=zero_points.astype(np.uint8),
        group_size=group_size,
        input_order=random_order(columns, group_size, random) if dialect in ACT_ORDER else None,
    )


@st.composite
def layers(draw: st.DrawFn, dialect: str, scale_dtype: Any = np.float16) -> QuantizedWeight:
    """Small layers that a quantising dialect can hold: any codes, any zero-points, any scale above zero."""
    free = dialect in PACK_QUANTIZED
    out = draw(st.integers(1, 20)) if free else 8 * draw(st.integers(1, 2))
    if dialect == "awq-gemv":
        group_size = draw(st.sampled_from([32, 64, 128]))
    else:
        group_size = draw(st.integers(1, 12)) if free or dialect in AWQ else draw(st.sampled_from([4, 8, 24]))
    groups = 2 * draw(st.integers(1, 2)) + (group_size % 8 == 0 or free)
    columns = group_size * groups
    if dialect in ONE_GROUP:
        group_size, groups = columns, 1
    zero_points = st.just(8) if dialect == "ct-pack-sym" else st.integers(0, 15)
    order = None
    if dialect in ACT_ORDER:
        order = random_order(columns, group_size, np.random.default_rng(draw(st.integers(0, 99))))
        order = None if np.array_equal(order, np.arange(columns)) else order
    return QuantizedWeight(
        codes=draw(hnp.arrays(np.uint8, (out, columns), elements=st.integers(0, 15))),
        scales=draw(_positive(scale_dtype, (out, groups))),
        zero_points=draw(hnp.arrays(np.uint8, (out, groups), elements=zero_points)),
        group_size=group_size,
        input_order=order,
    )


def _positive(dtype: Any, shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any positive finite numbers, by their bits: subnormal ones too."""
    bits, largest = {np.float16: (np.uint16, 0x7BFF), ml_dtypes.bfloat16: (np.uint16, 0x7F7F)}.get(
        dtype, (np.uint32, 0x7F7FFFFF)
    )
    return hnp.arrays(bits, shape, elements=st.integers(1, largest)).map(lambda array: array.view(dtype))


def write_layer(
    path: Path,
    dialect: str,
    weight: Weight,
    *,
    settings: Callable[[dict[str, Any]], Any] | None = None,
    damage: Mapping[str, Any] | None = None,
) -> Path:
    """A folder with one linear layer, `LAYER`.

    settings  changes the quantization_config in place, or returns what stands there instead
    damage    leaf -> function of the array, a new array, or None to leave the tensor out
    """
    tensors = {"model.norm.weight": np.ones(4, np.float16), **layer_tensors(dialect, LAYER, weight)}
    for leaf, change in (damage or {}).items():
        name = f"{LAYER}.{leaf}"
        array = change(tensors[name]) if callable(change) else change
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    written = quantization_config(dialect, {LAYER: weight})
    if settings is not None:
        returned = settings(written)
        written = written if returned is None else returned
    config: dict[str, Any] = {"model_type": "llama"}
    if written:
        config["quantization_config"] = written
    return save(path, config, tensors)


def read_layer(path: Path, module: str = LAYER, **options: Any) -> Weight:
    """A layer as the package reads it; what the headers promise must be what is read."""
    with ModelFolder.open(path) as folder:
        linears = open_linears(folder, **options)
        form = linears.format_of(module)
        weight = linears.read(module)
        assert form.shape == weight.shape and linears.has(module)
        if isinstance(weight, QuantizedWeight):
            assert (form.bits, form.group_size) == (4, weight.group_size) and form.dtype == weight.scales.dtype.name
            assert not form.symmetric or bool((weight.zero_points == 8).all())
        else:
            assert form.bits is None and form.dtype == weight.values.dtype.name
        return weight


def assert_same_weight(found: Weight, wanted: Weight) -> None:
    """Equal in kind, values, dtypes, groups, column order and mask."""
    assert type(found) is type(wanted)
    parts = ("values", "mask") if isinstance(wanted, DenseWeight) else ("codes", "scales", "zero_points", "input_order")
    for part in parts:
        left, right = getattr(found, part), getattr(wanted, part)
        assert (left is None) == (right is None), part
        if left is not None:
            assert left.dtype == right.dtype and left.shape == right.shape, part
            assert left.tobytes() == np.ascontiguousarray(right).tobytes(), part
    if isinstance(found, QuantizedWeight) and isinstance(wanted, QuantizedWeight):
        assert (found.group_size, found.bits) == (wanted.group_size, wanted.bits)


def refusal(path: Path, kind: type[SparseportError], tensor: str | None = None) -> SparseportError:
    """The error that opening and reading the layer ends in, checked for what every error owes its reader.

    tensor  the leaf of LAYER that the message must name; None = the message must name config.json
    """
    try:
        read_layer(path)
    except SparseportError as error:
        assert type(error) is kind, str(error)
        assert error.exit_code == {"BadInput": 3, "Unsupported": 7}[kind.__name__]
        wanted = f"{path / 'config.json'}" if tensor is None else f"{path}, tensor {LAYER}.{tensor}"
        assert error.where is not None and error.where.startswith(wanted), str(error)
        assert error.fix and error.code.startswith("E_"), str(error)
        return error
    raise AssertionError(f"read without an error, {kind.__name__} was expected")
