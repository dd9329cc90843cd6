"""`sparseport sparsify`: prune a model in one shot."""

from __future__ import annotations

import argparse
from typing import Any

from sparseport.verbs.making import add_common, add_task, output_folder, progress_of, require_folders, run_verb

NAME = "sparsify"
HELP = "Prune a floating-point model: Wanda, magnitude, or a metric of yours; unstructured, 2:4 or 4:8."
EXAMPLE = "sparseport sparsify --base model --sparsity 0.5 --output sparse"


def add_sparsify(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    add_common(verb, "folder of the dense model, with its tokenizer")
    verb.add_argument("--sparsity", type=float, help="share of weights to prune in each row (default 0.5)")
    verb.add_argument("--pattern", choices=["unstructured", "2:4", "4:8"], help="default unstructured")
    verb.add_argument("--metric", help="wanda (default), magnitude, or package.module:function")
    add_task(verb, "its prompts are calibrated on too")
    verb.set_defaults(run=run_sparsify, interrupted="no half-written output was left")


def run_sparsify(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    from sparseport.recipe import SparsifyRecipe, load_section

    given = {name: value for name in ("sparsity", "pattern", "metric") if (value := getattr(options, name)) is not None}
    recipe = load_section(SparsifyRecipe, options.config, given, tuple(options.set))
    require_folders(base=options.base, data=options.data)

    def work() -> dict[str, Any]:
        from sparseport.nls.artifacts import dense_sparsity
        from sparseport.nls.steps import make_sparse
        from sparseport.nls.tasks import load_task

        task = load_task(options.task, options.data) if options.task else None
        with output_folder(options, NAME, recipe) as stage:
            make_sparse(options.base, recipe, stage, progress_of(options), task)
            share = dense_sparsity(stage)
        return {"output": str(options.output), "metric": recipe.metric, "pattern": recipe.pattern, "zeros": share}

    return run_verb(options, work)
