"""`sparseport run`: a whole job from a recipe file, from a base model to a proven folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparseport.verbs.making import progress_of, run_verb

NAME = "run"
HELP = "A whole job from a recipe file: prune, quantise, fine-tune, search, export, prove, measure."
EXAMPLE = "sparseport run export_configs/methods/lonas.yaml --work-dir runs/lonas"


def add_run(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("job", type=Path, help="recipe file; its sections say which steps there are")
    verb.add_argument("--work-dir", type=Path, required=True, help="folder for everything it makes")
    verb.add_argument("--base", type=Path, metavar="DIR", help="base model, in place of the file's model section")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    verb.add_argument("--wheel", type=Path, help="the model's wheel, if it was downloaded before")
    verb.set_defaults(run=run_run, interrupted="finished steps are kept, and the same command goes on from there")


def run_run(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""

    def work() -> dict[str, Any]:
        from sparseport.job.run import run_job

        settings = tuple(options.set)
        return run_job(
            options.job, options.work_dir, settings, progress_of(options), base=options.base, wheel=options.wheel
        )

    return run_verb(options, work)
