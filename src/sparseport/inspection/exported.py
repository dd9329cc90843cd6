"""Look at what sparseport exported."""

from __future__ import annotations

from pathlib import Path

from sparseport.inspection.report import Inspection, as_command, word
from sparseport.layout import DRAFTS
from sparseport.verify.certificate import Certificate


def inspect_export(path: Path) -> Inspection:
    """The folder of one target, as its certificate describes it; raises as `Certificate.read`."""
    certificate = Certificate.read(path)
    totals = certificate.totals
    found = Inspection("export", "folder exported by sparseport, with its certificate")
    found.writer = f"sparseport {certificate.body['sparseport']}"
    found.facts = {
        "target": certificate.target,
        "linear layers": f"{totals['linears']}, {totals['weights']:,} weights, {totals['int4_linears']} in INT4",
        "pruned": f"{totals['pruned']:,} of {totals['masked_weights']:,}, {totals['revived']:,} of them not zero",
    }
    if certificate.draft is not None:
        found.facts["role"] = "draft of a main network, for speculative decoding"
    beside = sum("branch" in facts for facts in certificate.linears.values())
    if beside:
        found.facts["un-merged branches"] = f"beside {beside} layers, in the graph"
    for file, branches in sorted(certificate.adapters.items()):
        found.facts[f"adapter {file}"] = f"un-merged branches for {len(branches)} layers, which the runtime switches"
    found.next = [as_command(["sparseport", "verify", word(path)])]
    return found


def inspect_exports(path: Path, folders: list[Path]) -> Inspection:
    """A folder with a folder for each of several targets, or with drafts."""
    parts = [inspect_export(folder) for folder in folders if folder.name not in DRAFTS]
    drafts = [inspect_export(folder) for folder in folders if folder.name in DRAFTS]
    parts, drafts = (parts, drafts) if parts else (drafts, [])  # a draft whose main network is gone
    targets = f"{len(parts)} targets" if len(parts) > 1 else "a target"
    found = Inspection("export", f"folder exported by sparseport for {targets}, with certificates")
    found.writer = parts[0].writer
    found.facts = {**parts[0].facts, "target": ", ".join(part.facts["target"] for part in parts)}
    if drafts:
        found.facts["draft"] = drafts[0].facts["linear layers"]
    found.next = [as_command(["sparseport", "verify", word(path)])]
    return found
