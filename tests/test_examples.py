"""Every script in examples/ runs on a tiny model, as its docstring says, and shows what it says."""

from __future__ import annotations

import ast
import json
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from e2e.in_process import STEPS, InProcess, in_process

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
PROMPT = "why does ice"
_BENCH_STEPS = {
    "sparseport.bench.worker": "measure",
    "sparseport.bench.logits": "write_logits",
    "sparseport.bench.bandwidth": "bandwidth_step",
    "sparseport.bench.devices": "list_devices",
}
Run = Callable[..., tuple[int, str]]

for name in ("openvino_genai", "onnxruntime_genai", "torch", "transformers"):
    pytest.importorskip(name)


@pytest.fixture(scope="module", autouse=True)
def _without_children() -> Iterator[None]:
    """Steps of child processes run in this one: each would load torch or a runtime anew."""
    with ExitStack() as patches:
        patches.enter_context(in_process())
        patches.enter_context(mock.patch.dict(STEPS, _BENCH_STEPS))
        for module in ("rounds", "drift", "run"):
            patches.enter_context(mock.patch(f"sparseport.bench.{module}.Child", InProcess))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example as a script: its exit status and what it printed."""

    def run_example(name: str, *words: object) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, words)])
        monkeypatch.syspath_prepend(str(EXAMPLES))  # as Python does with a script's folder
        status = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as leave:
            status = int(leave.code or 0)
        return status, capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one example leaves what the next one reads."""
    return tmp_path_factory.mktemp("examples")


def test_export_and_ask(run: Run, work: Path, tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path) -> None:
    inputs = ["--base", tiny_int4, "--sparse-base", tiny_sparse, "--adapter", tiny_adapter]
    status, out = run("export_and_ask.py", *inputs, "--sub-adapter", "heuristic", "--output", work / "qa")
    lines = out.splitlines()
    assert status == 0 and lines[0].startswith("14 linear layers, ")
    assert lines[1] == "36,864 of 73,728 weights are pruned, 0 not zero"
    assert len(lines) > 2, "there is no answer"


def test_merge_one_layer(run: Run, work: Path, tiny_int4: Path, tiny_sparse: Path, tiny_adapter: Path) -> None:
    """The digest is the exported one; with another adapter of the same shapes it is not, and the status says so."""
    inputs = ["--base", tiny_int4, "--sparse-base", tiny_sparse, "--export", work / "qa"]
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        status, out = run("merge_one_layer.py", *inputs, "--adapter", tiny_adapter, "--layer", layer)
        if layer.endswith("q_proj"):
            assert status == 0 and "equal to the certificate" in out and " 0 pruned ones revived" in out
            assert not out.startswith(f"{layer}: 0 of")
    other = shutil.copytree(tiny_adapter, work / "other-adapter")
    _scale_adapter(other, 2.0)
    status, out = run("merge_one_layer.py", *inputs, "--adapter", other)
    assert status == 1 and "NOT what was exported" in out


def _scale_adapter(folder: Path, factor: float) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name: (values * factor).astype(values.dtype) for name, values in load_file(file).items()}, file)


