"""The certificate `sparseport.json`: what went in, what each weight became, what stands on disk.

It is canonical JSON (sorted keys, no white space, ASCII, no floats: real numbers are decimal strings) and carries its
own SHA-256, so that a changed bit in the certificate is found like one in any other file. The seal is no signature:
whoever may write the folder may write a new one. To be sure of a copy, compare the seal with the sender's.

`proof_sha256` covers everything but the measured logits, which differ in their last digits from machine to machine: the
same inputs and versions give the same proof everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import SparseportError, Unsupported, VerificationError
from sparseport.layout import FOLDERS, folder_name
from sparseport.layout import TARGETS as TARGETS

FILE_NAME = "sparseport.json"
SCHEMA = 1
_SEAL = "certificate_sha256"
_PROOF = "proof_sha256"
# Inputs that differ between a main network and its draft.
_CHOOSING = ("sub_adapter", "dataset")


@dataclass(frozen=True)
class Certificate:
    """A certificate's content.

    body  plain data, without seal and proof; every key is explained in docs/certificate.md
    """

    body: dict[str, Any]

    @property
    def target(self) -> str:
        """The runtime that the folder is for; the first certificates named none and were OpenVINO's."""
        return str(self.body.get("target", "openvino"))

    @property
    def portable(self) -> bool:
        """Whether OpenVINO runs the ONNX folder as well."""
        recipe = self.body.get("recipe")
        onnx = recipe.get("onnx") if isinstance(recipe, dict) else None
        return isinstance(onnx, dict) and onnx.get("portable") is True

    @property
    def around(self) -> dict[str, Any]:
        """What the graph around the weights was built as; see `targets.read_back.GraphReader.around`."""
        return dict(self.body.get("graph", {}))

    @property
    def linears(self) -> dict[str, dict[str, Any]]:
        """Per linear layer: rule, shape, format, sparsity and digests."""
        return dict(self.body["linears"])

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """Per other tensor (embedding, head, norms, biases): shape, dtype, what storing it changed, digests."""
        return dict(self.body["tensors"])

    @property
    def adapters(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Per file of un-merged branches, per module: rank, scaling, digests."""
        return dict(self.body.get("adapters", {}))

    @property
    def draft(self) -> dict[str, str] | None:
        """What a draft's certificate says of its main networks: `super_network_sha256`; None for a main network."""
        draft = self.body.get("draft")
        return None if draft is None else dict(draft)

    @property
    def folder_name(self) -> str:
        """Name of its folder in an export that has several: `openvino`, or `openvino-draft`."""
        return folder_name(self.target, draft=self.draft is not None)

    @property
    def super_network(self) -> dict[str, dict[str, str]]:
        """The files that make the network which this one was taken from: role -> file name -> SHA-256.

        All inputs but what chooses a part of it, and what it is compressed with.
        """
        inputs = self.body.get("inputs", {})
        return {role: dict(files) for role, files in inputs.items() if role not in _CHOOSING}

    def super_network_sha256(self) -> str:
        """SHA-256 of `super_network`: equal in the certificates of a main network and its draft."""
        return hashlib.sha256(canonical(self.super_network)).hexdigest()

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Per output file: size in bytes and SHA-256."""
        return dict(self.body["files"])

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all linear layers."""
        return dict(self.body["totals"])

    def sealed(self) -> bytes:
        """The file's bytes: canonical JSON with the seal, and a newline."""
        return canonical({**self.body, _PROOF: self.proof(), _SEAL: self.seal()}) + b"\n"

    def seal(self) -> str:
        """SHA-256 of everything else in the certificate, in hexadecimal: what sender and receiver of a copy compare."""
        return hashlib.sha256(canonical({**self.body, _PROOF: self.proof()})).hexdigest()

    def proof(self) -> str:
        """SHA-256 of the body without the measured logits."""
        return hashlib.sha256(canonical({key: self.body[key] for key in self.body if key != "numerics"})).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the certificate into `folder`."""
        (folder / FILE_NAME).write_bytes(self.sealed())

    @staticmethod
    def read(folder: Path) -> Certificate:
        """Read and check the seal.

        Raises:
            VerificationError: there is no certificate, it is damaged, or it was edited.
            Unsupported: it was written by a newer sparseport.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise VerificationError(
                "the folder has no certificate",
                where=path,
                fix="export it again with sparseport; other tools' folders cannot be verified",
            )
        try:
            data = read_json(path, what="certificate")
            found = path.read_bytes()
        except (OSError, SparseportError) as error:
            reason = error.what if isinstance(error, SparseportError) else error.strerror
            raise VerificationError("the certificate is damaged", where=path, found=reason) from error
        data.pop(_SEAL, None)
        data.pop(_PROOF, None)
        certificate = Certificate(data)
        try:
            sealed = certificate.sealed()
        except (TypeError, ValueError) as error:
            raise VerificationError(
                "the certificate holds what no certificate holds", where=path, found=str(error)
            ) from error
        # Whole bytes are compared, not only the seal: white space around the values is covered too.
        if found != sealed:
            raise VerificationError("the certificate was changed after it was written", where=path)
        # The seal comes first, in every schema, so that a damaged schema number does not pass for a newer one.
        schema = data.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise Unsupported(
                "the certificate has a newer schema",
                where=path,
                expected=f"<= {SCHEMA}",
                found=schema,
                fix="upgrade sparseport",
            )
        if type(schema) is not int or schema != SCHEMA:
            raise VerificationError("the certificate has an unknown schema", where=path, expected=SCHEMA, found=schema)
        _check_structure(data, path)
        return certificate


def certified_folders(folder: Path) -> list[Path]:
    """The exported folders at a place: the folder itself, or those of several targets and drafts if it holds only them.

    The list is empty if it is neither, or if there is something else beside them.
    """
    if (folder / FILE_NAME).is_file():
        return [folder]
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    if all(path.name in FOLDERS and not path.is_symlink() and (path / FILE_NAME).is_file() for path in inside):
        return inside
    return []


def exported_folders(folder: Path) -> list[Path]:
    """What there is to verify at a place: the folder itself, or its subfolders with the name of a target or a draft."""
    if (folder / FILE_NAME).is_file() or not folder.is_dir():
        return [folder]
    return [folder / name for name in FOLDERS if (folder / name).is_dir()] or [folder]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_group_size(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(length) is int and length >= 0 for length in value)


def _is_read_back(value: object) -> bool:
    return isinstance(value, dict) and len(value) == 1 and all(map(_is_text, value.values()))


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_true_or_false(value: object) -> bool:
    return isinstance(value, bool)


def _is_branch(value: object) -> bool:
    """What the certificate says of an un-merged branch; `readback` names the target alone, as that of a weight."""
    # `source_sha256` is younger than the others: certificates without it are read.
    return (
        isinstance(value, dict)
        and _is_text(value.get("branch_sha256"))
        and _is_text(value.get("source_sha256", ""))
        and _is_read_back(value.get("readback"))
    )


_Checks = dict[str, Callable[[object], bool]]
# What verification and inspection rely on: part -> key -> what its value has to be.
_OF_EVERY_ENTRY: dict[str, _Checks] = {
    "files": {"sha256": _is_text, "size": _is_count},
    "linears": {"shape": _is_shape, "readback": _is_read_back},
    "tensors": {"shape": _is_shape, "readback": _is_read_back},
}
_WHERE_PRESENT: _Checks = {
    "group_size": _is_group_size,
    "tied_head": _is_true_or_false,
    "places": _is_names,
    "added": _is_count,
    "branch": _is_branch,
}
_OF_TOTALS: _Checks = {
    **dict.fromkeys(("linears", "int4_linears", "weights", "masked_weights", "pruned", "revived"), _is_count),
    "sparsity": _is_text,
}


def _check_structure(data: dict[str, Any], path: Path) -> None:
    """What verification and inspection rely on must be there, even in a certificate that somebody sealed anew.

    Raises:
        VerificationError: a part is missing or of another type.
    """
    if not _is_text(data.get("sparseport")):
        raise VerificationError("the certificate lacks a part", where=path, expected="sparseport, a version")
    target = data.get("target", "openvino")
    if target not in TARGETS:
        raise VerificationError("the certificate has an unknown target", where=path, expected=TARGETS, found=target)
    if not isinstance(data.get("graph", {}), dict):
        raise VerificationError("the certificate's entry is of another type", where=f"{path}, graph")
    _check_adapters(data.get("adapters", {}), data.get("files"), target, path)
    _check_inputs(data, path)
    for part, checks in _OF_EVERY_ENTRY.items():
        entries = data.get(part)
        if not isinstance(entries, dict) or (part == "files" and not entries):
            raise VerificationError("the certificate lacks a part", where=path, expected=part)
        for name, facts in entries.items():
            _check_entry(facts, checks, {} if part == "files" else _WHERE_PRESENT, f"{path}, {part}, {name}")
            read_back = [] if part == "files" else [facts["readback"]]
            read_back += [facts["branch"]["readback"]] if "branch" in facts else []
            if any(target not in found for found in read_back):
                raise VerificationError(
                    "the certificate's entry was not read back from its target's folder",
                    where=f"{path}, {part}, {name}",
                    expected=target,
                    found=", ".join(facts["readback"]),
                )
    for name in data["files"]:
        if not is_inside(name):
            raise VerificationError("the certificate names a file outside the folder", where=path, found=name[:80])
    _check_entry(data.get("totals"), _OF_TOTALS, {}, f"{path}, totals")


def _check_inputs(data: dict[str, Any], path: Path) -> None:
    """Inputs are digests of files by role, and a draft says whose it is.

    Raises:
        VerificationError: they are something else.
    """
    inputs, draft = data.get("inputs", {}), data.get("draft")
    if not isinstance(inputs, dict) or not all(isinstance(files, dict) for files in inputs.values()):
        raise VerificationError("the certificate's entry is of another type", where=f"{path}, inputs")
    if "draft" in data and (not isinstance(draft, dict) or not _is_text(draft.get("super_network_sha256"))):
        raise VerificationError("the certificate's entry is of another type", where=f"{path}, draft")


def _check_adapters(adapters: object, files: object, target: str, path: Path) -> None:
    """Every adapter is a file of the folder, and every branch in it was read back.

    Raises:
        VerificationError: one is not.
    """
    if not isinstance(adapters, dict):
        raise VerificationError("the certificate's entry is of another type", where=f"{path}, adapters")
    for name, branches in adapters.items():
        where = f"{path}, adapters, {name[:80]}"
        if not isinstance(files, dict) or name not in files or not isinstance(branches, dict) or not branches:
            raise VerificationError("the certificate's entry is incomplete or of another type", where=where)
        for module, facts in branches.items():
            if not _is_branch(facts) or target not in facts["readback"]:
                raise VerificationError("the certificate's entry was not read back", where=f"{where}, {module[:80]}")


def _check_entry(facts: object, required: _Checks, optional: _Checks, where: str) -> None:
    """Check one mapping of the certificate.

    Raises:
        VerificationError: it is no mapping, or a value is missing or of another type.
    """
    found = facts if isinstance(facts, dict) else {}
    wrong = [key for key, fits in required.items() if key not in found or not fits(found[key])]
    wrong += [key for key, fits in optional.items() if key in found and not fits(found[key])]
    if wrong:
        raise VerificationError(
            "the certificate's entry is incomplete or of another type", where=where, expected=", ".join(wrong)
        )


def is_inside(name: str) -> bool:
    """Whether a file name is a plain relative path with slashes, such as every system can have and no drive starts."""
    plain = not set(name) & set("\0\\:") and not any("\ud800" <= c <= "\udfff" for c in name)  # bytes, no text
    return plain and all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in name.split("/"))


def canonical(data: dict[str, Any]) -> bytes:
    """Canonical JSON bytes: sorted keys, no spaces, ASCII.

    Raises:
        TypeError: a float is in the data; real numbers go in as decimal strings.
    """
    _refuse_floats(data)
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def decimal(value: float, digits: int = 6) -> str:
    """A real number as it stands in a certificate: fixed-point, so that equal values give equal text."""
    return f"{value:.{digits}f}"


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, read in blocks."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return {"sha256": sha.hexdigest(), "size": path.stat().st_size}


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise TypeError(f"a certificate holds no floats: {value}")
    if isinstance(value, dict):
        for item in value.values():
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)
