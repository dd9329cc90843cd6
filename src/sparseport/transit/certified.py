"""What the certificates of a folder say of its files, before it is sent and after it has arrived."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseport.errors import VerificationError
from sparseport.verify.certificate import FILE_NAME, Certificate, exported_folders


def check_certified(folder: Path, facts: Mapping[str, Mapping[str, Any]], strict: bool = True) -> list[str]:
    """Hold a folder's files against its certificates; returns the certified places: "", or names of subfolders.

    Args:
        folder: an exported folder, one with a subfolder for each target, or any other, which has no certified place.
        facts: `size` and `sha256` of every file, by relative name.
        strict: also refuse files that a certificate does not know.

    Raises:
        VerificationError: a file is missing or changed, or a certificate is.
        Unsupported: a certificate is of a newer schema.
    """
    places = [place for place in exported_folders(folder) if (place / FILE_NAME).is_file()]
    expected: dict[str, Mapping[str, Any]] = {}
    prefixes = []
    for place in places:
        prefix = "" if place == folder else f"{place.name}/"
        prefixes.append(prefix)
        expected |= {prefix + name: one for name, one in Certificate.read(place).files.items()}
    differences = [
        f"{name}: missing" if name not in facts else f"{name}: content changed"
        for name, one in sorted(expected.items())
        if name not in facts or any(facts[name][key] != one[key] for key in ("size", "sha256"))
    ]
    known = {*expected, *(prefix + FILE_NAME for prefix in prefixes)}
    extra = [f"{name}: not in the certificate" for name in sorted(set(facts) - known)] if strict and places else []
    if differences or extra:
        shown = "; ".join([*differences, *extra][:5])
        more = len(differences) + len(extra) - 5
        raise VerificationError(
            f"the files are not those of the certificate: {shown}{f' (and {more} more)' if more > 0 else ''}",
            where=folder,
            fix="export again, or copy the folder again from its source"
            if differences
            else "remove what is not of the export, or give --ignore-extra",
        )
    return [prefix.rstrip("/") for prefix in prefixes]
