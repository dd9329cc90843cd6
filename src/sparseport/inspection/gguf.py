"""Look at a GGUF file."""

from __future__ import annotations

from pathlib import Path

from sparseport.errors import SparseportError
from sparseport.inspection.report import EXPORT, Inspection, as_command, output_for, word


def inspect_gguf(path: Path) -> Inspection:
    """What a GGUF file holds, from its header alone."""
    from sparseport.checkpoints.gguf import check_gguf, describe_gguf

    facts, kinds = describe_gguf(path)
    found = Inspection("gguf", f"GGUF file, {facts.get('architecture', 'unknown')} model", facts=facts)
    found.facts["tensors"] = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    command = [*EXPORT, "--base", word(path)]
    wide = ["--gguf-dtype", "float32", "--embedding", "fp32"]
    try:
        check_gguf(path)
    except SparseportError as error:
        found.loses.append(f"an export refuses this file: {error}")
    else:
        found.next = [as_command([*command, "--output", output_for(path)])]
    if set(kinds) <= {"F16"}:
        found.keeps.append("the value of every tensor: all are float16 in the file")
        return found
    found.keeps.append(f"the value of every tensor as the file gives it, but only with {' '.join(wide)}")
    found.loses.append(
        "otherwise every tensor, norms and embedding too, is rounded to float16 once; an export counts what changes"
    )
    if set(kinds) - {"F16", "F32", "BF16"}:
        found.loses.append("the blocks themselves (Q4_K and the like): no runtime here computes with them")
    if found.next:
        found.next.append(as_command([*command, *wide, "--output", output_for(path)]))
    return found
