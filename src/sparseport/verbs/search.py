"""`sparseport search`: choose a sub-network of a trained super-adapter; an interrupted search goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparseport.verbs.making import progress_of, run_verb

NAME = "search"
HELP = "Search the sub-networks of a super-adapter by accuracy, cost and latency; or for the best draft of another one."
EXAMPLE = "sparseport search --config job.yaml --base model --adapter adapter --output found"


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

    def work() -> dict[str, Any]:
        from sparseport.job.search import search_sub_networks

        result = search_sub_networks(
            options.config,
            base=options.base,
            adapter=options.adapter,
            output=options.output,
            sparse_base=options.sparse_base,
            settings=tuple(options.set),
            progress=progress_of(options),
        )
        from sparseport.nls.searching import summary

        return {"output": str(options.output), **summary(result)}

    return run_verb(options, work)
