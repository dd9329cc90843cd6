"""GPTQ checkpoints as AutoGPTQ, GPTQModel and AutoRound write them.

    qweight  int32 [in/8, out]      code of input column 8i+k at bits 4k of word i
    qzeros   int32 [groups, out/8]  zero-point of output row 8j+k at bits 4k of word j; V1 stores z - 1, V2 stores z
    scales   float [groups, out]
    g_idx    int32 [in]             group of each input column; i // group_size unless act-order was used

W[o, i] = scales[g, o] * (code[o, i] - z[g, o]) with g = g_idx[i].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.checkpoints.act_order import order_by_group
from sparseport.checkpoints.dialect import (
    DAMAGED,
    FLOATS,
    ONLY_4_BITS,
    RESTORE,
    LayerFormat,
    check_part,
    expect_shape,
    read_part,
)
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq_zeros import decide_zero_storage
from sparseport.checkpoints.plain_settings import layer_settings
from sparseport.checkpoints.quantization_settings import quantization_settings
from sparseport.checkpoints.writer_of import scales_may_be_negative, writer_of
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.weights.linear import Array, QuantizedWeight
from sparseport.weights.packing import (
    ZeroPointStorage,
    pack_gptq_codes,
    pack_gptq_zero_points,
    unpack_gptq_codes,
    unpack_gptq_zero_points,
)

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqConfig:
    """What a GPTQ checkpoint says about itself, with the open question of its zero-points settled.

    group_size     input columns per group; -1 = one group for all
    desc_act       columns were quantised in order of activation size (act-order), so g_idx matters
    zero_storage   how qzeros are stored
    varies         some layers have settings of their own (GPTQModel's `dynamic`, AutoRound's `extra_config`)
    signed_scales the writer's scales may be negative
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    zero_storage: ZeroPointStorage
    varies: bool = False
    signed_scales: bool = False


def read_quantization_config(folder: ModelFolder, *, zero_storage: ZeroPointStorage | None = None) -> GptqConfig:
    """The quantisation settings of a GPTQ folder, checked against its tensors.

    zero_storage  what the user says about qzeros (`--gptq-zeros`); None = decided from config and data

    Remarks for the user are appended to `folder.warnings`.

    Raises:
        BadInput: no or contradicting settings, or zero-points that do not fit them.
        Unsupported: another method than GPTQ, other than 4 bits, or an option that changes the layout.
    """
    settings = quantization_settings(folder)
    if settings is None:
        raise BadInput(
            "config.json has no quantization_config",
            where=folder.path / "config.json",
            expected="a GPTQ checkpoint",
            fix=RESTORE,
            code="E_QUANT_CONFIG",
        )
    method = settings.raw["quant_method"]
    if method != "gptq":
        raise Unsupported(
            f"quant_method {method!r} is not read as GPTQ",
            where=settings.where,
            expected="gptq",
            found=method,
            code="E_QUANT_METHOD",
        )
    return _config(folder, settings.raw, settings.where, zero_storage)


