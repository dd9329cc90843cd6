"""compressed-tensors folders, as llm-compressor writes them: the format `pack-quantized`.

    weight_packed      int32 [out, ceil(in/8)]  column 8j+k at bits 4k of word j, stored as q + 8 (so it is the code)
    weight_scale       float [out, groups]      in the dtype of the model; [out, 1] for one scale per row
    weight_zero_point  int32 [ceil(out/8), groups], packed along `out`, stored as z + 8; int8 [out, groups] before
                       packing was introduced; absent for symmetric layers
    weight_shape       int [2]                  [out, in]
    weight_g_idx       int32 [in]               group of each column, for `actorder: group`; all -1 means none

W = scale * (code - zero_point), code and zero_point both with the same offset of 8.
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
from sparseport.checkpoints.module_targets import Targets
from sparseport.checkpoints.writer_of import scales_may_be_negative, writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.linear import U8, QuantizedWeight
from sparseport.weights.packing import unpack_row_words

_OFFSET = 8  # codes and zero-points are stored as signed value + 2**(bits - 1)
_WORDS = 8  # 4-bit values in an int32
_PACKED = "pack-quantized"
# compressed-tensors folds case, and takes true and false for group and none.
_ACT_ORDERS = {
    None: False,
    False: False,
    "weight": False,
    "static": False,
    True: True,
    "group": True,
    "dynamic": True,
}


@dataclass(frozen=True)
class Scheme:
    """How one config group quantises its layers.

    group_size  input columns per group; None = one group per row (strategy `channel`)
    act_order   groups are not made of neighbouring columns, so weight_g_idx must be there (`actorder: group`)
    """

    targets: tuple[str, ...]
    group_size: int | None
    symmetric: bool
    act_order: bool = False


class PackQuantized:
    """The dialect of a pack-quantized folder."""

    name = "compressed-tensors pack-quantized"

    def __init__(self, folder: ModelFolder, raw: Mapping[str, Any], where: str) -> None:
        """Take an open folder and its settings.

        raw    the quantization_config
        where  the file that it stands in, for messages

        Raises:
            BadInput, Unsupported: as `read_schemes` and `Targets`.
        """
        self._folder = folder
        self._schemes = Targets(
            [(scheme.targets, scheme) for scheme in read_schemes(raw, where)], class_name="Linear", where=where
        )
        self._signed_scales = scales_may_be_negative(raw)
        self.writer = writer_of(raw)

    def holds(self, module: str) -> bool:
        return self._folder.has(f"{module}.weight_packed")

    def parts(self, module: str) -> tuple[str, ...]:
        leaves = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        return tuple(name for leaf in leaves if self._folder.has(name := f"{module}.{leaf}"))

    def format_of(self, module: str) -> LayerFormat:
        folder, scheme = self._folder, self._scheme_of(module)
        packed = f"{module}.weight_packed"
        out, words = check_part(folder, packed, ("I32",), 2)
        columns = self._columns(module, out, words)
        group_size = columns if scheme.group_size is None else scheme.group_size
        if columns % group_size:
            raise BadInput(
                "group size does not divide the input features",
                where=f"{folder.path}, tensor {packed}",
                expected=f"a divisor of {columns}",
                found=group_size,
                fix="correct group_size in config.json, or download the folder again",
                code="E_GROUP",
            )
        groups = columns // group_size
        scale = f"{module}.weight_scale"
        expect_shape(folder, scale, check_part(folder, scale, FLOATS, 2), (out, groups))
        self._check_zero_point(module, scheme, out, groups)
        if scheme.act_order:
            check_part(folder, f"{module}.weight_g_idx", ("I32", "I64"), 1)
        return LayerFormat((out, columns), folder.info(scale).dtype.name, 4, group_size, scheme.symmetric)

    def read(self, module: str) -> QuantizedWeight:
        form = self.format_of(module)
        folder, (out, columns) = self._folder, form.shape
        assert form.group_size is not None
        groups = columns // form.group_size
        words = read_part(folder, f"{module}.weight_packed", ("I32",), 2)
        unpacked = unpack_row_words(words.view(np.int32))
        self._check_filling(unpacked[:, columns:], f"{module}.weight_packed")
        codes = np.ascontiguousarray(unpacked[:, :columns])
        order = None
        if folder.has(f"{module}.weight_g_idx"):
            g_idx = read_part(folder, f"{module}.weight_g_idx", ("I32", "I64"), 1)
            expect_shape(folder, f"{module}.weight_g_idx", g_idx.shape, (columns,))
            if not (g_idx == -1).all():
                order = order_by_group(g_idx, form.group_size, f"{folder.path}, tensor {module}.weight_g_idx")
        if order is not None:
            codes = np.ascontiguousarray(codes[:, order])
        weight = QuantizedWeight(
            codes=codes,
            scales=np.ascontiguousarray(folder.read(f"{module}.weight_scale")),
            zero_points=self._zero_points(module, out, groups),
            group_size=form.group_size,
            input_order=order,
        )
        return weight.check(f"{folder.path}, tensor {module}.weight_scale", signed_scales=self._signed_scales)

    def _scheme_of(self, module: str) -> Scheme:
        found = self._schemes.of(module)
        if found is None:
            raise BadInput(
                "layer is stored packed, but no config group targets it",
                where=f"{self._folder.path}, tensor {module}.weight_packed",
                fix=RESTORE,
                code="E_QUANT_CONFIG",
            )
        return found

    def _columns(self, module: str, out: int, words: int) -> int:
        name = f"{module}.weight_shape"
        shape = read_part(self._folder, name, ("I64", "I32"), 1)
        expect_shape(self._folder, name, shape.shape, (2,))
        rows, columns = (int(n) for n in shape)
        if rows != out or rows < 1 or columns < 1 or -(-columns // _WORDS) != words:
            raise BadInput(
                "weight_shape disagrees with the packed weight",
                where=f"{self._folder.path}, tensor {name}",
                expected=f"[{out}, {words * _WORDS - _WORDS + 1}..{words * _WORDS}] for 4 bits",
                found=[rows, columns],
                fix=DAMAGED,
                code="E_SHAPE",
            )
        return columns

    def _check_zero_point(self, module: str, scheme: Scheme, out: int, groups: int) -> None:
        name = f"{module}.weight_zero_point"
        if scheme.symmetric and not self._folder.has(name):
            return
        shape = check_part(self._folder, name, ("I32", "I8"), 2)
        packed = self._folder.info(name).stored == "I32"
        expect_shape(self._folder, name, shape, (-(-out // _WORDS) if packed else out, groups))

    def _zero_points(self, module: str, out: int, groups: int) -> U8:
        name = f"{module}.weight_zero_point"
        if not self._folder.has(name):
            return np.full((out, groups), _OFFSET, np.uint8)
        if self._folder.info(name).stored == "I8":
            signed = read_part(self._folder, name, ("I8",), 2).astype(np.int16) + _OFFSET
            if signed.size and (signed.min() < 0 or signed.max() > 15):
                raise BadInput(
                    "zero-point out of range",
                    where=f"{self._folder.path}, tensor {name}",
                    expected="-8..7",
                    found=int(signed.min()) - _OFFSET if signed.min() < 0 else int(signed.max()) - _OFFSET,
                    fix=DAMAGED,
                    code="E_ZEROS",
                )
            zero_points = signed.astype(np.uint8)
        else:
            words = read_part(self._folder, name, ("I32",), 2)
            unpacked = unpack_row_words(np.ascontiguousarray(words.view(np.int32).T))
            self._check_filling(unpacked[:, out:], name)
            zero_points = np.ascontiguousarray(unpacked[:, :out].T)
        if self._scheme_of(module).symmetric and (zero_points != _OFFSET).any():
            raise BadInput(
                "config says symmetric, but a zero-point is not the middle",
                where=f"{self._folder.path}, tensor {name}",
                expected=0,
                found=int(zero_points[zero_points != _OFFSET][0]) - _OFFSET,
                fix='set "symmetric": false in config.json if the model is asymmetric',
                code="E_ZEROS",
            )
        return zero_points

    def _check_filling(self, filling: U8, name: str) -> None:
        if filling.any():
            raise BadInput(
                "words hold values beyond the layer's size",
                where=f"{self._folder.path}, tensor {name}",
                expected="zeros after the last value",
                fix=DAMAGED,
                code="E_SHAPE",
            )


def read_schemes(raw: Mapping[str, Any], where: str) -> tuple[Scheme, ...]:
    """The config groups of a compressed-tensors quantization_config.

    Raises:
        BadInput: the config is damaged.
        Unsupported: a group in another format than 4-bit pack-quantized, or with quantised activations.
    """
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BadInput(
            "config_groups is missing", where=where, found=repr(groups)[:40], fix=RESTORE, code="E_QUANT_CONFIG"
        )
    return tuple(_scheme(name, group, raw.get("format"), where) for name, group in groups.items())


def _scheme(name: str, group: Any, outer_format: Any, where: str) -> Scheme:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise BadInput(f"config group {name} has no weights", where=where, fix=RESTORE, code="E_QUANT_CONFIG")
    form = group.get("format") or outer_format
    if form != _PACKED:
        raise Unsupported(
            f"compressed-tensors format {form!r} is not read",
            where=where,
            expected=f"{_PACKED}, sparse-bitmask or sparse-24-bitmask",
            found=form,
            fix=f"save the model again with quantization_format={_PACKED!r}",
            code="E_QUANT_METHOD",
        )
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise Unsupported(
                f"config group {name} quantises activations ({key}); only weights can be carried exactly",
                where=where,
                expected="null",
                found=repr(group[key])[:80],
                fix="use a weight-only scheme such as W4A16",
                code="E_QUANT_CONFIG",
            )
    weights = group["weights"]
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if bits != 4 or kind != "int":
        raise Unsupported(
            "only 4-bit integer weights are supported",
            where=where,
            expected="int4",
            found=f"{kind}{bits}",
            fix=ONLY_4_BITS,
            code="E_BITS",
        )
    if weights.get("dynamic") not in (None, False):
        raise Unsupported(
            f"config group {name} quantises weights while the model runs",
            where=where,
            expected="dynamic false",
            found=repr(weights["dynamic"])[:40],
            fix="use a weight-only scheme such as W4A16",
            code="E_QUANT_CONFIG",
        )
    return Scheme(
        _targets(name, group, where),
        _group_size(weights, where),
        _symmetric(weights, where),
        _act_order(weights, where),
    )


def _targets(name: str, group: Mapping[str, Any], where: str) -> tuple[str, ...]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        raise BadInput(f"config group {name} names no targets", where=where, fix=RESTORE, code="E_QUANT_CONFIG")
    return tuple(targets)


def _act_order(weights: Mapping[str, Any], where: str) -> bool:
    """Whether columns are in groups by `weight_g_idx`. `weight` order (alias `static`) leaves neighbours together."""
    value = weights.get("actorder")
    folded = value.casefold() if isinstance(value, str) else value
    if not (folded is None or isinstance(folded, (bool, str))) or folded not in _ACT_ORDERS:
        raise Unsupported(
            f"actorder {repr(value)[:40]} is not read",
            where=where,
            expected="group, weight, static, dynamic, true, false or null",
            found=repr(value)[:40],
            fix="quantise again with actorder weight or group",
            code="E_QUANT_CONFIG",
        )
    return _ACT_ORDERS[folded]


def _group_size(weights: Mapping[str, Any], where: str) -> int | None:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel":
        return None
    if strategy != "group":
        raise Unsupported(
            f"quantisation strategy {strategy!r} is not read",
            where=where,
            expected="group or channel",
            found=strategy,
            fix="quantise per group or per channel",
            code="E_QUANT_CONFIG",
        )
    if type(size) is not int or size < 1:
        raise BadInput(
            "group_size is no positive whole number",
            where=where,
            found=repr(size)[:40],
            fix=RESTORE,
            code="E_GROUP",
        )
    return size


def _symmetric(weights: Mapping[str, Any], where: str) -> bool:
    value = weights.get("symmetric", True)
    if not isinstance(value, bool):
        raise BadInput(
            "symmetric is not true or false",
            where=where,
            found=repr(value)[:40],
            fix=RESTORE,
            code="E_QUANT_CONFIG",
        )
    return value
