"""Guesses that cost no search: from the losses and the samples of the training that made the super-adapter.

The trainer writes into `training_record.jsonl` which search space it trained, and one line per sub-network that it
sampled:

    {"space_sha256": "..."}
    {"step": 0, "sizes": [32, 24, 16], "loss": 1.25}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseport.checkpoints.json_files import parse_json
from sparseport.checkpoints.paths import open_regular
from sparseport.errors import BadInput
from sparseport.nls.search.candidates import Candidate, Group, Sizes, check_candidate, space_digest

FILE_NAME = "training_record.jsonl"
_MAX_BYTES = 1 << 30
_MAX_LINE = 1 << 20
_HEADER = "space_sha256"
_KEYS = {"step", "sizes", "loss"}


@dataclass(frozen=True)
class Sample:
    """One training step: the sub-network that was active, and its loss."""

    candidate: Candidate
    loss: float


def read_training_record(path: Path, groups: Sequence[Group]) -> list[Sample]:
    """The steps of a training run, in their order.

    Raises:
        BadInput: E_RECORD for a record of another search space, and, with the line's number, for a line that is no
            step, a step out of order, or a loss that is not finite; E_ELASTIC for sizes outside the search space;
            E_LIMIT for a file over 1 GiB or a line over 1 MiB; E_MISSING or E_PATH.
    """
    samples: list[Sample] = []
    last = -1
    with open_regular(path) as file:
        number, size = 0, 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            size += len(line)
            where = f"{path}, line {number}"
            if len(line) > _MAX_LINE or size > _MAX_BYTES:
                raise BadInput(
                    "the training record is too large",
                    where=where,
                    expected=f"at most {_MAX_LINE >> 20} MiB a line and {_MAX_BYTES >> 30} GiB in all",
                    code="E_LIMIT",
                )
            entry = parse_json(line, where=where, what="training record", code="E_RECORD")
            if number == 1:
                _check_header(entry, groups, where, line)
                continue
            if not isinstance(entry, dict) or set(entry) != _KEYS or not line.endswith(b"\n"):
                raise _damaged(where, '{"step": ..., "sizes": [...], "loss": ...} and the end of the line', line)
            step, loss = entry["step"], entry["loss"]
            if type(step) is not int or step <= last:
                raise _damaged(where, f"a step after {last}", line)
            if type(loss) not in (int, float):
                raise _damaged(where, "a loss that is a number", line)
            samples.append(Sample(check_candidate(entry["sizes"], groups, where), float(loss)))
            last = step
    if not samples:
        raise BadInput("the training record is empty", where=path, fix="train again", code="E_RECORD")
    return samples


def _check_header(entry: object, groups: Sequence[Group], where: str, line: bytes) -> None:
    if not isinstance(entry, dict) or set(entry) != {_HEADER}:
        raise _damaged(where, f'{{"{_HEADER}": "..."}}', line)
    if entry[_HEADER] != space_digest(groups):
        raise BadInput(
            "the training record is of another search space",
            where=where,
            expected=space_digest(groups),
            found=repr(entry[_HEADER])[:80],
            fix="take record and search space from one training's output folder",
            code="E_RECORD",
        )


def lowest_loss(samples: Iterable[Sample], number: int, *, minimum_samples: int = 1) -> list[Candidate]:
    """The sub-networks with the lowest mean training loss, the lowest first; ties by the larger sizes.

    number           how many; fewer come back where fewer were sampled often enough
    minimum_samples  steps that a sub-network was active in, at least

    Raises:
        BadInput: E_RECORD if no sub-network was sampled often enough.
    """
    losses: dict[Candidate, list[float]] = {}
    for sample in samples:
        losses.setdefault(sample.candidate, []).append(sample.loss)
    means = {c: math.fsum(values) / len(values) for c, values in losses.items() if len(values) >= minimum_samples}
    if not means:
        raise BadInput(
            "no sub-network was sampled often enough in training",
            expected=f"{minimum_samples} samples of one sub-network",
            found=f"at most {max(map(len, losses.values()), default=0)}",
            fix="lower minimum_samples; in a large search space hardly any sub-network comes twice",
            code="E_RECORD",
        )
    order = sorted(means, key=lambda candidate: (means[candidate], tuple(-size for size in candidate)))
    return order[:number]


def most_sampled(samples: Sequence[Sample], sizes: Sizes) -> Candidate:
    """Per group the size that was active most often in training; ties give the larger size.

    The groups are looked at one by one, so the whole need not have been sampled at all.
    """
    return tuple(
        max(group, key=lambda size, n=number, counts=counts: (counts[size], size))  # type: ignore[misc]
        for number, group in enumerate(sizes)
        for counts in [Counter(sample.candidate[number] for sample in samples)]
    )


def _damaged(where: str, expected: str, line: bytes) -> BadInput:
    return BadInput(
        "the training record is damaged",
        where=where,
        expected=expected,
        found=repr(line[:80].decode("utf-8", "replace")),
        fix="train again, or take the file from the training's own output folder",
        code="E_RECORD",
    )
