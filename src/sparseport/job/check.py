"""Sections of a job that do not fit each other, found before any work."""

from __future__ import annotations

from pathlib import Path

from sparseport.errors import UsageError
from sparseport.extras import require_packages
from sparseport.recipe import Job

SEARCHED = "searched"
# Methods that train on the INT4 base, alone or beside the sparse one; and whose adapter is never merged.
_ON_INT4 = ("sqft", "qa_sparse_peft")
_ON_SPARSE = ("shears", "sparse_peft", "qa_sparse_peft")
_UNMERGED = ("shears", "sqft")
_MASKED = ("sparse_peft", "qa_sparse_peft")


def check_job(job: Job, job_file: Path, base: Path | None) -> None:
    """Refuse sections that do not fit each other, and packages and tasks that a later step would miss.

    Raises:
        BadInput: the task's files are missing or damaged.
        UsageError: names what is missing or too much.
        EnvironmentProblem: a package is not installed.
    """
    if base is not None and not base.is_dir():
        raise UsageError("--base is no folder", where=base)
    _check_sections(job, job_file, base)
    _check_adapter(job, job_file)
    extras: list[str] = list(job.export.target)
    if job.search is not None:
        extras += ["search"] if len(job.search.objectives) > 1 or "nsga" in job.search.strategy else []
        extras += ["distributed"] if job.search.backend == "ray" else []
    require_packages(extras)
    _check_task(job, job_file)


def _check_sections(job: Job, job_file: Path, base: Path | None) -> None:
    method = None if job.finetune is None else job.finetune.method
    needed = {
        "model": base is None and job.model is None,
        "sparsify": method in _ON_SPARSE and job.sparsify is None,
        "quantize": method in _ON_INT4 and job.quantize is None,
        "finetune": job.search is not None and job.finetune is None,
        "search": SEARCHED in (job.export.sub_adapter, job.export.draft) and job.search is None,
    }
    for section, missing in needed.items():
        if missing:
            raise UsageError(
                f"the job needs a section {section!r}",
                where=job_file,
                found=f"finetune.method {method}" if method else None,
                fix="give --base DIR" if section == "model" else f"add {section} to the file",
            )
    if job.search is not None:
        wanted, other = ("draft", "sub_adapter") if job.search.drafts else ("sub_adapter", "draft")
        if getattr(job.export, other) == SEARCHED:
            raise UsageError(
                f"a search by {job.search.objectives[0]} does not choose export.{other}",
                where=job_file,
                found=f"export.{other}: {SEARCHED}",
                fix=f"set export.{wanted} to {SEARCHED}, or change search.objectives",
            )
    unused = {
        "INT4": job.quantize is not None and method not in (None, *_ON_INT4),
        "sparse": job.sparsify is not None and method in ("lora", "lonas"),
    }
    for kind, wrong in unused.items():
        if wrong:
            raise UsageError(
                f"{method} is not trained on the {kind} base, so nothing would use the {kind} one",
                where=job_file,
                fix=f"leave the section {'quantize' if kind == 'INT4' else 'sparsify'} away, or choose another method",
            )


def _check_adapter(job: Job, job_file: Path) -> None:
    if job.finetune is None:
        return
    method, branches = job.finetune.method, job.export.branches
    if method in _UNMERGED and branches == "refuse":
        raise UsageError(
            f"an adapter of {method} cannot be merged",
            where=job_file,
            found="export.branches refuse",
            expected="graph or adapter",
            fix="set export.branches to graph",
        )
    if method in _MASKED and branches != "refuse":
        raise UsageError(
            f"an adapter of {method} is merged",
            where=job_file,
            found=f"export.branches {branches}",
            fix="leave export.branches away",
        )
    parts = (job.export.sub_adapter, job.export.draft)
    if not job.finetune.nls and (job.search is not None or any(one not in (None, "maximal") for one in parts)):
        raise UsageError(
            "without NLS there is no search space to choose from",
            where=job_file,
            found="a search section" if job.search is not None else f"export.sub_adapter {job.export.sub_adapter}",
            fix="set finetune.nls to true, or leave search, export.sub_adapter and export.draft away",
        )


def _check_task(job: Job, job_file: Path) -> None:
    if job.finetune is None:
        return
    from sparseport.nls.scoring import check_metric
    from sparseport.nls.tasks import load_task

    task = load_task(job.finetune.task, job.finetune.data)
    for split in ("train", "test"):
        task.examples(split)
    if job.search is not None:
        task.examples(job.search.split)
        check_metric(task, job.search)
    if job.export.branches == "adapter" and "openvino" in job.export.target and task.by_choice:
        raise UsageError(
            "OpenVINO switches adapters in its generation library only, which cannot score the choices of this task",
            where=job_file,
            found="export.branches adapter",
            fix="set export.branches to graph, or export to onnx",
        )
