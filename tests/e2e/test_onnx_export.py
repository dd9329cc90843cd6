"""`--target onnx`, alone and beside openvino: one merge, a folder and a certificate each, and both run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.in_process import in_process
from sparseport.cli import main
from sparseport.errors import BadInput, EnvironmentProblem, FidelityError, SparseportError, Unsupported
from sparseport.inspection import inspect
from sparseport.pipeline import export, plan
from sparseport.recipe import make_recipe
from sparseport.targets.read_back import open_reader
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import verify
from sparseport.verify.numerics import reference_of

pytest.importorskip("onnxruntime_genai")
CUSTOM_DOMAIN = "com.microsoft"


def _export(tmp_path: Path, **fields: Any) -> Any:
    recipe = make_recipe({"output": tmp_path / "out", "target": ["onnx"], "tokenizer": False, **fields})
    with in_process():
        return export(recipe)


def test_both_folders_certify_the_same_weights(tiny_both: Any) -> None:
    recipe, _ = tiny_both
    assert sorted(path.name for path in recipe.output.iterdir()) == ["onnx", "openvino"]
    certificates = {name: Certificate.read(recipe.output / name) for name in ("openvino", "onnx")}
    digests = {name: {m: f["weight_sha256"] for m, f in c.linears.items()} for name, c in certificates.items()}
    assert digests["openvino"] == digests["onnx"] and len(digests["onnx"]) == 14
    for name, certificate in certificates.items():
        assert certificate.target == name
        for facts in certificate.linears.values():
            assert facts["readback"] == {name: facts["weight_sha256"]}
            assert facts["revived"] == 0 and facts["pruned"] > 0
    values = [{n: f["value_sha256"] for n, f in c.tensors.items()} for c in certificates.values()]
    assert values[0] == values[1]


def test_each_folder_is_the_one_that_its_target_gives_alone(tiny_both: Any, tiny_qa: Any) -> None:
    """Neither the other target nor its presence enters a proof."""
    beside, alone = Certificate.read(tiny_both[0].output / "openvino"), tiny_qa[1].certificate
    assert beside.proof() == alone.proof()


def test_a_folder_of_both_is_verified_whole(tiny_both: Any, tmp_path: Path, capsys: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_both[0].output, copy)
    assert main(["verify", str(copy), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert [fact for label, fact in inspect(copy).facts.items() if label == "target"] == ["onnx, openvino"]
    data = bytearray((copy / "onnx" / "model.onnx.data").read_bytes())
    data[0] ^= 1
    (copy / "onnx" / "model.onnx.data").write_bytes(data)
    assert main(["verify", str(copy), "--quiet", "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and found["folders"]["openvino"]["ok"] and not found["folders"]["onnx"]["ok"]


def test_folders_of_two_exports_do_not_pass_for_one(tiny_both: Any, tmp_path: Path, tiny_sparse: Path) -> None:
    other = _export(tmp_path, base=tiny_sparse, numerics=False)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_both[0].output / "openvino", copy / "openvino")
    shutil.copytree(other.folder, copy / "onnx")
    assert main(["verify", str(copy), "--quiet"]) == 5


def test_overwrite_replaces_such_a_folder_and_nothing_else(tiny_both: Any, tmp_path: Path, tiny_int4: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(tiny_both[0].output, copy)
    (copy / "thesis.txt").write_text("precious")
    fields = {"base": tiny_int4, "numerics": False, "overwrite": True}
    with pytest.raises(SparseportError, match="not made by sparseport"):
        _export(tmp_path, **fields)
    assert (copy / "thesis.txt").read_text() == "precious"
    (copy / "thesis.txt").unlink()
    _export(tmp_path, **fields)
    assert (copy / "model.onnx").is_file() and not (copy / "openvino").exists()


def test_the_numbers_of_an_onnx_folder(tiny_both: Any) -> None:
    found = Certificate.read(tiny_both[0].output / "onnx").body["numerics"]
    assert float(found["full_precision"]["judged_max_abs"]) < 1e-3
    # Exact is the default, so applications get what was judged; the fast setting drifts, and that is said.
    assert found["default"]["settings"] == {"accuracy_level": "1"}
    assert float(found["default"]["kl"]) < 1e-6 < float(found["fast"]["kl"])


def test_onnxs_own_checker_and_runtime_accept_the_files(tiny_both: Any) -> None:
    import onnx

    folder = tiny_both[0].output / "onnx"
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        onnx.checker.check_tensor(tensor)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    inline = [tensor.name for tensor in graph.initializer if not tensor.external_data and np.prod(tensor.dims) > 4096]
    assert inline == []
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {1} and sum(node.op_type == "MatMulNBits" for node in graph.node) == 10  # q, k, v are one


def test_genai_generates_and_streams(tiny_both: Any) -> None:
    import onnxruntime_genai as genai

    folder = tiny_both[0].output / "onnx"
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    stream = tokenizer.create_stream()
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=24)
    generator = genai.Generator(model, parameters)
    prompt = tokenizer.encode("abc")
    generator.append_tokens(prompt)
    pieces = []
    while not generator.is_done():
        generator.generate_next_token()
        pieces.append(stream.decode(int(generator.get_next_tokens()[0])))
    tokens = [int(token) for token in generator.get_sequence(0)]
    # Random weights write random bytes; whether the text is right is seen on the real model.
    assert len(pieces) == len(tokens) - len(prompt) > 0 and "".join(pieces)


def test_openvino_and_onnx_runtime_compute_the_same_model(tiny_both: Any) -> None:
    import torch

    networks = [reference_of(f, open_reader(n, f)) for n in ("openvino", "onnx") for f in [tiny_both[0].output / n]]
    for (name, one), (_, two) in zip(*(network.named_parameters() for network in networks), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_qdq_needs_no_operators_but_onnxs_own(accuracy: str, tiny_int4: Path, tmp_path: Path) -> None:
    import onnx

    result = _export(tmp_path, base=tiny_int4, onnx={"format": "qdq", "accuracy": accuracy})
    model = onnx.load(result.folder / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not any(opset.domain == CUSTOM_DOMAIN for opset in model.opset_import)
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) >= 10
    onnx.checker.check_model(str(result.folder / "model.onnx"))
    assert verify(result.folder).differences == []
    config = json.loads((result.folder / "genai_config.json").read_text())
    # Exact layers are widened once, when the folder is loaded; fast ones have to stay what ONNX Runtime fuses.
    entry = config["model"]["decoder"]["session_options"].get("session.disable_quant_qdq")
    assert entry == ("1" if accuracy == "exact" else None)
    assert config["search"]["past_present_share_buffer"] is False
    numerics = result.certificate.body["numerics"]
    assert float(numerics["full_precision"]["judged_max_abs"]) < 1e-3
    # By columns ONNX Runtime fuses the layers and rounds activations; by rows it computes what is written.
    assert (float(numerics["default"]["kl"]) > 1e-6) == (accuracy == "fast")


def test_a_second_implementation_of_onnx_runs_qdq(tiny_int4: Path, tmp_path: Path) -> None:
    """The onnx package's own evaluator, which knows no kernel of any runtime."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    from sparseport.verify.numerics import logits_of

    folder = _export(tmp_path, base=tiny_int4, onnx={"format": "qdq"}, numerics=False).folder
    session = ReferenceEvaluator(onnx.load(folder / "model.onnx"))
    tokens = [5, 17, 33, 80, 121]
    feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, 5), np.int64)}
    feed |= {name: np.zeros((1, 2, 0, 16), np.float32) for name in session.input_names if name.startswith("past")}
    logits = session.run(["logits"], feed)[0][0]
    assert np.allclose(logits, logits_of(reference_of(folder, open_reader("onnx", folder)), tokens), atol=1e-4)


