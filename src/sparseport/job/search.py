"""A search over the sub-networks of a finished super-adapter, by the sections of a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparseport.errors import UsageError
from sparseport.job.check import SEARCHED
from sparseport.progress import Progress
from sparseport.recipe import load_job

if TYPE_CHECKING:
    from sparseport.nls.search.front import SearchResult

JOURNAL = "journal.jsonl"


def search_sub_networks(
    job_file: Path | str,
    *,
    base: Path | str,
    adapter: Path | str,
    output: Path | str,
    sparse_base: Path | str | None = None,
    settings: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Choose a sub-network of a trained super-adapter, or go on with a search that was stopped.

    Every evaluation is on disk before the next one starts. The chosen sizes stand in `sub_adapter.json` of the output,
    which is what a recipe's `sub_adapter` takes; `search.json` has everything that was measured.

    Args:
        job_file: recipe file with the sections `finetune` (as the adapter was trained) and `search`.
        base: folder of the model that the adapter was trained on.
        adapter: folder of the super-adapter, with its search space.
        output: folder for journal and result; a search whose journal is there goes on.
        sparse_base: the sparse model that the INT4 base was made from, for an adapter of `qa_sparse_peft` and no other.
        settings: `key=value` overrides of the file.
        progress: where to report; quiet by default.

    Returns:
        Everything that was evaluated, the Pareto front, and the choice with its reason.

    Raises:
        UsageError: a section or a folder is missing, or the bases are not those of the method.
        BadInput: the file or the adapter is damaged, the journal is that of another search, or no sub-network is
            accurate enough.
        EnvironmentProblem: a package that the search needs is missing.
    """
    given = {"base": Path(base), "adapter": Path(adapter), "output": Path(output)}
    if sparse_base is not None:
        given["sparse_base"] = Path(sparse_base)
    for name, folder in given.items():
        if name != "output" and not folder.is_dir():
            raise UsageError(f"--{name.replace('_', '-')} is no folder", where=folder)
    job = load_job(Path(job_file), settings, export={name: str(path) for name, path in given.items()})
    finetune, recipe = job.finetune, job.search
    if finetune is None or recipe is None:
        raise UsageError("the recipe has no section finetune or none named search", where=job_file)
    both = finetune.method == "qa_sparse_peft"
    if both != (sparse_base is not None):
        raise UsageError(
            "qa_sparse_peft needs the sparse base beside the INT4 one" if both else "only qa_sparse_peft has two bases",
            where="--sparse-base",
            found=f"finetune.method {finetune.method}",
        )
    # After everything that can be refused at once: these load torch.
    from sparseport.nls.searching import make_search
    from sparseport.nls.sub_networks import SubNetworkEvaluator

    trained_on, quantized = (given["sparse_base"], given["base"]) if both else (given["base"], None)
    main = "maximal" if job.export.sub_adapter == SEARCHED else job.export.sub_adapter
    export = job.export.model_copy(update={"sub_adapter": main, "target": job.export.target[:1]})
    setup = SubNetworkEvaluator(trained_on, quantized, given["adapter"], finetune, recipe, export)
    setup.check()
    given["output"].mkdir(parents=True, exist_ok=True)
    return make_search(setup, given["output"] / JOURNAL, given["output"], progress or Progress("quiet"))
