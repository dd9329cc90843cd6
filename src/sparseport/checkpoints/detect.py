"""Name the dialect of a folder's linear layers: from its quantization_config, never from the method's name alone."""

from __future__ import annotations

from typing import Any

from sparseport.checkpoints.auto_round import open_auto_round
from sparseport.checkpoints.awq import open_awq
from sparseport.checkpoints.bitmask import Bitmask
from sparseport.checkpoints.compressed_tensors import PackQuantized
from sparseport.checkpoints.dialect import DAMAGED, RESTORE, Dialect, StoredLinears
from sparseport.checkpoints.folder import EMBEDDINGS, POSITIONS, ModelFolder
from sparseport.checkpoints.gptq import Gptq, open_gptq
from sparseport.checkpoints.leaves import PACKED, PARTS
from sparseport.checkpoints.quantization_settings import QuantizationSettings, quantization_settings
from sparseport.checkpoints.writer_of import writer_of
from sparseport.errors import BadInput, Unsupported
from sparseport.weights.packing import ZeroPointStorage

_BITMASKS = ("sparse-bitmask", "sparse-24-bitmask")


def open_linears(folder: ModelFolder, *, gptq_zeros: ZeroPointStorage | None = None) -> StoredLinears:
    """The folder's linear layers, whichever tool wrote them; nothing but headers and config is read.

    gptq_zeros  what the user says about GPTQ zero-points (`--gptq-zeros`)

    Remarks for the user are appended to `folder.warnings`.

    Raises:
        BadInput: config and tensors contradict each other, or a part is missing.
        Unsupported: a quantisation method or layout that cannot be carried exactly.
    """
    _refuse_packed_embedding(folder)
    settings = quantization_settings(folder)
    packed = None if settings is None else _open_packed(folder, settings, gptq_zeros)
    if gptq_zeros is not None and not isinstance(packed, Gptq):
        folder.warnings.append("--gptq-zeros has nothing to do: this is no GPTQ folder")
    if packed is None:
        _require_dense(folder)
    elif not any(packed.holds(module) for module in folder.linear_names()):
        raise BadInput(
            f"config.json says {packed.name}, but no layer is stored so",
            where=folder.path / "config.json",
            fix="remove quantization_config if the model is not quantised",
            code="E_TENSOR",
        )
    linears = StoredLinears(folder, packed)
    _check_leftovers(linears)
    return linears


def _open_packed(
    folder: ModelFolder, settings: QuantizationSettings, gptq_zeros: ZeroPointStorage | None
) -> Dialect | None:
    raw, where = settings.raw, settings.where
    if raw["quant_method"] == "gptq":
        return open_gptq(folder, raw, where, zero_storage=gptq_zeros)
    if raw["quant_method"] == "awq":
        return open_awq(folder, raw, where)
    if raw["quant_method"] == "auto-round":
        return open_auto_round(folder, raw, where, zero_storage=gptq_zeros)
    return _open_compressed(folder, raw, where)


def _refuse_packed_embedding(folder: ModelFolder) -> None:
    for name in folder.names():
        module, _, leaf = name.rpartition(".")
        if leaf in PARTS and module.rpartition(".")[2] in EMBEDDINGS + POSITIONS:
            raise Unsupported(
                "the embedding is stored packed; only linear layers are read so",
                where=f"{folder.path}, tensor {name}",
                expected=f"{module}.weight in floating point",
                fix="quantise the model again without its embedding",
                code="E_EMBEDDING",
            )


def _require_dense(folder: ModelFolder) -> None:
    for module in folder.linear_names():
        for leaf, method in PACKED.items():
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
        if packed is not None and packed.holds(module) and leaf not in ("weight", *PARTS):
            raise Unsupported(
                f"layer has a tensor that {packed.name} does not know",
                where=f"{folder.path}, tensor {name}",
                fix="quantise the weights only, without rotations or adapters inside the layer",
                code="E_TENSOR",
            )
        if leaf in PARTS or (packed is not None and packed.holds(module)):
            raise BadInput(
                "tensor belongs to no layer that is stored whole and once",
                where=f"{folder.path}, tensor {name}",
                fix=DAMAGED,
                code="E_TENSOR",
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
    return PackQuantized(folder, raw, where)
