"""Digests: a fixed canonical form, and every single change shows."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.weights.digest import array_digest, digest, mask_digest
from sparseport.weights.linear import DenseWeight, QuantizedWeight

ORDER = np.array([1, 3, 0, 2], np.int32)


def quantized(order=None, scale_type=np.float16):
    return QuantizedWeight(
        np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8),
        np.array([[0.5, 1.5], [2.0, 0.25]], scale_type),
        np.array([[8, 7], [0, 15]], np.uint8),
        2,
        input_order=order,
    )


def sha(header, *parts):
    return hashlib.sha256(header.encode() + b"".join(parts)).hexdigest()


def test_canonical_form_of_a_quantised_weight():
    assert digest(quantized()) == "7da2ecf203c696ef0933f9d85edffa52603fec739d32d18d221802a164d5c3f8"
    assert digest(quantized()) == sha(
        "quantized 2x4 bits=4 group=2 scales=float16 order=none\n",
        bytes([1, 2, 3, 4, 5, 6, 7, 8]),
        bytes([8, 7, 0, 15]),
        bytes.fromhex("0038003e00400034"),
    )


def test_canonical_form_of_an_act_order_weight():
    assert digest(quantized(ORDER)) == "1456f84b65c66d6551fca3fbd5438b973bd8dc59e42f0653686851a41658af0d"
    assert digest(quantized(ORDER)) == sha(
        "quantized 2x4 bits=4 group=2 scales=float16 order=i32\n",
        bytes([1, 2, 3, 4, 5, 6, 7, 8]),
        bytes([8, 7, 0, 15]),
        bytes.fromhex("0038003e00400034"),
        bytes.fromhex("01000000030000000000000002000000"),
    )


DENSE = {
    "float16": ("74344e965e954599327565b78fb2b80651cef5517e5d4806be217f49ffd80077", "0000003c00c0"),
    "bfloat16": ("e40aa0e200895c3670a75cae0b432c0e3eb8ddfa708089f1a233c82f5abf6135", "0000803f00c0"),
    "float32": ("4e5e2e2846d91c67cc3287cbe93ccfe062f37a3110325863ad433370bfe05a39", "000000000000803f000000c0"),
}


@pytest.mark.parametrize("name", DENSE)
def test_canonical_form_of_dense_weights(name):
    golden, data = DENSE[name]
    values = np.array([[0.0, 1.0, -2.0]], ml_dtypes.bfloat16 if name == "bfloat16" else name)
    assert digest(DenseWeight(values)) == array_digest(values) == golden
    assert golden == sha(f"dense 1x3 {name}\n", bytes.fromhex(data))


def test_canonical_form_of_a_mask():
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0, 1, 0]], bool)
    assert mask_digest(mask) == "1d6f19350f5f223724e8a1d1c6222297deaf9f630a5354c12ab51c7ee486ac99"
    assert mask_digest(mask) == sha("mask 2x9\n", bytes.fromhex("80806100"))


def test_memory_layout_and_byte_order_do_not_matter():
    weight = quantized(ORDER)
    turned = replace(
        weight,
        codes=np.asfortranarray(weight.codes),
        scales=weight.scales.astype(">f2"),
        zero_points=np.asfortranarray(weight.zero_points),
        input_order=ORDER.astype(">i4"),
    )
    assert digest(turned) == digest(weight)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert array_digest(np.ascontiguousarray(values.T).T) == array_digest(values) == array_digest(values.astype(">f4"))


def test_the_mask_does_not_enter():
    assert digest(replace(quantized(), mask=np.ones((2, 4), bool))) == digest(quantized())


@given(st.data())
def test_any_changed_element_shows(data):
    weight = quantized(ORDER)
    part = data.draw(st.sampled_from(["codes", "scales", "zero_points", "input_order"]))
    array = getattr(weight, part).copy()
    raw = array.reshape(-1).view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(replace(weight, **{part: array})) != digest(weight)


@given(st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]), st.integers(0, 10**6), st.integers(0, 7))
def test_any_changed_bit_of_a_dense_weight_shows(dtype, place, bit):
    values = np.arange(-3, 9).reshape(3, 4).astype(dtype)
    changed = values.copy()
    raw = changed.reshape(-1).view(np.uint8)
    raw[place % raw.size] ^= 1 << bit
    assert digest(DenseWeight(changed)) != digest(DenseWeight(values))


@given(st.integers(0, 3), st.integers(0, 8))
def test_any_changed_bit_of_a_mask_shows(row, column):
    mask = np.random.default_rng(0).random((4, 9)) < 0.5
    changed = mask.copy()
    changed[row, column] ^= True
    assert mask_digest(changed) != mask_digest(mask)


def test_shape_dtype_and_kind_enter():
    weight = quantized()
    same_bytes = [
        weight,
        replace(weight, bits=3),
        replace(
            weight,
            codes=weight.codes.reshape(1, 8),
            scales=weight.scales.reshape(1, 4),
            zero_points=weight.zero_points.reshape(1, 4),
        ),
        replace(weight, group_size=1),
        quantized(scale_type=np.float32),
        quantized(scale_type=ml_dtypes.bfloat16),
        quantized(np.arange(4, dtype=np.int32)),
        DenseWeight(weight.scales),
        DenseWeight(weight.scales.reshape(1, 4)),
        DenseWeight(weight.scales.view(ml_dtypes.bfloat16)),
        DenseWeight(weight.scales.reshape(-1).view(np.float32).reshape(1, 2)),
    ]
    assert len({digest(item) for item in same_bytes}) == len(same_bytes)
    assert mask_digest(np.zeros((2, 4), bool)) != mask_digest(np.zeros((4, 2), bool))
    assert mask_digest(np.zeros((1, 4), bool)) != mask_digest(np.zeros((1, 5), bool))
