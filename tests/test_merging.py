"""Merging one planned layer: what is counted of a layer that a sub-network cuts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dialects import quantised_llama
from sparseport.checkpoints.elastic import ElasticGroup, save_search_space
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.merging import merge_planned
from sparseport.plan import make_plan
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources
from sparseport.weights.mask import revived

GATE = "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("stored", ["dense", "gptq-v1"])
def test_weights_that_are_pruned_again_are_counted_within_the_cut(
    stored: str, tiny_sparse: Path, tmp_path: Path
) -> None:
    """A sparser mask than the base's own: 3 more zeros in the rows and columns that stay, 5 in those that go."""
    base = tiny_sparse
    if stored != "dense":
        base = tmp_path / "base"
        quantised_llama(tiny_sparse, base, stored)
    sparser = Path(shutil.copytree(tiny_sparse, tmp_path / "sparser"))
    with SafeTensorsFile.open(sparser / "model.safetensors") as file:
        tensors = {name: np.array(file.read(name)) for name in file.names()}
    for module in (GATE, DOWN):
        values = tensors[f"{module}.weight"]
        by_channel = values if module == GATE else values.T
        for first, last, count in ((0, 64, 3), (64, 128, 5)):
            large = np.argwhere(np.abs(by_channel[first:last]) > 0.5 * np.abs(values).max())[:count]
            assert len(large) == count
            by_channel[first + large[:, 0], large[:, 1]] = 0
    write_safetensors(sparser / "model.safetensors", [spec_of(name, array) for name, array in tensors.items()])
    groups = [ElasticGroup((GATE, "model.layers.1.mlp.up_proj"), (128, 64), "width")]
    fields = {"search_space": save_search_space(tmp_path, groups), "mask_policy": "reapply", "base": base}
    counted: dict[str, dict[str, int]] = {}
    for choice in ("maximal", "minimal"):
        recipe = {**fields, "sparse_base": sparser, "sub_adapter": choice, "output": tmp_path / "out"}
        made = make_recipe(recipe)
        with open_sources(made) as sources:
            layers = {layer.module: layer for layer in make_plan(made, sources).layers}
            merged = {module: merge_planned(made, sources, layers[module]) for module in (GATE, DOWN)}
        counted[choice] = {module: one.re_pruned for module, one in merged.items()}
        for one in merged.values():
            assert one.weight.mask is not None and revived(one.weight, one.weight.mask) == 0
    assert counted == {"maximal": {GATE: 8, DOWN: 8}, "minimal": {GATE: 3, DOWN: 3}}
