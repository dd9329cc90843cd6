"""The certificate `sparseport.json`: what went in, what each weight became, what stands on disk.

It is canonical JSON (sorted keys, no white space, ASCII, integers and strings only: real numbers are decimal strings)
and carries its own SHA-256, so that a changed bit in the certificate is found like one in any other file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import SparseportError, Unsupported, VerificationError

FILE_NAME = "sparseport.json"
SCHEMA = 1
_SEAL = "certificate_sha256"


@dataclass(frozen=True)
class Certificate:
    """A certificate's content as plain data; `body` has no seal."""

    body: dict[str, Any]

    @property
    def linears(self) -> dict[str, dict[str, Any]]:
        """Per linear layer: rule, shape, format, sparsity and digests."""
        return dict(self.body["linears"])

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
        seal = hashlib.sha256(canonical(self.body)).hexdigest()
        return canonical({**self.body, _SEAL: seal}) + b"\n"

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
        return certificate


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
