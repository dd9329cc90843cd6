"""`sparseport search`: choose a sub-network of a trained super-adapter; an interrupted search goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparseport.errors import UsageError
from sparseport.verbs.making import progress_of, require_folders, run_verb

NAME = "search"
HELP = "Search the sub-networks of a super-adapter by accuracy, cost and latency; or for the best draft of another one."
EXAMPLE = "sparseport search --config job.yaml --base model --adapter adapter --output found"
JOURNAL = "journal.jsonl"


def add_search(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument(
        "--config", type=Path, required=True, help="recipe file with the sections finetune (as trained) and search"
    )
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    verb.add_argument("--base", type=Path, required=True, help="model that the adapter was trained on")
    verb.add_argument("--sparse-base", type=Path, help="sparse model that the INT4 base was made from (qa_sparse_peft)")
    verb.add_argument("--adapter", type=Path, required=True, help="folder of the super-adapter")
    verb.add_argument(
        "--output", type=Path, required=True, help="folder for journal and result; goes on if it is there"
    )
    verb.set_defaults(run=run_search, interrupted="the journal keeps what was measured, and the same command goes on")


def run_search(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status.

    Raises:
        UsageError: a folder is missing, or the recipe has no finetune or search section.
    """
    from sparseport.recipe import load_job

    require_folders(base=options.base, sparse_base=options.sparse_base, adapter=options.adapter)
    inputs = {"base": str(options.base), "output": str(options.output), "adapter": str(options.adapter)}
    if options.sparse_base is not None:
        inputs["sparse_base"] = str(options.sparse_base)
    job = load_job(options.config, tuple(options.set), export=inputs)
    finetune, recipe = job.finetune, job.search
    if finetune is None or recipe is None:
        raise UsageError("the recipe has no section finetune or none named search", where=options.config)
    both = finetune.method == "qa_sparse_peft"
    if both != (options.sparse_base is not None):
        raise UsageError(
            "qa_sparse_peft needs the sparse base beside the INT4 one" if both else "only qa_sparse_peft has two bases",
            where="--sparse-base",
            found=f"finetune.method {finetune.method}",
        )

    def work() -> dict[str, Any]:
        from sparseport.job.check import SEARCHED
        from sparseport.nls.searching import make_search, summary
        from sparseport.nls.sub_networks import SubNetworkEvaluator

        base, quantized = (options.sparse_base, options.base) if both else (options.base, None)
        main = "maximal" if job.export.sub_adapter == SEARCHED else job.export.sub_adapter
        export = job.export.model_copy(update={"sub_adapter": main, "target": job.export.target[:1]})
        setup = SubNetworkEvaluator(base, quantized, options.adapter, finetune, recipe, export)
        setup.check()
        options.output.mkdir(parents=True, exist_ok=True)
        result = make_search(setup, options.output / JOURNAL, options.output, progress_of(options))
        return {"output": str(options.output), **summary(result)}

    return run_verb(options, work)
