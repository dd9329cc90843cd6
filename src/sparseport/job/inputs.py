"""The folders that a job makes before it exports: base, sparse base, INT4 base, super-adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseport.job.base_model import make_base
from sparseport.job.steps import Steps, task_facts
from sparseport.progress import Progress
from sparseport.recipe import Job
from sparseport.training_recipe import FinetuneRecipe


@dataclass(frozen=True)
class Inputs:
    """What a job has made so far."""

    base: Path
    sparse: Path | None = None
    int4: Path | None = None
    adapter: Path | None = None

    @property
    def floating(self) -> Path:
        """The floating-point model that comes next to training: pruned, if there was pruning."""
        return self.sparse or self.base


def make_inputs(
    job: Job, steps: Steps, work_dir: Path, progress: Progress, *, base: Path | None = None, wheel: Path | None = None
) -> Inputs:
    """Make every folder that a job has a section for, or keep it from an earlier run.

    Args:
        job: the recipe file.
        steps: which are done.
        work_dir: folder of all of them.
        progress: where to report.
        base: folder of the base model, in place of the job's `model` section.
        wheel: the model's wheel, if it is on disk already.
    """
    # Pruning and quantisation calibrate on the task's sentences.
    task = [] if job.finetune is None else [task_facts(job.finetune.task, job.finetune.data)]
    if base is None:
        model = job.model
        assert model is not None
        base = steps.folder("base", [model], lambda out: make_base(model, out, work_dir / "downloads", wheel, progress))
        require_space(job, base)
    made = Inputs(base)
    if job.sparsify is not None:
        first = made
        sparse = steps.folder("sparse", [job.sparsify, *task], lambda out: _sparse(job, first, out, progress))
        made = replace(made, sparse=sparse)
    if job.quantize is not None:
        second = made
        int4 = steps.folder("int4", [job.quantize, *task], lambda out: _int4(job, second, out, progress))
        made = replace(made, int4=int4)
    if job.finetune is not None:
        finetune, third = job.finetune, made
        adapter = steps.folder("adapter", [finetune, *task], lambda out: _adapter(finetune, third, out, progress))
        made = replace(made, adapter=adapter)
    return made


def require_space(job: Job, base: Path) -> None:
    """Refuse modules, ranks, widths, heads and blocks that the model does not have, before hours of work.

    Raises:
        BadInput, Unsupported: see `search_space`.
    """
    if job.finetune is None:
        return
    from sparseport.nls.load import sketch
    from sparseport.nls.space import adapted_modules, search_space

    shapes = sketch(base)
    adapted_modules(shapes, job.finetune)
    search_space(shapes, job.finetune)


def training_bases(finetune: FinetuneRecipe, made: Inputs) -> tuple[Path, Path | None]:
    """(base that the adapter is trained on, its INT4 form where the method needs both)."""
    if finetune.method == "qa_sparse_peft":
        return made.floating, made.int4
    if finetune.method == "sqft":
        assert made.int4 is not None
        return made.int4, None
    return made.floating, None


def _sparse(job: Job, made: Inputs, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_sparse

    assert job.sparsify is not None
    make_sparse(made.base, job.sparsify, out, progress, _task(job))


def _int4(job: Job, made: Inputs, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_int4

    assert job.quantize is not None
    make_int4(made.floating, job.quantize, out, progress, _task(job))


def _adapter(finetune: FinetuneRecipe, made: Inputs, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_adapter
    from sparseport.nls.tasks import load_task

    base, quantized = training_bases(finetune, made)
    result = make_adapter(base, quantized, finetune, load_task(finetune.task, finetune.data), out, progress)
    progress.note(f"loss {result['first_loss']:.2f} -> {result['last_loss']:.3f}")


def _task(job: Job) -> Any:
    from sparseport.nls.tasks import load_task

    return None if job.finetune is None else load_task(job.finetune.task, job.finetune.data)
