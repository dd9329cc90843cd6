"""The training record: which sub-network was active when, and at what loss. Searches take their first guesses from it.

`training_record.jsonl` stands beside the adapter. Its first line says which search space the sizes are of, each
further line is one sub-network that was trained on one microbatch:

    {"space_sha256": "..."}
    {"step": 0, "sizes": [32, 24, 16], "loss": 1.25}

`step` counts sub-networks: it is the optimiser's step where a step has one microbatch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseport.checkpoints.elastic import SearchSpace
from sparseport.nls.search.candidates import space_digest
from sparseport.nls.search.heuristics import FILE_NAME


@dataclass(frozen=True)
class Sample:
    """One sub-network on one microbatch.

    step   number of the sample, from 0
    sizes  a size for each group of the search space; empty without NLS
    loss   mean cross-entropy over the answers' tokens of the microbatch, over all processes
    """

    step: int
    sizes: tuple[int, ...]
    loss: float


def write_training_record(folder: Path, space: SearchSpace, samples: Sequence[Sample]) -> Path:
    """Write the record beside an adapter and return the file."""
    lines: list[dict[str, object]] = [{"space_sha256": space_digest(space.groups)}]
    lines += [{"step": sample.step, "sizes": list(sample.sizes), "loss": sample.loss} for sample in samples]
    path = folder / FILE_NAME
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
