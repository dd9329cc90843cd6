"""Settings that a quantiser wrote beside config.json as well: both must say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.paths import bare_file
from sparseport.errors import BadInput

_SEPARATE = ("quantize_config.json", "quantization_config.json")
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


def check_separate(folder: ModelFolder, raw: Mapping[str, Any]) -> None:
    """Refuse a folder whose quantize_config.json or quantization_config.json contradicts its config.json.

    Raises:
        BadInput: names the file and the key.
    """
    for file in _SEPARATE:
        if not (folder.path / file).exists():
            continue
        other = read_json(bare_file(folder.path, file, file), what=file)
        for key in _COMPARED:
            if key in raw and key in other and _plain(raw[key]) != _plain(other[key]):
                raise BadInput(
                    f"config.json and {file} disagree about {key}",
                    where=folder.path / file,
                    expected=repr(raw[key]),
                    found=repr(other[key])[:80],
                    fix=f"correct one of them, or remove {file}",
                    code="E_QUANT_CONFIG",
                )


def _plain(value: object) -> object:
    """A setting for comparison: tools write `GEMM` in one file and `gemm` in the other."""
    return value.casefold() if isinstance(value, str) else value
