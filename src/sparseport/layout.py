"""Names of the folders in an export that has several: one for each target, and beside it that of the target's draft."""

from __future__ import annotations

TARGETS = ("openvino", "onnx")
_DRAFT = "-draft"
DRAFTS = tuple(f"{target}{_DRAFT}" for target in TARGETS)
FOLDERS = (*TARGETS, *DRAFTS)


def folder_name(target: str, *, draft: bool = False) -> str:
    """Name of a target's folder, or of its draft's."""
    return f"{target}{_DRAFT}" if draft else target


def main_of(name: str) -> str:
    """Name of the folder whose draft a folder is, by their names; a main network's own name for its folder."""
    return name.removesuffix(_DRAFT)
