"""Every recipe in export_configs/ is executed, on the tiny model (the demo's on the real one)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sparseport.cli import main
from sparseport.demo import run_demo
from sparseport.verify.certificate import certified_folders
from sparseport.verify.folder import verify

CONFIGS = sorted((Path(__file__).parents[2] / "export_configs").glob("*.yaml"))


@pytest.mark.usefixtures("light_steps")
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "demo"], ids=lambda path: path.stem)
def test_recipe_runs(
    path: Path,
    tmp_path: Path,
    tiny_qa_inputs: dict[str, Any],
    tiny_sp_inputs: dict[str, Any],
    tiny_adapter_dense: Path,
) -> None:
    sparse = path.stem.startswith(("sparse_peft", "shears"))
    inputs = dict(tiny_sp_inputs if sparse else tiny_qa_inputs)
    if "branches:" in path.read_text():
        inputs["adapter"] = tiny_adapter_dense
    named = re.findall(r"^  (base|sparse_base|adapter):", path.read_text(), re.MULTILINE)
    options = [part for name in named for part in (f"--{name.replace('_', '-')}", str(inputs[name]))]
    output = tmp_path / "out"
    code = main(["export", "--config", str(path), "--output", str(output), "--no-numerics", "--quiet", *options])
    folders = certified_folders(output)
    assert code == 0 and folders and all(verify(folder).differences == [] for folder in folders)


@pytest.mark.model
def test_demo_runs_and_resumes(demo_wheel: Path, tmp_path: Path) -> None:
    """The whole demo with next to no training: every step, the certificate, and the answers' agreement."""
    short = (
        "finetune.steps=2",
        "finetune.batch_size=4",
        "finetune.test_items=4",
        "sparsify.samples=4",
        "sparsify.sequence_length=64",
        "export.numerics=false",  # test_real_model compares logits
    )
    config = Path(__file__).parents[2] / "export_configs" / "demo.yaml"
    result = run_demo(config, tmp_path, short, wheel=demo_wheel)
    assert result["differences"] == [] and len(result["table"]) == 4
    assert result["code_differences"]["codes"] == sum(
        30 * rows * cols for rows, cols in ((576, 576), (192, 576), (192, 576), (1536, 576), (576, 1536))
    )
    assert result["code_differences"]["different"] < result["code_differences"]["codes"] / 100_000
    again = run_demo(config, tmp_path, short, wheel=demo_wheel)
    assert again["steps_seconds"] == {} and again["table"] == result["table"]
    changed = run_demo(config, tmp_path, (*short, "export.embedding=int8"), wheel=demo_wheel)
    assert set(changed["steps_seconds"]) == {"openvino", "measure"}
    assert verify(tmp_path / "openvino").differences == []
