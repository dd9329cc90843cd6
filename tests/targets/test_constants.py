"""Constants in a graph: OpenVINO's CPU plugin computes with them what numpy computes with the weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparseport.errors import FidelityError, VerificationError
from sparseport.targets.openvino import readback
from sparseport.targets.openvino.constants import swap_constants
from sparseport.targets.openvino.store import WeightStore
from sparseport.weights.digest import digest
from sparseport.weights.grouping import collapse
from sparseport.weights.layouts import GroupLayout, in_layout, openvino_layout
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.rounding import dequantize

ov = pytest.importorskip("openvino")

NAME = "layer.weight"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def _skeleton(out: int, cols: int) -> Any:
    """x [?, in] @ placeholder f16 [out, in]^T, as the traced graph has it."""
    from openvino import opset13 as ops

    x = ops.parameter([-1, cols], np.float32, name="x")
    placeholder = ops.constant(np.zeros((out, cols), np.float16), name="placeholder")
    convert = ops.convert(placeholder, "f32", name="convert")
    y = ops.result(ops.matmul(x, convert, False, True, name="__module.layer/matmul"), name="y")
    return ov.Model([y], [x], "skeleton")


def _weight(
    out: int, cols: int, group: int, *, symmetric: bool = False, dtype: Any = np.float16, order: bool = False
) -> QuantizedWeight:
    dice = np.random.default_rng(out + cols + group)
    shape = (out, cols // group)
    return QuantizedWeight(
        codes=dice.integers(0, 16, (out, cols), np.uint8),
        scales=dice.uniform(0.01, 0.1, shape).astype(dtype),
        zero_points=np.full(shape, 8, np.uint8) if symmetric else dice.integers(0, 16, shape, np.uint8),
        group_size=group,
        input_order=dice.permutation(cols).astype(np.int32) if order else None,
    )


def _export(weight: Any, stored: Any, tmp_path: Path) -> Path:
    model = _skeleton(*weight.shape)
    with WeightStore(tmp_path / "weights.pack") as store:
        entry = store.add_quantized(stored) if isinstance(stored, QuantizedWeight) else store.add_dense(stored.values)
        alive = swap_constants(model, {NAME: "placeholder"}, {NAME: entry}, store)
        ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
        del alive
    return tmp_path / "model.xml"


def _run(xml: Path, x: Any) -> Any:
    return ov.Core().compile_model(xml, "CPU", EXACT)(x)[0]


@pytest.mark.parametrize("group", [1, 3, 5, 8, 12, 15, 16, 20, 32, 48, 60, 64, 80, 96, 192, 320, 960])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_every_group_size_computes_right(tmp_path: Path, group: int, symmetric: bool, order: bool) -> None:
    """48, 80 and 96 are sizes for which the CPU plugin gives garbage, in f32 or bf16, unless they are split; 5, 15 and
    60 are filled up."""
    weight = _weight(24, 960, group, symmetric=symmetric, order=order)
    xml = _export(weight, in_layout(weight, openvino_layout(group, 960, "layer")), tmp_path)
    x = np.random.default_rng(0).normal(size=(3, 960)).astype(np.float32)
    assert np.allclose(_run(xml, x), x @ dequantize(weight).T, rtol=1e-4, atol=1e-4)
    (item,) = readback.weights(readback.read_model(xml))
    assert isinstance(item.weight, QuantizedWeight) and item.element_type == ("i4" if symmetric else "u4")
    assert digest(collapse(item.weight, group, "layer")) == digest(weight)


def test_a_filling_column_that_is_not_zero_is_found(tmp_path: Path) -> None:
    weight = _weight(8, 60, 12)
    filled = in_layout(weight, GroupLayout(12, 16))
    codes = filled.codes.copy()
    codes[3, 15] ^= 1
    xml = _export(weight, replace(filled, codes=codes), tmp_path)
    with pytest.raises(FidelityError, match="fills up"):
        list(readback.weights(readback.read_model(xml)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", [False, True])
def test_scale_dtypes_and_act_order(tmp_path: Path, dtype: Any, order: bool) -> None:
    weight = _weight(16, 128, 32, dtype=dtype, order=order)
    xml = _export(weight, weight, tmp_path)
    x = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    assert np.allclose(_run(xml, x), x @ dequantize(weight).T, rtol=1e-4, atol=1e-4)
    (item,) = readback.weights(readback.read_model(xml))
    assert isinstance(item.weight, QuantizedWeight)
    assert np.array_equal(item.weight.codes, weight.codes)
    assert np.array_equal(item.weight.scales.astype(np.float32), weight.scales.astype(np.float32))
    assert (item.weight.input_order is None) != order
    if order:
        assert np.array_equal(item.weight.input_order, weight.input_order)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_dense_weights(tmp_path: Path, dtype: Any) -> None:
    values = np.random.default_rng(0).normal(size=(16, 64)).astype(dtype)
    weight = DenseWeight(values)
    xml = _export(weight, weight, tmp_path)
    (item,) = readback.weights(readback.read_model(xml))
    assert item.name == NAME and isinstance(item.weight, DenseWeight)
    assert np.array_equal(item.weight.values.astype(np.float32), values.astype(np.float32))
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    assert np.allclose(_run(xml, x), x @ values.astype(np.float32).T, rtol=1e-4, atol=1e-4)


def test_packed_bytes_are_openvinos_own(tmp_path: Path) -> None:
    """Literal bytes: element 2k in the low nibble; i4 is two's complement."""
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8)
    scales = np.ones((1, 1), np.float16)
    with WeightStore(tmp_path / "w") as store:
        unsigned = store.add_quantized(QuantizedWeight(codes, scales, np.array([[3]], np.uint8), 8))
        signed = store.add_quantized(QuantizedWeight(codes, scales, np.array([[8]], np.uint8), 8))
        assert bytes(store.view(unsigned.codes)) == b"\x21\x43\x65\x87"
        assert unsigned.zero_points is not None and bytes(store.view(unsigned.zero_points)) == b"\x03"
        # 1 - 8 = -7 is nibble 9, 2 - 8 = -6 is nibble A, ..., 8 - 8 = 0.
        assert bytes(store.view(signed.codes)) == b"\xa9\xcb\xed\x0f" and signed.zero_points is None


