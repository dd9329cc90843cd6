"""What is in this folder or file, what exporting it would keep and lose, and which command to run next."""

from __future__ import annotations

from pathlib import Path

from sparseport.checkpoints.peft import CONFIG as ADAPTER_CONFIG
from sparseport.errors import BadInput
from sparseport.inspection.adapters import inspect_adapter, inspect_nncf
from sparseport.inspection.exported import inspect_export, inspect_exports
from sparseport.inspection.gguf import inspect_gguf
from sparseport.inspection.model import inspect_base
from sparseport.inspection.report import Inspection, LayerReport, Reading, Step
from sparseport.sources import is_nncf_checkpoint
from sparseport.verify.certificate import FILE_NAME as CERTIFICATE
from sparseport.verify.certificate import certified_folders

__all__ = ["Inspection", "LayerReport", "inspect"]


def inspect(
    path: Path | str,
    *,
    allow_pickle: bool = False,
    gptq_zeros: str | None = None,
    ignore_extra: bool = False,
    on_layer: Step = lambda: None,
) -> Inspection:
    """Look at a checkpoint folder, an adapter folder, an exported folder or a GGUF file.

    Every weight is read once, one layer at a time; nothing is written.

    Args:
        path: what to look at.
        allow_pickle: accept `.bin`, `.pt` and `.pth` files, as plain tensors in a process of their own.
        gptq_zeros: override of how a GPTQ file stores zero-points: `v1`, `v1-words` or `v2`.
        ignore_extra: leave out tensors of a base's files that its index does not name.
        on_layer: called after each linear layer.

    Returns:
        What was found: each layer's format, what an export keeps and loses, and commands to run next, which name the
        three options too.

    Raises:
        BadInput: there is nothing here that sparseport knows, or it is damaged.
        Unsupported: a base of a kind that cannot be carried exactly; the message says which and the way out.
        VerificationError: an exported folder whose certificate is damaged.
    """
    path, reading = Path(path), Reading(allow_pickle, gptq_zeros, ignore_extra)
    found = _inspect(path, reading, on_layer)
    if found.kind != "base":
        for option, given in (("--gptq-zeros", reading.gptq_zeros), ("--ignore-extra", reading.ignore_extra)):
            if given:
                found.warnings.append(f"{option} has nothing to do: it is for the folder of a base model")
    return found


def _inspect(path: Path, reading: Reading, on_layer: Step) -> Inspection:
    if path.is_file() and path.suffix == ".gguf":
        return inspect_gguf(path)
    if not path.is_dir() and not (path.is_file() and is_nncf_checkpoint(path)):
        raise BadInput(
            "nothing to inspect here",
            where=path,
            expected="a folder with config.json or adapter_config.json, or a .gguf file",
            found="a file" if path.exists() else "nothing",
            code="E_MISSING",
        )
    if (path / CERTIFICATE).is_file():
        return inspect_export(path)
    if exported := certified_folders(path):
        return inspect_exports(path, exported)
    if (path / ADAPTER_CONFIG).is_file():
        return inspect_adapter(path, reading)
    if is_nncf_checkpoint(path):
        return inspect_nncf(path, reading)
    return inspect_base(path, reading, on_layer)
