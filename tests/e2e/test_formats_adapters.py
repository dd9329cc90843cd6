"""Every kind of adapter and search space goes all the way, and the merged weights are those of the formula.

The formulas are computed here once more, naively, in float64 and rounded where the rule says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialects import quantised_llama
from e2e.both import export_to_both
from e2e.formats import Line, settle, shown
from e2e.in_process import in_process
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources
from sparseport.targets.openvino import readback
from sparseport.weights.digest import digest
from sparseport.weights.linear import DenseWeight, QuantizedWeight

OURS = "this repository"
Written = dict[str, QuantizedWeight | DenseWeight]


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


def _through(tmp_path: Path, **inputs: Any) -> Written:
    result = export_to_both(tmp_path, **inputs)
    model = readback.read_model(result.folder / "openvino_model.xml")
    return {item.name.removesuffix(".weight"): item.weight for item in readback.weights(model)}


def _updates(adapter: Path, ranks: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Module -> scaling * (B A) as float32, from the safetensors file and the config alone."""
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    updates = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        rank = (ranks or {}).get(module, a.shape[0])
        b = tensors[name.replace("lora_A", "lora_B")]
        product = (b[:, :rank].astype(np.float64) @ a[:rank].astype(np.float64)).astype(np.float32)
        updates[module] = np.float32(config["lora_alpha"] / config["r"]) * product
    return updates


def _require_merged(
    written: Written,
    base: Path,
    updates: dict[str, np.ndarray],
    *,
    masked: bool,
    parts: dict[str, tuple[int, int]] | None = None,
) -> int:
    """Floating-point layers are base + update (where the base is not zero, if masked); returns the adapted ones.

    parts  module -> first rows and columns that are left of it
    """
    with ModelFolder.open(base) as folder:
        for module, weight in written.items():
            if not folder.has(f"{module}.weight") or folder.read(f"{module}.weight").ndim != 2:
                continue
            assert isinstance(weight, DenseWeight)
            values = folder.read(f"{module}.weight")
            if module in updates:
                update = np.where(values != 0, updates[module], 0) if masked else updates[module]
                values = (values.astype(np.float32) + update).astype(values.dtype)
                assert not np.array_equal(values, folder.read(f"{module}.weight"))
            rows, columns = (parts or {}).get(module, values.shape)
            assert np.array_equal(weight.values, values[:rows, :columns]), module
    return len(updates)


def _ranks_of_heuristic() -> dict[str, int]:
    return {f"model.layers.{layer}.self_attn.{name}_proj": 6 for layer in range(2) for name in "qkv"}


