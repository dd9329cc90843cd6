"""`sparseport verify DIR`: repeat the proof from the written files alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseport.errors import SparseportError, VerificationError
from sparseport.targets.openvino import readback
from sparseport.verify.bits import digest_graph
from sparseport.verify.certificate import FILE_NAME, Certificate, file_facts


@dataclass(frozen=True)
class Verdict:
    """What verification found; `differences` is empty when every bit is as certified."""

    folder: Path
    files: int
    linears: int
    tensors: int
    differences: list[str] = field(default_factory=list)
    certificate: Certificate | None = None

    @property
    def ok(self) -> bool:
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "ok": self.ok,
            "files": self.files,
            "linears": self.linears,
            "tensors": self.tensors,
            "differences": self.differences,
        }


def verify(folder: Path | str, strict: bool = True, on_step: Callable[[], None] = lambda: None) -> Verdict:
    """Compare a folder with its certificate: every file by SHA-256, every weight by the digest of its values.

    Args:
        folder: an exported folder.
        strict: also report files that the certificate does not know.
        on_step: called after each file and each weight.

    Returns:
        A `Verdict`. Differences name the file and, where a weight is concerned, the tensor.

    Raises:
        VerificationError: there is no readable, unchanged certificate.
        Unsupported: the certificate is of a newer schema.
    """
    folder = Path(folder)
    certificate = Certificate.read(folder)
    differences: list[str] = []
    known = certificate.files
    for name, facts in sorted(known.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            differences.append(f"{name}: missing")
        elif path.stat().st_size != facts["size"]:
            differences.append(f"{name}: {path.stat().st_size} bytes, certified {facts['size']}")
        elif file_facts(path)["sha256"] != facts["sha256"]:
            differences.append(f"{name}: content changed")
        on_step()
    if strict:
        extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
        differences.extend(f"{name}: not in the certificate" for name in sorted(extra - set(known) - {FILE_NAME}))
    if not any(name.startswith("openvino_model.") and "missing" in name for name in differences):
        differences.extend(_weight_differences(folder / "openvino_model.xml", certificate, on_step))
    return Verdict(folder, len(known), len(certificate.linears), len(certificate.tensors), differences, certificate)


def _weight_differences(xml: Path, certificate: Certificate, on_step: Callable[[], None]) -> list[str]:
    certified = {"weight": certificate.linears, "tensor": certificate.tensors}
    try:
        found = digest_graph(readback.read_model(xml), certified["weight"], certified["tensor"], on_step)
    except SparseportError as error:
        return [f"openvino_model.xml: {error.what}{f' ({error.where})' if error.where else ''}"]
    except Exception as error:  # a damaged graph can fail anywhere in the reader: that is a difference, not a bug
        return [f"openvino_model.xml: cannot be read back ({type(error).__name__}: {str(error).splitlines()[:1]})"]
    differences = [f"openvino_model.xml: matrix {name} is used but not certified" for name in found.unproven]
    for kind, digests in (("weight", found.linears), ("tensor", found.tensors)):
        for name, facts in sorted(certified[kind].items()):
            if name not in digests:
                differences.append(f"openvino_model: {kind} {name} is not in the graph")
            elif digests[name] != facts["readback"]["openvino"]:
                differences.append(f"openvino_model.bin: {kind} {name} changed")
    return differences


def require(verdict: Verdict) -> None:
    """Raise if a verdict has differences.

    Raises:
        VerificationError: lists the first differences.
    """
    if not verdict.ok:
        shown = "; ".join(verdict.differences[:5])
        more = f" (and {len(verdict.differences) - 5} more)" if len(verdict.differences) > 5 else ""
        raise VerificationError(
            f"{len(verdict.differences)} differences from the certificate: {shown}{more}",
            where=verdict.folder,
            fix="export again, or copy the folder again from its source",
        )