@pytest.fixture
def _no_logit_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has tests of its own."""
    monkeypatch.setattr("sparseport.pipeline.check_numerics", lambda *_: {"run": False})
    monkeypatch.setattr("sparseport.further.check_switched", lambda *_: {})


@pytest.mark.usefixtures("_no_logit_check")
def test_gptq_to_both(run: Run, work: Path, tiny_int4: Path) -> None:
    status, out = run("gptq_to_both.py", "--base", tiny_int4, "--output", work / "both", "--prompt", PROMPT)
    assert status == 0 and out.startswith("same tokens [")
    one, other = (json.loads(part + "]") for part in out.removeprefix("same tokens ").split("]")[:2])
    assert one == other and len(one) == 16
    (work / "tokens.json").write_text(json.dumps(one), encoding="utf-8")


def test_read_certificate(run: Run, work: Path) -> None:
    status, out = run("read_certificate.py", work / "qa")
    lines = out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("model.layers")}
    assert status == 0 and len(rows) == 14
    assert all("50.00%" in line and line.endswith("read back equal") for line in rows.values())
    assert (
        " qa_sparse_peft " in rows["model.layers.0.self_attn.q_proj"] and "u4 g32" in rows["model.layers.0.mlp.up_proj"]
    )
    certificate = json.loads((work / "qa" / "sparseport.json").read_text(encoding="utf-8"))
    assert lines[-1] == f"proof {certificate['proof_sha256']}"
    assert any(line.startswith("logits at full_precision: KL ") for line in lines)


def test_deploy_check(run: Run, work: Path, tmp_path: Path) -> None:
    folders = [work / "both" / "openvino", work / "both" / "onnx"]
    proof = json.loads((folders[0] / "sparseport.json").read_text(encoding="utf-8"))["proof_sha256"]
    status, out = run("deploy_check.py", *folders, "--proof", proof)
    assert status == 0 and [json.loads(line)["ok"] for line in out.splitlines()] == [True, True]
    status, out = run("deploy_check.py", *folders, "--proof", "0" * 64)
    assert status == 5 and [json.loads(line)["ok"] for line in out.splitlines()] == [False, True]
    broken = shutil.copytree(folders[1], tmp_path / "broken")
    data = bytearray((broken / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "model.onnx.data").write_bytes(data)
    status, out = run("deploy_check.py", folders[0], broken, tmp_path)
    first, second, third = map(json.loads, out.splitlines())
    assert status == 5 and first["ok"] and "model.onnx.data: content changed" in second["differences"]
    assert third["error"]["code"] == "E_VERIFY"


@pytest.mark.parametrize(
    ("library", "target"), [("genai", "openvino"), ("optimum", "openvino"), ("onnxruntime-genai", "onnx")]
)
def test_load_anywhere(library: str, target: str, run: Run, work: Path) -> None:
    status, out = run("load_anywhere.py", library, work / "both" / target, PROMPT)
    assert status == 0 and out.strip(), "no answer"


def test_plain_onnxruntime_says_what_the_libraries_say(run: Run, work: Path) -> None:
    """The tokens of `gptq_to_both`, so the cache is handed on rightly; and it stops at the token that ends a text."""
    from tokenizers import Tokenizer

    folder = work / "both" / "onnx"
    tokens = json.loads((work / "tokens.json").read_text(encoding="utf-8"))
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert run("plain_onnxruntime.py", folder, PROMPT, "--tokens", 16) == (0, words.decode(tokens) + "\n")
    ends = work / "ends"
    shutil.copytree(folder, ends)
    config = json.loads((ends / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = [0, tokens[3]]
    (ends / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run("plain_onnxruntime.py", ends, PROMPT) == (0, words.decode(tokens[:3]) + "\n")


@pytest.mark.usefixtures("_no_logit_check")
def test_switch_adapters(run: Run, work: Path, tiny_sparse: Path, tiny_adapter_dense: Path) -> None:
    second = shutil.copytree(tiny_adapter_dense, work / "second-adapter")
    _scale_adapter(second, 3.0)
    words = ["--base", tiny_sparse, "--adapter", tiny_adapter_dense, "--second", second, "--output", work / "switched"]
    status, out = run("switch_adapters.py", *words, "--prompt", PROMPT)
    assert status == 0 and "adapter.safetensors: 10 layers, proven" in out and "second.safetensors: 10 layers" in out
    answers = [out.split(f"\n{label}: ")[1].split("\n")[0] for label in ("first", "second", "base alone")]
    assert len(set(answers)) == 3, "switching changes nothing"


def test_custom_metric(run: Run, work: Path, tiny_base: Path) -> None:
    """Half of each row goes: other weights than the smallest, and in part those, because the metric has their size."""
    from sparseport.checkpoints.folder import ModelFolder

    small = ["--sparsity", "0.5", "--set", "samples=2", "--set", "sequence_length=64", "--quiet"]
    status, _ = run("custom_metric.py", "--base", tiny_base, "--output", work / "ria", *small)
    assert status == 0
    with ModelFolder.open(tiny_base) as dense, ModelFolder.open(work / "ria") as sparse:
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            size, zeros = np.abs(dense.read(f"{module}.weight")), sparse.read(f"{module}.weight") == 0
            half = zeros.shape[1] // 2
            assert (zeros.sum(axis=1) == half).all()
            smallest = np.zeros_like(zeros)
            np.put_along_axis(smallest, np.argsort(size, axis=1)[:, :half], True, 1)
            assert 0.6 < (zeros & smallest).sum() / zeros.sum() < 1
    made = json.loads((work / "ria" / "sparseport-made.json").read_text(encoding="utf-8"))
    assert made["recipe"]["metric"] == "custom_metric:relative_importance"


def test_sweep_settings(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage, and few tokens; whole sweeps are tested elsewhere."""
    import sparseport.bench.sweeping as sweeping

    monkeypatch.setattr(sweeping, "stages", lambda *_, **__: [{"INFERENCE_PRECISION_HINT": [None, "f32"]}])
    monkeypatch.setattr(sweeping, "drift_tokens", lambda *_: list(range(20, 36)))
    monkeypatch.setattr(sweeping, "measured_bandwidth", lambda *_: None)
    asked = ["--kl", 1, "--top1", 0, "--tokens", 4, "--rounds", 1]
    status, out = run("sweep_settings.py", work / "both" / "openvino", *asked)
    assert status == 0 and "ms/token" in out and "openvino: 2 settings tried" in out
    assert "fastest within the budget: openvino, openvino-genai" in out


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    """At most 60 lines; the docstring's commands name the file and its options; a test above runs it."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    lines = [line.strip() for line in (ast.get_docstring(ast.parse(text)) or "").replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line.startswith("python ")]
    assert commands and lines[0].endswith((".", "?"))
    assert f'"{path.name}"' in Path(__file__).read_text(encoding="utf-8"), "no test runs it"
    assert f"(../examples/{path.name})" in (REPO / "docs" / "examples.md").read_text(encoding="utf-8")
    for command in commands:
        python, script, *words = shlex.split(command)
        assert (python, script) == ("python", f"examples/{path.name}")
        options = {word for word in words if word.startswith("--")}
        own = {option for option in options if f'"{option}"' in text or f'"{option[2:]}"' in text}
        assert options == own or "parse_known_args" in text, command


def test_examples_import_only_what_is_there() -> None:
    """No script reaches for a name that starts with an underscore."""
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sparseport"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path.name


def test_the_certificate_page_explains_every_key(work: Path) -> None:
    """Of a merged INT4 model with its logit check, of an ONNX folder, and of adapters in files."""
    from docs.certificate_keys import unexplained

    files = sorted(work.rglob("sparseport.json"))
    assert {path.parent.name for path in files} >= {"qa", "openvino", "onnx", "switched"}
    for path in files:
        assert unexplained(json.loads(path.read_text(encoding="utf-8"))) == [], path


def test_nothing_is_written_beside_the_output(work: Path) -> None:
    """Runs last: what the examples left behind is what they were told to write."""
    made: set[Any] = {path.name for path in work.iterdir()}
    assert made == {"qa", "both", "ends", "switched", "ria", "other-adapter", "second-adapter", "tokens.json"}
