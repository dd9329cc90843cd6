"""Nibble dialects: how each writer lays 4-bit numbers into bytes and words. Nothing else touches nibbles.

OpenVINO u4 / i4   element 2k in the low nibble of byte k, element 2k+1 in the high nibble, C order
ONNX Runtime       MatMulNBits B uint8 [out, groups, group/2] and zero-points uint8 [out, ceil(groups/2)], low nibble
                   first along the last axis, each row of zero-points filled up to a whole byte with zero
GPTQ qweight       int32 [in/8, out], input column 8i+k at bits 4k of word i (low nibble first along `in`)
GPTQ qzeros        int32 [groups, out/8], output row 8j+k at bits 4k of word j; v1 stores z - 1 (see
                   `ZeroPointStorage` for two ways to do so), v2 stores z
AWQ gemm           int32 [in, out/8] and [groups, out/8], row 8j+c of the weight at bits 4*AWQ_ORDER[c] of word j
AWQ gemv           int32 [out, in/8], column 8j+k at bits 4k of word j
compressed-tensors int32 [out, in/8], column 8j+k at bits 4k of word j, stored as q + 8; zero-points likewise, but
                   packed along `out`: int32 [out/8, groups]
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt

from sparseport.errors import BadInput
from sparseport.weights.linear import U8

I32 = npt.NDArray[np.int32]

_NIBBLE_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)
_ONES = 0x11111111  # one in each nibble of a word
# Which nibble of a word holds element 0..7: AWQ's kernels want even and odd elements apart.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class ZeroPointStorage(str, Enum):
    """What a GPTQ file stores for zero-points.

    V1        (z - 1) mod 16 in each nibble, as AutoGPTQ and SQFT read it
    V1_WORDS  the word of all eight z minus 0x11111111, as GPTQModel writes and reads it: a z of 0 borrows from the next
              nibble. The same as V1 where no z is 0
    V2        z
    """

    V1 = "v1"
    V1_WORDS = "v1-words"
    V2 = "v2"


def pack_nibbles_low_first(codes: U8) -> U8:
    """Pack 4-bit values, low nibble first.

    Args:
        codes: uint8, any shape with an even number of elements, values 0..15; flattened in C order.

    Returns:
        uint8 [elements / 2].

    Raises:
        BadInput: an odd number of elements.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size % 2:
        raise BadInput("an odd number of 4-bit values cannot be packed into bytes", found=flat.size, code="E_PACK")
    packed: U8 = flat[0::2] | (flat[1::2] << np.uint8(4))
    return packed


def unpack_nibbles_low_first(packed: U8, shape: tuple[int, ...]) -> U8:
    """Inverse of `pack_nibbles_low_first`: uint8 of `shape`, values 0..15."""
    flat = np.empty(packed.size * 2, np.uint8)
    np.bitwise_and(packed.reshape(-1), 15, out=flat[0::2])
    np.right_shift(packed.reshape(-1), 4, out=flat[1::2])
    return flat.reshape(shape)


def pack_matmulnbits_zero_points(zero_points: U8) -> U8:
    """Zero-points uint8 [out, groups] -> ONNX Runtime's uint8 [out, ceil(groups/2)], low nibble first in each row."""
    out, groups = zero_points.shape
    even = np.zeros((out, groups + groups % 2), np.uint8)
    even[:, :groups] = zero_points
    return pack_nibbles_low_first(even).reshape(out, -1)


def unpack_matmulnbits_zero_points(packed: U8, groups: int) -> U8:
    """Inverse of `pack_matmulnbits_zero_points`: uint8 [out, ceil(groups/2)] -> uint8 [out, groups]."""
    return np.ascontiguousarray(unpack_nibbles_low_first(packed, (packed.shape[0], packed.shape[1] * 2))[:, :groups])


