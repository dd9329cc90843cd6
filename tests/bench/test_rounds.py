"""Rounds, figures and results, with measurements made up by hand: no engine runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseport.bench import run as bench_run
from sparseport.bench.rounds import Asked, Samples, measure_rounds
from sparseport.bench.subjects import Contender, Subject
from sparseport.errors import EnvironmentProblem, SparseportError, UsageError
from sparseport.figures import paired_ratio, summary


def sample(decode_ms: float, energy: float | None = None) -> dict[str, Any]:
    return {
        "load_s": 1.0,
        "first_token_ms": 4 * decode_ms,
        "prefill_tokens_s": 64e3 / (4 * decode_ms),
        "decode_ms": decode_ms,
        "decode_tokens_s": 1e3 / decode_ms,
        "peak_mib": 100.0,
        "energy_j": energy,
    }


@pytest.fixture
def rows(tmp_path: Path) -> list[Contender]:
    found = []
    for name, size in (("one", 1000), ("two", 4000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "openvino_model.xml").write_text("<net/>")
        (folder / "openvino_model.bin").write_bytes(bytes(size))
        found.append(Contender(Subject(folder, "openvino", name), "openvino"))
    return found


def test_summary_is_the_median_and_the_range() -> None:
    assert summary([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0, "samples": [3.0, 1.0, 2.0, 10.0]}
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_ratio_is_taken_within_rounds() -> None:
    """A round in which everything was ten times slower does not move it; a ratio of medians would be 1.1."""
    assert paired_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 2.0]) == 2.0


def test_every_round_measures_every_row_once_in_changing_order(rows: list[Contender]) -> None:
    seen: list[tuple[int, str]] = []

    def measure(row: Contender, asked: Asked, number: int) -> dict[str, Any]:
        seen.append((number, row.subject.label))
        return sample(1.0)

    found = measure_rounds(rows, Asked(rounds=8), measure=measure)
    assert [len(row.runs) for row in found] == [8, 8]
    assert sorted(seen) == sorted((number, name) for number in range(8) for name in ("one", "two"))
    firsts = [seen[2 * number][1] for number in range(8)]
    assert set(firsts) == {"one", "two"}, "the same row always came first"


def test_a_row_that_fails_is_left_out_and_named(rows: list[Contender]) -> None:
    calls = []

    def measure(row: Contender, asked: Asked, number: int) -> dict[str, Any]:
        calls.append(row.subject.label)
        if row.subject.label == "two":
            raise SparseportError("it broke")
        return sample(2.0)

    found = measure_rounds(rows, Asked(rounds=3), measure=measure)
    assert calls.count("two") == 1, "a row that failed was measured again"
    result = bench_run.result_of(found, Asked(rounds=3), [], [], None, None)
    assert [row["label"] for row in result["rows"]] == ["one, openvino"]
    (failed,) = result["failed"]
    assert failed["label"] == "two, openvino"
    assert "it broke" in failed["why"]


def test_nothing_measured_is_an_error_not_an_empty_result(rows: list[Contender]) -> None:
    broken = [Samples(row, [], SparseportError("it broke")) for row in rows]
    with pytest.raises(EnvironmentProblem, match="nothing could be measured"):
        bench_run.result_of(broken, Asked(), [], [], None, None)


def test_rows_say_what_was_measured(rows: list[Contender]) -> None:
    bandwidth = {**summary([10.0]), "threads": 2}
    samples = [
        Samples(rows[0], [sample(2.0), sample(4.0)]),
        Samples(rows[1], [sample(1.0, 0.5), sample(2.0, 0.7)]),
    ]
    result = bench_run.result_of(samples, Asked(rounds=2), [], [], bandwidth, 0.5)
    first, second = result["rows"]
    assert first["decode_ms"]["median"] == 3.0
    assert first["ratio"] == {"decode": 1.0, "first_token": 1.0}
    assert second["ratio"]["decode"] == 0.5
    # 10 GB/s and 4000 bytes a token are 2.5 million tokens a second.
    assert second["bytes_per_token"] == 4000
    assert second["limit"]["tokens_s"] == 2.5e6
    assert second["limit"]["reached"] == pytest.approx((1000 + 500) / 2 / 2.5e6)
    assert first["energy_j"] is None
    assert second["energy_j"]["median"] == 0.6
    assert result["machine"]["load_before"] == 0.5


def test_energy_of_some_rounds_only_is_none(rows: list[Contender]) -> None:
    """A counter that vanished in the middle gives no figure, rather than one of fewer rounds."""
    result = bench_run.result_of([Samples(rows[0], [sample(1.0, 0.5), sample(1.0)])], Asked(), [], [], None, None)
    assert result["rows"][0]["energy_j"] is None


def test_results_follow_the_schema_and_hold_no_paths(rows: list[Contender], tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(bench_run.__file__).with_name("bench.schema.json")).read_text(encoding="utf-8"))
    devices = [{"name": "CPU", "present": True, "full_name": "x"}, {"name": "GPU", "present": False, "why": "none"}]
    missing = [{"engine": "llama.cpp", "why": "not installed", "fix": "install it"}]
    bandwidth = {**summary([10.0]), "threads": 2}
    samples = [Samples(rows[0], [sample(2.0)]), Samples(rows[1], [], SparseportError("it broke"))]
    result = bench_run.result_of(samples, Asked(pinned=(0,)), devices, missing, bandwidth, 0.5)
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    checker.validate(json.loads(json.dumps(result)))
    assert str(tmp_path) not in json.dumps(result)
    for wrong in ({"kind": "other"}, {"schema": 2}, {"rows": []}, {"unknown": 1}):
        with pytest.raises(jsonschema.ValidationError):
            checker.validate({**result, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"prompt": 0}, {"rounds": 0}, {"tokens": 1}, {"warm_up": -1}, {"threads": -1}, {"pinned": (99999,)}]
)
def test_counts_that_measure_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        bench_run.check_asked(Asked(**wrong))
