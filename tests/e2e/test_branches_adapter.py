"""`--branches adapter`: the base is untouched, and the runtimes switch its adapter on and off as torch does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from branch_models import TOKENS, Weights, dense_adapter, peft_logits
from dialects import quantised_llama
from e2e.in_process import in_process
from sparseport.errors import FidelityError
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.targets.read_back import open_reader
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import unequal_weights, verify
from sparseport.weights.linear import DenseWeight, LowRankBranch
from sparseport.weights.rounding import dequantize

og = pytest.importorskip("onnxruntime_genai")
genai = pytest.importorskip("openvino_genai")
pytest.importorskip("peft")

FILES = {"openvino": "adapter.safetensors", "onnx": "adapter.onnx_adapter"}
FORMS: dict[str, dict[str, Any]] = {
    "openvino": {"target": ["openvino"]},
    "nbits": {"target": ["onnx"]},
    "qdq": {"target": ["onnx"], "onnx": {"format": "qdq"}},
}
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_process():
        yield


def _export(output: Path, form: str, **fields: Any) -> Path:
    common = {"output": output, "tokenizer": False, "branches": "adapter"}
    result = export(make_recipe({**common, **FORMS[form], **fields}))
    assert verify(result.folder).differences == []
    return result.folder


def _target(folder: Path) -> str:
    return Certificate.read(folder).target


def _read(folder: Path) -> tuple[Weights, dict[str, LowRankBranch]]:
    """Linear layers of the base, and the adapter's branches as the runtime will use them."""
    target = _target(folder)
    body = Certificate.read(folder).body
    shapes = {name: tuple(facts["shape"]) for part in ("linears", "tensors") for name, facts in body[part].items()}
    reader = open_reader(target, folder)
    weights = {item.name.removesuffix(".weight"): item.weight for item in reader.weights(shapes)}
    assert list(reader.branches()) == []
    linears = {module: weights[module] for module in body["linears"]}
    return linears, {beside.module: beside.branch for beside in reader.adapter(FILES[target])}


def _log_probabilities(model: Path, adapter: Path | None, weights: Weights) -> np.ndarray:
    logits = peft_logits(model, adapter, weights).astype(np.float64)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def _first_token(folder: Path, active: bool) -> tuple[int, float]:
    """OpenVINO GenAI's choice after TOKENS, and its log-probability."""
    import openvino as ov

    adapter = genai.Adapter(str(folder / FILES["openvino"]))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    pipeline = genai.LLMPipeline(str(folder), "CPU", adapters=genai.AdapterConfig(adapter), **settings)
    ids = np.array([TOKENS], np.int64)
    config = genai.GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True, logprobs=1)
    config.adapters = genai.AdapterConfig(adapter) if active else genai.AdapterConfig()
    answer = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
    return int(answer.tokens[0][0]), float(answer.scores[0])


def _onnx_logits(folder: Path, active: bool) -> np.ndarray:
    """onnxruntime-genai's logits after TOKENS."""
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    adapters.load(str(folder / FILES["onnx"]), "tuned")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(TOKENS) + 1, do_sample=False)
    generator = og.Generator(model, parameters)
    if active:
        generator.set_active_adapter(adapters, "tuned")
    generator.append_tokens(np.array([TOKENS], np.int32))
    return np.array(generator.get_logits()).reshape(-1)


def _require_switch(folder: Path, model: Path, adapter: Path, weights: Weights) -> None:
    """With the adapter the runtime computes what peft does, and without it what the base alone does."""
    for active in (True, False):
        expected = _log_probabilities(model, adapter if active else None, weights)[-1]
        if _target(folder) == "openvino":
            token, score = _first_token(folder, active)
            assert token == expected.argmax() and abs(score - expected.max()) < 1e-4
        else:
            logits = _onnx_logits(folder, active).astype(np.float64)
            assert np.abs(logits - np.log(np.exp(logits).sum()) - expected).max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sparse", "int4"])
