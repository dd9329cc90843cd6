"""Export a checkpoint to both targets from one merge, and require that both folders hold the same, proven weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import unequal_weights, verify


@dataclass(frozen=True)
class Exported:
    """The OpenVINO half of an export to both targets, and the notes of the whole."""

    folder: Path
    certificate: Certificate
    notes: list[str]


def export_to_both(tmp_path: Path, **fields: Any) -> Exported:
    """Export, verify both folders, and require that they were read back as the same weights."""
    targets = ["openvino", "onnx"]
    result = export(make_recipe({"output": tmp_path / "out", "tokenizer": False, "target": targets, **fields}))
    verdicts = [verify(one.folder) for one in result.exports]
    assert [verdict.differences for verdict in verdicts] == [[], []] and unequal_weights(verdicts) == []
    for one in result.exports:
        assert one.certificate.body["numerics"]["run"]
        for facts in one.certificate.linears.values():
            assert facts["readback"] == {one.target: facts["weight_sha256"]}
    first = result.exports[0]
    return Exported(first.folder, first.certificate, result.notes)
