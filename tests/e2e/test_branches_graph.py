"""`--branches graph`: the base arrives bit for bit, its adapter beside it, and the runtimes compute what peft does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from branch_models import Weights, dense_adapter, exported_logits, peft_logits
from dialects import quantised_llama
from e2e.in_process import in_process
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.merging import merge_planned
from sparseport.pipeline import export
from sparseport.plan import make_plan
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources
from sparseport.targets.read_back import open_reader
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import verify
from sparseport.weights.digest import digest
from sparseport.weights.linear import LowRankBranch

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("peft")

# Target and form -> recipe fields.
FORMS: dict[str, dict[str, Any]] = {
    "openvino": {"target": ["openvino"]},
    "nbits": {"target": ["onnx"]},
    "qdq": {"target": ["onnx"], "onnx": {"format": "qdq"}},
    "columns": {"target": ["onnx"], "onnx": {"format": "qdq", "accuracy": "fast"}},
}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


def _export(tmp_path: Path, form: str, **fields: Any) -> Path:
    common = {"output": tmp_path / form, "tokenizer": False, "branches": "graph"}
    result = export(make_recipe({**common, **FORMS[form], **fields}))
    assert verify(result.folder).differences == []
    return result.folder


def _target(form: str) -> str:
    return "openvino" if form == "openvino" else "onnx"


def _read(folder: Path, form: str) -> tuple[Weights, dict[str, LowRankBranch]]:
    """Linear layers and branches of a written folder."""
    reader = open_reader(_target(form), folder)
    shapes = {name: tuple(facts["shape"]) for name, facts in _facts(folder, "linears", "tensors").items()}
    weights = {item.name.removesuffix(".weight"): item.weight for item in reader.weights(shapes)}
    return weights, {beside.module: beside.branch for beside in reader.branches()}


def _facts(folder: Path, *parts: str) -> dict[str, Any]:
    body = Certificate.read(folder).body
    return {name: facts for part in parts for name, facts in body[part].items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sparse", "int4"])
def test_as_peft_computes_it(
    kind: str, form: str, tiny_sparse: Path, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    base = tiny_sparse if kind == "sparse" else tiny_int4
    folder = _export(tmp_path, form, base=base, adapter=tiny_adapter_dense)
    weights, branches = _read(folder, form)
    linears = _facts(folder, "linears")
    with open_sources(make_recipe({"base": base, "output": tmp_path, "adapter": tiny_adapter_dense})) as sources:
        for module, facts in linears.items():
            own = sources.linears.read(module)
            if kind == "int4":
                assert digest(own) == facts["weight_sha256"] == facts["readback"][_target(form)]
            assert facts["rule"] == ("branch" if module in branches else "carry")
    with AdapterFolder.open(tiny_adapter_dense) as adapter:
        assert set(branches) == set(adapter.modules()) and len(branches) == 10
        for module, found in branches.items():
            wanted = adapter.branch(module)
            assert found.scaling == wanted.scaling == 2.0
            for one, other in ((found.a, wanted.a), (found.b, wanted.b)):
                assert one.dtype == other.dtype and np.array_equal(one, other)
    model = tiny_sparse
    if kind == "sparse":
        assert {facts["sparsity"] for facts in linears.values()} == {"0.500000"}
        weights = {}
    else:
        weights = {module: weights[module] for module in linears}
    expected = peft_logits(model, tiny_adapter_dense, weights)
    without = peft_logits(model, None, weights)
    found = exported_logits(folder, _target(form))
    assert np.abs(found - expected).max() < 1e-4 < 1e-2 < np.abs(without - expected).max()


def test_both_targets_from_one_run(
    tiny_int4: Path, tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    """With the sparse base beside the INT4 one the mask is certified, and a sub-adapter takes its ranks."""
    inputs = {"base": tiny_int4, "sparse_base": tiny_sparse, "adapter": tiny_adapter_dense, "sub_adapter": "heuristic"}
    result = export(
        make_recipe({**inputs, "output": tmp_path / "out", "target": ["openvino", "onnx"], "branches": "graph"})
    )
    one, two = (export.certificate for export in result.exports)
    for module, facts in one.linears.items():
        other = two.linears[module]
        assert facts["mask_sha256"] == other["mask_sha256"] and facts["revived"] == 0
        if "branch" not in facts:
            continue
        beside, there = facts["branch"], other["branch"]
        assert beside["branch_sha256"] == there["branch_sha256"] == beside["readback"]["openvino"]
        assert beside["scaling"] == "2.000000" and beside["changed"] == 0
        assert beside["rank"] == (6 if "self_attn" in module else 8)
        assert "rank" not in facts  # nothing was merged
    assert one.totals["sparsity"] == "0.500000" and one.totals["int4_linears"] == 14


@pytest.mark.parametrize("form", ["openvino", "nbits", "qdq"])
def test_act_order_gathers_for_the_base_only(form: str, tiny_sparse: Path, tmp_path: Path) -> None:
    quantised_llama(tiny_sparse, tmp_path / "base", "gptq-act-order")
    dense_adapter(tiny_sparse, tmp_path / "adapter")
    folder = _export(tmp_path, form, base=tmp_path / "base", adapter=tmp_path / "adapter")
    weights, branches = _read(folder, form)
    linears = _facts(folder, "linears")
    assert all(facts["act_order"] for facts in linears.values()) and len(branches) == 8
    expected = peft_logits(tiny_sparse, tmp_path / "adapter", _in_model_order({m: weights[m] for m in linears}))
    assert np.abs(exported_logits(folder, _target(form)) - expected).max() < 1e-4


def _in_model_order(weights: Weights) -> Weights:
    from sparseport.weights.linear import DenseWeight
    from sparseport.weights.rounding import dequantize

    return {module: DenseWeight(np.asarray(dequantize(weight))) for module, weight in weights.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["openvino", "nbits"])
@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("k_proj",), ("q_proj", "o_proj", "lm_head"), ("gate_proj",)])
def test_some_layers_only(names: tuple[str, ...], form: str, tiny_sparse: Path, tmp_path: Path) -> None:
    """Where q, k and v share a node but not all have a branch, they are products of their own; a head may have one."""
    branches = dense_adapter(tiny_sparse, tmp_path / "adapter", names)
    folder = _export(tmp_path, form, base=tiny_sparse, adapter=tmp_path / "adapter", embedding="fp32")
    _, found = _read(folder, form)
    assert set(found) == set(branches)
    expected = peft_logits(tiny_sparse, tmp_path / "adapter")
    assert np.abs(exported_logits(folder, _target(form)) - expected).max() < 1e-4


@pytest.mark.parametrize("form", ["openvino", "nbits"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp16"])
def test_dtypes(dtype: str, form: str, tiny_sparse: Path, tmp_path: Path) -> None:
    """float16 stays, bfloat16 is widened, and float32 is rounded to float16 if that is asked for, and said."""
    kinds = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "fp16": np.float32}
    source = dense_adapter(tiny_sparse, tmp_path / "adapter", dtype=kinds[dtype], rank=1)
    extra = {"branch_dtype": "fp16"} if dtype == "fp16" else {}
    folder = _export(tmp_path, form, base=tiny_sparse, adapter=tmp_path / "adapter", **extra)
    _, found = _read(folder, form)
    changed = [facts["branch"]["changed"] for facts in _facts(folder, "linears").values() if "branch" in facts]
    assert len(changed) == 8 and (min(changed) > 0) == (dtype == "fp16") and (max(changed) > 0) == (dtype == "fp16")
    for module, branch in found.items():
        assert branch.rank == 1 and branch.a.dtype == (np.float32 if dtype == "bfloat16" else np.float16)
        wanted = source[module].b.astype(np.float16 if dtype == "fp16" else np.float32)
        assert np.array_equal(branch.b.astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("form", ["openvino", "nbits"])
def test_biases_of_q_k_and_v(form: str, tmp_path: Path) -> None:
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    model.half().save_pretrained(tmp_path / "base")
    dense_adapter(tmp_path / "base", tmp_path / "adapter", ("q_proj", "k_proj", "v_proj"))
    folder = _export(tmp_path, form, base=tmp_path / "base", adapter=tmp_path / "adapter")
    expected = peft_logits(tmp_path / "base", tmp_path / "adapter")
    assert np.abs(exported_logits(folder, _target(form)) - expected).max() < 1e-4


@pytest.mark.parametrize("extra", [{"embedding": "int8"}, {"compress": {"mode": "int8_sym"}}])
def test_nncf_leaves_branches_alone(extra: dict[str, Any], tiny_sparse: Path, tmp_path: Path) -> None:
    import openvino  # noqa: F401

    branches = dense_adapter(tiny_sparse, tmp_path / "adapter")
    from unittest import mock

    from e2e.in_process import STEPS, InProcess

    steps = {**STEPS, "sparseport.targets.openvino.nncf_step": "compress"}
    with mock.patch("sparseport.compress.Child", InProcess), mock.patch.dict(STEPS, steps):
        folder = _export(tmp_path, "openvino", base=tiny_sparse, adapter=tmp_path / "adapter", **extra)
    _, found = _read(folder, "openvino")
    assert all(np.array_equal(found[module].a, branch.a) for module, branch in branches.items())
    assert set(found) == set(branches)


def test_the_numeric_check_runs_branches(tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path) -> None:
    """A reference without the branches would not agree: the check computes base and branch, un-merged."""
    from sparseport.errors import FidelityError
    from sparseport.verify import numerics

    folder = _export(tmp_path, "nbits", base=tiny_sparse, adapter=tiny_adapter_dense)
    assert float(numerics.compare_logits(str(folder), "onnx")["full_precision"]["judged_max_abs"]) < 1e-4
    from unittest import mock

    from sparseport.verify.judge import check_numerics

    with mock.patch.object(numerics, "attach"), pytest.raises(FidelityError, match="logits differ"):
        check_numerics(folder, "onnx")


def test_merged_and_branched_compute_alike(tiny_base: Path, tiny_adapter_dense: Path, tmp_path: Path) -> None:
    """On a dense base both are possible; the merge rounds to the base's float16, the branch does not."""
    merged = _export(tmp_path / "m", "nbits", base=tiny_base, adapter=tiny_adapter_dense, branches="refuse")
    beside = _export(tmp_path / "b", "nbits", base=tiny_base, adapter=tiny_adapter_dense)
    expected = peft_logits(tiny_base, tiny_adapter_dense)
    rounded, exact = (np.abs(exported_logits(folder, "onnx") - expected).max() for folder in (merged, beside))
    assert exact < 1e-4 and 10 * exact < rounded < 0.1
    with open_sources(make_recipe({"base": tiny_base, "output": tmp_path, "adapter": tiny_adapter_dense})) as sources:
        recipe = make_recipe({"base": tiny_base, "output": tmp_path, "adapter": tiny_adapter_dense})
        layer = next(layer for layer in make_plan(recipe, sources).layers if layer.rule == "lora")
        assert merge_planned(recipe, sources, layer).branch is None