def test_switches_as_peft_does(
    kind: str, form: str, tiny_sparse: Path, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    base = tiny_sparse if kind == "sparse" else tiny_int4
    folder = _export(tmp_path / "out", form, base=base, adapter=tiny_adapter_dense)
    plain = export(make_recipe({**FORMS[form], "base": base, "output": tmp_path / "plain", "tokenizer": False})).folder
    one, two = (Certificate.read(path) for path in (folder, plain))
    assert {name: f["weight_sha256"] for name, f in one.linears.items()} == {
        name: f["weight_sha256"] for name, f in two.linears.items()
    }
    assert {facts["rule"] for facts in one.linears.values()} == {"carry"}
    assert not any({"rank", "branch"} & set(facts) for facts in one.linears.values())
    if form == "openvino":  # the base's own files are those of an export without the adapter
        assert all(one.files[name] == two.files[name] for name in two.files if name != "README.md")
    weights, branches = _read(folder)
    assert len(branches) == 10 and set(one.adapters) == {FILES[one.target]}
    numerics = one.body["numerics"]
    assert float(numerics[f"with {FILES[one.target]}"]["judged_max_abs"]) < 1e-4
    _require_switch(folder, tiny_sparse, tiny_adapter_dense, {} if kind == "sparse" else weights)


@pytest.mark.parametrize("form", ["openvino", "nbits"])
@pytest.mark.parametrize("group_size", [32, 4])
def test_act_order(group_size: int, form: str, tiny_sparse: Path, tmp_path: Path) -> None:
    """OpenVINO GenAI gives the branch the gathered activation: A lies in that order, filling columns are zero."""
    quantised_llama(tiny_sparse, tmp_path / "base", "gptq-act-order", group_size=group_size)
    source = dense_adapter(tiny_sparse, tmp_path / "adapter", alpha=8.0)
    folder = _export(tmp_path / "out", form, base=tmp_path / "base", adapter=tmp_path / "adapter")
    weights, branches = _read(folder)
    for module, branch in branches.items():
        assert np.array_equal(branch.a, source[module].a)
    in_order: Weights = {m: DenseWeight(np.asarray(dequantize(w))) for m, w in weights.items()}  # type: ignore[arg-type]
    _require_switch(folder, tiny_sparse, tmp_path / "adapter", in_order)


@pytest.mark.parametrize("alpha", [8.0, 6.0])
def test_the_scaling_lies_in_b_for_openvino(alpha: float, tiny_sparse: Path, tmp_path: Path) -> None:
    """A scaling of 2 changes nothing, one of 1.5 is rounded in float32, and that is said."""
    source = dense_adapter(tiny_sparse, tmp_path / "adapter", alpha=alpha, dtype=np.float16)
    fields = {"base": tiny_sparse, "adapter": tmp_path / "adapter", "numerics": False, "tokenizer": False}
    recipe = make_recipe({**fields, "output": tmp_path / "out", "target": ["openvino", "onnx"], "branches": "adapter"})
    result = export(recipe)
    _, branches = _read(result.exports[0].folder)
    scaling = alpha / 4
    for module, branch in branches.items():
        exact = source[module].b.astype(np.float64) * scaling
        assert branch.scaling == 1.0 and np.array_equal(branch.b, exact)  # 1.5 times 11 bits fit into float32
        assert branch.a.dtype == branch.b.dtype == (np.float16 if scaling == 2 else np.float32)
    _, theirs = _read(result.exports[1].folder)
    for module, branch in theirs.items():
        assert branch.scaling == scaling and branch.b.dtype == np.float16
        assert np.array_equal(branch.b, source[module].b)


def test_rounded_scalings_are_counted(tiny_sparse: Path, tmp_path: Path) -> None:
    dense_adapter(tiny_sparse, tmp_path / "adapter", alpha=5.3)
    fields = {"base": tiny_sparse, "adapter": tmp_path / "adapter", "numerics": False, "tokenizer": False}
    result = export(make_recipe({**fields, "output": tmp_path / "out", "branches": "adapter"}))
    facts = next(iter(result.certificate.adapters.values()))[Q]
    assert facts["scaling"] == "1.325000" and facts["scaling_in"] == "lora_B" and facts["changed"] > 0
    assert any("takes no scaling from an adapter's file" in note for note in result.notes)
    assert any("enable_prefix_caching" in note for note in result.notes)


@pytest.mark.parametrize("form", ["openvino", "nbits"])
def test_float16(form: str, tiny_sparse: Path, tmp_path: Path) -> None:
    source = dense_adapter(
        tiny_sparse, tmp_path / "adapter", ("q_proj", "down_proj", "lm_head"), dtype=np.float16, alpha=8.0
    )
    folder = _export(tmp_path / "out", form, base=tiny_sparse, adapter=tmp_path / "adapter")
    _, branches = _read(folder)
    assert set(branches) == set(source)
    assert {branch.a.dtype.name for branch in branches.values()} == {"float16"}
    _require_switch(folder, tiny_sparse, tmp_path / "adapter", {})


def test_targets_certify_the_same_adapter(tiny_sparse: Path, tmp_path: Path) -> None:
    """Folded into B here and beside it there, in other dtypes: the digest of what the adapter itself says is one."""
    fields = {"base": tiny_sparse, "numerics": False, "tokenizer": False, "branches": "adapter"}

    def verdicts(name: str, seed: int, dtype: Any = np.float16) -> list[Any]:
        dense_adapter(tiny_sparse, tmp_path / name, alpha=6.0, seed=seed, dtype=dtype)
        given = {**fields, "adapter": tmp_path / name, "output": tmp_path / f"{name}-out"}
        folder = export(make_recipe({**given, "target": ["openvino", "onnx"]})).folder
        return [verify(folder / target) for target in ("openvino", "onnx")]

    one, two = verdicts("one", 3), verdicts("two", 4)
    assert unequal_weights(one) == unequal_weights(two) == []
    facts = [verdict.certificate.adapters[FILES[verdict.certificate.target]][Q] for verdict in one]
    assert facts[0]["branch_sha256"] != facts[1]["branch_sha256"]
    assert facts[0]["source_sha256"] == facts[1]["source_sha256"]
    mixed = unequal_weights([one[0], two[1]])
    assert len(mixed) == len(one[0].certificate.adapters[FILES["openvino"]])
    assert f"adapter adapter, {Q}: the targets' certificates name different branches" in mixed
    # A certificate from before there was such a digest is read, and compared by what it has.
    old = two[1].certificate
    for branch in old.body["adapters"][FILES["onnx"]].values():
        del branch["source_sha256"]
    old.write(two[1].folder)
    again = verify(two[1].folder)
    assert again.differences == [] and unequal_weights([one[0], again]) == []
    del again.certificate.body["adapters"][FILES["onnx"]][Q]
    assert unequal_weights([one[0], again]) == [
        f"adapter adapter, {Q}: the targets' certificates name different branches"
    ]


def test_the_same_files_every_time(tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path) -> None:
    fields = {"base": tiny_sparse, "adapter": tiny_adapter_dense, "numerics": False}
    for form in ("openvino", "nbits"):
        one, two = (_export(tmp_path / f"{form}{n}", form, **fields) for n in range(2))
        for path in one.iterdir():
            assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_the_check_of_the_switch_would_find_a_wrong_scaling(
    tiny_sparse: Path, tiny_adapter_dense: Path, tmp_path: Path
) -> None:
    """The file at another alpha, as GenAI would compute with alpha / r left out of it."""
    from sparseport.verify.judge import judge_numerics
    from sparseport.verify.switched import compare_switched

    folder = _export(tmp_path / "out", "openvino", base=tiny_sparse, adapter=tiny_adapter_dense)
    plain = genai.AdapterConfig
    half = mock.Mock(side_effect=lambda *given: plain(*given, 0.5) if given else plain())
    with mock.patch.object(genai, "AdapterConfig", half):
        found = compare_switched(str(folder), "openvino", [FILES["openvino"]])
    assert float(found[f"without {FILES['openvino']}"]["judged_max_abs"]) < 1e-4
    with pytest.raises(FidelityError, match=r"with adapter\.safetensors"):
        judge_numerics(found, "out")


# --- attacks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_int4: Path, tiny_adapter_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    fields = {"base": tiny_int4, "adapter": tiny_adapter_dense, "numerics": False}
    return {form: _export(root / form, form, **fields) for form in FORMS}


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: Path(shutil.copytree(exported[form], tmp_path / form))


def _found(folder: Path) -> list[str]:
    return [line for line in verify(folder).differences if "content changed" not in line and " bytes, " not in line]


def _edit(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> list[str]:
    """Change an adapter's tensors, by names that both kinds of files are brought to: (module, part)."""
    if (folder / FILES["openvino"]).exists():
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / FILES["openvino"])
        change(tensors)
        save_file(tensors, folder / FILES["openvino"])
    else:
        from onnxruntime import AdapterFormat, OrtValue

        adapter = AdapterFormat.read_adapter(str(folder / FILES["onnx"]))
        tensors = {name: np.array(value.numpy()) for name, value in adapter.get_parameters().items()}
        change(tensors)
        values = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
        adapter.export_adapter(str(folder / FILES["onnx"]))
    return _found(folder)


def _name(tensors: dict[str, np.ndarray], part: str, module: str = Q) -> str:
    return next(name for name in tensors if module in name and f"lora_{part}" in name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["A", "B"])
def test_one_bit_names_the_file_and_the_layer(form: str, part: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = _name(tensors, part)
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1).view(np.uint8)[5] ^= 1

    file = FILES["openvino" if form == "openvino" else "onnx"]
    assert _edit(folder, change) == [f"{file}: branch of {Q} changed"]


def test_another_scaling(copy: Callable[[str], Path]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{Q}.lora_scaling"] = np.array([2.0000002], np.float32)

    assert _edit(copy("nbits"), change) == [f"adapter.onnx_adapter: branch of {Q} changed"]


def _drop(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if Q in name]:
        del tensors[name]


def _drop_a_side(tensors: dict[str, np.ndarray]) -> None:
    del tensors[_name(tensors, "B")]


def _for_another_layer(tensors: dict[str, np.ndarray]) -> None:
    """down_proj has a branch; o_proj, which has none, gets q_proj's."""
    for name in [name for name in tensors if Q in name]:
        tensors[name.replace("q_proj", "o_proj")] = tensors.pop(name)


def _additional(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if Q in name]:
        tensors[name.replace("q_proj", "o_proj")] = tensors[name]


def _two_layers_exchanged(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if Q in name]:
        other = name.replace("layers.1", "layers.0")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _of_a_whole_block(tensors: dict[str, np.ndarray]) -> None:
    """GenAI takes a name that is a part of many operations' names for all of them."""
    for name in [name for name in tensors if Q in name]:
        tensors[name.replace(Q, "model.layers.1.self_attn")] = tensors.pop(name)


def _an_embedding(tensors: dict[str, np.ndarray]) -> None:
    """GenAI replaces constants by tensors of such names."""
    tensors["base_model.model.lm_head.weight"] = np.zeros((256, 64), np.float32)


def _alpha(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"base_model.model.{Q}.alpha"] = np.array([4], np.float32)


CHANGES = (_drop, _drop_a_side, _for_another_layer, _additional, _two_layers_exchanged, _of_a_whole_block, _an_embedding, _alpha)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("form", ["openvino", "nbits"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_files_are_found(
    change: Callable[[dict[str, np.ndarray]], None], form: str, copy: Callable[[str], Path]
) -> None:
    found = _edit(copy(form), change)
    assert found and all("adapter" in line for line in found), found


def test_an_operation_that_genai_would_take_for_the_layer(copy: Callable[[str], Path]) -> None:
    """GenAI looks for parts of names: an adapter for q_proj would change this product as well."""
    import openvino as ov

    folder = copy("openvino")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    product = next(op for op in model.get_ordered_ops() if "rotary_emb/aten::matmul" in op.get_friendly_name())
    product.set_friendly_name(f"__module.model.rotary_emb/{Q}/MatMul")
    ov.save_model(model, folder.parent / "changed.xml", compress_to_fp16=False)
    del model, product
    for suffix in ("xml", "bin"):
        (folder.parent / f"changed.{suffix}").replace(folder / f"openvino_model.{suffix}")
    found = _found(folder)
    assert len(found) == 1 and "an adapter would change another layer than its own" in found[0]


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_damaged_files(form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)
    file = folder / FILES[_target(folder)]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert any("adapter's file" in line and "cannot" in line for line in _found(folder))
    file.unlink()
    assert verify(folder).differences == [f"{file.name}: missing"]


def onnx_default_with_values(model: Any) -> None:
    import onnx

    for part, shape in (("A", (64, 2)), ("B", (2, 64))):
        tensor = next(t for t in model.graph.initializer if t.name == f"{Q}.lora_{part}")
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))


def onnx_place_removed(model: Any) -> None:
    port = next(port for port in model.graph.input if port.name == f"{Q}.lora_A")
    model.graph.input.remove(port)


def onnx_place_fed_from_elsewhere(model: Any) -> None:
    first = next(node for node in model.graph.node if f"{Q}.lora_A" in node.input)
    first.input[0] = next(n for n in model.graph.node if "layers.0.self_attn.q_proj.lora_A" in str(n.input)).input[0]


def onnx_weight_made_an_input(model: Any) -> None:
    """A base weight that an adapter could take the place of."""
    import onnx

    tensor = next(t for t in model.graph.initializer if t.name.endswith("down_proj.scales"))
    model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def onnx_default_scaling(model: Any) -> None:
    import onnx

    tensor = next(t for t in model.graph.initializer if t.name == f"{Q}.lora_scaling")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([3], np.float32), tensor.name))


