"""`sparseport verify DIR`: repeat the proof from the written files alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseport.errors import SparseportError, VerificationError
from sparseport.extras import missing
from sparseport.targets.read_back import open_reader
from sparseport.verify.adapters import adapter_differences
from sparseport.verify.bits import digest_graph
from sparseport.verify.certificate import FILE_NAME, Certificate, file_facts

GRAPH_FILES = {"openvino": ("openvino_model.xml", "openvino_model.bin"), "onnx": ("model.onnx", "model.onnx.data")}
"""Per target, the files of the graph and of its weights."""


@dataclass(frozen=True)
class Verdict:
    """What verification found; `differences` is empty when every bit is as certified.

    folder       that was verified
    files        how many files the certificate names
    linears      how many linear layers
    tensors      how many other tensors
    differences  sentences, each with its file and, where a weight is concerned, its name
    certificate  as it was read; None where there is no readable one
    """

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
        EnvironmentProblem: the target's packages, which read the graph, are not installed.
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
    graph_files = GRAPH_FILES[certificate.target]
    if not any(name.startswith(graph_files) and "missing" in name for name in differences):
        differences.extend(_weight_differences(folder, certificate, graph_files, on_step))
    return Verdict(folder, len(known), len(certificate.linears), len(certificate.tensors), differences, certificate)


def _weight_differences(
    folder: Path, certificate: Certificate, files: tuple[str, str], on_step: Callable[[], None]
) -> list[str]:
    graph_file, data_file = files
    target = certificate.target
    certified = {"weight": certificate.linears, "tensor": certificate.tensors}
    try:
        reader = open_reader(target, folder)
        found = digest_graph(reader, certified["weight"], certified["tensor"], on_step)
        present = {name: facts for name, facts in certificate.adapters.items() if (folder / name).is_file()}
        beside = adapter_differences(reader, target, present)
    except ModuleNotFoundError as error:
        raise missing(error.name, target) from error
    except SparseportError as error:
        return [f"{graph_file}: {error.what}{f' ({error.where})' if error.where else ''}"]
    except Exception as error:  # a damaged graph can fail anywhere in the reader: that is a difference, not a bug
        return [f"{graph_file}: cannot be read back ({type(error).__name__}: {str(error).splitlines()[:1]})"]
    differences = [
        f"sparseport.json: weight {name} was not read back as it was merged"
        for name, facts in sorted(certificate.linears.items())
        if facts["readback"][target] != facts.get("compressed_sha256", facts.get("weight_sha256"))
    ]
    differences += [f"{graph_file}: matrix {name} is used but not certified" for name in found.unproven]
    if not found.unproven and found.around != certificate.around:
        differences.append(f"{graph_file}: the graph around the weights changed")
    differences += _branch_differences(certificate, found.branches, graph_file, data_file) + beside
    for kind, digests in (("weight", found.linears), ("tensor", found.tensors)):
        for name, facts in sorted(certified[kind].items()):
            if name not in digests:
                differences.append(f"{graph_file}: {kind} {name} is not in the graph")
            elif digests[name] != facts["readback"][target]:
                differences.append(f"{data_file}: {kind} {name} changed")
    return differences


def _branch_differences(certificate: Certificate, found: dict[str, str], graph_file: str, data_file: str) -> list[str]:
    """What is wrong with the branches beside base weights: one that is gone, one too many, another one."""
    certified = {module: facts["branch"] for module, facts in certificate.linears.items() if "branch" in facts}
    differences = []
    for module in sorted({*certified, *found}):
        if module not in certified:
            differences.append(f"{graph_file}: branch of {module} is in the graph but not certified")
        elif module not in found:
            differences.append(f"{graph_file}: branch of {module} is not in the graph")
        elif found[module] != certified[module]["readback"][certificate.target]:
            differences.append(f"{data_file}: branch of {module} changed")
        elif found[module] != certified[module]["branch_sha256"]:
            differences.append(f"sparseport.json: branch of {module} was not read back as it was written")
    return differences


def unequal_weights(verdicts: list[Verdict]) -> list[str]:
    """Layers and adapters of which the certificates of several targets say different things: all come from one merge.

    Branches in files are stored as each runtime wants them, so what is compared of them is the digest of the adapter
    itself, where both certificates have it; of files, those that both targets have.
    """
    certificates = [verdict.certificate for verdict in verdicts if verdict.certificate]
    differences = []
    for theirs in certificates[1:]:
        first = certificates[0]
        differences += [
            f"{module}: the targets' certificates name different weights"
            for module in sorted({*first.linears, *theirs.linears})
            if _different(first.linears.get(module), theirs.linears.get(module))
        ]
        ours, other = (_by_name(certificate) for certificate in (first, theirs))
        differences += [
            f"adapter {name}, {module}: the targets' certificates name different branches"
            for name in sorted({*ours} & {*other})
            for module in sorted({*ours[name], *other[name]})
            if _different_branch(ours[name].get(module), other[name].get(module))
        ]
    return differences


def _different(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    if one is None or other is None or one.get("weight_sha256") != other.get("weight_sha256"):
        return True
    ours, theirs = one.get("branch"), other.get("branch")
    if ours is None or theirs is None:
        return ours is not theirs
    return _different_branch(ours, theirs) or bool(ours["branch_sha256"] != theirs["branch_sha256"])


def _different_branch(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    if one is None or other is None:
        return True
    digests = one.get("source_sha256"), other.get("source_sha256")
    return None not in digests and digests[0] != digests[1]


def _by_name(certificate: Certificate) -> dict[str, dict[str, dict[str, Any]]]:
    """Adapters by the names of their files without suffix, which differs from target to target."""
    return {Path(file).stem: branches for file, branches in certificate.adapters.items()}


def strangers(parent: Path, folders: list[Path]) -> list[str]:
    """What lies beside the folders of several targets."""
    names = {folder.name for folder in folders}
    return [f"{path.name}: beside the exported folders" for path in sorted(parent.iterdir()) if path.name not in names]


def require(verdict: Verdict) -> None:
    """Raise if a verdict has differences.

    Raises:
        VerificationError: lists the first differences.
    """
    require_all([verdict], [])


def require_all(verdicts: list[Verdict], unequal: list[str]) -> None:
    """Raise if a verdict has differences, or if `unequal_weights` found some between them.

    Raises:
        VerificationError: lists the first differences.
    """
    differences = unequal + [difference for verdict in verdicts for difference in verdict.differences]
    if differences:
        shown = "; ".join(differences[:5])
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        wrong = next((verdict for verdict in verdicts if not verdict.ok), verdicts[0])
        raise VerificationError(
            f"{len(differences)} differences from the certificate: {shown}{more}",
            where=wrong.folder,
            fix="export again, or copy the folder again from its source",
        )