def gptq_format(folder: ModelFolder, name: str, config: GptqConfig) -> LayerFormat:
    """Shape, group size and scale dtype of a layer, from headers.

    Where the config gives layers settings of their own, the shapes of the tensors tell bits and group size.

    Raises:
        BadInput: a part is missing, or shapes or dtypes do not fit each other.
    """
    rows, out = check_part(folder, f"{name}.qweight", ("I32",), 2)
    zeros = check_part(folder, f"{name}.qzeros", ("I32",), 2)
    scales = check_part(folder, f"{name}.scales", FLOATS, 2)
    where = f"{folder.path}, tensor {name}.qweight"
    columns = rows * 8
    group_size = columns if config.group_size == -1 else config.group_size
    if config.varies and scales[0] and columns % scales[0] == 0:
        group_size = columns // scales[0]
    if columns == 0 or columns % group_size:
        raise BadInput(
            "group size does not divide the input features",
            where=where,
            expected=f"a divisor of {columns}",
            found=group_size,
            fix="correct group_size in config.json, or download the folder again",
            code="E_GROUP",
        )
    groups = columns // group_size
    if out % 8:
        raise BadInput(
            "output features do not fill whole words of zero-points",
            expected="a multiple of 8",
            found=out,
            where=where,
            fix=DAMAGED,
            code="E_SHAPE",
        )
    expect_shape(folder, f"{name}.qzeros", zeros, (groups, out // 8))
    expect_shape(folder, f"{name}.scales", scales, (groups, out))
    return LayerFormat((out, columns), folder.info(f"{name}.scales").dtype.name, 4, group_size, config.sym)


def read_gptq_linear(folder: ModelFolder, name: str, config: GptqConfig) -> QuantizedWeight:
    """One quantised linear layer; scales keep their dtype, a `.bias` stays a tensor of its own.

    With act-order the columns come sorted by group (stable), and `input_order` says which input each belongs to.

    Raises:
        BadInput: a part is missing, or shapes, dtypes, group indices or scales are wrong; names the tensor.
    """
    form = gptq_format(folder, name, config)
    qweight = folder.read(f"{name}.qweight")
    qzeros = folder.read(f"{name}.qzeros")
    scales = folder.read(f"{name}.scales")
    (_, columns), group_size = form.shape, form.group_size
    assert group_size is not None
    codes = unpack_gptq_codes(qweight.view(np.int32))
    order = _input_order(folder, name, columns, group_size, config.desc_act)
    if order is not None:
        codes = np.ascontiguousarray(codes[:, order])
    zero_points = unpack_gptq_zero_points(qzeros.view(np.int32), config.zero_storage)
    if config.sym and (zero_points != 8).any():
        raise BadInput(
            "config says sym, but a zero-point is not 8",
            where=f"{folder.path}, tensor {name}.qzeros",
            expected=8,
            found=int(zero_points[zero_points != 8][0]),
            fix='set "sym": false in config.json if the model is asymmetric',
            code="E_ZEROS",
        )
    weight = QuantizedWeight(codes, np.ascontiguousarray(scales.T), zero_points, group_size, input_order=order)
    return weight.check(f"{folder.path}, tensor {name}.scales", signed_scales=config.signed_scales)


class Gptq:
    """The dialect of a GPTQ folder."""

    def __init__(self, folder: ModelFolder, config: GptqConfig, writer: str = "") -> None:
        self._folder = folder
        self.config = config
        self.name = f"GPTQ {config.zero_storage.value[:2]}" + (" act-order" if config.desc_act else "")
        self.writer = writer

    def holds(self, module: str) -> bool:
        return self._folder.has(f"{module}.qweight")

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(name for leaf in PARTS if self._folder.has(name := f"{module}.{leaf}"))

    def format_of(self, module: str) -> LayerFormat:
        return gptq_format(self._folder, module, self.config)

    def read(self, module: str) -> QuantizedWeight:
        return read_gptq_linear(self._folder, module, self.config)


def open_gptq(
    folder: ModelFolder, raw: Mapping[str, Any], where: str, *, zero_storage: ZeroPointStorage | None = None
) -> Gptq:
    """The dialect of a folder with GPTQ words.

    raw           the settings under GPTQ's names, as `quantization_settings` has checked them
    where         the file that they stand in, for messages
    zero_storage  what the user says about qzeros (`--gptq-zeros`)

    Raises:
        BadInput, Unsupported: as `read_quantization_config`.
    """
    return Gptq(folder, _config(folder, raw, where, zero_storage), writer_of(raw))


def gptq_tensors(name: str, weight: QuantizedWeight, storage: ZeroPointStorage) -> dict[str, Array]:
    """The tensors of a layer as AutoGPTQ 0.8 stores them: qweight, qzeros, scales (float16), g_idx.

    Columns go back to the order of the inputs, and g_idx carries the groups.

    Raises:
        Unsupported: not 4 bits, or features that do not fill whole words.
        FidelityError: a scale does not fit float16.
    """
    out, columns = weight.shape
    if weight.bits != 4 or out % 8 or columns % 8:
        raise Unsupported(
            "layer does not fit the GPTQ layout",
            where=name,
            expected="4 bits, features in multiples of 8",
            found=f"{weight.bits} bits, {out} x {columns}",
        )
    with np.errstate(over="ignore"):
        scales = weight.scales.astype(np.float16)
    if not np.array_equal(scales.astype(np.float64), weight.scales.astype(np.float64)):
        raise FidelityError(
            "scales do not fit float16, which GPTQ files hold",
            where=f"tensor {name}.scales",
            found=weight.scales.dtype.name,
            fix="choose scales in float16 when quantising",
        )
    g_idx = (np.arange(columns) // weight.group_size).astype(np.int32)
    codes = weight.codes
    if weight.input_order is not None:
        back = np.argsort(weight.input_order, kind="stable")
        codes, g_idx = codes[:, back], g_idx[back]
    return {
        f"{name}.qweight": pack_gptq_codes(codes),
        f"{name}.qzeros": pack_gptq_zero_points(weight.zero_points, storage),
        f"{name}.scales": np.ascontiguousarray(scales.T),
        f"{name}.g_idx": g_idx,
    }


def gptq_config_dict(
    *,
    group_size: int,
    sym: bool,
    storage: ZeroPointStorage,
    desc_act: bool = False,
    bits: int = 4,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json for tensors from `gptq_tensors`."""
    label = "gptq_v2" if storage is ZeroPointStorage.V2 else "gptq"
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": label,
        **(extra or {}),
    }


def _config(
    folder: ModelFolder, raw: Mapping[str, Any], where: str, zero_storage: ZeroPointStorage | None
) -> GptqConfig:
    bits, group_size = _whole(raw, "bits", where), _whole(raw, "group_size", where)
    if bits != 4:
        raise Unsupported(
            "only 4-bit GPTQ is supported", where=where, expected=4, found=bits, fix=ONLY_4_BITS, code="E_BITS"
        )
    if group_size != -1 and group_size < 1:
        raise BadInput(
            "group_size is impossible",
            where=where,
            expected="-1 or a positive number",
            found=group_size,
            fix=RESTORE,
            code="E_GROUP",
        )
    sym, desc_act = flag(raw, "sym", where), flag(raw, "desc_act", where, default=False)
    own = [entry for _, entry in layer_settings(raw, where)]
    # A layer's own act-order asks for group indices too; where they are, they are followed anyway.
    desc_act = desc_act or any(flag(entry, "desc_act", where, default=False) for entry in own)
    varies = bool(own)
    _check_zeros(folder, varies)
    storage = decide_zero_storage(folder, raw, where, sym=sym, override=zero_storage)
    return GptqConfig(bits, group_size, sym, desc_act, storage, varies, scales_may_be_negative(raw))


def _input_order(
    folder: ModelFolder, name: str, columns: int, group_size: int, desc_act: bool
) -> np.ndarray[Any, np.dtype[np.int32]] | None:
    tensor = f"{name}.g_idx"
    if not folder.has(tensor):
        if desc_act:
            raise BadInput(
                "config says desc_act, but the group indices are missing",
                where=f"{folder.path}, tensor {tensor}",
                fix=DAMAGED,
                code="E_G_IDX",
            )
        return None
    g_idx = read_part(folder, tensor, ("I32",), 1)
    expect_shape(folder, tensor, g_idx.shape, (columns,))
    return order_by_group(g_idx, group_size, f"{folder.path}, tensor {tensor}")


def _check_zeros(folder: ModelFolder, varies: bool) -> None:
    """Refuse layers whose zero-points cannot be looked at, before the storage of all is decided from them.

    varies  each layer may have its own settings, so other than 4 bits are looked for: the words per output tell

    Raises:
        BadInput: zero-points are missing, of another dtype, or empty.
        Unsupported: a layer has other than 4 bits.
    """
    for name in folder.names():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("qweight", "qzeros"):
            continue
        zeros = f"{module}.qzeros"
        groups, words = check_part(folder, zeros, ("I32",), 2)
        if not groups or not words:
            raise BadInput(
                "layer has no zero-points", where=f"{folder.path}, tensor {zeros}", fix=DAMAGED, code="E_SHAPE"
            )
        out = (folder.info(name).shape or (0,))[-1] if leaf == "qweight" else 0
        found = [bits for bits in (2, 3, 8) if varies and out and words * 32 == bits * out]
        if found:
            raise Unsupported(
                "only 4-bit GPTQ is supported",
                where=f"{folder.path}, tensor {name}",
                expected=4,
                found=found[0],
                fix=ONLY_4_BITS,
                code="E_BITS",
            )


def _whole(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if type(value) is not int:
        raise BadInput(
            f"quantization_config.{key} is no whole number",
            where=where,
            found=repr(value)[:40],
            fix=RESTORE,
            code="E_QUANT_CONFIG",
        )
    return value


def flag(raw: Mapping[str, Any], key: str, where: str, default: bool | None = None) -> bool:
    """A setting that is true or false.

    Raises:
        BadInput: it is something else, or missing without a default.
    """
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise BadInput(
            f"quantization_config.{key} is not true or false",
            where=where,
            found=repr(value)[:40],
            fix=RESTORE,
            code="E_QUANT_CONFIG",
        )
    return value
