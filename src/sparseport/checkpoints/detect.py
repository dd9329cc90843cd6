"""Name the dialect of a folder's linear layers: from its quantization_config, never from the method's name alone."""

from __future__ import annotations

from typing import Any

from sparseport.checkpoints.auto_round import open_auto_round
from sparseport.checkpoints.awq import open_awq
from sparseport.checkpoints.bitmask import Bitmask
from sparseport.checkpoints.compressed_tensors import PackQuantized, read_schemes, refuse_transforms
from sparseport.checkpoints.dialect import DAMAGED, RESTORE, Dialect, StoredLinears
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import Gptq, open_gptq
from sparseport.checkpoints.separate_settings import check_separate
from sparseport.checkpoints.writer_of import writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.packing import ZeroPointStorage

METHODS = ("gptq", "awq", "auto-round", "compressed-tensors")
_BITMASKS = ("sparse-bitmask", "sparse-24-bitmask")
# What leaf of a packed layer belongs to which method, so that a folder whose config lost its settings is refused.
_PACKED_LEAVES = {"qweight": "gptq or awq", "weight_packed": "compressed-tensors", "compressed": "compressed-tensors"}
# Leaves that make sense only as parts of a packed layer.
_PARTS = (
    *_PACKED_LEAVES,
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "bitmask",
    "row_offsets",
)
# AutoRound sets these for every format it exports to; other values change more than how a weight is stored.
_PLAIN: dict[str, tuple[object, ...]] = {
    "act_bits": (None, 16, 32),
    "data_type": (None, "int"),
    "super_bits": (None,),
    "rotation_config": (None, {}),
    "spinquant_config": (None, {}),
}


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
    packed = None if raw is None else _open_packed(folder, raw, where, gptq_zeros)
    if gptq_zeros is not None and not isinstance(packed, Gptq):
        folder.warnings.append("--gptq-zeros has nothing to do: this is no GPTQ folder")
    if packed is None:
        _require_dense(folder)
    elif not any(packed.holds(module) for module in folder.linear_names()):
        raise BadInput(
            f"config.json says {packed.name}, but no layer is stored so",
            where=where,
            fix="remove quantization_config if the model is not quantised",
            code="E_TENSOR",
        )
    linears = StoredLinears(folder, packed)
    _check_leftovers(linears)
    return linears


def _open_packed(
    folder: ModelFolder, raw: dict[str, Any], where: str, gptq_zeros: ZeroPointStorage | None
) -> Dialect | None:
    method = raw.get("quant_method")
    if method not in METHODS:
        raise Unsupported(
            f"quantisation method {method!r} is not read",
            where=where,
            expected=" or ".join(METHODS),
            found=method,
            fix=f"dequantise the model with the tool that made it, or quantise it as {' or '.join(METHODS)}",
            code="E_QUANT_METHOD",
        )
    check_separate(folder, raw)
    for key, plain in _PLAIN.items():
        if raw.get(key) not in plain:
            raise Unsupported(
                f"quantisation option {key} changes what the model computes",
                where=where,
                expected=str(plain[-1]),
                found=repr(raw[key])[:80],
                fix="quantise the weights only, as int4 (scheme W4A16)",
                code="E_QUANT_CONFIG",
            )
    if method == "gptq":
        return open_gptq(folder, zero_storage=gptq_zeros)
    if method == "awq":
        return open_awq(folder, raw, where)
    if method == "auto-round":
        return open_auto_round(folder, raw, where, zero_storage=gptq_zeros)
    return _open_compressed(folder, raw, where)


def _settings(folder: ModelFolder) -> dict[str, Any] | None:
    """quantization_config, or compressed-tensors' older compression_config; None for a model without either.

    Raises:
        BadInput: it is no mapping, or both are there and disagree.
    """
    found: dict[str, Any] | None = None
    for key in ("quantization_config", "compression_config"):
        value = folder.config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise BadInput(
                f"{key} is no mapping",
                where=folder.path / "config.json",
                found=repr(value)[:40],
                fix=RESTORE,
                code="E_QUANT_CONFIG",
            )
        settings = {"quant_method": "compressed-tensors", **value} if key == "compression_config" else value
        if found is not None and found != settings:
            raise BadInput(
                "quantization_config and compression_config disagree",
                where=folder.path / "config.json",
                fix="remove the one that the weights were not written with",
                code="E_QUANT_CONFIG",
            )
        found = settings
    return found


def _require_dense(folder: ModelFolder) -> None:
    for module in folder.linear_names():
        for leaf, method in _PACKED_LEAVES.items():
            if folder.has(f"{module}.{leaf}"):
                raise BadInput(
                    "layer is stored packed, but config.json does not say how",
                    where=f"{folder.path}, tensor {module}.{leaf}",
                    expected=f"the settings of {method}",
                    fix=RESTORE,
                    code="E_QUANT_CONFIG",
                )


def _check_leftovers(linears: StoredLinears) -> None:
    """Refuse what would be dropped otherwise: parts without their layer, and further tensors of a packed layer.

    Raises:
        BadInput: a part lacks the others, or a layer is stored twice.
        Unsupported: a packed layer has a tensor that this dialect does not know.
    """
    folder, packed = linears.folder, linears.packed
    taken = linears.part_names()
    for name in folder.names():
        module, _, leaf = name.rpartition(".")
        if name in taken or leaf == "bias":
            continue
        if packed is not None and packed.holds(module) and leaf not in ("weight", *_PARTS):
            raise Unsupported(
                f"layer has a tensor that {packed.name} does not know",
                where=f"{folder.path}, tensor {name}",
                fix="quantise the weights only, without rotations or adapters inside the layer",
                code="E_TENSOR",
            )
        if leaf in _PARTS or (packed is not None and packed.holds(module)):
            raise BadInput(
                "tensor belongs to no layer that is stored whole and once",
                where=f"{folder.path}, tensor {name}",
                fix=DAMAGED,
                code="E_TENSOR",
            )


def _open_compressed(folder: ModelFolder, raw: dict[str, Any], where: str) -> Dialect | None:
    """None for a model that llm-compressor pruned and saved as plain tensors."""
    refuse_transforms(raw, where)
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