def test_openvino_runs_a_portable_folder(tiny_int4: Path, tmp_path: Path) -> None:
    import openvino as ov

    result = _export(tmp_path, base=tiny_int4, onnx={"portable": True})
    numerics = result.certificate.body["numerics"]
    assert float(numerics["openvino_full_precision"]["judged_max_abs"]) < 1e-3
    assert result.certificate.portable
    # Weights stay in 4 bits there: no constant of a layer is widened.
    model = ov.Core().compile_model(result.folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [op.get_rt_info() for op in model.get_runtime_model().get_ops()]
    kinds = [(one["layerType"].astype(str), one["runtimePrecision"].astype(str)) for one in found]
    assert kinds.count(("FullyConnected", "u4")) == 10


@pytest.mark.parametrize("embedding", ["fp16", "fp32", "int8"])
@pytest.mark.parametrize("form", ["nbits", "qdq"])
def test_embeddings(embedding: str, form: str, tiny_int4: Path, tmp_path: Path) -> None:
    result = _export(tmp_path, base=tiny_int4, embedding=embedding, onnx={"format": form})
    facts = result.certificate.tensors["model.embed_tokens.weight"]
    if embedding == "int8":
        assert facts["stored"] == "u8 g64" and facts["readback"]["onnx"] == facts["compressed_sha256"]
        assert float(facts["compression_error_steps"]["max"]) <= 0.51
    else:
        assert "compressed_sha256" not in facts
    assert verify(result.folder).differences == []


def test_every_group_size_arrives(tiny_sparse: Path, tmp_path: Path) -> None:
    """8 is filled up to 16, 64 stays; one group per row of 128 columns stays."""
    from dialects import quantised_llama

    for group, stored in ((8, "u4 g16"), (64, "u4 g64"), (-1, None)):
        base = tmp_path / f"base{group}"
        dialect = "gptq-channel" if group == -1 else "gptq-v1"
        quantised_llama(tiny_sparse, base, dialect, **({} if group == -1 else {"group_size": group}))
        recipe = make_recipe({"base": base, "output": tmp_path / f"out{group}", "target": ["onnx"], "tokenizer": False})
        with in_process():
            certificate = export(recipe).certificate
        kinds = {facts["stored"] for facts in certificate.linears.values()}
        assert kinds == ({stored} if stored else {"u4 g64", "u4 g128"})


def test_dense_and_sparse_models_leave_as_plain_matrices(tiny_sparse: Path, tmp_path: Path) -> None:
    certificate = _export(tmp_path, base=tiny_sparse).certificate
    assert {facts["stored"] for facts in certificate.linears.values()} == {"f16"}
    assert certificate.totals["revived"] == 0 and certificate.totals["pruned"] > 0
    assert "fast" not in certificate.body["numerics"]  # there is nothing to choose


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compress": {"mode": "int8_sym"}}, "compression is OpenVINO's"),
        ({"target": ["onnx", "onnx"]}, "named twice"),
        ({"target": ["openvino"], "onnx": {"accuracy": "fast"}}, "need the target onnx"),
        ({"onnx": {"accuracy": "level 4"}}, "exact"),
        ({"target": ["tflite"]}, "openvino"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        make_recipe({"base": tiny_base, "output": tmp_path / "out", "target": ["onnx"], **fields})
    assert caught.value.code == "E_RECIPE"


def test_a_plan_names_both_forms(tiny_int4: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["export", "--target", "openvino", "--target", "onnx", "--base", str(tiny_int4)]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(sorted(layer["stored"].items())) for layer in found["layers"]} == {
        (("onnx", "u4 g32"), ("openvino", "u4 g32"))
    }
    assert main([*arguments, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "openvino" in printed and "onnx" in printed and not (tmp_path / "out").exists()


def test_a_group_that_no_kernel_holds_is_refused_before_any_work(tiny_base: Path, tmp_path: Path) -> None:
    from dialects import quantised_llama

    quantised_llama(tiny_base, tmp_path / "base", "gptq-v1", group_size=2)
    recipe = make_recipe({"base": tmp_path / "base", "output": tmp_path / "out", "target": ["onnx"]})
    refusals = plan(recipe).refusals
    assert refusals and all(isinstance(layer.refusal, Unsupported) for layer in refusals)
    assert all("MatMulNBits" in str(layer.refusal) for layer in refusals)


def test_a_tokenizer_that_reads_otherwise_is_refused(tiny_int4: Path, tmp_path: Path) -> None:
    """onnxruntime-genai reads tokenizer.json by itself; here it is told of another pre-tokenizer than transformers."""
    from unittest import mock

    with mock.patch("sparseport.targets.onnx.tokenizer.ROUND_TRIP_SAMPLES", ("abc",)):
        with mock.patch("onnxruntime_genai.Tokenizer.encode", lambda self, text: np.array([1, 2], np.int32)):
            with pytest.raises(FidelityError, match="other ids") as caught:
                _export(tmp_path, base=tiny_int4, tokenizer=True)
    assert caught.value.code == "E_TOKENIZER" and "--no-tokenizer" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_before_any_work(
    tiny_int4: Path, tiny_both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins
    import sys

    from sparseport import extras

    find, plain = extras.find_spec, builtins.__import__
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxruntime_genai" else find(name))
    with pytest.raises(EnvironmentProblem, match="onnxruntime_genai") as caught:
        _export(tmp_path, base=tiny_int4)
    assert "sparseport[onnx]" in str(caught.value) and not (tmp_path / "out").exists()

    def without_onnx(name: str, *rest: Any) -> Any:
        if name == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return plain(name, *rest)

    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(EnvironmentProblem, match=r"sparseport\[onnx\]"):
        verify(tiny_both[0].output / "onnx")


def test_a_chat_template_that_is_filled_in_differently_is_noted(
    tiny_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_int4, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    notes = _export(tmp_path, base=base, tokenizer=True, numerics=False).notes
    assert not any("chat template" in note for note in notes)
    monkeypatch.setattr("onnxruntime_genai.Tokenizer.apply_chat_template", lambda self, text, **_: "other")
    notes = _export(tmp_path, base=base, tokenizer=True, numerics=False, overwrite=True).notes
    assert sum("chat template differently" in note and "'other'" in note for note in notes) == 1


def test_verify_looks_at_every_folder(tiny_both: Any, tmp_path: Path, capsys: Any) -> None:
    """A broken or missing certificate in one folder does not hide the other, nor a stray file both."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_both[0].output, copy)
    (copy / "notes.txt").write_text("x")
    assert main(["verify", str(copy), "--quiet"]) == 5
    assert "notes.txt: beside the exported folders" in capsys.readouterr().out
    assert main(["verify", str(copy), "--quiet", "--ignore-extra"]) == 0
    (copy / "openvino" / "sparseport.json").write_text("{}")
    assert main(["verify", str(copy), "--quiet", "--ignore-extra", "--json"]) == 5
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert found["folders"]["onnx"]["ok"] and not found["folders"]["openvino"]["ok"]
    (copy / "openvino" / "sparseport.json").unlink()
    assert main(["verify", str(copy), "--quiet", "--ignore-extra"]) == 5
    assert "has no certificate" in capsys.readouterr().out


def test_a_dry_run_names_what_the_target_refuses(tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "head_dim": 12}))
    arguments = ["export", "--target", "onnx", "--base", str(base), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 7
    assert "multiple of 8" in capsys.readouterr().err
    assert main([*arguments, "--onnx-format", "qdq"]) == 0


def test_notes_reach_the_terminal(tiny_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseport.progress import Progress

    told: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: told.append(text))
    monkeypatch.setattr("onnxruntime_genai.Tokenizer.apply_chat_template", lambda self, text, **_: "other")
    base = tmp_path / "base"
    shutil.copytree(tiny_int4, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    result = _export(tmp_path, base=base, tokenizer=True, numerics=False)
    assert told == result.notes and any("chat template" in note for note in told)


@pytest.mark.parametrize(("ends", "message"), [("2", "no token of the model"), (256, "below 256"), (-1, "no token")])
def test_end_tokens_that_are_none(ends: Any, message: str, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(BadInput, match=message):
        _export(tmp_path, base=base)


def test_the_models_own_sampling_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    own = {"eos_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.92, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps(own))
    search = json.loads((_export(tmp_path, base=base, numerics=False).folder / "genai_config.json").read_text())[
        "search"
    ]
    assert {key: search[key] for key in own if key != "eos_token_id"} == {
        k: v for k, v in own.items() if "eos" not in k
    }


def test_a_portable_folder_with_an_embedding_in_8_bits(tiny_int4: Path, tmp_path: Path) -> None:
    numerics = _export(tmp_path, base=tiny_int4, embedding="int8", onnx={"portable": True}).certificate.body["numerics"]
    assert float(numerics["openvino_full_precision"]["judged_max_abs"]) < 1e-3


def test_groups_of_a_table_in_8_bits() -> None:
    from sparseport.recipe import OnnxRecipe
    from sparseport.targets.onnx.writer import _table_group

    plain, portable = OnnxRecipe(), OnnxRecipe(portable=True)
    assert [_table_group(width, plain, "e") for width in (576, 2048, 48)] == [64, 256, 16]
    assert [_table_group(width, portable, "e") for width in (576, 2048)] == [64, 128]
    with pytest.raises(Unsupported, match="cannot be stored in 8 bits") as caught:
        _table_group(200, plain, "e")
    assert caught.value.code == "E_GROUP" and "--embedding fp16" in str(caught.value)


def test_no_path_of_an_input_is_in_the_certificate(tiny_qa_inputs: dict[str, Any], tmp_path: Path) -> None:
    space = tmp_path / "my-space.json"
    adapter = Path(tiny_qa_inputs["adapter"])
    own = next(path for path in adapter.iterdir() if "elastic" in path.name or "space" in path.name)
    shutil.copyfile(own, space)
    folder = _export(tmp_path, **tiny_qa_inputs, search_space=space, numerics=False).folder
    body = json.loads((folder / "sparseport.json").read_text())
    # Inputs are told by their bare names and their hashes, and the recipe has no places at all.
    assert str(tmp_path) not in json.dumps(body) and "search_space" not in body["recipe"]
    assert "my-space.json" in json.dumps(body["inputs"])


def test_a_certificate_that_claims_other_weights_than_it_read(tiny_both: Any, tmp_path: Path) -> None:
    """Sealed anew, with the weights of the graph and the digest of others beside them."""
    folder = tmp_path / "onnx"
    shutil.copytree(tiny_both[0].output / "onnx", folder)
    body = json.loads((folder / "sparseport.json").read_text())
    body.pop("certificate_sha256"), body.pop("proof_sha256")
    module = next(iter(body["linears"]))
    body["linears"][module]["weight_sha256"] = "0" * 64
    Certificate(body).write(folder)
    assert verify(folder).differences == [f"sparseport.json: weight {module} was not read back as it was merged"]
