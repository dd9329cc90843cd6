"""Masks that come with the weights, choices that are said aloud, and what the certificate says of the written type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialects import quantised_llama, write_folder
from e2e.in_process import in_process
from nncf_models import nncf_with_strip, tuned
from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.merging import merge_planned
from sparseport.pipeline import export, plan
from sparseport.plan import make_plan
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources
from sparseport.weights.linear import DenseWeight, QuantizedWeight


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


def _recipe(tmp_path: Path, **inputs: Any) -> Any:
    return make_recipe({"output": tmp_path / "out", "tokenizer": False, "numerics": False, **inputs})


def _as_bitmask(sparse: Path, out: Path) -> None:
    """The sparse model in compressed-tensors' bitmask layout; in each layer one kept weight is exactly zero."""
    with ModelFolder.open(sparse) as folder:
        modules = [module for module in folder.linear_names() if module != folder.head_name]
        weights = {}
        for module in modules:
            values = np.array(folder.read(f"{module}.weight"))
            mask = values != 0
            row, column = np.argwhere(mask)[7]
            values[row, column] = 0
            weights[module] = DenseWeight(values, mask)
        names = {f"{module}.weight" for module in modules}
        others = {name: np.array(folder.read(name)) for name in folder.names() if name not in names}
        write_folder(out, "sparse-bitmask", weights, others, folder.config)


def test_a_kept_zero_gets_no_update(tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    """Training masks by W != 0, so a weight that the bitmask keeps and that is zero stays zero; it is not counted as
    pruned all the same."""
    _as_bitmask(tiny_sparse, tmp_path / "base")
    recipe = _recipe(tmp_path, base=tmp_path / "base", adapter=tiny_adapter_sparse)
    with open_sources(recipe) as sources:
        for layer in make_plan(recipe, sources).layers:
            base = sources.dense(layer.module)
            weight = merge_planned(recipe, sources, layer).weight
            assert isinstance(weight, DenseWeight) and weight.mask is not None and base.mask is not None
            kept_zeros = base.mask & (base.values == 0)
            assert kept_zeros.sum() == 1 and not weight.values[kept_zeros].any()
            assert np.array_equal(weight.mask, base.mask)
            if layer.rule == "sparse_peft":
                assert not np.array_equal(weight.values, base.values)


def test_a_kept_zero_of_the_sparse_base_gets_no_update(
    tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    _as_bitmask(tiny_sparse, tmp_path / "sparse")
    recipe = _recipe(tmp_path, base=tiny_int4, sparse_base=tmp_path / "sparse", adapter=tiny_adapter)
    with open_sources(recipe) as sources:
        layers = [layer for layer in make_plan(recipe, sources).layers if layer.rule == "qa_sparse_peft"]
        assert layers
        for layer in layers:
            sparse = sources.sparse_dense(layer.module)
            weight = merge_planned(recipe, sources, layer).weight
            assert isinstance(weight, QuantizedWeight)
            zeros = np.repeat(weight.zero_points, weight.group_size, axis=1)
            assert (weight.codes == zeros)[sparse.values == 0].all()


def test_lora_on_a_bitmask_base_that_prunes_nothing(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with ModelFolder.open(tiny_base) as folder:
        modules = [module for module in folder.linear_names() if module != folder.head_name]
        read = {module: np.array(folder.read(f"{module}.weight")) for module in modules}
        names = {f"{module}.weight" for module in modules}
        others = {name: np.array(folder.read(name)) for name in folder.names() if name not in names}
        weights = {module: DenseWeight(values, np.ones(values.shape, bool)) for module, values in read.items()}
        write_folder(tmp_path / "base", "sparse-bitmask", weights, others, folder.config)
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    plain = {"sparse_adapter": False, "quantization_aware": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), **plain}))
    found = plan(_recipe(tmp_path, base=tmp_path / "base", adapter=tmp_path / "adapter"))
    assert not found.refusals and {layer.rule for layer in found.layers} == {"carry", "lora"}


def test_a_mask_that_was_given_is_held_against_nncf(tiny_base: Path, tiny_sparse: Path, tmp_path: Path) -> None:
    with nncf_with_strip() as nncf:
        tuned(nncf, tiny_sparse, tmp_path / "tuned", mode="INT4_ASYM", compression="FQ_LORA_NLS", dtype="float32")
    inputs: dict[str, Any] = {"base": tiny_sparse, "adapter": tmp_path / "tuned", "allow_pickle": True}
    notes = plan(_recipe(tmp_path, **inputs)).notes
    assert any("--nncf-base-dtype" in note for note in notes) and any("largest rank" in note for note in notes)
    inputs["nncf_base_dtype"] = "float32"
    with pytest.raises(FidelityError, match="revives weights that the sparse base prunes"):
        export(_recipe(tmp_path, **inputs, sparse_base=tiny_sparse))
    assert not (tmp_path / "out").exists()
    kept = export(_recipe(tmp_path, **inputs, sparse_base=tiny_sparse, mask_policy="keep-codes"))
    assert kept.certificate.totals["revived"] > 1000
    with pytest.raises(BadInput, match="no search space"):
        plan(_recipe(tmp_path, **inputs, search_space=tmp_path / "nothing.json"))


def test_the_default_sub_adapter_is_said(tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    inputs = {"base": tiny_sparse, "adapter": tiny_adapter_sparse}
    assert any("maximal sub-adapter is taken" in note for note in plan(_recipe(tmp_path, **inputs)).notes)
    chosen = plan(_recipe(tmp_path, **inputs, sub_adapter="heuristic"))
    assert not any("maximal" in note for note in chosen.notes)


def test_the_certificate_names_the_type_that_was_written(tiny_base: Path, tmp_path: Path) -> None:
    """Settings say asymmetric, every zero-point is 8: stored as i4, and the certificate says so."""
    weights = quantised_llama(tiny_base, tmp_path / "first", "ct-pack-sym")
    with ModelFolder.open(tmp_path / "first") as folder:
        parts = {name for name in folder.names() if "weight_" in name}
        others = {name: np.array(folder.read(name)) for name in folder.names() if name not in parts}
        middle = {m: replace(w, scales=w.scales.astype(np.float16)) for m, w in weights.items()}  # type: ignore[type-var, union-attr]
        config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
        write_folder(tmp_path / "base", "gptq-v1", middle, others, config)
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    settings["quantization_config"]["sym"] = False
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    recipe = _recipe(tmp_path, base=tmp_path / "base")
    assert {layer.stored["openvino"].label for layer in plan(recipe).layers} == {"u4 g32"}
    assert {facts["stored"] for facts in export(recipe).certificate.linears.values()} == {"i4 g32"}


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_stored_rotary_frequencies_must_be_the_configs(tiny_base: Path, tmp_path: Path, factor: float) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16) * factor
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.astype(np.float16)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    if factor == 1.0:
        assert any(
            "rotary frequency tensors are left out" in n for n in plan(_recipe(tmp_path, base=tmp_path / "base")).notes
        )
        return
    with pytest.raises(Unsupported, match="rotary frequencies are not those of the config"):
        plan(_recipe(tmp_path, base=tmp_path / "base"))
