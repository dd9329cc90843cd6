"""Exports that several tests look at: made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.in_process import in_process
from sparseport.pipeline import ExportResult, TargetExport, export
from sparseport.recipe import Recipe, make_recipe

Inputs = dict[str, Any]


@pytest.fixture
def light_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """The steps of an export run in the test's process, unless it is marked `processes`.

    What session fixtures export is made in child processes either way: they are made before.
    """
    if request.node.get_closest_marker("processes"):
        yield
        return
    with in_process():
        yield


@pytest.fixture(scope="session")
def tiny_qa_inputs(tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path) -> Inputs:
    """Recipe fields of the tiny QA-SparsePEFT model."""
    return {"base": tiny_int4, "sparse_base": tiny_sparse, "adapter": tiny_adapter, "sub_adapter": "heuristic"}


@pytest.fixture(scope="session")
def tiny_sp_inputs(tiny_sparse: Path, tiny_adapter_sparse: Path) -> Inputs:
    """Recipe fields of the tiny SparsePEFT model."""
    return {"base": tiny_sparse, "adapter": tiny_adapter_sparse, "sub_adapter": "heuristic"}


@pytest.fixture(scope="session")
def run_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Recipe, ExportResult]]:
    """Export with the given recipe fields into a fresh folder."""

    def run(**fields: Any) -> tuple[Recipe, ExportResult]:
        recipe = make_recipe({"output": tmp_path_factory.mktemp("export") / "out", **fields})
        return recipe, export(recipe)

    return run


@pytest.fixture(scope="session")
def tiny_qa(run_export: Any, tiny_qa_inputs: Inputs) -> tuple[Recipe, ExportResult]:
    """The tiny QA-SparsePEFT model, exported with its numeric check."""
    result: tuple[Recipe, ExportResult] = run_export(**tiny_qa_inputs)
    return result


@pytest.fixture(scope="session")
def tiny_both(run_export: Any, tiny_qa_inputs: Inputs) -> tuple[Recipe, ExportResult]:
    """The same model, exported to OpenVINO and ONNX Runtime from one merge."""
    pytest.importorskip("onnxruntime_genai")
    result: tuple[Recipe, ExportResult] = run_export(**tiny_qa_inputs, target=["openvino", "onnx"])
    return result


@pytest.fixture(scope="session")
def real_inputs(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """SmolLM2-135M pruned by magnitude, in INT4, with a random QA-SparsePEFT super-adapter.

    The adapter is small enough for the text to stay sensible; what training would have learnt does not matter here.
    """
    from sparseport.checkpoints.elastic import FILE_NAME, ElasticGroup, write_search_space
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.checkpoints.peft import write_adapter
    from sparseport.nls.artifacts import write_gptq_base, write_sparse_base
    from sparseport.nls.quantize import quantize_rtn
    from sparseport.weights.linear import LowRankBranch

    root = tmp_path_factory.mktemp("real")
    random = np.random.default_rng(0)
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    with ModelFolder.open(demo_base) as base:
        modules = base.linear_names()
        masks, branches = {}, {}
        for module in modules:
            size = np.abs(base.read(f"{module}.weight").astype(np.float32))
            pruned = np.argpartition(size, size.shape[1] // 4, axis=1)[:, : size.shape[1] // 4]
            masks[module] = np.ones(size.shape, bool)
            np.put_along_axis(masks[module], pruned, False, 1)
            if module.rpartition(".")[2] in targets:
                rows, columns = size.shape
                a = (random.normal(size=(32, columns)) / columns**0.5).astype(np.float32)
                branches[module] = LowRankBranch(a, (random.normal(size=(rows, 32)) * 0.002).astype(np.float32), 2.0)
        write_sparse_base(base, masks, root / "sparse")
    with ModelFolder.open(root / "sparse") as sparse:
        weights = ((m, quantize_rtn(sparse.read(f"{m}.weight"), masks[m], group_size=64)) for m in modules)
        write_gptq_base(sparse, weights, root / "int4", group_size=64, symmetric=False)
    write_adapter(
        root / "adapter",
        branches,
        r=32,
        alpha=64,
        target_modules=targets,
        base_model_name="SmolLM2",
        sparse_adapter=True,
        quantization_aware=True,
    )
    write_search_space(
        root / "adapter" / FILE_NAME,
        [
            ElasticGroup(tuple(f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"), (32, 24, 16))
            for layer in range(30)
        ],
    )
    return {
        "base": root / "int4",
        "sparse_base": root / "sparse",
        "adapter": root / "adapter",
        "sub_adapter": "heuristic",
    }


@pytest.fixture(scope="session")
def real_both(run_export: Any, real_inputs: Inputs) -> tuple[Recipe, ExportResult]:
    """The real model, exported to both targets with their numeric checks."""
    pytest.importorskip("onnxruntime_genai")
    result: tuple[Recipe, ExportResult] = run_export(**real_inputs, target=["openvino", "onnx"])
    return result


@pytest.fixture(scope="session")
def real_qa(real_both: Any) -> tuple[Recipe, TargetExport]:
    """The OpenVINO half of `real_both`."""
    return real_both[0], real_both[1].exports[0]
