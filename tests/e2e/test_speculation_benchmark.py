"""The benchmark of speculation, in small: what its result says has to hold together."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.in_process import in_process

pytest.importorskip("openvino_genai")

REPO = Path(__file__).parents[2]
PROMPTS = [[7, 7, 3], list(range(1, 9))]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    names = ("common", "speculation", "speculation_engines", "same_tokens")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("speculation")
    monkeypatch.setattr(module.common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "make_prompts", lambda _, count: PROMPTS[:count])  # the tiny model cannot chat
    yield module
    for name in names:
        sys.modules.pop(name, None)


def _run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["speculation.py", *arguments])
    with in_process():
        module.main()


def test_the_result_holds_together(
    benchmark: Any,
    tiny_sparse: Path,
    tiny_adapter_sparse: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = ["--base", str(tiny_sparse), "--adapter", str(tiny_adapter_sparse), "--scratch", str(tmp_path / "scratch")]
    small = ["--drafts", "minimal", "--lengths", "1", "3", "--prompts", "2", "--tokens", "8", "--rounds", "1"]
    _run(benchmark, monkeypatch, *inputs, *small)
    found = json.loads((tmp_path / "results" / "speculation.json").read_text(encoding="utf-8"))
    assert set(found) == {"machine", "asked", "sizes", "costs", "rows"}
    asked = [(settings, k) for settings in ("full", "default") for k in (1, 3)]
    assert [(row["settings"], row["k"]) for row in found["rows"]] == asked
    for row in found["rows"]:
        for kind in ("task", "text"):
            one = row[kind]
            assert one["prompts"] == 1 and one["identical"] + len(one["different"]) == 1
            assert one["identical"] == 1 or row["settings"] == "default"
            assert 0 <= one["accepted"] <= one["proposed"] and 0 <= one["agreement"] <= 1
            assert one["steps"] >= 1 and min(one["speed_up"], one["replayed_speed_up"], one["formula_speed_up"]) > 0
            if row["settings"] == "full" and kind == "text":
                assert one["steps"] == one["replayed"]["rounds"]
                assert 0 <= one["replayed"]["accepted"] - one["accepted"] <= row["k"]
    for costs in found["costs"].values():
        assert len(costs["verify"]) == 3 and len(costs["c"]) == 1 and "/" not in costs["drafts"][0]["path"]
    printed = capsys.readouterr().out
    assert "1 of 1" in printed and "main network" in printed and "c \\ a" in printed
    pair = next((tmp_path / "scratch").iterdir())
    folders = [str(pair / name) for name in ("openvino", "openvino-draft")]
    _run(benchmark, monkeypatch, "--costs", *folders, "--lengths", "2", "--rounds", "1")
    costs = json.loads((tmp_path / "results" / "speculation_costs.json").read_text(encoding="utf-8"))["costs"]
    assert len(costs["verify"]) == 2 and len(costs["drafts"]) == 1


def test_the_tables_say_where_it_pays(benchmark: Any) -> None:
    step = {"median": 10.0}
    costs = {
        "step_ms": {"1": step},
        "verify": [1.0, 1.0],
        "c": [0.1, 2.0],
        "drafts": [{"path": "a", "step_ms": step}] * 2,
    }
    table = benchmark.costs_table({"default": costs}, ["cheap", "dear"])
    assert "pays from a = 0.10 on" in table and "never, up to k = 2" in table
    first = benchmark.pays_table(costs).splitlines()[2]
    assert first.startswith("| 0.1 | 1.46x |")  # (1 + a + a^2) / (2 c + 1) at a = 0.5: k = 2 is the best