def test_identical_exports_give_identical_files(tmp_path: Path) -> None:
    weight = _weight(16, 128, 32, order=True)
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        xml = _export(weight, weight, tmp_path / name)
        files.append((xml.read_bytes(), xml.with_suffix(".bin").read_bytes()))
    assert files[0] == files[1]


def test_missing_or_unfit_places_are_refused(tmp_path: Path) -> None:
    weight = _weight(16, 128, 32)
    with WeightStore(tmp_path / "w") as store:
        entry = store.add_quantized(weight)
        with pytest.raises(FidelityError, match="no place"):
            swap_constants(_skeleton(16, 128), {NAME: "elsewhere"}, {NAME: entry}, store)
        with pytest.raises(FidelityError, match="does not fit"):
            swap_constants(_skeleton(16, 64), {NAME: "placeholder"}, {NAME: entry}, store)


@pytest.mark.parametrize("broken", ["no_multiply", "not_used"])
def test_read_back_follows_the_graph(broken: str) -> None:
    """Codes that stand in the file, but are not dequantised into a linear layer, do not count."""
    from openvino import opset13 as ops

    codes = ops.constant(np.ones((4, 8), np.uint8), name="layer.codes")
    value = ops.convert(codes, "f32")
    zero_points = ops.convert(ops.constant(np.ones((4, 1), np.uint8)), "f32")
    value = ops.subtract(value, zero_points)
    scales = ops.constant(np.ones((4, 1), np.float32))
    value = ops.add(value, scales) if broken == "no_multiply" else ops.multiply(value, scales)
    x = ops.parameter([-1, 8], np.float32)
    y = ops.matmul(x, value, False, True) if broken == "no_multiply" else ops.add(ops.reduce_sum(x, 0), value)
    with pytest.raises(VerificationError):
        list(readback.weights(ov.Model([y], [x], "broken")))