@shown("SQFT SparsePEFT super-adapter, elastic_adapter_config.json")
def test_sparse_peft(tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    inputs = {"base": tiny_sparse, "adapter": tiny_adapter_sparse, "sub_adapter": "heuristic"}
    written = _through(tmp_path, **inputs)
    count = _require_merged(written, tiny_sparse, _updates(tiny_adapter_sparse, _ranks_of_heuristic()), masked=True)
    settle(
        Line(
            "SQFT SparsePEFT super-adapter, elastic_adapter_config.json",
            OURS,
            "-",
            f"{count} layers",
            "merged values: equal to the formula, pruned ones zero",
            "f16",
        )
    )


def _require_merged_codes(written: Written, sparse: Path, updates: dict[str, np.ndarray]) -> None:
    """Codes of adapted layers are those of the formula on the grid that stands in the graph, pruned ones its zeros."""
    with ModelFolder.open(sparse) as folder:
        for module, update in updates.items():
            weight, values = written[module], folder.read(f"{module}.weight").astype(np.float32)
            assert isinstance(weight, QuantizedWeight)
            merged = values + np.where(values != 0, update, 0)
            if weight.input_order is not None:
                merged, values = merged[:, weight.input_order], values[:, weight.input_order]
            grouped = merged.reshape(values.shape[0], -1, weight.group_size)
            # z * s is taken in the dtype of the scales, as training takes it; everything else in float32.
            offset = (weight.zero_points.astype(weight.scales.dtype) * weight.scales).astype(np.float32)[:, :, None]
            scaled = (grouped + offset) / weight.scales.astype(np.float32)[:, :, None]
            codes = np.clip(np.rint(scaled), 0, 15).reshape(values.shape)
            assert np.array_equal(codes, weight.codes), module
            zeros = np.repeat(weight.zero_points, weight.group_size, axis=1)
            assert (weight.codes[values == 0] == zeros[values == 0]).all()


@shown("SQFT QA-SparsePEFT from INT4 base, sparse base and adapter")
def test_qa_sparse_peft(tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    inputs = {"base": tiny_int4, "sparse_base": tiny_sparse, "adapter": tiny_adapter, "sub_adapter": "heuristic"}
    written = _through(tmp_path, **inputs)
    updates = _updates(tiny_adapter, _ranks_of_heuristic())
    _require_merged_codes(written, tiny_sparse, updates)
    settle(
        Line(
            "SQFT QA-SparsePEFT from INT4 base, sparse base and adapter",
            OURS,
            "-",
            f"{len(updates)} layers",
            "codes: equal to the formula, pruned ones at the zero-point",
            "u4 g32",
        )
    )


QUANTISED_BASES = {
    "awq-gemm": "QA-SparsePEFT on an AWQ gemm base",
    "auto-round-awq": "QA-SparsePEFT on an AutoRound auto_round:auto_awq base",
    "ct-pack-asym": "QA-SparsePEFT on a compressed-tensors pack-quantized base",
    "gptq-act-order": "QA-SparsePEFT on a GPTQ v1 act-order base",
}


@shown(dialect=QUANTISED_BASES)
def test_qa_sparse_peft_on_other_bases(dialect: str, tiny_sparse: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    base = quantised_llama(tiny_sparse, tmp_path / "base", dialect)
    inputs = {"base": tmp_path / "base", "sparse_base": tiny_sparse, "adapter": tiny_adapter}
    written = _through(tmp_path, **inputs, sub_adapter="heuristic")
    updates = _updates(tiny_adapter, _ranks_of_heuristic())
    for module in updates:
        before, after = base[module], written[module]
        assert isinstance(before, QuantizedWeight) and isinstance(after, QuantizedWeight)
        for name in ("scales", "zero_points"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), module
        assert (before.input_order is None) == (after.input_order is None) == (dialect != "gptq-act-order")
        assert before.input_order is None or np.array_equal(before.input_order, after.input_order)
        assert not np.array_equal(before.codes, after.codes)
    _require_merged_codes(written, tiny_sparse, updates)
    settle(
        Line(
            QUANTISED_BASES[dialect],
            OURS,
            "-",
            f"{len(updates)} layers",
            "codes: equal to the formula, pruned ones at the zero-point; grid and order: equal to the base's",
            "u4 g32",
        )
    )


@shown("merged QA-SparsePEFT or GPTQ folder alone")
def test_merged_gptq_folder_alone(tiny_int4: Path, tmp_path: Path) -> None:
    written = _through(tmp_path, base=tiny_int4)
    from safetensors.numpy import load_file

    tensors = load_file(tiny_int4 / "model.safetensors")
    count = 0
    for name, words in tensors.items():
        if not name.endswith(".qweight"):
            continue
        weight = written[name.removesuffix(".qweight")]
        assert isinstance(weight, QuantizedWeight)
        for nibble in range(8):
            assert np.array_equal(weight.codes.T[nibble::8], (words.view(np.uint32) >> (4 * nibble)) & 15)
        assert np.array_equal(weight.scales.T, tensors[name.replace("qweight", "scales")])
        count += 1
    settle(
        Line(
            "merged QA-SparsePEFT or GPTQ folder alone",
            OURS,
            "-",
            f"{count} layers",
            "codes, scales: equal",
            "u4 g32",
        )
    )


@shown("SQFT extracted sub-adapter, adapter_model.bin (`--allow-pickle`)")
def test_extracted_sub_adapter(tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    """As SQFT's script writes it: a pickle of tensors with lower ranks beside a config that keeps r and alpha."""
    import torch
    from safetensors.numpy import load_file

    extracted, ranks = tmp_path / "extracted", _ranks_of_heuristic()
    extracted.mkdir()
    shutil.copyfile(tiny_adapter_sparse / "adapter_config.json", extracted / "adapter_config.json")
    tensors = {}
    for name, values in load_file(tiny_adapter_sparse / "adapter_model.safetensors").items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = ranks.get(module, 8)
        tensors[name] = torch.tensor(values[:rank] if ".lora_A." in name else values[:, :rank])
    torch.save(tensors, extracted / "adapter_model.bin")
    written = _through(tmp_path, base=tiny_sparse, adapter=extracted, allow_pickle=True)
    count = _require_merged(written, tiny_sparse, _updates(tiny_adapter_sparse, ranks), masked=True)
    version = torch.__version__.partition("+")[0]
    settle(
        Line(
            "SQFT extracted sub-adapter, adapter_model.bin (`--allow-pickle`)",
            "torch",
            version,
            f"{count} layers",
            "merged values: equal to the super-adapter's at those ranks",
            "f16",
        )
    )


OPTIONS = ("plain", "rank_pattern, alpha_pattern", "use_rslora")


@shown(options={options: f"PEFT LoRA, {options}" for options in OPTIONS})
def test_peft(options: str, tiny_base: Path, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    more: dict[str, Any] = {}
    if "pattern" in options:
        more = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 6, "q_proj": 12}}
    elif options == "use_rslora":
        more = {"use_rslora": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    written = _through(tmp_path, base=tiny_base, adapter=tmp_path / "adapter")
    merged = {name: value.double() for name, value in tuned.merge_and_unload().state_dict().items()}
    with AdapterFolder.open(tmp_path / "adapter") as adapter:
        modules = adapter.modules()
    for module, weight in written.items():
        if f"{module}.weight" not in merged or not isinstance(weight, DenseWeight) or weight.values.ndim != 2:
            continue
        difference = np.abs(weight.values.astype(np.float64) - merged[f"{module}.weight"].numpy())
        # peft adds in float32; ours is rounded once more, to the base's float16. 1e-6 is for the last bits of peft's
        # float32 product, which are BLAS's.
        ulp = np.spacing(np.abs(weight.values)).astype(np.float64)
        assert (difference <= 0.5 * ulp + 1e-6).all(), module
    settle(
        Line(
            f"PEFT LoRA, {options}",
            "peft",
            peft.__version__,
            f"{len(modules)} layers",
            "merged values: within half a unit in the last place of float16 of peft's float32 merge",
            "f16",
        )
    )


def _stays_beside(folder: Path, base: Path, adapter: Path) -> int:
    """Base weights are the checkpoint's, and beside them stand the adapter's matrices; returns the adapted layers."""
    model = readback.read_model(folder / "openvino_model.xml")
    written = {item.name.removesuffix(".weight"): item.weight for item in readback.weights(model)}
    with open_sources(make_recipe({"base": base, "output": folder})) as sources:
        for module in sources.base.linear_names()[:14]:
            assert digest(written[module]) == digest(sources.linears.read(module)), module
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {beside.module: beside.branch for beside in readback.branches(model)}
    for module, branch in found.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        rank = _ranks_of_heuristic().get(module, 8)
        assert branch.scaling == 2.0 and np.array_equal(branch.a, a[:rank]) and np.array_equal(branch.b, b[:, :rank])
    assert len(found) == len(tensors) // 2
    return len(found)


BESIDE = {
    "sparse": "Shears: dense adapter beside a sparse base (`--branches graph`)",
    "int4": "SQFT: floating-point adapter beside an INT4 base (`--branches graph`)",
}


@shown(kind=BESIDE)
def test_branches_in_the_graph(
    kind: str, tiny_sparse: Path, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    base = tiny_sparse if kind == "sparse" else tiny_int4
    inputs = {"base": base, "adapter": tiny_adapter_dense, "sub_adapter": "heuristic"}
    result = export_to_both(tmp_path, **inputs, branches="graph")
    count = _stays_beside(result.folder, base, tiny_adapter_dense)
    what = "values and zeros" if kind == "sparse" else "codes, zero-points, scales"
    exact = f"{what} of the base: equal; A, B and scaling beside it: equal to the adapter's at those ranks"
    settle(Line(BESIDE[kind], OURS, "-", f"{count} layers", exact, "f16" if kind == "sparse" else "u4 g32"))


SWITCHED = {
    "sparse": "Shears: dense adapter in a file of its own (`--branches adapter`)",
    "int4": "SQFT: floating-point adapter in a file of its own (`--branches adapter`)",
}


@shown(kind=SWITCHED)
def test_branches_in_a_file(
    kind: str, tiny_sparse: Path, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    base = tiny_sparse if kind == "sparse" else tiny_int4
    result = export_to_both(tmp_path, base=base, adapter=tiny_adapter_dense, branches="adapter")
    plain = export_to_both(tmp_path / "plain", base=base)
    digests = [{m: f["weight_sha256"] for m, f in one.certificate.linears.items()} for one in (result, plain)]
    assert digests[0] == digests[1]
    tensors = load_file(tiny_adapter_dense / "adapter_model.safetensors")
    written = load_file(result.folder / "adapter.safetensors")
    assert set(written) == set(tensors)
    for name, values in tensors.items():
        assert np.array_equal(written[name], values * np.float32(2) if "lora_B" in name else values), name
    what = "values and zeros" if kind == "sparse" else "codes, zero-points, scales"
    exact = (
        f"{what}: equal to an export of the base alone; A: equal, B: equal or times the scaling, which is exact here"
    )
    form = "f16" if kind == "sparse" else "u4 g32"
    settle(Line(SWITCHED[kind], OURS, "-", f"{len(tensors) // 2} layers", exact, form))


def _nncf_space(node: str, **width: Any) -> dict[str, Any]:
    root = "PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]"
    path = f"{root}/{node}"
    groups = {"overwrite_groups": width["groups"](path), "overwrite_groups_widths": width["widths"]}
    return {"bootstrapNAS": {"training": {"elasticity": {"width": groups}}}}


@shown("search space of Shears and legacy SQFT (NNCF JSON)")
def test_shears_search_space(tiny_base: Path, tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path) -> None:
    """A template for all layers, as Shears writes it: the same ranks as SQFT's own file gives."""
    node = "LlamaDecoderLayer[{*}]/LlamaAttention[self_attn]/Linear"
    tail = "ModuleDict[lora_A]/NNCFLinear[default]/linear_0"
    space = _nncf_space(
        node,
        groups=lambda path: [[f"{{re}}{path}[{name}_proj]/{tail}" for name in "qkv"]],
        widths=[[8, 6, 4]],
    )
    file = tmp_path / "nncf_shears.json"
    file.write_text(json.dumps(space).replace("}}}}}", "}}}},}  // a trailing comma and a comment\n"))
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter_sparse, adapter)
    (adapter / "elastic_adapter_config.json").unlink()
    inputs = {"base": tiny_sparse, "adapter": adapter, "search_space": file, "sub_adapter": "heuristic"}
    written = _through(tmp_path, **inputs)
    count = _require_merged(written, tiny_sparse, _updates(tiny_adapter_sparse, _ranks_of_heuristic()), masked=True)
    settle(
        Line(
            "search space of Shears and legacy SQFT (NNCF JSON)",
            OURS,
            "-",
            f"{count} layers",
            "ranks and merged values: equal to those of SQFT's file",
            "f16",
        )
    )


@shown("search space of LoNAS (NNCF JSON), narrower")
def test_lonas_search_space(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    """Ranks and widths in one file; a list of one number per group chooses lower ranks and a part of the channels."""
    layer = "LlamaDecoderLayer[0]"
    attention, mlp = f"{layer}/LlamaAttention[self_attn]/Linear", f"{layer}/LlamaMLP[mlp]"
    rank, default = "ModuleDict[lora_A]", "NNCFLinear[default]/linear_0"
    up = f"{mlp}/Linear[up_proj]"
    space = _nncf_space(
        "",
        groups=lambda path: [
            [f"{path}{attention}[{name}_proj]/{rank}/{default}" for name in "qkv"],
            [
                f"{path}{mlp}/NNCFLinear[gate_proj]/linear_0",
                f"{path}{up}/NNCFLinear[self_linear]/linear_0",
                f"{path}{up}/ModuleDict[lora_B]/{default}",
            ],
        ],
        widths=[[8, 6, 4], [128, 96]],
    )
    (tmp_path / "nncf_lonas.json").write_text(json.dumps(space))
    (tmp_path / "chosen.json").write_text("[6, 96]")
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    (adapter / "elastic_adapter_config.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    plain = {"sparse_adapter": False, "quantization_aware": False}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **plain}))
    inputs = {"base": tiny_base, "adapter": adapter, "search_space": tmp_path / "nncf_lonas.json"}
    written = _through(tmp_path, **inputs, sub_adapter=str(tmp_path / "chosen.json"))
    kept = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    parts = {f"model.layers.0.mlp.{name}": shape for name, shape in kept.items()}
    assert all(written[module].shape == shape for module, shape in parts.items())
    ranks = {f"model.layers.0.self_attn.{name}_proj": 6 for name in "qkv"}
    count = _require_merged(written, tiny_base, _updates(adapter, ranks), masked=False, parts=parts)
    settle(
        Line(
            "search space of LoNAS (NNCF JSON), narrower",
            OURS,
            "-",
            f"{count} layers",
            "merged values: equal to the first rows and columns of the formula's, at the chosen ranks",
            "f16",
        )
    )
