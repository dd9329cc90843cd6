"""sparsify, quantize and finetune as commands: folders in, folders out, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from sparseport import cli
from sparseport.checkpoints.elastic import open_search_space
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import read_gptq_linear, read_quantization_config
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources
from sparseport.verbs.making import MARKER
from sparseport.weights.mask import keeps_n_m, mask_of, revived

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "words.jsonl"
    lines = [
        {"prompt": f"{split}: say {word}", "answer": f" {word}", "split": split, "form": "text"}
        for split in ("train", "validation", "test")
        for word in ("ab", "cd", "ef", "gh", "abab", "cdcd")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(capsys: Any, *arguments: object) -> tuple[int, Any, str]:
    """Exit status, JSON of standard output, standard error."""
    status = cli.main([*(str(item) for item in arguments), "--json", "--quiet"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


SMALL = ("--set", "samples=4", "--set", "sequence_length=32")
TRAIN = ("--steps", "3", "--set", "search_space=[8, 4]", "--set", "batch_size=4")


def test_from_a_dense_model_to_an_adapter_that_the_exporter_reads(capsys, tiny_base, task, tmp_path):
    sparse, int4, adapter = tmp_path / "sparse", tmp_path / "int4", tmp_path / "adapter"
    status, said, _ = run(
        capsys, "sparsify", "--base", tiny_base, "--output", sparse, "--pattern", "2:4", "--task", task, *SMALL
    )
    assert status == 0 and said["zeros"] == 0.5 and said["metric"] == "wanda"
    with ModelFolder.open(sparse) as folder:
        assert keeps_n_m(mask_of(folder.read(f"{QUERY}.weight")), 2, 4)
        mask = mask_of(folder.read(f"{QUERY}.weight"))
    status, said, _ = run(
        capsys, "quantize", "--base", sparse, "--output", int4, "--method", "gptq", "--group-size", 32, *SMALL
    )
    assert status == 0 and said["group_size"] == 32
    with ModelFolder.open(int4) as folder:
        assert revived(read_gptq_linear(folder, QUERY, read_quantization_config(folder)), mask) == 0
    status, said, _ = run(
        capsys, "finetune", "--base", int4, "--sparse-base", sparse, "--task", task, "--output", adapter, *TRAIN
    )
    assert status == 0 and said["steps"] == 3 and said["groups"] == 2 and np.isfinite(said["last_loss"])
    recipe = {"base": int4, "sparse_base": sparse, "adapter": adapter, "output": tmp_path / "out"}
    with open_sources(make_recipe({**recipe, "sub_adapter": "minimal"})) as sources:
        assert sources.branch(QUERY).rank == 4
    facts = json.loads((adapter / MARKER).read_text())
    assert facts["step"] == "finetune" and facts["recipe"]["search_space"] == [8, 4] and "data" not in facts["recipe"]
    assert (adapter / "training_record.jsonl").is_file() and str(tmp_path) not in (adapter / MARKER).read_text()


@pytest.mark.parametrize("method", ["lora", "shears", "sqft", "sparse_peft", "lonas"])
def test_every_method_writes_what_picks_its_rule(capsys, method, tiny_base, tiny_sparse, tiny_int4, task, tmp_path):
    base = {"lora": tiny_base, "lonas": tiny_base, "sqft": tiny_int4}.get(method, tiny_sparse)
    more = ("--set", "widths=[128, 96]") if method == "lonas" else ()
    status, _, err = run(
        capsys,
        "finetune",
        "--method",
        method,
        "--base",
        base,
        "--task",
        task,
        "--output",
        tmp_path / "a",
        *TRAIN,
        *more,
    )
    assert status == 0, err
    with AdapterFolder.open(tmp_path / "a") as adapter:
        assert adapter.sparse_adapter == (method == "sparse_peft") and not adapter.quantization_aware
        assert adapter.scaling == 8.0
    name = "search_space.json" if method == "lonas" else "elastic_adapter_config.json"
    kinds = {group.kind for group in open_search_space(tmp_path / "a" / name).groups}
    assert kinds == ({"rank", "width"} if method == "lonas" else {"rank"})


def test_magnitude_and_a_configured_section(capsys, tiny_base, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("sparsify: {metric: magnitude, sparsity: 0.25, samples: 3}\nquantize: {method: gptq}\n")
    status, said, _ = run(
        capsys, "sparsify", "--config", config, "--base", tiny_base, "--output", tmp_path / "out", "--sparsity", 0.75
    )
    assert status == 0 and said["zeros"] == 0.75 and said["metric"] == "magnitude"
    assert json.loads((tmp_path / "out" / MARKER).read_text())["recipe"]["samples"] == 3


def test_an_output_is_replaced_only_if_the_verb_made_it(capsys, tiny_base, tmp_path):
    out = tmp_path / "out"
    arguments = ("sparsify", "--base", tiny_base, "--output", out, "--metric", "magnitude")
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert run(capsys, *arguments)[0] == 6
    assert run(capsys, *arguments, "--overwrite")[0] == 6 and (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert run(capsys, *arguments)[0] == 6
    assert run(capsys, *arguments, "--overwrite", "--sparsity", "0.25")[1]["zeros"] == 0.25
    assert run(capsys, "quantize", "--base", tiny_base, "--output", out, "--overwrite")[0] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("sparsify", "--base", "{none}"), 2, "--base is no folder"),
        (("sparsify", "--base", "{base}", "--metric", "sparsegpt"), 3, "metrics are wanda"),
        (("sparsify", "--base", "{base}", "--metric", "no_such:f"), 2, "cannot be imported"),
        (("sparsify", "--base", "{base}", "--set", "calibration={none}"), 3, "cannot read the calibration text"),
        (("sparsify", "--base", "{base}", "--set", "steps=3"), 3, "'steps'"),
        (("sparsify", "--base", "{base}", "--pattern", "2:4", "--sparsity", "0.4"), 2, "fixed sparsity"),
        (("quantize", "--base", "{base}", "--group-size", "48"), 3, "does not divide"),
        (("finetune", "--base", "{base}"), 2, "needs the sparse base"),
        (("finetune", "--base", "{base}", "--sparse-base", "{base}", "--method", "lora"), 2, "two bases"),
        (("finetune", "--base", "{base}", "--method", "lora", "--task", "{none}"), 3, "no such task"),
        (("finetune", "--base", "{base}", "--method", "lora", "--set", "widths=[256, 128]"), 3, "at most 128"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(capsys, words, status, message, tiny_base, task, tmp_path):
    names = {"base": tiny_base, "none": tmp_path / "none"}
    arguments = [word.format(**names) for word in words]
    if "finetune" in words and "--task" not in words:
        arguments += ["--task", str(task)]
    got, said, err = run(capsys, *arguments, "--output", tmp_path / "out", *(SMALL if "sparsify" in words else ()))
    assert got == status, err
    assert message in err and message in json.dumps(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("sparse: {}\n", "no section 'sparse'"), ("sparsify: 3\n", "is a mapping"), ("sparsify: {x: 1}\n", "'x'")],
)
def test_recipes_that_do_not_fit(capsys, text, message, tiny_base, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(text)
    status, _, err = run(capsys, "sparsify", "--config", config, "--base", tiny_base, "--output", tmp_path / "out")
    assert status == 3 and message in err and not (tmp_path / "out").exists()
