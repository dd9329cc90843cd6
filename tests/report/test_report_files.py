"""Files that a report reads: what is damaged, of another kind, or newer is refused by name, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from report.fakes import bench, bench_row, naive, written
from sparseport.errors import BadInput, SparseportError, Unsupported
from sparseport.report.bench_file import read_bench
from sparseport.report.naive_file import read_naive

REPO = Path(__file__).resolve().parents[2]
Change = Callable[[dict[str, Any]], Any]


def test_a_bench_file_is_read(tmp_path: Path) -> None:
    found = read_bench(written(tmp_path / "b.json", bench(bench_row("one", "aa"), chosen="one", later_key=1)))
    (row,) = found.rows
    assert (row.decode.median, row.decode.least, row.decode.largest, row.decode.samples) == (87.5, 83.125, 91.875, 3)
    assert (row.kl, row.top1, row.limit, row.seal, row.energy_j) == (0.0137, 0.9107, (233.0, 0.375), "aa", None)
    assert found.prompt == 64 and found.chosen == 0 and found.load == (0.25, None) and found.name == "b.json"
    assert found.machine["memory bandwidth"] == "21.0 GB/s [20.2-21.4], 2 threads"
    assert found.absent == {"NPU": "no such device"} and found.devices == {"CPU": "Some Processor"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("kind"), "kind sparseport-bench"),
        (lambda d: d.update(schema=True), "schema"),
        (lambda d: d.update(schema=0), "schema"),
        (lambda d: d.pop("rows"), "rows"),
        (lambda d: d.update(rows={}), "rows"),
        (lambda d: d["rows"][0].pop("label"), "rows[0], label"),
        (lambda d: d["rows"][0].update(label="x" * 5000), "rows[0], label"),
        (lambda d: d["rows"][0].update(decode_tokens_s=None), "rows[0], decode_tokens_s"),
        (lambda d: d["rows"][0]["decode_tokens_s"].update(median=-1), "decode_tokens_s, median"),
        (lambda d: d["rows"][0]["decode_tokens_s"].update(median="fast"), "decode_tokens_s, median"),
        (lambda d: d["rows"][0]["decode_tokens_s"].update(median=True), "decode_tokens_s, median"),
        (lambda d: d["rows"][0]["decode_tokens_s"].update(max=1), "decode_tokens_s"),
        (lambda d: d["rows"][0].update(size_bytes=1.5), "rows[0], size_bytes"),
        (lambda d: d["rows"][0].update(drift=[1]), "rows[0], drift"),
        (lambda d: d["rows"][0].update(settings={"a": [1]}), "rows[0], settings, a"),
        (lambda d: d.update(chosen="two"), "chosen row"),
        (lambda d: d.update(chosen=0), "chosen"),
        (lambda d: d["machine"].pop("processor"), "machine, processor"),
        (lambda d: d["machine"].update(cores="two"), "machine, cores"),
        (lambda d: d.update(budget={"kl": []}), "budget, kl"),
        (lambda d: d.update(missing=["llama.cpp"]), "missing[0]"),
        (lambda d: d.update(asked=None), "asked"),
    ],
)
def test_a_damaged_bench_file_is_refused_by_its_place(tmp_path: Path, change: Change, named: str) -> None:
    content = bench(bench_row("one"))
    change(content)
    with pytest.raises(BadInput) as caught:
        read_bench(written(tmp_path / "b.json", content))
    assert named in str(caught.value) and "b.json" in str(caught.value)


def test_a_sweep_is_a_bench_with_a_choice(tmp_path: Path) -> None:
    """The file of a sweep names its choice by label; the evidence in a folder is one row's settings."""
    rows = [bench_row("own", settings={}), bench_row("swept", settings={"KV_CACHE_PRECISION": "u8", "THREADS": 2})]
    budget = {"kl": 0.02, "top1": 0.9, "tokens": 256, "prefer": "decode"}
    whole = bench(*rows, kind="sparseport-sweep", chosen="swept", budget=budget, sweeps=[])
    found = read_bench(written(tmp_path / "s.json", whole))
    assert found.chosen == 1 and found.asked["budget, kl"] == "0.02"
    evidence = {key: whole[key] for key in ("schema", "kind", "sparseport", "machine", "asked", "budget", "rows")}
    evidence["sweep"] = {"model": "a", "settings": {"THREADS": 2, "KV_CACHE_PRECISION": "u8"}, "written": True}
    assert read_bench(written(tmp_path / "e.json", evidence)).chosen == 1
    evidence["machine"] = {**whole["machine"], "cores": None, "bandwidth_gb_s": None}
    assert "cores" not in read_bench(written(tmp_path / "e.json", evidence)).machine


def test_a_newer_bench_file_asks_for_an_upgrade(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="upgrade sparseport"):
        read_bench(written(tmp_path / "b.json", bench(schema=2)))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": NaN}', "\x7fELF"])
@pytest.mark.parametrize("read", [read_bench, read_naive])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str, read: Callable[[Path], Any]) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(SparseportError, match=r"x\.json"):
        read(tmp_path / "x.json")
    with pytest.raises(BadInput, match="missing"):
        read(tmp_path / "none.json")


def test_the_comparison_in_the_repository_is_read() -> None:
    """The format is that of benchmarks/fidelity.py, whose result is kept."""
    path = REPO / "benchmarks" / "results" / "fidelity.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    found = read_naive(path)
    assert [way.name for way in found.ways] == [row["path"] for row in data["rows"]]
    assert [way.changed["codes"] for way in found.ways] == [row["codes"] for row in data["rows"]]
    assert [way.kl for way in found.ways] == [float(row["kl"]) for row in data["rows"]]
    assert [way.ours for way in found.ways] == [row["codes"] == 0 for row in data["rows"]]
    assert found.items == data["items"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("rows"), "no comparison"),
        (lambda d: d.update(rows=[]), "no rows"),
        (lambda d: d["rows"][0].pop("codes"), "rows[0]"),
        (lambda d: d["rows"][0].update(scales=1.5), "rows[0]"),
        (lambda d: d["rows"][1].update(kl="small"), "rows[1], kl"),
        (lambda d: d["rows"][1].update(float32={"kl": None}), "rows[1], float32, kl"),
        (lambda d: d.update(items=-3), "items"),
    ],
)
def test_a_damaged_comparison_is_refused_by_its_place(tmp_path: Path, change: Change, named: str) -> None:
    content = naive()
    change(content)
    with pytest.raises(BadInput) as caught:
        read_naive(written(tmp_path / "n.json", content))
    assert named in str(caught.value)
