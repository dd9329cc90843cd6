"""The command line: exit codes, one-line errors, JSON that parses, and the door `export.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparseport import cli
from sparseport.errors import FidelityError

VERBS = (
    *("export", "verify", "inspect", "demo", "sparsify", "quantize", "finetune", "search", "evaluate", "bench"),
    *("run", "ovms"),
)


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        status = cli.main([str(item) for item in arguments])
    except SystemExit as leave:
        status = leave.code
    out, err = capsys.readouterr()
    return status, out, err


def one_error(err: str, code: str) -> str:
    lines = [line for line in err.splitlines() if not line.startswith("{")]  # progress lines are JSON
    assert len(lines) == 1 and lines[0].startswith(f"error[{code}]: "), err
    return lines[0]


def model_folder(path: Path, config: dict[str, object]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


# --- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["explode"],
        ["export", "--target", "tensorrt"],
        ["export", "--no-such-option"],
        ["verify"],
        ["export", "--compress-ratio", "half"],
    ],
)
def test_a_command_that_does_not_parse_is_2(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith("usage: sparseport") and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "--base is missing"),
        (["export", "--base", "b"], "--output is missing"),
        (["export", "--base", "", "--output", "o"], "--base is missing"),
        (["export", "--base", "b", "--output", "o", "--set", "rounding"], "key=value"),
        (["export", "--base", "b", "--output", "o", "--set", "rounding=["], "not YAML"),
        (["export", "--base", "b", "--output", "o", "--set", "base.x=1"], "leads through a value"),
    ],
)
def test_options_that_do_not_fit_are_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and message in one_error(err, "E_USAGE")


@pytest.mark.parametrize(
    ("extra", "code", "named"),
    [
        (["--base", "none"], "E_MISSING", "in none;"),
        (["--base", "none", "--set", "surprise=1"], "E_RECIPE", "'surprise'"),
        (["--base", "none", "--compress", "int4_sym", "--compress-ratio", "7"], "E_RECIPE", "'compress.ratio'"),
        (["--config", "none.yaml"], "E_INPUT", "in none.yaml;"),
    ],
)
def test_bad_input_is_3(capsys, tmp_path, monkeypatch, extra, code, named):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "export", "--output", "out", *extra)
    assert status == 3 and out == "" and named in one_error(err, code)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_certificate_is_5(capsys, tmp_path):
    status, out, err = run(capsys, "verify", tmp_path)
    assert status == 5 and out == "" and str(tmp_path) in one_error(err, "E_VERIFY")


def test_an_existing_output_is_6(capsys, tmp_path, tiny_int4, tiny_sparse, tiny_adapter):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    status, out, err = run(
        capsys,
        "export",
        "--quiet",
        "--base",
        tiny_int4,
        "--sparse-base",
        tiny_sparse,
        "--adapter",
        tiny_adapter,
        "--output",
        tmp_path / "out",
    )
    assert status == 6 and out == "" and "--overwrite" in one_error(err, "E_EXISTS")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_what_is_unsupported_is_7(capsys, tmp_path):
    base = model_folder(tmp_path / "m", {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}})
    status, out, err = run(capsys, "export", "--base", base, "--output", tmp_path / "out")
    assert status == 7 and out == "" and "auto_map" in one_error(err, "E_REMOTE_CODE")


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (FidelityError("x"), 4, "error[E_FIDELITY]: x\n"),
        (MemoryError(), 8, "error[E_MEM]: out of memory; to fix: `--dry-run` shows the estimate\n"),
        (
            ZeroDivisionError("boo\n\x1b"),
            70,
            "error[E_INTERNAL]: unexpected ZeroDivisionError: boo\\n\\x1b; "
            "to fix: run again with --debug and report it\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
    ],
)
def test_whatever_happens_has_a_status_and_one_line(capsys, monkeypatch, raised, status, text):
    def fail(options):
        raise raised

    monkeypatch.setattr(cli, "_run_verify", fail)
    assert run(capsys, "verify", "x") == (status, "", text)


@pytest.mark.parametrize(
    ("arguments", "runs", "text"),
    [
        (
            ["export", "--base", "b", "--output", "o"],
            "sparseport.verbs.export.run_export",
            "interrupted; no half-written output was left\n",
        ),
        (["verify", "x"], "sparseport.cli._run_verify", "interrupted; nothing was written\n"),
        (
            ["demo"],
            "sparseport.cli._run_demo",
            "interrupted; finished steps are kept, and the same command goes on from there\n",
        ),
    ],
)
def test_ctrl_c_says_what_became_of_the_work(capsys, monkeypatch, arguments, runs, text):
    def fail(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, fail)
    assert run(capsys, *arguments) == (130, "", text)


@pytest.mark.parametrize("raised", [None, FidelityError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_a_caller_in_the_same_process_gets_everything_back(capsys, monkeypatch, raised):
    """The signal handler, the offline switches and the hidden telemetry package are for the time of the verb only."""
    seen = {}

    def verb(options):
        seen["handler"] = signal.getsignal(signal.SIGTERM)
        seen["offline"] = os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TOKENIZERS_PARALLELISM")
        seen["telemetry"] = sys.modules.get("openvino_telemetry", "not blocked")
        if raised is not None:
            raise raised
        return 0

    def mine(signum, frame):
        raise AssertionError

    monkeypatch.setattr(cli, "_run_verify", verb)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    environment, before = dict(os.environ), signal.signal(signal.SIGTERM, mine)
    try:
        run(capsys, "verify", "x")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == {"handler": cli._terminate, "offline": ("1", "true"), "telemetry": None}
    assert dict(os.environ) == environment and "openvino_telemetry" not in sys.modules


def test_a_telemetry_package_that_is_blocked_already_stays_blocked(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_run_verify", lambda options: 0)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    run(capsys, "verify", "x")
    assert sys.modules["openvino_telemetry"] is None


def test_main_runs_in_any_thread(monkeypatch):
    """Python lets only the main thread set signal handlers."""
    monkeypatch.setattr(cli, "_run_verify", lambda options: 0)
    before, results = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: results.append(cli.main(["verify", "x"])))
    thread.start()
    thread.join()
    assert results == [0] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("raised", [FidelityError("x"), ZeroDivisionError()])
def test_debug_shows_the_traceback(capsys, monkeypatch, raised):
    def fail(options):
        raise raised

    monkeypatch.setattr(cli, "_run_verify", fail)
    with pytest.raises(type(raised)):
        cli.main(["verify", "x", "--debug"])


def test_a_reader_that_goes_away_is_no_error(capsys, monkeypatch):
    def fail(options):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run_verify", fail)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert cli.main(["verify", "x"]) == 141
    sys.stdout.close()


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_errors_are_json_when_asked(capsys, tmp_path):
    status, out, err = run(capsys, "export", "--json", "--base", tmp_path / "no\x1b[1m", "--output", tmp_path / "out")
    error = json.loads(out)["error"]
    assert status == 3 and error["code"] == "E_MISSING" and error["exit_code"] == 3
    assert error["where"].endswith("no\\x1b[1m") and out.isascii()
    one_error(err, "E_MISSING")


def test_control_characters_of_names_do_not_reach_the_terminal(capsys, tmp_path):
    hostile = tmp_path / "a\x1b]0;owned\x07\r\nerror[E_FAKE]: b"
    for arguments in (["export", "--base", hostile, "--output", "o"], ["verify", hostile]):
        _, _, err = run(capsys, *arguments)
        line = one_error(err, "E_MISSING" if arguments[0] == "export" else "E_VERIFY")
        assert line.isprintable() and "a\\x1b]0;owned\\x07\\r\\nerror[E_FAKE]: b" in line


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path, tiny_int4, tiny_sparse, tiny_adapter):
    arguments = [
        "export",
        "--dry-run",
        "--base",
        tiny_int4,
        "--sparse-base",
        tiny_sparse,
        "--adapter",
        tiny_adapter,
        "--sub-adapter",
        "heuristic",
        "--output",
        tmp_path / "out",
    ]
    status, out, err = run(capsys, *arguments)
    assert status == 0 and err == "" and "qa_sparse_peft 10" in out and "carry 4" in out
    status, out, err = run(capsys, *arguments, "--json")
    plan = json.loads(out)
    assert status == 0 and plan["refused"] == 0 and "error" not in plan
    ranks = {layer["module"].rpartition(".")[2]: layer["rank"] for layer in plan["layers"]}
    elastic = {"q_proj": 6, "k_proj": 6, "v_proj": 6}
    assert ranks == {**elastic, "up_proj": 8, "down_proj": 8, "gate_proj": None, "o_proj": None}
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_every_refusal(capsys, tmp_path, monkeypatch, tiny_base, tiny_adapter):
    arguments = ["export", "--dry-run", "--base", tiny_base, "--adapter", tiny_adapter, "--output", tmp_path / "out"]
    status, out, err = run(capsys, *arguments, "--json")
    plan = json.loads(out)  # one document, with the error in it
    refused = [layer["module"] for layer in plan["layers"] if layer["refusal"]]
    assert status == 3 == plan["error"]["exit_code"] and plan["refused"] == len(refused) == 10
    assert "10 of 14 layers are refused" in one_error(err, "E_PAIRING") and refused[0] in err
    monkeypatch.setenv("COLUMNS", "300")
    status, out, err = run(capsys, *arguments)
    assert status == 3 and out.count("refused:") == 10 and all(module in out for module in refused)
    one_error(err, "E_PAIRING")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--gguf-dtype", "float32"], "gguf_dtype", "float32"),
        (["--nncf-base-dtype", "bfloat16"], "nncf_base_dtype", "bfloat16"),
        (["--gptq-zeros", "v1-words"], "gptq_zeros", "v1-words"),
        (["--ignore-extra"], "ignore_extra", True),
        (["--allow-pickle"], "allow_pickle", True),
    ],
)
def test_options_about_reading_reach_the_recipe(capsys, monkeypatch, words, field, value):
    seen = []

    def stop(recipe):
        seen.append(recipe)
        raise FidelityError("far enough")

    monkeypatch.setattr("sparseport.pipeline.plan", stop)
    for extra in ([], words):
        status, _, _ = run(capsys, "export", "--dry-run", "--base", "b", "--output", "o", *extra)
        assert status == 4
    without, given = (recipe.model_dump(mode="json") for recipe in seen)
    assert given[field] == value != without[field]
    assert {**given, field: None} == {**without, field: None}


@pytest.mark.parametrize("words", [["--gguf-dtype", "int8"], ["--nncf-base-dtype", "half"], ["--gptq-zeros", "v3"]])
def test_values_that_do_not_exist_are_2(capsys, words):
    assert run(capsys, "export", "--base", "b", "--output", "o", *words)[0] == 2


def test_options_win_over_the_config(capsys, tmp_path, tiny_sparse, tiny_adapter_sparse):
    config = tmp_path / "job.yaml"
    config.write_text("export: {base: nowhere, sub_adapter: minimal, compress: {mode: int8_sym, ratio: 0.5}}\n")
    status, out, _ = run(
        capsys,
        "export",
        "--config",
        config,
        "--dry-run",
        "--json",
        "--base",
        tiny_sparse,
        "--adapter",
        tiny_adapter_sparse,
        "--output",
        tmp_path / "out",
        "--set",
        "sub_adapter=maximal",
        "--compress",
        "int4_sym",
        "--set",
        "compress.group_size=32",
    )
    layers = json.loads(out)["layers"]
    assert status == 0 and {layer["rank"] for layer in layers} == {8, None}
    assert {layer["stored"]["openvino"] for layer in layers} == {"nncf int4_sym g32"}


# --- help and doors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(capsys, verb):
    status, out, err = run(capsys, verb, "--help")
    assert status == 0 and err == "" and f"example:\n  sparseport {verb} " in out
    example = out.split("example:\n")[1].split()
    assert cli._parser().parse_args(example[1:]).verb == verb


def test_every_verb_is_tested_here(capsys):
    _, out, _ = run(capsys, "--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert [name for name in listed if name.isalpha() and name.islower()] == list(VERBS)


def test_version(capsys):
    from sparseport import __version__

    assert run(capsys, "--version") == (0, f"sparseport {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], [], ["--base", "none", "--output", "o", "--json"]])
def test_the_door_is_the_verb_export(repo_root, tmp_path, arguments):
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "src"), "COLUMNS": "100"}

    def ended(*command):
        done = subprocess.run(
            [sys.executable, *command, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    door = ended(str(repo_root / "export.py"))
    assert door == ended("-m", "sparseport.cli", "export")
    assert door[0] == {1: 0, 0: 2, 5: 3}[len(arguments)] and "Traceback" not in door[2]


def test_the_door_works_from_a_checkout_that_is_not_installed(repo_root, tmp_path):
    # -S leaves site-packages out, so that an installed sparseport cannot help.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", str(repo_root / "export.py"), "--help"],
        cwd=tmp_path,
        text=True,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and "sparseport export" in done.stdout, done.stderr
