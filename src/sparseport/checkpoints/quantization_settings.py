"""The quantisation settings of a folder: in config.json, or beside it, where AutoGPTQ's own folders have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.dialect import RESTORE
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.paths import bare_file
from sparseport.checkpoints.plain_settings import check_plain
from sparseport.errors import BadInput, Unsupported

METHODS = ("gptq", "awq", "auto-round", "compressed-tensors")
_NATIVE = "quantize_config.json"
_SEPARATE = (_NATIVE, "quantization_config.json")
_COMPARED = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "quant_method",
    "checkpoint_format",
    "format",
    "packing_format",
    "version",
    "zero_point",
)


@dataclass(frozen=True)
class QuantizationSettings:
    """What a quantiser wrote about its work.

    raw    the mapping, with a `quant_method` that sparseport reads
    where  the file that it stands in, for messages
    """

    raw: dict[str, Any]
    where: str


def quantization_settings(folder: ModelFolder) -> QuantizationSettings | None:
    """The settings of a quantised folder, checked for options that are not carried; None for a plain model.

    A quantize_config.json alone counts where config.json is silent and layers are stored in GPTQ's words; a remark
    about it is then appended to `folder.warnings`.

    Raises:
        BadInput: settings are damaged, or two files disagree about them.
        Unsupported: another quantisation method, or an option that cannot be carried exactly.
    """
    found = _in_config(folder) or _beside_config(folder)
    if found is None:
        return None
    method = found.raw.get("quant_method")
    if method not in METHODS:
        raise Unsupported(
            f"quantisation method {method!r} is not read",
            where=found.where,
            expected=" or ".join(METHODS),
            found=method,
            fix=f"dequantise the model with the tool that made it, or quantise it as {' or '.join(METHODS)}",
            code="E_QUANT_METHOD",
        )
    _check_separate(folder, found.raw)
    check_plain(found.raw, found.where)
    return found


def _in_config(folder: ModelFolder) -> QuantizationSettings | None:
    """quantization_config, or compressed-tensors' older compression_config; None for a config without either."""
    where = str(folder.path / "config.json")
    found: dict[str, Any] | None = None
    for key in ("quantization_config", "compression_config"):
        value = folder.config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise BadInput(
                f"{key} is no mapping", where=where, found=repr(value)[:40], fix=RESTORE, code="E_QUANT_CONFIG"
            )
        settings = {"quant_method": "compressed-tensors", **value} if key == "compression_config" else value
        if found is not None and found != settings:
            raise BadInput(
                "quantization_config and compression_config disagree",
                where=where,
                fix="remove the one that the weights were not written with",
                code="E_QUANT_CONFIG",
            )
        found = settings
    return None if found is None else QuantizationSettings(found, where)


def _beside_config(folder: ModelFolder) -> QuantizationSettings | None:
    """AutoGPTQ's own settings, which have no quant_method before release 0.7."""
    if not (folder.path / _NATIVE).exists() or not any(name.endswith(".qweight") for name in folder.names()):
        return None
    raw = read_json(bare_file(folder.path, _NATIVE, _NATIVE), what=_NATIVE)
    folder.warnings.append(f"config.json does not say how layers are quantised: {_NATIVE} does")
    return QuantizationSettings({"quant_method": "gptq", **raw}, str(folder.path / _NATIVE))


def _check_separate(folder: ModelFolder, raw: Mapping[str, Any]) -> None:
    """Refuse a folder whose quantize_config.json or quantization_config.json contradicts its settings.

    Raises:
        BadInput: names the file and the key.
    """
    for file in _SEPARATE:
        path: Path = folder.path / file
        if not path.exists():
            continue
        other = read_json(bare_file(folder.path, file, file), what=file)
        for key in _COMPARED:
            if key in raw and key in other and _folded(raw[key]) != _folded(other[key]):
                raise BadInput(
                    f"config.json and {file} disagree about {key}",
                    where=path,
                    expected=repr(raw[key]),
                    found=repr(other[key])[:80],
                    fix=f"correct one of them, or remove {file}",
                    code="E_QUANT_CONFIG",
                )


def _folded(value: object) -> object:
    """A setting for comparison: tools write `GEMM` in one file and `gemm` in the other."""
    return value.casefold() if isinstance(value, str) else value
