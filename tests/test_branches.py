"""Which adapters may stay un-merged: everything else is refused before any work, with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparseport.cli import main
from sparseport.errors import BadInput, FidelityError, SparseportError
from sparseport.pipeline import export, plan
from sparseport.plan import require_exportable
from sparseport.recipe import make_recipe


def _refusal(kind: type[SparseportError], tmp_path: Path, **fields: Any) -> SparseportError:
    with pytest.raises(kind) as caught:
        export(make_recipe({"output": tmp_path / "out", "tokenizer": False, **fields}))
    assert not (tmp_path / "out").exists()
    return caught.value


@pytest.mark.parametrize("branches", ["graph", "adapter"])
@pytest.mark.parametrize("kind", ["quantization-aware", "SparsePEFT"])
def test_adapters_that_are_merged(
    kind: str, branches: str, tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path, tiny_adapter_sparse: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    adapter, base = (tiny_adapter, tiny_int4) if kind == "quantization-aware" else (tiny_adapter_sparse, tiny_sparse)
    fields = {"base": base, "adapter": adapter, "branches": branches}
    if kind == "quantization-aware":
        fields["sparse_base"] = tiny_sparse
    error = _refusal(BadInput, tmp_path, **fields)
    assert kind in error.what and "un-merged" in error.what and error.code == "E_BRANCH"
    assert error.fix is not None and "--branches" in error.fix


def test_an_nncf_checkpoint_is_merged(tmp_path: Path) -> None:
    """Its adapters lie inside the fake quantiser, whatever the checkpoint holds."""
    from types import SimpleNamespace

    from sparseport.branches import require_branches

    recipe = make_recipe({"base": "b", "output": "o", "adapter": "a", "branches": "graph"})
    sources: Any = SimpleNamespace(tuned=SimpleNamespace(source=tmp_path / "nncf_checkpoint.pth"), adapter=None)
    with pytest.raises(BadInput, match="NNCF") as caught:
        require_branches(recipe, sources)
    assert caught.value.fix is not None and "--branches" in caught.value.fix


def test_the_refusal_of_a_merge_names_the_way_out(
    tiny_sparse: Path, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    for base in (tiny_sparse, tiny_int4):
        error = _refusal(FidelityError, tmp_path, base=base, adapter=tiny_adapter_dense)
        assert error.code == "E_RULE" and error.fix is not None and "--branches graph" in error.fix


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"branches": "graph"}, "need an adapter"),
        ({"branches": "adapter"}, "need an adapter"),
        ({"adapter": "a", "branch_dtype": "fp16"}, "belongs to un-merged branches"),
        ({"adapter": "a", "branches": "both"}, "branches"),
        ({"adapter": "a", "branches": "adapter", "target": ["onnx"], "onnx": {"portable": True}}, "portable"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        make_recipe({"base": "b", "output": "o", **fields})


def test_ranks_above_the_trained_ones(tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text("[9, 9]")
    fields = {"base": tiny_sparse, "adapter": tiny_adapter_dense, "branches": "graph"}
    error = _refusal(BadInput, tmp_path, **fields, sub_adapter=str(tmp_path / "ranks.json"))
    assert error.found is not None and "9" in error.found


def test_an_overflow_is_found_before_anything_is_published(
    tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    import numpy as np

    from adapter_folders import edit_tensors

    adapter = Path(shutil.copytree(tiny_adapter_dense, tmp_path / "adapter"))

    def enlarge(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name] = tensors[name] + np.float32(1e5)

    edit_tensors(adapter, enlarge)
    fields = {"base": tiny_sparse, "adapter": adapter, "branches": "graph", "branch_dtype": "fp16"}
    error = _refusal(BadInput, tmp_path, **fields)
    assert error.code == "E_OVERFLOW" and error.fix == "leave --branch-dtype away"


@pytest.mark.parametrize(("branches", "rule"), [("graph", "branch"), ("adapter", "carry")])
def test_the_plan(branches: str, rule: str, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path) -> None:
    fields = {"base": tiny_int4, "adapter": tiny_adapter_dense, "branches": branches, "sub_adapter": "minimal"}
    found = plan(make_recipe({"output": tmp_path / "out", **fields}))
    require_exportable(found)
    for layer in found.layers:
        adapted = layer.module.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        assert layer.rule == (rule if adapted else "carry")
        assert layer.rank == ((4 if "self_attn" in layer.module else 8) if adapted else None)
    with_branch, without = (
        plan(make_recipe({"output": tmp_path / "out", **more})) for more in (fields, {"base": tiny_int4})
    )
    assert with_branch.output_bytes > without.output_bytes


def test_command_line(tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["export", "--base", str(tiny_sparse), "--adapter", str(tiny_adapter_dense), "--dry-run", "--json"]
    assert main([*command, "--output", str(tmp_path / "out"), "--branches", "graph"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["rule"] for layer in layers} == {"branch", "carry"}
    assert main([*command, "--output", str(tmp_path / "out")]) == 4
    assert "--branches" in json.loads(capsys.readouterr().out)["error"]["fix"]
