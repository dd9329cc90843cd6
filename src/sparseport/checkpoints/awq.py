"""AWQ checkpoints as AutoAWQ and AutoRound write them, versions `gemm` and `gemv`.

    gemm   qweight  int32 [in, out/8]      row 8j+c of the weight at bits 4*(0,4,1,5,2,6,3,7)[c] of word j
           qzeros   int32 [groups, out/8]  zero-points in the same order, stored as they are
           scales   float [groups, out]
    gemv   qweight  int32 [out, in/8]      column 8j+k at bits 4k of word j
           qzeros   int32 [out, words]     zero-point of group 8j+k at bits 4k of word j, filled up with zeros
           scales   float [out, 8*words]   filled up with zeros

W = scale * (code - zero_point). AWQ's per-channel scaling of activations is already folded into the other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sparseport.checkpoints.dialect import (
    FLOATS,
    ONLY_4_BITS,
    RESTORE,
    LayerFormat,
    check_part,
    expect_shape,
    read_part,
)
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.writer_of import scales_may_be_negative, writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import U8, Array, QuantizedWeight
from sparseport.weights.packing import unpack_awq_words, unpack_row_words

Version = Literal["gemm", "gemv"]
_VERSIONS: dict[str, Version] = {"gemm": "gemm", "gemv": "gemv"}
_WORDS = 8  # 4-bit values in an int32


class Awq:
    """The dialect of an AWQ folder; open it with `open_awq`."""

    def __init__(
        self,
        folder: ModelFolder,
        version: Version,
        group_size: int | None,
        symmetric: bool,
        *,
        signed_scales: bool = False,
        writer: str = "",
    ) -> None:
        """Take an open folder.

        version        which kernel the words are laid out for
        group_size     of every layer, -1 for one group per row; None where layers differ (the shapes then tell)
        symmetric      whether the config says that there are no zero-points; all stored ones must then be 8
        signed_scales  the writer's scales may be negative
        """
        self._folder = folder
        self._version = version
        self._group_size = group_size
        self._symmetric = symmetric
        self._signed_scales = signed_scales
        self.name = f"AWQ {version}"
        self.writer = writer

    def holds(self, module: str) -> bool:
        return self._folder.has(f"{module}.qweight")

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))

    def format_of(self, module: str) -> LayerFormat:
        folder = self._folder
        weight, zeros, scales = (
            check_part(folder, f"{module}.{leaf}", stored, 2)
            for leaf, stored in (("qweight", ("I32",)), ("qzeros", ("I32",)), ("scales", FLOATS))
        )
        if self._group_size is None and weight[1] * 32 != 4 * scales[1]:
            raise Unsupported(
                "only 4-bit AWQ is supported",
                where=f"{folder.path}, tensor {module}.qweight",
                expected=4,
                found=f"{weight[1]} words for {scales[1]} output features",
                fix=ONLY_4_BITS,
                code="E_BITS",
            )
        if self._version == "gemm":
            columns, out = weight[0], weight[1] * _WORDS
            asked = columns if self._group_size == -1 else self._group_size
            groups = scales[0]
            wanted_zeros, wanted_scales = (groups, weight[1]), (groups, out)
        else:
            out, columns = weight[0], weight[1] * _WORDS
            asked = columns if self._group_size == -1 else self._group_size
            groups = columns // asked if asked else 0
            # Rows of scales are filled up to whole words, and to more for small groups.
            words = max(zeros[1], -(-groups // _WORDS))
            wanted_zeros, wanted_scales = (out, words), (out, words * _WORDS)
        expect_shape(folder, f"{module}.qzeros", zeros, wanted_zeros)
        expect_shape(folder, f"{module}.scales", scales, wanted_scales)
        group_size = columns // groups if groups else 0
        if not groups or not columns or not out or columns % groups or (asked is not None and asked != group_size):
            raise BadInput(
                "scales do not fit the group size",
                where=f"{folder.path}, tensor {module}.scales",
                expected=f"{columns} input features in groups of {asked or 'one size'}",
                found=f"{groups} groups",
                fix="correct group_size in config.json, or download the folder again",
                code="E_GROUP",
            )
        return LayerFormat((out, columns), folder.info(f"{module}.scales").dtype.name, 4, group_size, self._symmetric)

    def read(self, module: str) -> QuantizedWeight:
        form = self.format_of(module)
        assert form.group_size is not None
        folder = self._folder
        groups = form.shape[1] // form.group_size
        words = read_part(folder, f"{module}.qweight", ("I32",), 2).view(np.int32)
        zeros = read_part(folder, f"{module}.qzeros", ("I32",), 2).view(np.int32)
        scales: Array = folder.read(f"{module}.scales")
        codes: U8
        if self._version == "gemm":
            codes, zero_points, scales = unpack_awq_words(words).T, unpack_awq_words(zeros).T, scales.T
        else:
            codes, zero_points = unpack_row_words(words), unpack_row_words(zeros)
            self._check_filling(module, zero_points[:, groups:], scales[:, groups:])
            zero_points, scales = zero_points[:, :groups], scales[:, :groups]
        if self._symmetric and (zero_points != 8).any():
            raise BadInput(
                "config says that there are no zero-points, but one is not the middle",
                where=f"{folder.path}, tensor {module}.qzeros",
                expected=8,
                found=int(zero_points[zero_points != 8][0]),
                fix='set "zero_point": true ("sym": false for AutoRound) in config.json if the model is asymmetric',
                code="E_ZEROS",
            )
        weight = QuantizedWeight(
            codes=np.ascontiguousarray(codes),
            scales=np.ascontiguousarray(scales),
            zero_points=np.ascontiguousarray(zero_points),
            group_size=form.group_size,
        )
        return weight.check(f"{folder.path}, tensor {module}.scales", signed_scales=self._signed_scales)

    def _check_filling(self, module: str, zero_points: U8, scales: Array) -> None:
        if zero_points.any() or scales.any():
            raise BadInput(
                "scales or zero-points beyond the last group are not zero",
                where=f"{self._folder.path}, tensor {module}.scales",
                fix="correct group_size in config.json, or download the folder again",
                code="E_GROUP",
            )


def open_awq(folder: ModelFolder, raw: Mapping[str, Any], where: str) -> Awq:
    """The dialect of a folder with AWQ words.

    raw    the settings under AWQ's names, as `quantization_settings` has checked them
    where  the file that they stand in, for messages

    Raises:
        BadInput: the config is damaged.
        Unsupported: another version than gemm or gemv, or other than 4 bits.
    """
    given = raw.get("version", raw.get("format", "gemm"))
    version = _VERSIONS.get(given.lower()) if isinstance(given, str) else None
    if version is None:
        raise Unsupported(
            f"AWQ version {given!r} is not read",
            where=where,
            expected="gemm or gemv",
            found=given,
            fix="save the model with version gemm, which every loader reads",
            code="E_QUANT_METHOD",
        )
    bits = raw.get("bits", raw.get("w_bit", 4))
    if bits != 4:
        raise Unsupported(
            "only 4-bit AWQ is supported", where=where, expected=4, found=bits, fix=ONLY_4_BITS, code="E_BITS"
        )
    zero_point = raw.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise BadInput(
            "zero_point is not true or false",
            where=where,
            found=repr(zero_point)[:40],
            fix=RESTORE,
            code="E_QUANT_CONFIG",
        )
    group_size = raw.get("group_size", raw.get("q_group_size", 128))
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise BadInput(
            "group_size is impossible",
            where=where,
            expected="-1 or a positive number",
            found=repr(group_size)[:40],
            fix=RESTORE,
            code="E_GROUP",
        )
    varying = bool(raw.get("extra_config") or raw.get("dynamic"))
    if varying and version == "gemv":
        raise Unsupported(
            "AWQ gemv with settings that differ between layers is not read",
            where=where,
            fix="save the model with version gemm",
            code="E_QUANT_CONFIG",
        )
    return Awq(
        folder,
        version,
        None if varying else group_size,
        not zero_point,
        signed_scales=scales_may_be_negative(raw),
        writer=writer_of(raw),
    )
