"""Options of a quantization_config that change how words are read, or what the model computes: only plain values pass.

One table for all methods. It is applied to the settings of the whole folder and to those of single layers: AutoRound's
`extra_config` and GPTQModel's `dynamic`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparseport.checkpoints.dialect import RESTORE
from sparseport.errors import BadInput, Unsupported

_PLAIN: dict[str, tuple[object, ...]] = {
    "pack_dtype": (None, "int32"),
    "data_type": (None, "int"),
    "is_marlin_format": (None, False),
    "super_bits": (None,),
    "act_bits": (None, 16, 32),
    "adapter": (None, "", {}),
    "rotation": (None, "", {}),
    "rotation_config": (None, {}),
    "spinquant_config": (None, {}),
    "transform_config": (None, {}),
    "kv_cache_scheme": (None, {}),
}
# What only some methods write, or mean so. AWQ's `backend` is a kernel of the loader, but llm-awq is another layout;
# AutoRound's `backend` and `packing_format` are read by `auto_round`.
_OF_METHOD: dict[str, dict[str, tuple[object, ...]]] = {
    "gptq": {"packing_format": (None, "auto_round:auto_gptq", "gptq")},
    "awq": {
        "packing_format": (None, "auto_round:auto_awq", "awq"),
        "backend": (
            *(None, "auto", "auto_trainable", "autoawq", "gemm", "gemm_triton", "gemv", "machete", "marlin"),
            *("exllama_v1", "exllama_v2", "torch_awq", "torch_fused_awq"),
        ),
    },
}
# The layout of the words: layers differ in bits and groups, but not in these.
_SAME = ("quant_method", "method", "checkpoint_format", "format", "version", "packing_format", "backend")
_OWN = ("extra_config", "dynamic")
# How AutoRound describes a layer that it leaves alone.
_FLOATS = ("float", "fp", "fp16", "bf16", "fp32", "float16", "bfloat16", "float32")


def check_plain(raw: Mapping[str, Any], where: str) -> None:
    """Refuse settings, of the folder or of a single layer, that the readers do not carry.

    Raises:
        BadInput: settings of single layers are no mappings.
        Unsupported: names the option, and the layer or pattern that has it.
    """
    method = raw.get("quant_method")
    own = _OF_METHOD.get(method, {}) if isinstance(method, str) else {}
    for key, plain in {**_PLAIN, **own}.items():
        if not _among(raw.get(key), plain):
            _refuse(key, raw[key], plain, where)
    for place, entry in layer_settings(raw, where):
        unquantised = type(entry.get("bits")) is int and entry["bits"] >= 16
        for key in (*_PLAIN, *_SAME):
            plain = (*_PLAIN.get(key, (None,)), *(_FLOATS if unquantised and key == "data_type" else ()))
            if not _among(entry.get(key), (*plain, raw.get(key))):
                _refuse(key, entry[key], plain, f"{where}, {place}")


def layer_settings(raw: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Settings of single layers, each with its place in the config for messages; none for entries that are empty.

    Raises:
        BadInput: they are no mappings.
    """
    for key in _OWN:
        entries = raw.get(key) or {}
        if not isinstance(entries, dict):
            raise _no_mapping(f"{where}, {key}", entries)
        for name, entry in entries.items():
            place = f"{key} {name[:120]}"
            if not isinstance(entry or {}, dict):
                raise _no_mapping(f"{where}, {place}", entry)
            if entry:
                yield place, entry


def _no_mapping(where: str, found: object) -> BadInput:
    return BadInput(
        "settings of single layers are no mapping",
        where=where,
        found=repr(found)[:40],
        fix=RESTORE,
        code="E_QUANT_CONFIG",
    )


def _among(value: object, plain: tuple[object, ...]) -> bool:
    return value in plain or (isinstance(value, str) and value.casefold() in plain)


def _refuse(key: str, value: object, plain: tuple[object, ...], where: str) -> None:
    raise Unsupported(
        f"quantisation option {key} changes the layout, or what the model computes",
        where=where,
        expected="it unset" if plain[-1] in (None, "", {}) else f"{plain[-1]}, or it unset",
        found=repr(value)[:80],
        fix="quantise the weights only, as plain 4-bit integers (W4A16), all layers in one layout",
        code="E_QUANT_CONFIG",
    )
