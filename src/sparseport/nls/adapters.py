"""Which adapter of an exported folder is active when the folder is measured.

A folder that was exported with `--branches adapter` is a base and files of adapters beside it, which a runtime switches
on and off; its certificate names them.
"""

from __future__ import annotations

from pathlib import Path

from sparseport.errors import Unsupported, UsageError
from sparseport.verify.certificate import FILE_NAME, Certificate

NONE = "none"


def active_adapter(folder: Path, wanted: str | None = None) -> str | None:
    """The file of the adapter to switch on; None for the base alone, and for a folder without adapters.

    Args:
        folder: an exported folder, or a checkpoint, which has none.
        wanted: a file of the folder, or `none`. None takes the only adapter that there is.

    Raises:
        UsageError: the folder has no such adapter, or several and none was chosen.
        VerificationError: the folder's certificate, which names them, is damaged.
    """
    names = sorted(Certificate.read(folder).adapters) if (folder / FILE_NAME).is_file() else []
    if wanted == NONE or (wanted is None and not names):
        return None
    if wanted is None and len(names) > 1:
        raise UsageError(
            "the folder has several adapters",
            where=folder,
            expected=f"{', '.join(names)}, or {NONE}",
            fix=f"choose one with --adapter FILE, or give --adapter {NONE} for the base alone",
        )
    if wanted is not None and wanted not in names:
        raise UsageError(
            "the folder has no such adapter",
            where=folder,
            expected=", ".join([*names, NONE]),
            found=wanted,
            fix="an export with --branches adapter has a file with its adapter" if not names else None,
        )
    return names[0] if wanted is None else wanted


def no_switch(folder: Path, adapter: str) -> Unsupported:
    """The error where OpenVINO itself runs a model: only its GenAI switches an adapter on, and that gives no logits."""
    return Unsupported(
        "OpenVINO without its GenAI cannot switch an adapter on",
        where=folder / adapter,
        fix="export with --branches graph to measure this, or choose --adapter none for the base alone; "
        "written answers, and the engines torch and onnx, take the adapter",
        code="E_ADAPTER",
    )
