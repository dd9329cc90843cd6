"""Search over a trained super-adapter's folder: journal, result, picture, and the sub-network for the export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sparseport.checkpoints.elastic import SearchSpace
from sparseport.checkpoints.json_files import write_json
from sparseport.errors import BadInput
from sparseport.extras import require_packages
from sparseport.nls.search.front import SearchResult, write_result
from sparseport.nls.search.heuristics import FILE_NAME as RECORD
from sparseport.nls.search.heuristics import Sample, read_training_record
from sparseport.nls.search.run import identity_of, search
from sparseport.nls.sub_networks import SubNetworkEvaluator
from sparseport.progress import Progress

RESULT, CHOSEN, PICTURES = "search.json", "sub_adapter.json", ("front.svg", "front.png")


def journal_name(setup: SubNetworkEvaluator) -> str:
    """A file name for the journal of a search, the same for searches that go on with one journal.

    It follows what an evaluation depends on, the search space, and what steers the strategy (its settings, its seed,
    the sub-networks that it begins with). It does not follow how long the search goes on, who computes, and what is
    chosen at the end: turns, evaluations, workers, reference_accuracy, accuracy_delta.

    Raises:
        BadInput, UsageError: see `make_search`; nothing is measured.
    """
    setup.check()
    space = setup.space()
    identity = identity_of(
        space.groups, setup.search, evaluation_digest=setup.digest(), record=_record(setup, space)
    ).header()
    return f"search-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}.jsonl"


def make_search(setup: SubNetworkEvaluator, journal: Path, out: Path, progress: Progress) -> SearchResult:
    """Search, or go on with a search, and write what it found.

    Files: `search.json` (everything that was evaluated, and the front), `front.svg` and `front.png` where there is a
    cost beside the accuracy, and `sub_adapter.json`, the chosen sizes for `export --sub-adapter` or `--draft`.

    Args:
        setup: super-network, task, recipe.
        journal: file of the evaluations; made, or continued.
        out: folder to fill.
        progress: where to report.

    Raises:
        BadInput: no sub-network is accurate enough; the journal keeps everything.
        EnvironmentProblem: a package that the search or its picture needs is missing.
        SparseportError: see `SubNetworkEvaluator.check` and `search`.
    """
    if len(setup.search.objectives) > 1:
        require_packages(["search"])  # the picture at the end
    setup.check()
    space = setup.space()
    result = search(
        space.groups,
        setup,
        setup.search,
        journal,
        evaluation_digest=setup.digest(),
        record=_record(setup, space),
        progress=progress,
    )
    if result.chosen is None:
        raise BadInput(
            "no sub-network is accurate enough",
            where=journal,
            found=result.reason,
            fix="lower reference_accuracy or raise accuracy_delta; nothing is measured again",
            code="E_SEARCH",
        )
    write_result(out / RESULT, result)
    write_json(out / CHOSEN, list(result.chosen))
    if len(result.objectives) > 1:
        from sparseport.nls.search.plot import draw

        draw(result, [out / name for name in PICTURES])
    return result


def _record(setup: SubNetworkEvaluator, space: SearchSpace) -> list[Sample] | None:
    file = setup.adapter / RECORD
    return read_training_record(file, space.groups) if file.is_file() else None


def summary(result: SearchResult) -> dict[str, Any]:
    """The result in a few lines: how much was measured, the front's ends, what was chosen and why."""
    named = {
        name: result.of(candidate).values
        for name, candidate in result.seeds.items()
        if any(evaluation.candidate == candidate for evaluation in result.evaluations)
    }
    assert result.chosen is not None
    return {
        "evaluations": len(result.evaluations),
        "front": len(result.front),
        "chosen": result.of(result.chosen).values,
        "reason": result.reason,
        "named": named,
        "seconds": result.seconds,
    }
