"""Several adapters for one base: a further file enters an exported folder, proven like the first, or nothing does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import sparseport
from branch_models import TOKENS, dense_adapter, peft_logits
from dialects import quantised_llama
from e2e.cut_models import MIXED, make_model, mask, space
from e2e.in_process import in_process
from sparseport.checkpoints.elastic import ElasticGroup, save_search_space
from sparseport.checkpoints.peft import write_adapter
from sparseport.errors import BadInput, FidelityError, OutputExists, SparseportError, Unsupported, VerificationError
from sparseport.further import add_adapter
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.targets.read_back import open_reader
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import unequal_weights, verify
from sparseport.weights.linear import LowRankBranch

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("openvino_genai")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAMES = ("q_proj", "k_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


@pytest.fixture(scope="module")
def exported(tiny_sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both targets with an adapter of rank 4, on an act-order INT4 base."""
    root = tmp_path_factory.mktemp("further")
    quantised_llama(tiny_sparse, root / "base", "gptq-act-order")
    dense_adapter(tiny_sparse, root / "first", NAMES)
    fields = {"base": root / "base", "adapter": root / "first", "branches": "adapter", "tokenizer": False}
    targets = ["openvino", "onnx"]
    return export(make_recipe({**fields, "output": root / "out", "target": targets, "numerics": False})).folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(exported, tmp_path / "out"))


def _state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_adapter_of_another_rank(copy: Callable[[], Path], tiny_sparse: Path, tmp_path: Path) -> None:
    folder = copy()
    before = _state(folder)
    source = dense_adapter(tiny_sparse, tmp_path / "second", NAMES, rank=7, alpha=14.0, seed=9)
    certificates = sparseport.add_adapter(folder, tmp_path / "second", "second")
    files = {"onnx": "second.onnx_adapter", "openvino": "second.safetensors"}
    assert [certificate.target for certificate in certificates] == ["onnx", "openvino"]
    after = _state(folder)
    for name, data in before.items():
        assert name.endswith(("sparseport.json", "README.md")) or after[name] == data, name
    assert set(after) - set(before) == {f"{target}/{file}" for target, file in files.items()}
    for target, file in files.items():
        part = folder / target
        assert verify(part).differences == [] and len(Certificate.read(part).adapters) == 2
        numerics = Certificate.read(part).body["numerics"]
        assert float(numerics[f"with {file}"]["judged_max_abs"]) < 1e-4
        assert "adapter second" in Certificate.read(part).body["inputs"]
        reader: Any = open_reader(target, part)
        shapes = {name: tuple(facts["shape"]) for name, facts in Certificate.read(part).linears.items()}
        tensors = {name: tuple(facts["shape"]) for name, facts in Certificate.read(part).tensors.items()}
        list(reader.weights({**shapes, **tensors}))
        for beside in reader.adapter(file):
            assert np.array_equal(beside.branch.a, source[beside.module].a) and beside.branch.rank == 7
    # The new file alone is what is told when it changes.
    changed = folder / "openvino" / files["openvino"]
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    found = verify(folder / "openvino").differences
    assert any("second.safetensors: branch of" in line for line in found) and len(found) == 2


def test_both_adapters_run(copy: Callable[[], Path], tiny_sparse: Path, tmp_path: Path) -> None:
    """ONNX Runtime takes the one that is named, and without one the base."""
    from sparseport.verify.runs import onnx_logits

    folder = copy() / "onnx"
    dense_adapter(tiny_sparse, tmp_path / "second", NAMES, rank=2, alpha=4.0, seed=9)
    add_adapter(folder, tmp_path / "second", "second", numerics=False)
    weights = _weights(folder)
    first = folder.parents[1] / "first"
    dense_adapter(tiny_sparse, first, NAMES)
    for adapter, file in ((None, None), (first, "adapter.onnx_adapter"), (tmp_path / "second", "second.onnx_adapter")):
        expected = peft_logits(tiny_sparse, adapter, weights)
        found = onnx_logits(folder, TOKENS, adapter=None if file is None else folder / file)
        assert np.abs(found - expected).max() < 1e-4


def _weights(folder: Path) -> Any:
    from sparseport.weights.linear import DenseWeight
    from sparseport.weights.rounding import dequantize

    body = Certificate.read(folder).body
    shapes = {name: tuple(facts["shape"]) for part in ("linears", "tensors") for name, facts in body[part].items()}
    found = {item.name: item.weight for item in open_reader("onnx", folder).weights(shapes)}
    return {module: DenseWeight(np.asarray(dequantize(found[module]))) for module in body["linears"]}  # type: ignore[arg-type]


