"""The plan: estimates, and refusals that need no weight to be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sparseport import plan as module
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, EnvironmentProblem
from sparseport.plan import make_plan, require_exportable
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources


def test_too_little_memory_is_said_before_any_work(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory_mib", lambda: 100)
    for numerics in (True, False):
        recipe = make_recipe({"base": tiny_base, "output": tmp_path / "out", "numerics": numerics})
        with open_sources(recipe) as sources:
            plan = make_plan(recipe, sources)
        if numerics:
            with pytest.raises(EnvironmentProblem, match="no-numerics"):
                require_exportable(plan)
        else:
            require_exportable(plan)


def test_sparse_base_with_another_shape_is_refused(tiny_int4: Path, tiny_sparse: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_sparse, other)
    name = "model.layers.0.mlp.up_proj.weight"
    file = other / "model.safetensors"
    with SafeTensorsFile.open(file) as tensors:
        values = {each: np.array(tensors.read(each)) for each in tensors.names()}
    values[name] = values[name][:64]
    write_safetensors(file, [spec_of(each, array) for each, array in values.items()])
    recipe = make_recipe({"base": tiny_int4, "sparse_base": other, "output": tmp_path / "out"})
    with pytest.raises(BadInput, match=r"up_proj") as caught, open_sources(recipe):
        pass
    assert caught.value.code == "E_PAIRING"