GRAPHS = (onnx_default_with_values, onnx_place_removed, onnx_place_fed_from_elsewhere, onnx_weight_made_an_input, onnx_default_scaling)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("change", GRAPHS, ids=lambda change: change.__name__)
def test_changed_places_are_found(change: Callable[[Any], None], copy: Callable[[str], Path]) -> None:
    import onnx

    folder = copy("nbits")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    before = model.SerializeToString()
    change(model)
    assert model.SerializeToString() != before
    onnx.save(model, folder / "model.onnx")
    found = _found(folder)
    assert found and all(line.startswith("model.onnx") for line in found), found


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["adapters"]["adapter.safetensors"][Q].pop("branch_sha256"),
        lambda body: body["adapters"]["adapter.safetensors"][Q].update(readback={"onnx": "0" * 64}),
        lambda body: body["adapters"].update({"other.safetensors": body["adapters"]["adapter.safetensors"]}),
        lambda body: body.update(adapters=[]),
        lambda body: body["adapters"].update({"adapter.safetensors": {}}),
    ],
)
def test_certificates_that_are_sealed_anew(change: Callable[[Any], None], copy: Callable[[str], Path]) -> None:
    from sparseport.errors import VerificationError

    folder = copy("openvino")
    body = Certificate.read(folder).body
    change(body)
    Certificate(body).write(folder)
    with pytest.raises(VerificationError, match="certificate's entry"):
        verify(folder)


def test_a_certificate_that_forgets_a_branch(copy: Callable[[str], Path]) -> None:
    folder = copy("openvino")
    body = Certificate.read(folder).body
    del body["adapters"]["adapter.safetensors"][Q]
    Certificate(body).write(folder)
    assert _found(folder) == [f"adapter.safetensors: branch of {Q} is in the file but not certified"]
