"""The search for settings, with speeds and drifts made up by hand: no engine runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.bench.knobs import SPARSE_WEIGHTS, combinations, stages
from sparseport.bench.rounds import Asked, Samples
from sparseport.bench.subjects import Contender, Subject
from sparseport.bench.sweep import Budget, faster, sweep
from sparseport.errors import EnvironmentProblem, SparseportError, UsageError

ROW = Contender(Subject(Path("out"), "openvino", "out"), "openvino-genai")
STAGES = [{"INFERENCE_PRECISION_HINT": [None, "f32"], "DYNAMIC_QUANTIZATION_GROUP_SIZE": [None, 0, 64]},
          {"INFERENCE_NUM_THREADS": [None, 1, 2]}]  # fmt: skip


def milliseconds(settings: dict[str, Any]) -> float:
    """Quantised activations are faster, one thread is slower; nothing else matters."""
    group = settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE")
    return {None: 10.0, 0: 12.0, 64: 8.0}[group] * {None: 1.0, 1: 2.0, 2: 0.9}[settings.get("INFERENCE_NUM_THREADS")]


def drift_of(row: Contender) -> dict[str, float]:
    group = row.settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE")
    kl = {None: 0.004, 0: 0.0, 64: 0.02}[group]
    return {"kl": kl, "top1": 1 - kl, "max_abs": 10 * kl}


def measure(row: Contender, asked: Asked, number: int) -> dict[str, Any]:
    decode = milliseconds(row.settings)
    return {"decode_ms": decode, "first_token_ms": 100 - decode}


def found(budget: Budget, **options: Any) -> tuple[Any, Any]:
    return sweep(ROW, STAGES, budget, Asked(rounds=3), drift_of, measure=options.pop("measure", measure), **options)


def test_the_fastest_settings_within_a_wide_budget() -> None:
    _, best = found(Budget(0.05, 0.9))
    assert best == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "INFERENCE_NUM_THREADS": 2}


def test_noise_changes_no_settings() -> None:
    """One percent is noise: a stage whose fastest value is that little faster stays where it began."""

    def noisy(row: Contender, asked: Asked, number: int) -> dict[str, Any]:
        decode = 10.0 - 0.05 * len(row.settings)
        return {"decode_ms": decode, "first_token_ms": 100 - decode}

    _, best = found(Budget(0.05, 0.9), measure=noisy)
    assert best == {}


def test_a_narrow_budget_keeps_what_drifts_out() -> None:
    """The fastest setting of all drifts by 0.02: it must not even be measured."""
    measured = []

    def watched(row: Contender, asked: Asked, number: int) -> dict[str, Any]:
        measured.append(row.settings)
        return measure(row, asked, number)

    tried, best = found(Budget(0.01, 0.9), measure=watched)
    assert best == {"INFERENCE_NUM_THREADS": 2}
    assert all(settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") != 64 for settings in measured)
    outside = [one for one in tried if not one.within]
    assert [one.settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] for one in outside] == [64, 64]
    assert all(one.runs == [] for one in outside)


def test_top1_is_a_bound_of_its_own() -> None:
    _, best = found(Budget(1.0, 0.99))
    assert best == {"INFERENCE_NUM_THREADS": 2}


def test_no_drift_at_all_means_full_precision() -> None:
    _, best = found(Budget(0.0, 1.0))
    assert best["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0


def test_nothing_within_the_budget_is_said() -> None:
    tried, best = sweep(
        ROW, [{"KV_CACHE_PRECISION": [None, "u8"]}], Budget(0.001, 0.5), Asked(), drift_of, measure=measure
    )
    assert best is None
    assert [one.within for one in tried] == [False, False]


def test_prefill_can_be_what_counts() -> None:
    """Here what decodes slowest reads fastest."""
    _, best = found(Budget(0.05, 0.9), prefer="prefill")
    assert best["INFERENCE_NUM_THREADS"] == 1


def test_drift_is_measured_once_for_settings_that_compute_the_same() -> None:
    calls = []

    def counted(row: Contender) -> dict[str, float]:
        calls.append(dict(row.settings))
        return drift_of(row)

    sweep(ROW, STAGES, Budget(0.05, 0.9), Asked(rounds=1), counted, measure=measure)
    assert len(calls) == 6, "threads change nothing about the numbers"


def test_settings_that_fail_are_kept_with_their_error() -> None:
    def failing(row: Contender, asked: Asked, number: int) -> dict[str, Any]:
        if row.settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 64:
            raise SparseportError("not supported here")
        return measure(row, asked, number)

    tried, best = found(Budget(0.05, 0.9), measure=failing)
    assert best == {"INFERENCE_NUM_THREADS": 2}
    assert all("not supported here" in (one.failed or "") for one in tried
               if one.settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 64)  # fmt: skip


@pytest.mark.parametrize("budget", [Budget(-0.1, 0.9), Budget(0.1, 1.5), Budget(float("nan"), 0.9)])
def test_budgets_that_mean_nothing_are_refused(budget: Budget) -> None:
    with pytest.raises(UsageError, match="no such budget"):
        found(budget)


def test_a_gain_below_two_percent_is_noise() -> None:
    def rows(factor: float) -> tuple[Samples, Samples]:
        default = [{"decode_ms": value} for value in (10.0, 20.0, 11.0)]
        return Samples(ROW, [{"decode_ms": run["decode_ms"] * factor} for run in default]), Samples(ROW, default)

    assert faster(*rows(0.9), "decode")
    assert not faster(*rows(0.99), "decode")
    assert not faster(*rows(1.1), "decode")


@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.none() | st.integers(0, 3), min_size=1), min_size=1))
def test_combinations_are_all_of_them_once(stage: dict[str, list[Any]]) -> None:
    """Against a count over sets: None leaves what was there."""
    start = {"a": 9}
    got = list(combinations(stage, start))
    keys = [tuple(sorted(one.items())) for one in got]
    assert len(set(keys)) == len(keys)
    expected = 1
    for name, values in stage.items():
        expected *= len({start.get(name) if value is None else value for value in values})
    assert len(got) == expected


def test_groups_of_the_weights_are_among_the_values() -> None:
    """OpenVINO quantises activations only in groups that divide those of the weights."""
    first = stages("openvino-genai", [128], cores=4)[0]
    assert list(first["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == [None, 0, 32, 128]
    later = {name: values for stage in stages("openvino-genai", [64], cores=4) for name, values in stage.items()}
    assert list(later["INFERENCE_NUM_THREADS"]) == [None, 2, 4]
    assert list(later["NUM_STREAMS"]) == [None, 2]
    assert list(stages("onnxruntime-genai", [], cores=1)[0]["intra_op_num_threads"]) == [None, 1]


@pytest.mark.parametrize("engine", ["openvino-genai", "onnxruntime-genai"])
def test_threads_that_were_given_are_not_tried(engine: str) -> None:
    names = {name for stage in stages(engine, [64], 4, fixed_threads=True) for name in stage}
    assert names and not any("threads" in name.lower() for name in names)


def test_settings_that_cannot_be_had_are_left_out() -> None:
    """A plugin that refuses a value costs that value and not the sweep."""

    def drift_of(one: Contender) -> dict[str, float]:
        if one.settings.get("KV_CACHE_PRECISION") == "u8":
            raise EnvironmentProblem("the plugin refuses it")
        return {"kl": 0.0, "max_abs": 0.0, "top1": 1.0}

    def measure(one: Contender, asked: Asked, seed: int) -> dict[str, Any]:
        return {"decode_ms": 1.0, "first_token_ms": 1.0}

    tried, best = sweep(ROW, [{"KV_CACHE_PRECISION": [None, "u8", "f16"]}], Budget(1, 0), Asked(), drift_of,
                        measure=measure)  # fmt: skip
    assert best is not None
    (left_out,) = [one for one in tried if one.failed]
    assert (left_out.drift, left_out.within, left_out.runs) == (None, False, [])
    assert "refuses" in str(left_out.failed)


def test_sparse_weights_are_tried_where_amx_can_use_them() -> None:
    def names(sparsity: float, flags: list[str]) -> list[str]:
        return [name for stage in stages("openvino", [64], 2, sparsity, flags) for name in stage]

    assert SPARSE_WEIGHTS in names(0.5, ["amx_int8"])
    assert SPARSE_WEIGHTS not in names(0.5, ["avx2"])
    assert SPARSE_WEIGHTS not in names(0.0, ["amx_int8"])
