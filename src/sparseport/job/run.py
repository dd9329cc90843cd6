"""A job from its recipe file: base, pruning, quantisation, fine-tuning, search, export, proof, measurement.

Which steps there are is decided by the sections of the file; each takes what the step before it made.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sparseport.errors import BadInput
from sparseport.job.check import SEARCHED, check_job
from sparseport.job.inputs import Inputs, make_inputs, require_space, training_bases
from sparseport.job.steps import MARKER, Steps, hide_library_bars
from sparseport.progress import Progress
from sparseport.recipe import Job, Recipe, load_job

EXPORTED = "exported"


def run_job(
    job_file: Path | str,
    work_dir: Path | str,
    settings: tuple[str, ...] = (),
    progress: Progress | None = None,
    *,
    base: Path | str | None = None,
    wheel: Path | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Run every step that a job's file has a section for, and verify what was exported.

    Args:
        job_file: the recipe file; `base` and `output` of its export section are filled in.
        work_dir: folder for everything the job makes; finished steps are kept for the next run.
        settings: `key=value` overrides.
        progress: where to report steps; quiet by default.
        base: folder of the base model, in place of the file's `model` section.
        wheel: the model's wheel, if it is on disk already.
        measure: whether accuracy is measured, where there is a task.

    Returns:
        `folder`, `exports` (per target the verdict), `search` and `measured` where there are such steps, seconds.

    Raises:
        UsageError: sections that do not fit each other.
        SparseportError: any of its subclasses; finished steps are kept.
    """
    progress = progress or Progress("quiet")
    job_file, work_dir = Path(job_file), Path(work_dir)
    base = None if base is None else Path(base)
    job = _load(job_file, work_dir, settings)
    check_job(job, job_file, base)
    if base is not None:
        require_space(job, base)
    steps = Steps(work_dir, _markers(job), progress, given="" if base is None else _digest(base))
    steps.require_own()
    hide_library_bars()
    started = time.monotonic()
    made = make_inputs(job, steps, work_dir, progress, base=base, wheel=wheel)
    recipe = _export_recipe(job, made, work_dir)
    found: dict[str, Any] = {}
    if job.search is not None:
        chosen, found["search"] = _search(job, made, recipe, steps, work_dir, progress)
        recipe = _with_searched(recipe, str(chosen))
    folder = steps.folder(EXPORTED, [job.export], lambda out: _export(recipe, out, progress), staged=False)
    if job.finetune is not None and measure:
        found["measured"] = steps.values(
            "measure", [job.finetune.test_items], lambda: _measure(job, made, recipe, folder, progress)
        )
    return {
        "folder": str(folder),
        "exports": _verified(folder, progress),
        **found,
        "seconds": round(time.monotonic() - started, 1),
        "steps_seconds": steps.seconds,
    }


def finished_recipe(
    job_file: Path, work_dir: Path, settings: tuple[str, ...] = (), *, base: Path | None = None
) -> Recipe:
    """The export recipe of a job that has run: other sub-networks of its super-adapter can be exported with it.

    Raises:
        BadInput: the file is no job.
    """
    job = _load(job_file, work_dir, settings)
    made = {
        name: work_dir / name if section is not None else None
        for name, section in (("sparse", job.sparsify), ("int4", job.quantize), ("adapter", job.finetune))
    }
    recipe = _export_recipe(job, Inputs(base or work_dir / "base", **made), work_dir)
    from sparseport.nls.searching import CHOSEN

    return _with_searched(recipe, str(work_dir / "search" / CHOSEN))


def _with_searched(recipe: Recipe, chosen: str) -> Recipe:
    """The recipe with what a search chose, in the place that asks for it."""
    asking = [name for name in ("sub_adapter", "draft") if getattr(recipe, name) == SEARCHED]
    return recipe.model_copy(update=dict.fromkeys(asking, chosen))


def _load(job_file: Path, work_dir: Path, settings: tuple[str, ...]) -> Job:
    # What the job will make; the sections are checked together with it.
    filled = {"base": "base", "adapter": "adapter", "output": str(work_dir / EXPORTED), "overwrite": True}
    return load_job(job_file, settings, export=filled)


