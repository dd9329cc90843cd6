"""Latency: what is measured, how often and in which order; never how long it takes."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sparseport.errors import BadInput, UsageError
from sparseport.nls import latency
from sparseport.nls.latency import measure_draft_costs, measure_latency


@pytest.fixture(scope="module")
def folders(tiny_both: Any) -> list[Path]:
    return [tiny_both[0].output / name for name in ("openvino", "onnx")]


def test_real_folders_give_positive_times(folders: list[Path]) -> None:
    steps = []
    result = measure_latency(
        folders, prompts=(4, 9), decode_tokens=3, rounds=2, threads=1, on_step=lambda: steps.append(1)
    )
    assert json.loads(json.dumps(result)) == result
    assert len(steps) == 2 * 2 * (1 + 2)
    assert [entry["path"] for entry in result["folders"]] == [str(folder) for folder in folders]
    assert result["folders"][0]["settings"] == {"INFERENCE_NUM_THREADS": "1"}
    assert result["folders"][1]["settings"] == {"intra_op_num_threads": "1"}
    for entry in result["folders"]:
        for kind in ("prefill_ms", "decode_ms"):
            assert list(entry[kind]) == ["4", "9"]
            for found in entry[kind].values():
                assert len(found["samples"]) == 2
                assert 0 < found["min"] <= found["median"] <= found["max"]
                assert found["ratio"] > 0
    assert all(found["ratio"] == 1 for found in result["folders"][0]["decode_ms"].values())


def test_rounds_are_interleaved_and_times_add_up(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks a second at each look, and models that take some more: 2 s a token, the second model 6 s."""
    log: list[Any] = []
    ticks = count()
    spent = [0.0]

    class Session:
        def __init__(self, name: str, pace: float) -> None:
            self.name, self.pace = name, pace

        def reset(self) -> None:
            log.append((self.name, "reset"))

        def read(self, tokens: Any) -> None:
            log.append((self.name, len(tokens)))
            spent[0] += self.pace * len(tokens)

    sessions = {folders[0]: Session("a", 2.0), folders[1]: Session("b", 6.0)}
    monkeypatch.setattr(latency, "open_session", lambda folder, *_: (sessions[folder], {}))
    result = measure_latency(
        folders, prompts=(5,), decode_tokens=2, rounds=2, warm_up=1, clock=lambda: next(ticks) + spent[0]
    )
    assert log == [(name, what) for _ in range(3) for name in "ab" for what in ("reset", 5, 1, 1)]
    slow, fast = result["folders"][1], result["folders"][0]
    assert fast["prefill_ms"]["5"]["samples"] == [11000.0, 11000.0]
    assert fast["decode_ms"]["5"]["median"] == 2500.0
    assert slow["decode_ms"]["5"]["median"] == 6500.0 and slow["decode_ms"]["5"]["ratio"] == 2.6


def test_costs_of_a_draft_are_in_steps_of_the_main_network(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A main network whose steps take 4 s and half a second a token more, a draft that takes a second a token."""
    log: list[Any] = []
    spent = [0.0]

    class Session:
        def __init__(self, name: str, step: float, token: float) -> None:
            self.name, self.step, self.token = name, step, token

        def reset(self) -> None:
            log.append((self.name, "reset"))

        def read(self, tokens: Any) -> None:
            log.append((self.name, len(tokens)))
            spent[0] += self.step + self.token * len(tokens)

    sessions = {folders[0]: Session("a", 3.5, 0.5), folders[1]: Session("b", 0.0, 1.0)}
    monkeypatch.setattr(latency, "open_session", lambda folder, *_: (sessions[folder], {}))
    steps: list[int] = []
    result = measure_draft_costs(
        folders[0], folders[1:], longest=2, prompt=5, repeats=2, rounds=2, warm_up=1,
        clock=lambda: spent[0], on_step=lambda: steps.append(1),
    )  # fmt: skip
    assert log == [(name, what) for _ in range(3) for name in "ab" for what in ("reset", 5, 1, 2, 3, 1, 2, 3)]
    assert len(steps) == 6 and json.loads(json.dumps(result)) == result
    assert {tokens: found["samples"] for tokens, found in result["step_ms"].items()} == {
        "1": [4000.0] * 2, "2": [4500.0] * 2, "3": [5000.0] * 2,
    }  # fmt: skip
    assert [found["ratio"] for found in result["step_ms"].values()] == [1.0, 1.125, 1.25]
    assert [(one["path"], one["step_ms"]["ratio"]) for one in result["drafts"]] == [(str(folders[1]), 0.25)]
    with pytest.raises(UsageError, match="1 or more"):
        measure_draft_costs(folders[0], [], longest=0)
    with pytest.raises(UsageError, match="so many tokens"):
        measure_draft_costs(folders[0], [], prompt=250)


@pytest.mark.parametrize(
    "wrong", [{"prompts": ()}, {"prompts": (0,)}, {"decode_tokens": 0}, {"rounds": 0}, {"warm_up": -1}, {"threads": -1}]
)
def test_impossible_requests_are_refused(wrong: dict[str, Any], folders: list[Path]) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure_latency(folders, **wrong)


def test_models_and_folders_have_limits(folders: list[Path], tiny_base: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure_latency([])
    with pytest.raises(UsageError, match="at most 256"):
        measure_latency(folders, prompts=(250,), decode_tokens=7)
    with pytest.raises(BadInput, match="no exported folder"):
        measure_latency([tiny_base])
