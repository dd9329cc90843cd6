"""What the verbs that make models have in common: their options, and the folder that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseport import __version__
from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.job.steps import MARKER, hide_library_bars, task_facts
from sparseport.progress import Progress
from sparseport.publish import staged_output

if TYPE_CHECKING:
    from pydantic import BaseModel

# What a job calls the step that a verb does alone.
_OF_JOB = {"sparsify": "sparse", "quantize": "int4", "finetune": "adapter"}


def add_common(verb: argparse.ArgumentParser, base: str) -> None:
    """Options that all of them have; `base` says what --base is."""
    verb.add_argument("--config", type=Path, help="recipe file with a section for this verb; other options override it")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the section")
    verb.add_argument("--base", type=Path, required=True, help=base)
    verb.add_argument("--output", type=Path, required=True, help="folder to write; appears whole or not at all")
    verb.add_argument("--overwrite", action="store_true", help="replace an output that this verb made")


def add_task(verb: argparse.ArgumentParser, what_for: str) -> None:
    """Options that name a task."""
    verb.add_argument("--task", help=f"home-commands, a task of a data set, or a JSONL file: {what_for}")
    verb.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets, for their tasks")


def run_verb(options: argparse.Namespace, work: Callable[[], dict[str, Any] | None]) -> int:
    """Run a verb's work and print what it returns, if it does (one process of a team does).

    Raises:
        EnvironmentProblem: a package of the extra `train` is not installed.
    """
    try:
        hide_library_bars()
        result = work()
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "sparseport":
            raise
        fix = "pip install 'sparseport[train]'"
        raise EnvironmentProblem("a package is missing", where=error.name, fix=fix) from error
    if result is not None:
        print(json.dumps(result, indent=2) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0


def require_folders(**folders: Path | None) -> None:
    """Refuse folders that are not there, before anything heavy is loaded.

    Raises:
        UsageError: names the option.
    """
    for name, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise UsageError(f"--{name.replace('_', '-')} is no folder", where=folder)


@contextmanager
def output_folder(options: argparse.Namespace, step: str, recipe: BaseModel) -> Iterator[Path]:
    """A stage for the output; what it is and the recipe it was made by stand in it. Paths stay out."""
    steps = (step, _OF_JOB.get(step))
    with staged_output(options.output, options.overwrite, ours=lambda folder: made_by(folder) in steps) as stage:
        yield stage
        plain = recipe.model_dump(mode="json", exclude={"data", "calibration"})
        if "task" in plain:
            plain |= task_facts(plain["task"])
        facts = {"made_by": f"sparseport {__version__}", "step": step, "recipe": plain}
        (stage / MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def made_by(folder: Path) -> str | None:
    """The step that made a folder; None if none of ours did."""
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts.get("step") if isinstance(facts, dict) else None


def progress_of(options: argparse.Namespace, main: bool = True) -> Progress:
    """Progress for one process of a team: the main one reports."""
    return Progress("quiet" if options.quiet or not main else "auto")
