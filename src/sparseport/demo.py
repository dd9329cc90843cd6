"""The whole job on a small real model, from a GGUF file to a proven OpenVINO folder that answers.

Every step writes a folder that the next step reads, in the file formats of the reference code; a step whose recipe did
not change is not repeated, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import UsageError
from sparseport.job.inputs import make_inputs
from sparseport.job.steps import MARKER, Steps, hide_library_bars, task_facts
from sparseport.nls.artifacts import dense_sparsity
from sparseport.progress import Progress
from sparseport.recipe import Job, Recipe, load_job
from sparseport.verify.certificate import FILE_NAME as CERTIFICATE
from sparseport.verify.certificate import Certificate

DEFAULT_JOB = Path("export_configs") / "demo.yaml"

_MARKERS = {**dict.fromkeys(("base", "sparse", "int4", "adapter"), MARKER), "openvino": CERTIFICATE}


def run_demo(
    job_file: Path | None,
    work_dir: Path,
    settings: tuple[str, ...] = (),
    progress: Progress | None = None,
    *,
    wheel: Path | None = None,
) -> dict[str, Any]:
    """Run every step of a job and return its closing table and what verification found (see `require_verified`).

    Args:
        job_file: recipe with model, sparsify, quantize, finetune and export; None for the repository's demo.
        work_dir: folder for everything the job makes.
        settings: `key=value` overrides.
        progress: where to report steps.
        wheel: the model's wheel, if it is on disk already.

    Raises:
        OutputExists: `work_dir` holds something under a step's name that the demo did not make; it is left alone.
        SparseportError: any of its subclasses; finished steps are kept for the next run.
    """
    progress = progress or Progress("quiet")
    job = load_job(job_file or _default_job(), settings)
    if job.model is None or job.sparsify is None or job.quantize is None or job.finetune is None:
        raise UsageError("the demo needs a job with model, sparsify, quantize and finetune sections", where=job_file)
    finetune = job.finetune
    steps = Steps(work_dir, _MARKERS, progress)
    steps.require_own()
    hide_library_bars()
    started = time.monotonic()
    made = make_inputs(job, steps, work_dir, progress, wheel=wheel)
    task = task_facts(finetune.task)
    recipe = job.export.model_copy(
        update={
            "base": made.int4,
            "sparse_base": made.sparse,
            "adapter": made.adapter,
            "output": work_dir / "openvino",
            "overwrite": True,
        }
    )
    exported = steps.folder("openvino", [job.export], lambda out: _export(recipe, out, progress), staged=False)
    measured = steps.values("measure", [finetune, task], lambda: _measure(job, made.base, recipe, exported, progress))

    from sparseport.verify.folder import verify

    with progress.task("verifying"):
        verdict = verify(exported)
    return {
        **measured,
        "folder": str(exported),
        "differences": verdict.differences,
        "verify": verdict.as_dict(),
        "seconds": round(time.monotonic() - started, 1),
        "steps_seconds": steps.seconds,
    }


def require_verified(result: dict[str, Any]) -> None:
    """Raise if the folder of a finished demo is not what its certificate says.

    Args:
        result: what `run_demo` returned.

    Raises:
        VerificationError: lists the first differences.
    """
    from sparseport.verify.folder import Verdict, require

    found = result["verify"]
    require(Verdict(Path(result["folder"]), found["files"], found["linears"], found["tensors"], found["differences"]))


def _export(recipe: Recipe, out: Path, progress: Progress) -> None:
    from sparseport.pipeline import export

    export(recipe.model_copy(update={"output": out}), progress)


def _measure(job: Job, base: Path, recipe: Recipe, exported: Path, progress: Progress) -> dict[str, Any]:
    """Accuracy, on the test split, and sparsity of base, INT4 base, merged model in torch and exported folder."""
    from transformers import AutoTokenizer

    from sparseport.nls.evaluate import accuracy, answers_openvino, answers_torch
    from sparseport.nls.load import load_dense, load_int4
    from sparseport.nls.reference import code_differences, load_merged
    from sparseport.nls.tasks import load_task

    assert job.finetune is not None and recipe.sparse_base is not None
    task = load_task(job.finetune.task, job.finetune.data)
    items = task.test[: job.finetune.test_items]
    tokenizer = AutoTokenizer.from_pretrained(base)
    merged_sparsity = certified_sparsity(Certificate.read(exported).totals)
    table = []
    answers: dict[str, list[str]] = {}
    for label, load, folder, share in (
        ("base, 16 bit, torch", lambda: load_dense(base), base, dense_sparsity(base)),
        ("sparse INT4 base, torch", lambda: load_int4(recipe.base), recipe.base, int4_sparsity(recipe)),
        ("fine-tuned and merged, torch", lambda: load_merged(recipe), None, merged_sparsity),
    ):
        model = load()
        with progress.task(f"answering: {label}", len(items)) as step:
            answers[label] = answers_torch(model, tokenizer, items, step)
        del model
        table.append(_row(label, accuracy(answers[label], items), folder, share))
    label = "exported, OpenVINO GenAI"
    with progress.task(f"answering: {label}", len(items)) as step:
        answers[label] = answers_openvino(exported, items, step)
    table.append(_row(label, accuracy(answers[label], items), exported, merged_sparsity))
    with progress.task("counting codes"):
        differences = code_differences(recipe, job.finetune)
    tuned = answers["fine-tuned and merged, torch"]
    return {
        "task": task.name,
        "items": len(items),
        "table": table,
        "code_differences": differences,
        "same_answers": sum(a == b for a, b in zip(tuned, answers[label], strict=True)),
        "example": {"prompt": items[0].prompt, "answer": answers[label][0], "wanted": items[0].answer},
    }


def int4_sparsity(recipe: Recipe) -> float:
    """Share of the INT4 base's weights that the sparse base prunes and that are exactly zero.

    A kept weight that rounds to zero does not count, so that the figure compares with a mask's.
    """
    from sparseport.sources import open_sources
    from sparseport.weights.mask import revived

    zeros = total = 0
    with open_sources(recipe.model_copy(update={"adapter": None, "sub_adapter": "maximal"})) as sources:
        for module in sources.base.linear_names():
            if sources.format_of(module).quantized:
                mask = sources.sparse_dense(module).mask
                assert mask is not None
                zeros += int(np.count_nonzero(~mask)) - revived(sources.quantized(module), mask)
                total += mask.size
    return zeros / total


def certified_sparsity(totals: dict[str, Any]) -> float:
    """Share of pruned weights that are exactly zero among those that a mask covers, from a certificate's totals."""
    return (totals["pruned"] - totals["revived"]) / totals["masked_weights"] if totals["masked_weights"] else 0.0


def _row(label: str, share: float, folder: Path | None, sparsity: float) -> dict[str, str]:
    size = (
        ""
        if folder is None
        else f"{sum(p.stat().st_size for p in folder.iterdir() if p.suffix in ('.bin', '.safetensors')) >> 20} MiB"
    )
    return {"model": label, "accuracy": f"{share:.1%}", "size": size, "sparsity": f"{sparsity:.1%}"}


def _default_job() -> Path:
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / DEFAULT_JOB).is_file():
            return root / DEFAULT_JOB
    raise UsageError("no demo recipe found", where=DEFAULT_JOB, fix="run from the repository, or give --config FILE")