def _digest(base: Path) -> str:
    """What a base that was given holds: every step after it depends on it."""
    from sparseport.checkpoints.folder import ModelFolder

    with ModelFolder.open(base) as folder:
        return repr(sorted(folder.sha256().items()))


def _markers(job: Job) -> dict[str, str]:
    made = {"base": job.model, "sparse": job.sparsify, "int4": job.quantize, "adapter": job.finetune}
    markers = {name: MARKER for name, section in {**made, "search": job.search}.items() if section is not None}
    certificate = "sparseport.json"
    return {**markers, EXPORTED: f"{job.export.target[0]}/{certificate}" if job.export.several else certificate}


def _export_recipe(job: Job, made: Inputs, work_dir: Path) -> Recipe:
    """The export section with the folders that the job made."""
    quantized = made.int4 is not None
    return job.export.model_copy(
        update={
            "base": made.int4 or made.floating,
            "sparse_base": made.sparse if quantized else None,
            "adapter": made.adapter,
            "output": work_dir / EXPORTED,
            "overwrite": True,
        }
    )


def _export(recipe: Recipe, out: Path, progress: Progress) -> None:
    from sparseport.pipeline import export

    export(recipe.model_copy(update={"output": out}), progress)


def _search(
    job: Job, made: Inputs, recipe: Recipe, steps: Steps, work_dir: Path, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    from sparseport.nls.search.front import read_result
    from sparseport.nls.searching import CHOSEN, RESULT, journal_name, make_search, summary
    from sparseport.nls.sub_networks import SubNetworkEvaluator

    assert job.finetune is not None and job.search is not None and made.adapter is not None
    base, quantized = training_bases(job.finetune, made)
    plain = _with_searched(recipe, "maximal").model_copy(update={"target": recipe.target[:1]})
    setup = SubNetworkEvaluator(base, quantized, made.adapter, job.finetune, job.search, plain)
    # Other settings are another search; its journal does not stand in the way of this one.
    journal = work_dir / journal_name(setup)

    def write(out: Path) -> None:
        make_search(setup, journal, out, progress)

    folder = steps.folder("search", [job.search, job.export], write)
    return folder / CHOSEN, summary(read_result(folder / RESULT))


def _measure(job: Job, made: Inputs, recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Accuracy on the test split, of the base and of each exported folder, and how far folders agree with torch.

    A draft's accuracy does not matter: only what the main network would say itself is heard of it. Torch runs the
    weights that were read back from the first folder.
    """
    from sparseport.layout import DRAFTS
    from sparseport.nls.evaluation import compare, evaluate
    from sparseport.nls.tasks import load_task
    from sparseport.verify.certificate import exported_folders

    assert job.finetune is not None
    task = load_task(job.finetune.task, job.finetune.data)
    limit = job.finetune.test_items
    folders = [one for one in exported_folders(folder) if one.name not in DRAFTS]
    runs = [evaluate(folders[0], task, limit=limit, engine="torch", progress=progress)]
    runs += [evaluate(one, task, limit=limit, progress=progress) for one in folders]
    before = evaluate(made.base, task, limit=limit, progress=progress)
    return {
        "task": task.name,
        "items": len(next(iter(runs[0].outcome.right.values()))),
        "base": before.outcome.metrics(),
        "torch": runs[0].outcome.metrics(),
        **{run.engine: run.outcome.metrics() for run in runs[1:]},
        "agreement": compare(runs),
    }


def _verified(folder: Path, progress: Progress) -> dict[str, Any]:
    from sparseport.verify.certificate import exported_folders
    from sparseport.verify.folder import require_all, verify
    from sparseport.verify.pairs import differences_between

    with progress.task("verifying"):
        folders = exported_folders(folder)
        verdicts = [verify(one) for one in folders]
    unequal = differences_between(verdicts)
    require_all(verdicts, unequal)
    if not verdicts:
        raise BadInput("nothing was exported", where=folder)
    return {one.name: verdict.as_dict() for one, verdict in zip(folders, verdicts, strict=True)}