def test_float16_is_widened_where_a_place_takes_float32(
    copy: Callable[[], Path], tiny_sparse: Path, tmp_path: Path
) -> None:
    folder = copy()
    dense_adapter(tiny_sparse, tmp_path / "half", NAMES, alpha=8.0, dtype=np.float16)
    certificates = add_adapter(folder, tmp_path / "half", "half", numerics=False)
    dtypes = []
    for certificate in certificates:
        branches = next(branches for file, branches in certificate.adapters.items() if file.startswith("half"))
        dtypes.append({tuple(facts["dtypes"]) for facts in branches.values()})
    assert dtypes == [{("float32", "float32")}, {("float16", "float16")}]


def test_a_sub_adapter(tiny_sparse: Path, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path) -> None:
    """An OpenVINO folder needs no places: a plain export takes an adapter too, at the ranks that are chosen."""
    folder = export(make_recipe({"base": tiny_int4, "output": tmp_path / "out", "tokenizer": False})).folder
    (certificate,) = add_adapter(folder, tiny_adapter_dense, "median", sub_adapter="heuristic")
    ranks = {m.rpartition(".")[2]: facts["rank"] for m, facts in certificate.adapters["median.safetensors"].items()}
    assert ranks == {"q_proj": 6, "k_proj": 6, "v_proj": 6, "up_proj": 8, "down_proj": 8}
    assert verify(folder).differences == []


def _refused(kind: type[SparseportError], folder: Path, adapter: Path, name: str = "second", **more: Any) -> str:
    before = _state(folder)
    with pytest.raises(kind) as caught:
        add_adapter(folder, adapter, name, **more)
    assert _state(folder) == before and sorted(path.name for path in folder.parent.glob(".sparseport*")) == []
    return str(caught.value)


def test_what_does_not_fit_changes_nothing(
    copy: Callable[[], Path], tiny_sparse: Path, tiny_adapter_sparse: Path, tmp_path: Path
) -> None:
    folder = copy()
    dense_adapter(tiny_sparse, tmp_path / "more", (*NAMES, "o_proj"))
    assert "no place for a layer" in _refused(Unsupported, folder, tmp_path / "more")
    dense_adapter(tiny_sparse, tmp_path / "second", NAMES)
    assert "such an adapter" in _refused(OutputExists, folder, tmp_path / "second", "adapter")
    assert "letters" in _refused(BadInput, folder, tmp_path / "second", "../x")
    assert "SparsePEFT" in _refused(BadInput, folder, tiny_adapter_sparse)
    assert "search space" in _refused(BadInput, folder, tmp_path / "second", sub_adapter="minimal")
    (folder / "onnx" / "stray").write_text("x")
    assert "not in the certificate" in _refused(VerificationError, folder, tmp_path / "second")
    assert "no folder exported" in _refused(BadInput, tiny_sparse, tmp_path / "second")


def test_another_base_is_told_by_its_shapes(copy: Callable[[], Path], tiny_sparse: Path, tmp_path: Path) -> None:
    from adapter_folders import edit_tensors

    dense_adapter(tiny_sparse, tmp_path / "second", NAMES)

    def narrow(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name] = np.array(tensors[name][:-2])

    edit_tensors(tmp_path / "second", narrow)
    assert "another base" in _refused(BadInput, copy(), tmp_path / "second")


