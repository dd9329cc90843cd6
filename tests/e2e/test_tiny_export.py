"""Whole exports of a tiny random model: every rule, every compression mode, every refusal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.paths import file_sha256
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, FidelityError, SparseportError, Unsupported
from sparseport.merging import merge_planned
from sparseport.pipeline import export, plan
from sparseport.plan import make_plan
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources
from sparseport.targets.openvino import readback
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import verify
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.mask import revived

pytestmark = pytest.mark.usefixtures("light_steps")


def _found(folder: Path) -> dict[str, QuantizedWeight | DenseWeight]:
    model = readback.read_model(folder / "openvino_model.xml")
    return {item.name.removesuffix(".weight"): item.weight for item in readback.weights(model)}


def test_qa_sparse_peft_arrives_bit_for_bit(tiny_qa: Any) -> None:
    recipe, result = tiny_qa
    found = _found(result.folder)
    with open_sources(recipe) as sources:
        layers = make_plan(recipe, sources).layers
        assert {layer.rule for layer in layers} == {"qa_sparse_peft", "carry"}
        for layer in layers:
            want, got = merge_planned(recipe, sources, layer).weight, found[layer.module]
            assert isinstance(want, QuantizedWeight) and isinstance(got, QuantizedWeight)
            assert np.array_equal(want.codes, got.codes)
            assert np.array_equal(want.zero_points, got.zero_points)
            assert want.scales.tobytes() == got.scales.tobytes()
            assert revived(got, sources.sparse_dense(layer.module).mask) == 0  # type: ignore[arg-type]
            # The merge did change something, so the comparison above is not one of untouched weights.
            if layer.rule == "qa_sparse_peft":
                assert not np.array_equal(got.codes, sources.quantized(layer.module).codes)


def test_certificate_says_what_was_done(tiny_qa: Any) -> None:
    _, result = tiny_qa
    linears = result.certificate.linears
    q_proj, up_proj = (linears[f"model.layers.0.{name}"] for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert q_proj["rank"] == 6 and up_proj["rank"] == 8
    assert q_proj["scaling"] == up_proj["scaling"] == "2.000000"
    assert q_proj["sparsity"] == "0.500000" and q_proj["revived"] == 0
    assert q_proj["readback"]["openvino"] == q_proj["weight_sha256"]
    assert float(result.certificate.body["numerics"]["full_precision"]["max_abs"]) <= 1e-3
    text = result.certificate.sealed().decode()
    assert str(Path.home()) not in text and "/tmp" not in text


def test_verify_finds_no_difference(tiny_qa: Any) -> None:
    assert verify(tiny_qa[1].folder).differences == []


@pytest.mark.processes
def test_same_inputs_give_the_same_bytes(run_export: Any, tiny_qa_inputs: dict[str, Any]) -> None:
    results = [run_export(**tiny_qa_inputs, numerics=False)[1] for _ in range(2)]
    one, two = (result.folder for result in results)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_measured_logits_do_not_enter_the_proof(tiny_qa: Any) -> None:
    """The measured logits may differ in their last digit from run to run; the proof may not."""
    certificate = tiny_qa[1].certificate
    numerics = {**certificate.body["numerics"], "full_precision": {}}
    assert Certificate({**certificate.body, "numerics": numerics}).proof() == certificate.proof()
    assert Certificate({**certificate.body, "totals": {}}).proof() != certificate.proof()


def test_dense_model_travels_as_it_is(run_export: Any, tiny_base: Path) -> None:
    _, result = run_export(base=tiny_base)
    found = _found(result.folder)
    with ModelFolder.open(tiny_base) as base:
        for module in base.linear_names():
            weight = found[module]
            assert isinstance(weight, DenseWeight)
            assert np.array_equal(weight.values, base.read(f"{module}.weight"))
    assert result.certificate.totals["masked_weights"] == 0


def test_bfloat16_leaves_as_float32_exactly(run_export: Any, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "bf16"
    shutil.copytree(tiny_base, base)
    file = base / "model.safetensors"
    with SafeTensorsFile.open(file) as tensors:
        values = {name: tensors.read(name).astype(ml_dtypes.bfloat16) for name in tensors.names()}
    write_safetensors(file, [spec_of(name, array) for name, array in values.items()])
    _, result = run_export(base=base, embedding="fp32", numerics=False)
    found = _found(result.folder)
    for name, array in values.items():
        stored = found[name.removesuffix(".weight")].values.reshape(array.shape)  # type: ignore[union-attr]
        assert stored.dtype == np.float32 and np.array_equal(stored, array.astype(np.float32)), name
    assert verify(result.folder).differences == []


def test_gptq_folder_alone(run_export: Any, tiny_int4: Path) -> None:
    _, result = run_export(base=tiny_int4, numerics=False)
    assert {facts["rule"] for facts in result.certificate.linears.values()} == {"carry"}
    assert any("no sparse base" in note for note in result.notes)


@pytest.mark.processes
def test_sparse_peft_leaves_as_fp16_sparse(run_export: Any, tiny_sp_inputs: dict[str, Any]) -> None:
    recipe, result = run_export(**tiny_sp_inputs)
    assert result.certificate.totals["sparsity"] == "0.500000"
    found = _found(result.folder)
    with open_sources(recipe) as sources:
        for layer in make_plan(recipe, sources).layers:
            mask = sources.dense(layer.module).mask
            assert mask is not None and not (found[layer.module].values[~mask]).any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mode", "extra", "types"),
    [
        ("int8_sym", {}, {"i8"}),
        ("int8_asym", {}, {"u8"}),
        ("int4_sym", {"group_size": 32}, {"i4"}),
        ("int4_asym", {"group_size": 32}, {"u4"}),
        ("int4_asym", {"group_size": 32, "ratio": 0.5}, {"u4", "u8"}),
    ],
)
def test_nncf_keeps_the_mask(
    run_export: Any, tiny_sp_inputs: dict[str, Any], mode: str, extra: dict[str, Any], types: set[str]
) -> None:
    recipe, result = run_export(**tiny_sp_inputs, compress={"mode": mode, **extra}, numerics=mode == "int4_asym")
    model = readback.read_model(result.folder / "openvino_model.xml")
    seen = set()
    with open_sources(recipe) as sources:
        for item in readback.weights(model):
            module = item.name.removesuffix(".weight")
            if module in result.certificate.linears:
                seen.add(item.element_type)
                mask = sources.dense(module).mask
                assert mask is not None and revived(item.weight, mask) == 0
    assert seen == types
    assert verify(result.folder).differences == []


@pytest.mark.processes
def test_nncf_gptq_is_refused_or_repaired(run_export: Any, tiny_sp_inputs: dict[str, Any], tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"sample {i}: the quick brown fox jumps over {i * 7} lazy dogs" for i in range(8)))
    compress = {"mode": "int4_asym", "group_size": 32, "gptq": True, "dataset": str(lines), "samples": 8}
    output = tmp_path / "strict"
    with pytest.raises(FidelityError, match="revived pruned weights"):
        export(make_recipe({**tiny_sp_inputs, "output": output, "compress": compress, "numerics": False}))
    assert list(tmp_path.iterdir()) == [lines]
    _, result = run_export(**tiny_sp_inputs, compress=compress, mask_policy="reapply")
    assert sum(facts.get("re_pruned", 0) for facts in result.certificate.linears.values()) > 0
    assert verify(result.folder).differences == []
    model = readback.read_model(result.folder / "openvino_model.xml")
    with ModelFolder.open(tiny_sp_inputs["base"]) as sparse:
        for item in readback.weights(model):
            if item.name.removesuffix(".weight") in result.certificate.linears:
                assert revived(item.weight, np.asarray(sparse.read(item.name) != 0)) == 0


def test_nncf_scale_estimation_keeps_the_mask(run_export: Any, tiny_sp_inputs: dict[str, Any], tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"sample {i}: the quick brown fox jumps over {i * 7} lazy dogs" for i in range(8)))
    compress = {"mode": "int4_asym", "group_size": 32, "scale_estimation": True, "dataset": str(lines), "samples": 8}
    _, result = run_export(**tiny_sp_inputs, compress=compress, numerics=False)
    model = readback.read_model(result.folder / "openvino_model.xml")
    with ModelFolder.open(tiny_sp_inputs["base"]) as sparse:
        checked = [
            revived(item.weight, np.asarray(sparse.read(item.name) != 0))
            for item in readback.weights(model)
            if item.name.removesuffix(".weight") in result.certificate.linears
        ]
    assert checked == [0] * 14
    assert result.certificate.body["inputs"]["dataset"]["sha256"] == file_sha256(lines)


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process group, as a terminal does")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_export_leaves_nothing(
    number: int, status: int, tiny_qa_inputs: dict[str, Any], tmp_path: Path
) -> None:
    """Ctrl-C while the graph is being built: no output, no temporary folder, no child process."""
    command = [sys.executable, "-m", "sparseport.cli", "export", "--quiet", "--output", str(tmp_path / "out")]
    for key in ("base", "sparse_base", "adapter"):
        command += [f"--{key.replace('_', '-')}", str(tiny_qa_inputs[key])]
    # A test run in the background of a shell ignores Ctrl-C, and its children would inherit that.
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/scratch-*/*/weights.pack")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == status, message
    assert b"Traceback" not in message
    assert list(tmp_path.iterdir()) == []
    # A child that was killed may need a moment until the system has taken it away.
    with pytest.raises(ProcessLookupError):
        for _ in range(500):
            os.killpg(process.pid, 0)
            time.sleep(0.02)


@pytest.mark.processes
def test_int8_embedding_leaves_int4_layers_alone(run_export: Any, tiny_qa: Any, tiny_qa_inputs: dict[str, Any]) -> None:
    _, result = run_export(**tiny_qa_inputs, embedding="int8")
    plain = tiny_qa[1].certificate.linears
    assert {name: facts["readback"] for name, facts in result.certificate.linears.items()} == {
        name: facts["readback"] for name, facts in plain.items()
    }
    found = _found(result.folder)
    assert isinstance(found["model.embed_tokens"], QuantizedWeight) and found["model.embed_tokens"].bits == 8
    assert verify(result.folder).differences == []


def test_float32_embedding_is_exact(run_export: Any, tiny_qa_inputs: dict[str, Any]) -> None:
    _, result = run_export(**tiny_qa_inputs, embedding="fp32", numerics=False)
    assert _found(result.folder)["model.embed_tokens"].values.dtype == np.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_groups_and_symmetric(
    run_export: Any, tiny_sparse: Path, tmp_path: Path, group_size: int, symmetric: bool
) -> None:
    from sparseport.nls.artifacts import write_gptq_base
    from sparseport.nls.quantize import quantize_rtn
    from sparseport.weights.mask import mask_of

    with ModelFolder.open(tiny_sparse) as sparse:
        read = {m: sparse.read(f"{m}.weight") for m in sparse.linear_names() if m != sparse.head_name}
        weights = (
            (m, quantize_rtn(v, mask_of(v), group_size=group_size, symmetric=symmetric)) for m, v in read.items()
        )
        write_gptq_base(sparse, weights, tmp_path / "int4", group_size=group_size, symmetric=symmetric)
    _, result = run_export(base=tmp_path / "int4", sparse_base=tiny_sparse)
    kinds = {item.element_type for item in readback.weights(readback.read_model(result.folder / "openvino_model.xml"))}
    assert ("i4" in kinds) == symmetric and ("u4" in kinds) != symmetric


# --- refusals: the error, its code, and nothing on disk --------------------------------------------------------------


def _edited(source: Path, out: Path, name: str, change: Any) -> Path:
    """A copy of a folder with one tensor changed."""
    shutil.copytree(source, out)
    file = next(out.glob("*.safetensors"))
    with SafeTensorsFile.open(file) as tensors:
        values = {each: np.array(tensors.read(each)) for each in tensors.names()}
    values[name] = change(values.get(name))
    write_safetensors(file, [spec_of(each, array) for each, array in values.items() if array is not None])
    return out


def _set(value: float) -> Any:
    def change(array: Any) -> Any:
        array.flat[3] = value
        return array

    return change


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (lambda t: {"base": t["int4"], "adapter": t["adapter"]}, BadInput, "sparse base"),
        (lambda t: {"base": t["sparse"], "adapter": t["adapter"]}, BadInput, "INT4 base"),
        (lambda t: {"base": t["int4"], "adapter": t["adapter_sparse"]}, FidelityError, "re-quantise"),
        (lambda t: {"base": t["int4"], "adapter": t["adapter"], "sparse_base": t["base"]}, BadInput, "less sparse"),
        (lambda t: {"base": t["sparse"], "adapter": t["dense_adapter"]}, FidelityError, "dense LoRA merge"),
        (lambda t: {"base": t["nan_base"], "adapter": t["adapter_sparse"]}, BadInput, "NaN"),
        (lambda t: {"base": t["nan_carried"], "adapter": t["adapter_sparse"]}, BadInput, "o_proj"),
        (lambda t: {"base": t["base"], "adapter": t["adapter_sparse"]}, BadInput, "next to no zeros"),
        (
            lambda t: {"base": t["base"], "adapter": t["adapter_sparse"], "sparse_base": t["sparse"]},
            FidelityError,
            "sparse base prunes",
        ),
        (lambda t: {"base": t["other"], "sparse_base": t["sparse"]}, BadInput, "other values"),
        (lambda t: {"base": t["no_embedding"]}, BadInput, "embed_tokens"),
        (lambda t: {"base": t["stray"]}, Unsupported, "model.norm.bias"),
        (lambda t: {"base": t["sparse"], "adapter": t["inf_adapter"]}, BadInput, "lora_B"),
        (lambda t: {"base": t["nan_norm"]}, BadInput, "model.norm.weight"),
        (
            lambda t: {"base": t["sparse"], "adapter": t["adapter_sparse"], "sub_adapter": "best"},
            SparseportError,
            "best",
        ),
        (lambda t: {"base": t["sparse"], "compress": {"mode": "int8_sym", "gptq": True}}, BadInput, "4-bit modes"),
        (lambda t: {"base": t["sparse"], "compress": {"mode": "int4_sym", "gptq": True}}, BadInput, "dataset"),
        (lambda t: {"base": t["sparse"], "compress": {"mode": "int4_sym", "group_size": 48}}, BadInput, "divide"),
    ],
)
def test_refused_with_the_way_out_and_nothing_written(
    fields: Any,
    error: type[SparseportError],
    words: str,
    tmp_path: Path,
    tiny_base: Path,
    tiny_sparse: Path,
    tiny_int4: Path,
    tiny_adapter: Path,
    tiny_adapter_sparse: Path,
) -> None:
    import json

    dense = tmp_path / "in" / "dense_adapter"
    shutil.copytree(tiny_adapter_sparse, dense)
    config = json.loads((dense / "adapter_config.json").read_text())
    (dense / "adapter_config.json").write_text(json.dumps({**config, "sparse_adapter": False}))
    inputs = {
        "base": tiny_base,
        "sparse": tiny_sparse,
        "int4": tiny_int4,
        "adapter": tiny_adapter,
        "adapter_sparse": tiny_adapter_sparse,
        "dense_adapter": dense,
        "nan_base": _edited(tiny_sparse, tmp_path / "in" / "nan", f"{Q}.weight", _set(np.nan)),
        "nan_carried": _edited(
            tiny_sparse, tmp_path / "in" / "carried", "model.layers.1.self_attn.o_proj.weight", _set(np.nan)
        ),
        "other": _edited(tiny_sparse, tmp_path / "in" / "other", f"{Q}.weight", lambda values: values * 2),
        "no_embedding": _edited(tiny_base, tmp_path / "in" / "bare", "model.embed_tokens.weight", lambda _: None),
        "stray": _edited(tiny_base, tmp_path / "in" / "stray", "model.norm.bias", lambda _: np.ones(64, np.float16)),
        "nan_norm": _edited(tiny_sparse, tmp_path / "in" / "norm", "model.norm.weight", _set(np.nan)),
        "inf_adapter": _edited(
            tiny_adapter_sparse, tmp_path / "in" / "inf", f"base_model.model.{Q}.lora_B.weight", _set(np.inf)
        ),
    }
    output = tmp_path / "outputs" / "out"
    with pytest.raises(error) as caught:
        export(make_recipe({"output": output, "numerics": False, **fields(inputs)}))
    assert words in str(caught.value)
    assert "to fix:" in str(caught.value) or caught.value.where
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def test_gptq_base_that_revives_weights(run_export: Any, tiny_int4: Path, tiny_sparse: Path, tmp_path: Path) -> None:
    """A third-party GPTQ base may revive pruned weights: refused, carried and counted, or pruned again."""

    def revive(qweight: Any) -> Any:
        # XOR of a nibble with 1 moves its code off the zero-point for every weight at zero.
        return qweight ^ np.int32(1)

    base = _edited(tiny_int4, tmp_path / "revived", f"{Q}.qweight", revive)
    with pytest.raises(FidelityError, match="keep-codes"):
        export(make_recipe({"base": base, "sparse_base": tiny_sparse, "output": tmp_path / "o", "numerics": False}))
    _, kept = run_export(base=base, sparse_base=tiny_sparse, mask_policy="keep-codes", numerics=False)
    assert kept.certificate.linears[Q]["revived"] > 0 and kept.certificate.totals["revived"] > 0
    _, pruned = run_export(base=base, sparse_base=tiny_sparse, mask_policy="reapply", numerics=False)
    assert pruned.certificate.linears[Q]["revived"] == 0
    assert pruned.certificate.linears[Q]["re_pruned"] == kept.certificate.linears[Q]["revived"]


def test_dry_run_lists_refusals_and_estimates(tiny_int4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    result = plan(make_recipe({"base": tiny_int4, "adapter": tiny_adapter, "output": tmp_path / "o"}))
    assert len(result.refusals) == 10 and "--sparse-base" in str(result.refusals[0].refused)
    assert result.output_bytes > 0 and result.memory_mib > 0
    assert list(tmp_path.iterdir()) == []
