"""Name the dialect of a folder's linear layers: from its quantization_config, never from the method's name alone."""

from __future__ import annotations

from typing import Any

from sparseport.checkpoints.auto_round import open_auto_round
from sparseport.checkpoints.awq import open_awq
from sparseport.checkpoints.bitmask import Bitmask
from sparseport.checkpoints.compressed_tensors import PackQuantized, read_schemes
from sparseport.checkpoints.dialect import Dialect, StoredLinears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import check_separate, open_gptq
from sparseport.checkpoints.writer_of import writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.packing import ZeroPointStorage

METHODS = ("gptq", "awq", "auto-round", "compressed-tensors")
_BITMASKS = ("sparse-bitmask", "sparse-24-bitmask")
# What leaf of a packed layer belongs to which method, so that a folder whose config lost its settings is refused.
_PACKED_LEAVES = {"qweight": "gptq or awq", "weight_packed": "compressed-tensors", "compressed": "compressed-tensors"}


def open_linears(folder: ModelFolder, *, gptq_zeros: ZeroPointStorage | None = None) -> StoredLinears:
    """The folder's linear layers, whichever tool wrote them; nothing but headers and config is read.

    gptq_zeros  what the user says about GPTQ zero-points (`--gptq-zeros`)

    Remarks for the user are appended to `folder.warnings`.

    Raises:
        BadInput: config and tensors contradict each other, or a part is missing.
        Unsupported: a quantisation method or layout that cannot be carried exactly.
    """
    raw = _settings(folder)
    where = str(folder.path / "config.json")
    if raw is None:
        _require_dense(folder)
        if gptq_zeros is not None:
            folder.warnings.append("--gptq-zeros has nothing to do: this is no GPTQ folder")
        return StoredLinears(folder, None)
    method = raw.get("quant_method")
    if method != "gptq":
        check_separate(folder, raw)
    packed: Dialect | None
    if method == "gptq":
        packed = open_gptq(folder, zero_storage=gptq_zeros)
    elif method == "awq":
        packed = open_awq(folder, raw, where)
    elif method == "auto-round":
        packed = open_auto_round(folder, raw, where, zero_storage=gptq_zeros)
    elif method == "compressed-tensors":
        packed = _open_compressed(folder, raw, where)
    else:
        raise Unsupported(
            f"quantisation method {method!r} is not read",
            where=where,
            expected=" or ".join(METHODS),
            found=method,
            fix="dequantise the model with the tool that made it, or quantise it with one of these",
            code="E_QUANT_METHOD",
        )
    if packed is None:
        _require_dense(folder)
        return StoredLinears(folder, None)
    if not any(packed.holds(module) for module in folder.linear_names()):
        raise BadInput(
            f"config.json says {method}, but no layer is stored so",
            where=where,
            fix="remove quantization_config if the model is not quantised",
            code="E_TENSOR",
        )
    return StoredLinears(folder, packed)


def _settings(folder: ModelFolder) -> dict[str, Any] | None:
    """quantization_config, or compressed-tensors' older compression_config; None for a model without either.

    Raises:
        BadInput: it is no mapping.
    """
    found = None
    for key in ("quantization_config", "compression_config"):
        value = folder.config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise BadInput(
                f"{key} is no mapping", where=folder.path / "config.json", found=repr(value)[:40], code="E_QUANT_CONFIG"
            )
        if found is None:
            found = {"quant_method": "compressed-tensors", **value} if key == "compression_config" else value
    return found


def _require_dense(folder: ModelFolder) -> None:
    for module in folder.linear_names():
        for leaf, method in _PACKED_LEAVES.items():
            if folder.has(f"{module}.{leaf}"):
                raise BadInput(
                    "layer is stored packed, but config.json does not say how",
                    where=f"{folder.path}, tensor {module}.{leaf}",
                    expected=f"the settings of {method}",
                    fix="restore the config.json that the writer saved",
                    code="E_QUANT_CONFIG",
                )


def _open_compressed(folder: ModelFolder, raw: dict[str, Any], where: str) -> Dialect | None:
    """None for a model that llm-compressor pruned and saved as plain tensors."""
    sparsity = raw.get("sparsity_config") or {}
    layout = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if layout in _BITMASKS:
        if raw.get("config_groups"):
            raise Unsupported(
                f"{layout} on top of quantisation is not read",
                where=where,
                found=f"{layout} and {raw.get('format')}",
                fix="save the model with a dense sparsity_config",
                code="E_QUANT_METHOD",
            )
        return Bitmask(folder, layout, writer_of(raw))
    if layout != "dense":
        raise Unsupported(
            f"sparsity format {layout!r} is not read",
            where=where,
            expected=" or ".join(_BITMASKS),
            found=layout,
            fix="save the model uncompressed",
            code="E_QUANT_METHOD",
        )
    if not raw.get("config_groups") and isinstance(sparsity, dict) and sparsity:
        return None
    return PackQuantized(folder, read_schemes(raw, where), writer_of(raw))
