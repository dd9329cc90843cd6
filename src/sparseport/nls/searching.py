"""Search over a trained super-adapter's folder: journal, result, picture, and the sub-network for the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseport.checkpoints.json_files import write_json
from sparseport.errors import BadInput
from sparseport.nls.search.front import SearchResult, write_result
from sparseport.nls.search.heuristics import FILE_NAME as RECORD
from sparseport.nls.search.heuristics import read_training_record
from sparseport.nls.search.run import search
from sparseport.nls.sub_networks import SubNetworkEvaluator
from sparseport.progress import Progress

RESULT, CHOSEN, PICTURES = "search.json", "sub_adapter.json", ("front.svg", "front.png")


def make_search(setup: SubNetworkEvaluator, journal: Path, out: Path, progress: Progress) -> SearchResult:
    """Search, or go on with a search, and write what it found.

    Files: `search.json` (everything that was evaluated, and the front), `front.svg` and `front.png` where there is a
    cost beside the accuracy, and `sub_adapter.json`, the chosen sizes for `export --sub-adapter`.

    Args:
        setup: super-network, task, recipe.
        journal: file of the evaluations; made, or continued.
        out: folder to fill.
        progress: where to report.

    Raises:
        BadInput: no sub-network is accurate enough; the journal keeps everything.
        SparseportError: see `search`.
    """
    space = setup.space()
    record_file = setup.adapter / RECORD
    record = read_training_record(record_file, space.groups) if record_file.is_file() else None
    result = search(
        space.groups,
        setup,
        setup.search,
        journal,
        evaluation_digest=setup.digest(),
        record=record,
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
