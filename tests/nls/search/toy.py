"""A search space and evaluators for the tests: separable, so that the truth is known; processes can import them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparseport.checkpoints.elastic import ElasticGroup
from sparseport.errors import FidelityError
from sparseport.nls.search.candidates import Candidate
from sparseport.nls.search.objectives import OBJECTIVES, Evaluation

GROUPS = (
    ElasticGroup(("layers.0.q_proj", "layers.0.k_proj"), (32, 24, 16)),
    ElasticGroup(("layers.1.q_proj",), (32, 24, 16)),
    ElasticGroup(("layers.0.mlp",), (64, 48, 32, 16), "width"),
    ElasticGroup(("layers.1",), (1, 0), "block"),
)
SIZES = [group.sizes for group in GROUPS]
OBJECTIVE_PAIR = (OBJECTIVES["accuracy"], OBJECTIVES["macs"])
# Accuracy and cost of each size; the accuracy is not monotone, so that the largest sub-network is not the best.
GAIN = (
    {32: 0.20, 24: 0.22, 16: 0.10},
    {32: 0.15, 24: 0.10, 16: 0.14},
    {64: 0.25, 48: 0.24, 32: 0.20, 16: 0.02},
    {1: 0.30, 0: 0.05},
)
PRICE = (1.0, 1.0, 2.0, 300.0)


def everything() -> list[Candidate]:
    """All sub-networks of the space, 72."""
    return list(itertools.product(*SIZES))


def values_of(candidate: Candidate) -> dict[str, float]:
    """The truth about a sub-network."""
    return {
        "accuracy": sum(gain[size] for gain, size in zip(GAIN, candidate, strict=True)),
        "macs": sum(price * size for price, size in zip(PRICE, candidate, strict=True)),
    }


def evaluation_of(candidate: Candidate) -> Evaluation:
    """The evaluation that every worker would return."""
    return Evaluation(candidate, values_of(candidate))


def evaluate(candidates: list[Candidate]) -> list[Evaluation]:
    """What a strategy gets for its questions."""
    return [evaluation_of(candidate) for candidate in candidates]


@dataclass(frozen=True)
class Maker:
    """Makes an evaluator that leaves traces and fails on demand.

    folder      gets a file per evaluator made (pid) and a line per evaluation
    kill_once   the process that evaluates this sub-network is killed, the first time
    kill_always the same, every time
    fail        this sub-network raises an error of ours
    break_on    this one raises something else
    sleep_on    this one takes ten minutes
    """

    folder: Path
    kill_once: Candidate | None = None
    kill_always: Candidate | None = None
    fail: Candidate | None = None
    break_on: Candidate | None = None
    sleep_on: Candidate | None = None

    def __call__(self) -> ToyEvaluator:
        with (self.folder / "made").open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return ToyEvaluator(self)

    def made(self) -> list[int]:
        """Process ids of the evaluators that were made."""
        path = self.folder / "made"
        return [int(line) for line in path.read_text(encoding="utf-8").split()] if path.exists() else []

    def asked(self) -> list[Candidate]:
        """Sub-networks in the order in which their evaluations began."""
        path = self.folder / "asked"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [tuple(map(int, line.split(","))) for line in lines]


@dataclass(frozen=True)
class ToyEvaluator:
    """The evaluator that `Maker` makes."""

    maker: Maker

    def __call__(self, candidate: Candidate) -> Mapping[str, float]:
        with (self.maker.folder / "asked").open("a", encoding="utf-8") as file:
            file.write(",".join(map(str, candidate)) + "\n")
        if candidate == self.maker.kill_always:
            os.kill(os.getpid(), signal.SIGKILL)
        marker = self.maker.folder / "killed"
        if candidate == self.maker.kill_once and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if candidate == self.maker.sleep_on:
            time.sleep(600)
        if candidate == self.maker.fail:
            raise FidelityError("the codes differ", where="layers.0", found=3, fix="look closer", code="E_TOY")
        if candidate == self.maker.break_on:
            raise ZeroDivisionError("one over nothing\nand more")
        return values_of(candidate)
