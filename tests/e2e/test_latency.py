"""Latency: what is measured, how often and in which order; never how long it takes."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sparseport.errors import BadInput, UsageError
from sparseport.nls import latency
from sparseport.nls.latency import measure_latency


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
