"""Digests of unpacked weights, so that a source, a merge result and each target's read-back can be compared as strings.

A digest is the SHA-256 of a canonical byte string: a one-line ASCII header with kind, shape, dtypes and group size,
then the arrays in C order, little endian. Packing, nibble order and file format do not enter it.
"""

from __future__ import annotations

import hashlib

import numpy as np

from sparseport.weights.linear import Array, DenseWeight, Mask, QuantizedWeight

# Elements converted at a time, so that a large embedding is never copied whole.
_BLOCK = 1 << 20


def digest(weight: DenseWeight | QuantizedWeight) -> str:
    """SHA-256 (hex) of the weight's values; the mask is digested apart, by `mask_digest`."""
    out, cols = weight.shape
    if isinstance(weight, DenseWeight):
        return array_digest(weight.values)
    order = "none" if weight.input_order is None else "i32"
    header = f"quantized {out}x{cols} bits={weight.bits} group={weight.group_size} scales={weight.scales.dtype.name}"
    sha = hashlib.sha256(f"{header} order={order}\n".encode("ascii"))
    for array in (weight.codes, weight.zero_points, weight.scales, weight.input_order):
        if array is not None:
            sha.update(canonical_bytes(array))
    return sha.hexdigest()


def array_digest(values: Array) -> str:
    """SHA-256 (hex) of any array: its dtype, shape and values."""
    shape = "x".join(str(n) for n in values.shape)
    sha = hashlib.sha256(f"dense {shape} {values.dtype.name}\n".encode("ascii"))
    sha.update(canonical_bytes(values))
    return sha.hexdigest()


def value_digest(values: Array) -> str:
    """SHA-256 (hex) of a tensor's numbers, whatever float dtype holds them: all are exact in float32."""
    shape = "x".join(str(n) for n in values.shape)
    sha = hashlib.sha256(f"values {shape}\n".encode("ascii"))
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        sha.update(canonical_bytes(flat[start : start + _BLOCK].astype(np.float32)))
    return sha.hexdigest()


def mask_digest(mask: Mask) -> str:
    """SHA-256 (hex) of a mask: its shape and its bits, eight to a byte, first column in the highest bit, per row."""
    sha = hashlib.sha256(f"mask {mask.shape[0]}x{mask.shape[1]}\n".encode("ascii"))
    sha.update(np.packbits(mask, axis=1).data)
    return sha.hexdigest()


def canonical_bytes(array: Array) -> memoryview:
    """The bytes of an array in C order, little endian."""
    little = np.ascontiguousarray(array)
    if little.dtype.byteorder == ">":
        little = little.astype(little.dtype.newbyteorder("<"))
    # Viewing as bytes also covers bfloat16, which has no buffer format of its own.
    return little.reshape(-1).view(np.uint8).data
