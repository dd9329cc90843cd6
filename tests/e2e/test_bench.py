"""Bench and sweep on real folders: that every engine measures, what a sweep leaves behind; never how long it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tests.e2e.in_process import STEPS, InProcess

import sparseport.bench.run as bench_run
from sparseport.bench.drift import drift_tokens, measure_drift, write_reference
from sparseport.bench.knobs import SPARSE_WEIGHTS
from sparseport.bench.logits import write_logits
from sparseport.bench.rounds import Asked
from sparseport.bench.settle import CONFIG, EVIDENCE, runtime_options, settle, taken_properties
from sparseport.bench.subjects import Contender, Subject, subjects_of
from sparseport.bench.sweep import Budget
from sparseport.bench.sweeping import sweep_folders
from sparseport.checkpoints.json_files import read_json
from sparseport.cli import main
from sparseport.errors import BadInput, FidelityError, UsageError, VerificationError
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import verify

QUICK = Asked(prompt=8, tokens=4, rounds=1, warm_up=0)
_CHILDREN = ("bench.rounds", "bench.drift", "bench.run", "bench.settle", "verify.judge")
_STEPS = {
    "sparseport.bench.worker": "measure",
    "sparseport.bench.logits": "write_logits",
    "sparseport.bench.bandwidth": "bandwidth_step",
    "sparseport.bench.devices": "list_devices",
    "sparseport.bench.settle": "taken_properties",
}


@pytest.fixture
def without_children() -> Iterator[None]:
    """The steps of child processes in this one: each would import its runtime anew."""
    with mock.patch.dict(STEPS, _STEPS):
        patches = [mock.patch(f"sparseport.{name}.Child", InProcess) for name in _CHILDREN]
        for patch in patches:
            patch.start()
        yield
        for patch in patches:
            patch.stop()


@pytest.fixture
def folder(tiny_both: Any, tmp_path: Path) -> Path:
    """A copy of the tiny model for both runtimes, to be written into."""
    return Path(shutil.copytree(tiny_both[0].output, tmp_path / "out"))


def test_every_engine_measures_in_a_process_of_its_own(
    tiny_both: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole verb with real child processes, once."""
    jsonschema = pytest.importorskip("jsonschema")
    output = tmp_path / "bench.json"
    engines = ["openvino-genai", "openvino", "onnxruntime-genai", "torch"]
    asked = ["--prompt", "8", "--tokens", "4", "--rounds", "1", "--pin", "0", "--output", str(output)]
    arguments = ["bench", str(tiny_both[0].output), *asked, "--quiet"]
    for engine in engines:
        arguments += ["--engine", engine]
    assert main(arguments) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    schema = json.loads(Path(bench_run.__file__).with_name("bench.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(result, schema)
    rows = {(row["model"], row["engine"]) for row in result["rows"]}
    assert rows == {
        ("out/openvino", "openvino-genai"),
        ("out/openvino", "openvino"),
        ("out/openvino", "torch"),
        ("out/onnx", "onnxruntime-genai"),
        ("out/onnx", "torch"),
    }
    assert result["failed"] == []
    for row in result["rows"]:
        assert all(row[name]["min"] > 0 for name in ("decode_ms", "first_token_ms", "load_s", "peak_mib"))
        assert row["bytes_counted"] == "certificate"
        seal = read_json(tiny_both[0].output / row["model"].partition("/")[2] / "sparseport.json", what="certificate")
        assert row["certificate_sha256"] == seal["certificate_sha256"]
    shown = capsys.readouterr().out
    assert "GB/s" in shown and "out/openvino" in shown
    assert main(arguments) == 6, "an existing result was replaced"


def test_a_row_that_cannot_run_is_named(tiny_both: Any, tmp_path: Path, without_children: None) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_both[0].output / "openvino", broken)
    (broken / "openvino_tokenizer.xml").unlink()
    result = bench_run.bench([tiny_both[0].output / "openvino", broken], asked=QUICK, bandwidth=False)
    assert [row["model"] for row in result["rows"]] == ["openvino"]
    (failed,) = result["failed"]
    assert "broken" in failed["label"]
    assert "tokenizer" in failed["why"]


def test_drift_is_zero_at_full_precision_and_not_elsewhere(
    tiny_both: Any, tmp_path: Path, without_children: None
) -> None:
    """One scale of the reference times two, and the drift shows it."""
    from sparseport.verify.runs import OPENVINO_FULL_PRECISION

    subject = Subject(tiny_both[0].output / "openvino", "openvino", "out")
    tokens = list(range(20, 60))
    write_reference(subject, tokens, tmp_path / "reference.npy")
    row = Contender(subject, "openvino-genai", settings=dict(OPENVINO_FULL_PRECISION))
    exact = measure_drift(row, tmp_path / "reference.npy", tokens, tmp_path)
    assert exact["kl"] < 1e-9
    assert exact["top1"] == 1
    rows = np.load(tmp_path / "reference.npy")
    assert rows.shape[0] == 40
    np.save(tmp_path / "other.npy", rows * 2)
    assert measure_drift(row, tmp_path / "other.npy", tokens, tmp_path)["kl"] > 1e-4
    np.save(tmp_path / "shorter.npy", rows[:, :-1])
    with pytest.raises(BadInput, match="another model"):
        measure_drift(row, tmp_path / "shorter.npy", tokens, tmp_path)
    onnx = Contender(Subject(tiny_both[0].output / "onnx", "onnx", "onnx"), "onnxruntime-genai")
    assert measure_drift(onnx, tmp_path / "reference.npy", tokens, tmp_path)["kl"] < 1e-9


def written_into(folder: Path) -> dict[str, str]:
    """What a runtime takes from a folder by itself."""
    if (folder / "openvino_model.xml").is_file():
        return runtime_options((folder / "openvino_model.xml").read_text(encoding="utf-8"))
    decoder = read_json(folder / "genai_config.json", what="")["model"]["decoder"]
    return {name: str(value) for name, value in decoder["session_options"].items()}


def test_a_sweep_writes_its_settings_where_runtimes_find_them(folder: Path, without_children: None) -> None:
    """Made-up speeds: half of the threads and quantised activations win. The folders verify afterwards."""

    def measure(row: Contender, asked: Asked, seed: int) -> dict[str, Any]:
        fast = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32", "intra_op_num_threads": "1"}
        now = {**written_into(row.subject.path), **{name: str(value) for name, value in row.settings.items()}}
        decode = 10.0 - sum(now.get(name) == value for name, value in fast.items())
        names = ("load_s", "prefill_tokens_s", "decode_tokens_s", "peak_mib")
        return {"decode_ms": decode, "first_token_ms": 1.0, "energy_j": None, **dict.fromkeys(names, 1.0)}

    texts = {name: (folder / name / file).read_text(encoding="utf-8") for name, file in
             (("openvino", "openvino_model.xml"), ("onnx", "genai_config.json"))}  # fmt: skip
    with (
        mock.patch("sparseport.bench.rounds.in_process_of_its_own", measure),
        mock.patch("sparseport.bench.sweeping.drift_tokens", lambda *_: list(range(20, 60))),
    ):
        result = sweep_folders([folder], Budget(10.0, 0.0), asked=QUICK, write=True, numerics=False)
        # The same again: what the first one wrote is not the engine's own.
        again = sweep_folders([folder], Budget(10.0, 0.0), asked=QUICK, write=True, numerics=False)
        unwritten = sweep_folders([folder / "openvino"], Budget(10.0, 0.0), asked=QUICK, write=False)
    assert [sweep["settings"] for sweep in again["sweeps"]] == [sweep["settings"] for sweep in result["sweeps"]]
    assert [sweep["written"] for sweep in again["sweeps"]] == [True, True]
    assert unwritten["sweeps"][0]["written"] is False
    assert not list(folder.glob(".sweep-*"))
    assert [sweep["written"] for sweep in result["sweeps"]] == [True, True]
    assert result["sweeps"][0]["settings"]["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 32
    assert result["sweeps"][1]["settings"] == {"intra_op_num_threads": 1}
    assert all(row["drift"]["kl"] >= 0 for row in result["rows"])
    assert result["chosen"].endswith("swept")
    for name in ("openvino", "onnx"):
        assert verify(folder / name).ok
        evidence = read_json(folder / name / EVIDENCE, what=EVIDENCE)
        assert evidence["sweep"]["settings"]
        assert EVIDENCE in Certificate.read(folder / name).files
        assert str(folder.parent) not in json.dumps(evidence)
        assert evidence["at_rest"]["kl"] <= 10
        assert Certificate.read(folder / name).body["numerics"] == {"run": False}
    # OpenVINO takes the setting from the IR, without being told.
    names = ["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
    assert taken_properties(str(folder / "openvino"), names) == {names[0]: "32"}
    assert read_json(folder / "openvino" / CONFIG, what=CONFIG)[names[0]] == 32
    options = read_json(folder / "onnx" / "genai_config.json", what="")["model"]["decoder"]["session_options"]
    assert options["intra_op_num_threads"] == 1
    # Another sweep that finds nothing better takes everything back, to the byte.
    for name, file in (("openvino", "openvino_model.xml"), ("onnx", "genai_config.json")):
        settle(folder / name, {}, {}, numerics=False)
        assert (folder / name / file).read_text(encoding="utf-8") == texts[name]
        assert verify(folder / name).ok
    assert not (folder / "openvino" / CONFIG).exists()


def test_settled_numerics_are_those_of_the_new_settings(folder: Path, without_children: None) -> None:
    """The KV cache in 8 bits drifts: the certificate's default settings have to say so."""
    before = Certificate.read(folder / "openvino").body["numerics"]
    sealed = settle(folder / "openvino", {"KV_CACHE_PRECISION": "u8"}, {})
    after = sealed.body["numerics"]
    assert float(after["default"]["kl"]) > 2 * float(before["default"]["kl"])
    assert after["full_precision"]["max_abs"] == before["full_precision"]["max_abs"]
    text = (folder / "openvino" / "openvino_model.xml").read_text(encoding="utf-8")
    assert runtime_options(text)["KV_CACHE_PRECISION"] == "u8"
    assert "ACTIVATIONS_SCALE_FACTOR" in runtime_options(text), "an option that was there is gone"


def test_a_folder_that_drifts_by_itself_stays_as_it_was(folder: Path, without_children: None) -> None:
    def too_much(stage: Path) -> dict[str, float]:
        assert "KV_CACHE_PRECISION" in (stage / "openvino_model.xml").read_text(encoding="utf-8")
        raise FidelityError("outside of the budget")

    with pytest.raises(FidelityError):
        settle(folder / "openvino", {"KV_CACHE_PRECISION": "u8"}, {}, at_rest=too_much)
    assert verify(folder / "openvino").ok and not (folder / "openvino" / EVIDENCE).exists()


def test_a_changed_folder_is_not_settled(folder: Path) -> None:
    file = folder / "openvino" / "config.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(VerificationError):
        settle(folder / "openvino", {"KV_CACHE_PRECISION": "u8"}, {})
    assert not (folder / "openvino" / EVIDENCE).exists()


def test_what_cannot_be_swept_is_refused(tiny_both: Any, tmp_path: Path, without_children: None) -> None:
    foreign = shutil.copytree(tiny_both[0].output / "openvino", tmp_path / "foreign")
    (foreign / "sparseport.json").unlink()
    with pytest.raises(UsageError, match="sparseport exported"):
        sweep_folders([foreign], Budget(0.1, 0.9))
    with pytest.raises(BadInput, match="too short"):
        drift_tokens(subjects_of(tiny_both[0].output / "openvino")[0], count=10**6)
    assert main(["bench", str(tiny_both[0].output), "--write", "--quiet"]) == 2
    assert main(["bench", str(tiny_both[0].output), "--sweep", "--engine", "openvino", "--quiet"]) == 2


def test_openvino_takes_the_setting_for_sparse_weights(tiny_both: Any, tmp_path: Path, without_children: None) -> None:
    """Without AMX it changes nothing: the property is taken, and the logits are the same ones."""
    import openvino as ov

    folder = tiny_both[0].output / "openvino"
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", {SPARSE_WEIGHTS: 0.5})
    assert float(compiled.get_property(SPARSE_WEIGHTS)) == 0.5
    subject, tokens = Subject(folder, "openvino", "out"), list(range(20, 40))
    logits = []
    for number, settings in enumerate(({}, {SPARSE_WEIGHTS: 0.5})):
        file = tmp_path / f"{number}.npy"
        write_logits("openvino", str(subject.path), "CPU", dict(settings), tokens, str(file))
        logits.append(np.load(file))
    assert np.array_equal(*logits)
