"""`sparseport quantize`: an INT4 base in which every zero stays zero."""

from __future__ import annotations

import argparse
from typing import Any

from sparseport.verbs.making import add_common, add_task, output_folder, progress_of, require_folders, run_verb

NAME = "quantize"
HELP = "Quantise a sparse or dense model to INT4 (a GPTQ folder); pruned weights stay exactly zero."
EXAMPLE = "sparseport quantize --base sparse --method gptq --group-size 128 --output sparse-int4"


def add_quantize(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    add_common(verb, "folder of the floating-point model, with its tokenizer")
    verb.add_argument("--method", choices=["rtn", "gptq"], help="round to nearest (default), or GPTQ, the mask held")
    verb.add_argument("--group-size", type=int, metavar="N", help="input columns per group (default 64)")
    verb.add_argument("--symmetric", action="store_true", default=None, help="all zero-points 8")
    add_task(verb, "its prompts are calibrated on too (gptq)")
    verb.set_defaults(run=run_quantize, interrupted="no half-written output was left")


def run_quantize(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    from sparseport.recipe import QuantizeRecipe, load_section

    names = ("method", "group_size", "symmetric")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    recipe = load_section(QuantizeRecipe, options.config, given, tuple(options.set))
    require_folders(base=options.base, data=options.data)

    def work() -> dict[str, Any]:
        from sparseport.nls.steps import make_int4
        from sparseport.nls.tasks import load_task

        task = load_task(options.task, options.data) if options.task else None
        with output_folder(options, NAME, recipe) as stage:
            make_int4(options.base, recipe, stage, progress_of(options), task)
        return {"output": str(options.output), "method": recipe.method, "group_size": recipe.group_size}

    return run_verb(options, work)