def test_a_failed_comparison_changes_nothing(
    copy: Callable[[], Path], tiny_sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseport.verify import switched

    dense_adapter(tiny_sparse, tmp_path / "second", NAMES, seed=9)
    monkeypatch.setattr(switched, "attach", lambda *_: _Handle())
    assert "logits differ" in _refused(FidelityError, copy(), tmp_path / "second")


# --- sub-networks: the adapter is one of the whole model, the folder numbers its blocks anew -------------------------


@pytest.fixture(scope="module")
def cut_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(whole model, exported folder without block 2, with other widths and heads in each block)."""
    root = tmp_path_factory.mktemp("cut")
    make_model(root / "base", "LlamaConfig", "LlamaForCausalLM", {})
    dense_adapter(root / "base", root / "first", NAMES)
    fields = {"base": root / "base", "adapter": root / "first", **space(root, MIXED), "branches": "adapter"}
    fields |= {"output": root / "out", "target": ["openvino", "onnx"], "tokenizer": False}
    return root / "base", export(make_recipe(fields)).folder


def test_an_adapter_of_the_whole_model_finds_its_layers(cut_base: tuple[Path, Path], tmp_path: Path) -> None:
    """Against the masked whole model with the adapter merged into all its blocks, by their own numbers."""
    base, exported = cut_base
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    source = dense_adapter(base, tmp_path / "second", NAMES, rank=3, seed=9)
    certificates = add_adapter(folder, tmp_path / "second", "second")
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, branch in source.items():
            delta = branch.scaling * (branch.b @ branch.a)
            model.get_submodule(module).weight += torch.from_numpy(delta.astype(np.float32))
        expected = mask(model, MIXED)(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    from sparseport.verify.runs import onnx_logits

    found = onnx_logits(folder / "onnx", TOKENS, adapter=folder / "onnx" / "second.onnx_adapter")
    assert np.abs(found - expected).max() < 1e-4
    without = onnx_logits(folder / "onnx", TOKENS, adapter=None)
    assert np.abs(without - expected).max() > 1e-2
    for certificate, target in zip(certificates, ("onnx", "openvino"), strict=True):
        assert verify(folder / target).differences == []
        (branches,) = (facts for file, facts in certificate.adapters.items() if file.startswith("second"))
        assert len(branches) == 3 * len(NAMES) and "model.layers.3.self_attn.q_proj" not in branches
    assert unequal_weights([verify(folder / target) for target in ("openvino", "onnx")]) == []
    # OpenVINO's file, read by the package that wrote none of it: block 2 of the folder was block 3.
    with safe_open(folder / "openvino" / "second.safetensors", "np") as file:
        b = file.get_tensor("base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight")
    whole = source["model.layers.3.self_attn.q_proj"]
    assert np.allclose(b, whole.scaling * whole.b[:32], rtol=1e-6)


def test_adapters_that_fit_no_layer_of_the_sub_network(cut_base: tuple[Path, Path], tmp_path: Path) -> None:
    base, exported = cut_base
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    source = dense_adapter(base, tmp_path / "all", NAMES)

    def adapter(name: str, branches: dict[str, LowRankBranch]) -> Path:
        names = sorted({module.rpartition(".")[2] for module in branches})
        write_adapter(tmp_path / name, branches, r=4, alpha=6.0, target_modules=names, base_model_name="tiny")
        return tmp_path / name

    gone = {module: branch for module, branch in source.items() if ".layers.2." in module}
    assert "only blocks that were left out" in _refused(BadInput, folder, adapter("gone", gone))
    stray = {module.replace("layers.2", "layers.4"): branch for module, branch in gone.items()}
    assert "another base" in _refused(BadInput, folder, adapter("stray", {**source, **stray}))
    # An adapter as wide as the cut layer is not one of the whole model.
    q = "model.layers.1.self_attn.q_proj"
    narrow = LowRankBranch(source[q].a, source[q].b[:32], source[q].scaling)
    assert "another base" in _refused(BadInput, folder, adapter("narrow", {**source, q: narrow}))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            ElasticGroup(("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"), (128, 96), "width"),
            "other rows",
        ),
        (ElasticGroup(("model.layers.3.self_attn",), (2, 1), "heads"), "other key-value heads"),
        (ElasticGroup(("model.layers.2",), (1, 0), "block"), "other blocks"),
    ],
)
def test_a_sub_adapter_for_another_sub_network(
    group: ElasticGroup, message: str, cut_base: tuple[Path, Path], tmp_path: Path
) -> None:
    base, exported = cut_base
    folder = Path(shutil.copytree(exported, tmp_path / "out")) / "openvino"
    dense_adapter(base, tmp_path / "second", NAMES)
    file = save_search_space(tmp_path, [group])
    assert message in _refused(Unsupported, folder, tmp_path / "second", search_space=file)
    add_adapter(folder, tmp_path / "second", "second", search_space=file, sub_adapter="minimal", numerics=False)


def test_certificate_and_config_have_to_agree_on_blocks(cut_base: tuple[Path, Path], tmp_path: Path) -> None:
    base, exported = cut_base
    folder = Path(shutil.copytree(exported, tmp_path / "out")) / "openvino"
    dense_adapter(base, tmp_path / "second", NAMES)
    body = Certificate.read(folder).body
    body["linears"]["model.layers.2.mlp.up_proj"]["from"] = "model.layers.2.mlp.up_proj"
    Certificate(body).write(folder)
    assert "disagree about the blocks" in _refused(VerificationError, folder, tmp_path / "second")


class _Handle:
    def remove(self) -> None:
        pass
