"""`sparseport finetune`: train a super-adapter, in one process or in those that `accelerate launch` starts."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sparseport.errors import UsageError
from sparseport.verbs.making import add_common, add_task, output_folder, progress_of, require_folders, run_verb

NAME = "finetune"
HELP = (
    "Fine-tune low-rank adapters, with or without neural low-rank adapter search (NLS). Several processes: accelerate "
    "launch -m sparseport finetune ..."
)
EXAMPLE = "sparseport finetune --base sparse-int4 --sparse-base sparse --task arc-easy --data DIR --output adapter"
_METHODS = ["lora", "shears", "sqft", "sparse_peft", "qa_sparse_peft", "lonas"]


def add_finetune(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    add_common(verb, "folder of the model to tune: dense (lora, lonas), sparse (shears, sparse_peft) or INT4")
    verb.add_argument("--sparse-base", type=Path, help="sparse model that the INT4 base was made from (qa_sparse_peft)")
    verb.add_argument("--method", choices=_METHODS, help="default qa_sparse_peft")
    verb.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default 100)")
    add_task(verb, "what to train on")
    verb.set_defaults(run=run_finetune, interrupted="no half-written output was left")


def run_finetune(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status.

    Raises:
        UsageError: a base is missing, or given to a method that does not take it.
    """
    from sparseport.recipe import FinetuneRecipe, load_section

    given = {
        name: str(value) if isinstance(value, Path) else value
        for name in ("method", "steps", "task", "data")
        if (value := getattr(options, name)) is not None
    }
    recipe = load_section(FinetuneRecipe, options.config, given, tuple(options.set))
    require_folders(base=options.base, sparse_base=options.sparse_base, data=recipe.data)
    both = recipe.method == "qa_sparse_peft"
    if both != (options.sparse_base is not None):
        raise UsageError(
            "qa_sparse_peft needs the sparse base beside the INT4 one" if both else "only qa_sparse_peft has two bases",
            where="--sparse-base",
            found=f"--method {recipe.method}",
            fix="give --sparse-base DIR" if both else "give the model to tune as --base, and no --sparse-base",
        )

    def work() -> dict[str, Any] | None:
        from sparseport.nls.steps import make_adapter
        from sparseport.nls.tasks import load_task
        from sparseport.nls.team import team_of

        task = load_task(recipe.task, recipe.data)
        team = team_of(recipe.precision)
        base, quantized = (options.sparse_base, options.base) if both else (options.base, None)
        writing = output_folder(options, NAME, recipe) if team.main else nullcontext(options.output)
        with writing as stage:
            made = make_adapter(base, quantized, recipe, task, stage, progress_of(options, team.main), team)
        return {"output": str(options.output), "method": recipe.method, **made} if team.main else None

    return run_verb(options, work)
