"""Export a checkpoint to both targets from one merge, and require that both folders hold the same, proven weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.pipeline import TargetExport, export
from sparseport.recipe import make_recipe
from sparseport.verify.folder import unequal_weights, verify


def export_to_both(tmp_path: Path, **inputs: Any) -> TargetExport:
    """The OpenVINO half of an export to both targets; what is true of it has been required of the ONNX half as well."""
    targets = ["openvino", "onnx"]
    result = export(make_recipe({"output": tmp_path / "out", "tokenizer": False, "target": targets, **inputs}))
    verdicts = [verify(one.folder) for one in result.exports]
    assert [verdict.differences for verdict in verdicts] == [[], []] and unequal_weights(verdicts) == []
    for one in result.exports:
        assert one.certificate.body["numerics"]["run"]
        for facts in one.certificate.linears.values():
            assert facts["readback"] == {one.target: facts["weight_sha256"]}
    return result.exports[0]