def pack_words_low_first(values: U8) -> I32:
    """Pack groups of eight 4-bit values along axis 0 into int32 words, value k at bits 4k.

    Args:
        values: uint8 [8*n, m], values 0..15.

    Returns:
        int32 [n, m].

    Raises:
        BadInput: the first axis is not a multiple of 8.
    """
    rows, cols = values.shape
    if rows % 8:
        raise BadInput("GPTQ words hold eight values each", expected="a multiple of 8", found=rows, code="E_PACK")
    wide = values.reshape(rows // 8, 8, cols).astype(np.uint32) << _NIBBLE_SHIFTS[None, :, None]
    words: I32 = np.bitwise_or.reduce(wide, axis=1).view(np.int32)
    return words


def unpack_words_low_first(words: I32) -> U8:
    """Inverse of `pack_words_low_first`: int32 [n, m] -> uint8 [8*n, m]."""
    n, cols = words.shape
    wide = (np.ascontiguousarray(words).view(np.uint32)[:, None, :] >> _NIBBLE_SHIFTS[None, :, None]) & np.uint32(15)
    values: U8 = wide.astype(np.uint8)
    return values.reshape(n * 8, cols)


def pack_gptq_codes(codes: U8) -> I32:
    """Codes uint8 [out, in] -> GPTQ `qweight` int32 [in/8, out]."""
    return pack_words_low_first(np.ascontiguousarray(codes.T))


def unpack_gptq_codes(qweight: I32) -> U8:
    """GPTQ `qweight` int32 [in/8, out] -> codes uint8 [out, in]."""
    return np.ascontiguousarray(unpack_words_low_first(qweight).T)


def pack_gptq_zero_points(zero_points: U8, storage: ZeroPointStorage) -> I32:
    """Zero-points uint8 [out, groups] -> GPTQ `qzeros` int32 [groups, out/8]."""
    stored = (zero_points - np.uint8(1)) & np.uint8(15) if storage is ZeroPointStorage.V1 else zero_points
    words = np.ascontiguousarray(pack_words_low_first(np.ascontiguousarray(stored)).T)
    return _add_to_words(words, -_ONES) if storage is ZeroPointStorage.V1_WORDS else words


def unpack_gptq_zero_points(qzeros: I32, storage: ZeroPointStorage) -> U8:
    """GPTQ `qzeros` int32 [groups, out/8] -> zero-points uint8 [out, groups]; a stored 15 is z = 0 in v1."""
    words = _add_to_words(qzeros, _ONES) if storage is ZeroPointStorage.V1_WORDS else qzeros
    stored = unpack_words_low_first(np.ascontiguousarray(words.T))
    if storage is ZeroPointStorage.V1:
        stored = (stored + np.uint8(1)) & np.uint8(15)
    return stored


def _add_to_words(words: I32, number: int) -> I32:
    """Words plus a number modulo 2**32, with carries between nibbles."""
    return ((words.astype(np.int64) + number) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def pack_awq_words(values: U8) -> I32:
    """Values 0..15 uint8 [n, 8*m] -> AWQ gemm words int32 [n, m], element c of a word at bits 4*AWQ_ORDER[c].

    Raises:
        BadInput: the second axis is not a multiple of 8.
    """
    rows, cols = values.shape
    if cols % 8:
        raise BadInput("AWQ words hold eight values each", expected="a multiple of 8", found=cols, code="E_PACK")
    nibbles = np.empty((rows, cols // 8, 8), np.uint8)
    nibbles[:, :, list(AWQ_ORDER)] = values.reshape(rows, cols // 8, 8)
    return np.ascontiguousarray(pack_words_low_first(np.ascontiguousarray(nibbles.reshape(rows, cols).T)).T)


def unpack_awq_words(words: I32) -> U8:
    """Inverse of `pack_awq_words`: int32 [n, m] -> uint8 [n, 8*m]."""
    rows, cols = words.shape
    nibbles = unpack_row_words(words).reshape(rows, cols, 8)
    return np.ascontiguousarray(nibbles[:, :, list(AWQ_ORDER)].reshape(rows, cols * 8))


def pack_row_words(values: U8) -> I32:
    """Values 0..15 uint8 [n, m] -> int32 [n, ceil(m/8)], value 8j+k at bits 4k of word j; short rows end in zeros."""
    rows, cols = values.shape
    padded = np.zeros((-(-cols // 8) * 8, rows), np.uint8)
    padded[:cols] = values.T
    return np.ascontiguousarray(pack_words_low_first(padded).T)


def unpack_row_words(words: I32) -> U8:
    """Inverse of `pack_row_words`, with the filling: int32 [n, m] -> uint8 [n, 8*m]."""
    return np.ascontiguousarray(unpack_words_low_first(np.ascontiguousarray(words.T)).T)
