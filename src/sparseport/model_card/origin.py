"""Where an exported model comes from, as its inputs' README.md and the adapter's config say it: for the certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.checkpoints.paths import file_sha256
from sparseport.checkpoints.readme import FILE_NAME, HUB_NAME, Metadata, checked, read_metadata


@dataclass(frozen=True)
class Origin:
    """What is known of a model's origin.

    facts  for the certificate: `licenses` (role -> identifiers), `license_name`, `license_link`, `base_model` (`name`,
           and `source`, the file that says so), `languages`; a key is missing where nothing is known
    files  role -> name -> SHA-256 of the files that it was read from, which are inputs too
    notes  what could not be read, one sentence each
    """

    facts: dict[str, Any]
    files: dict[str, dict[str, str]]
    notes: list[str]


def origin_of(folders: Mapping[str, Path], adapter_base: str = "", gguf: Path | None = None) -> Origin:
    """Read the origin of an export's inputs.

    Args:
        folders: role -> input folder, the base first.
        adapter_base: `base_model_name_or_path` of the adapter; passed over unless it has the form owner/name.
        gguf: the file that the base was converted from, which names its license itself.

    A folder without README.md says nothing. Where inputs name different licenses, all of them are kept.
    """
    found: dict[str, Metadata] = {}
    files: dict[str, dict[str, str]] = {}
    notes = []
    for role, folder in folders.items():
        metadata = read_metadata(folder)
        if metadata is None:
            continue
        found[role] = metadata
        if metadata.problem is not None:
            notes.append(
                f"{FILE_NAME} of the {role.replace('_', ' ')} is not used for the model card: {metadata.problem}"
            )
        if metadata != Metadata(problem=metadata.problem):
            files[role] = {FILE_NAME: file_sha256(folder / FILE_NAME)}
    if gguf is not None:
        found = {"base": _of_gguf(gguf), **found}
    facts: dict[str, Any] = {}
    licenses = {role: list(one.licenses) for role, one in found.items() if one.licenses}
    if licenses:
        facts["licenses"] = licenses
        named = next(one for one in found.values() if one.licenses)
        if named.license_name:
            facts["license_name"] = named.license_name
        if named.license_link:
            facts["license_link"] = named.license_link
    if HUB_NAME.fullmatch(adapter_base):
        facts["base_model"] = {"name": adapter_base, "source": "adapter_config.json"}
    else:
        named_base = next((one.base_model for one in found.values() if one.base_model), None)
        if named_base is not None:
            facts["base_model"] = {"name": named_base, "source": FILE_NAME}
    languages = next((one.languages for one in found.values() if one.languages), ())
    if languages:
        facts["languages"] = list(languages)
    return Origin(facts, files, notes)


def _of_gguf(path: Path) -> Metadata:
    """`general.license` and `general.languages` of a GGUF file, in the forms that a README.md may have them."""
    fields = GgufFile.open(path).fields
    return checked({"license": fields.get("general.license"), "language": fields.get("general.languages")})
