"""`sparseport evaluate`: accuracy of checkpoints and exported folders on a task, and where two of them differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.progress import Progress

NAME = "evaluate"
HELP = "Measure checkpoints and exported folders on a task; several are compared with the first, item by item."
EXAMPLE = "sparseport evaluate model-int4 out/openvino --task arc-easy --data DIR --limit 200"


def add_evaluate(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="checkpoint or exported folder; one may come twice"
    )
    verb.add_argument(
        "--task",
        required=True,
        help="arc-easy, arc-challenge, openbookqa, piqa, siqa, gsm8k, mawps, svamp or math-data (these need --data), "
        "home-commands, or a JSONL file",
    )
    verb.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets, with mc/ and math/")
    verb.add_argument("--split", choices=["validation", "test"], default="test", help="items to use (default test)")
    verb.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    verb.add_argument(
        "--engine",
        action="append",
        choices=["torch", "openvino", "onnx"],
        help="what computes: once for all paths, or once for each in their order "
        "(default: the runtime that a folder was exported for, torch for a checkpoint)",
    )
    verb.add_argument(
        "--precision",
        choices=["default", "full"],
        default="default",
        help="runtimes as applications get them (default), or in float32 with nothing quantised on the way",
    )
    verb.add_argument(
        "--adapter",
        action="append",
        metavar="FILE",
        help="which adapter of a folder exported with --branches adapter is switched on, or none for the base alone: "
        "once for all paths, or once for each (default: the one that is there)",
    )
    verb.add_argument(
        "--lm-eval-task",
        type=Path,
        metavar="DIR",
        help="write the items as a task of lm-evaluation-harness too, for its own runs of any model on them",
    )
    verb.set_defaults(run=run_evaluate, interrupted="nothing was written")


def run_evaluate(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status.

    Raises:
        UsageError: the options do not fit together.
        EnvironmentProblem: a package that an engine needs is not installed.
    """
    try:
        result = _evaluated(options)
    except ModuleNotFoundError as error:
        fix = "pip install 'sparseport[openvino,onnx,train]'"
        raise EnvironmentProblem("a package is missing", where=error.name, fix=fix) from error
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show_evaluations(result)
    return 0


def _evaluated(options: argparse.Namespace) -> dict[str, Any]:
    engines, adapters = options.engine or [None], options.adapter or [None]
    for name, given in (("--engine", engines), ("--adapter", adapters)):
        if len(given) not in (1, len(options.paths)):
            raise UsageError(
                f"{name} is given once for all paths, or once for each", expected=len(options.paths), found=len(given)
            )
    # After the options were checked: this loads torch.
    from sparseport.integrations.lm_eval import write_task
    from sparseport.nls.evaluation import adapter_for, compare, engine_of, evaluate
    from sparseport.nls.tasks import load_task

    count = len(options.paths)
    asked = list(zip(options.paths, engines * count, adapters * count, strict=False))
    engines_found = [engine_of(path, engine) for path, engine, _ in asked]
    task = load_task(options.task, options.data)
    for (path, _, adapter), engine in zip(asked, engines_found, strict=True):
        adapter_for(path, task, engine, adapter)  # every path is looked at before the first is run
    if options.lm_eval_task is not None:
        write_task(task, options.lm_eval_task, options.split, options.limit)
    progress = Progress("quiet" if options.quiet else "auto")
    runs = [
        evaluate(
            path,
            task,
            split=options.split,
            limit=options.limit,
            engine=engine,
            precision=options.precision,
            adapter=adapter,
            progress=progress,
        )
        for path, engine, adapter in asked
    ]
    return {"runs": [run.as_dict() for run in runs], "agreement": compare(runs)}


def show_evaluations(result: dict[str, Any]) -> None:
    """Print the metrics of each run, and how the others agree with the first."""
    from rich.console import Console
    from rich.table import Table

    from sparseport.show import printable

    console = Console(emoji=False)
    runs = result["runs"]
    first = runs[0]
    metrics = list(first["metrics"])
    table = Table(
        "model",
        "engine",
        *metrics,
        title=f"task {printable(first['task'])}, {first['items']} items of {first['split']}",
        title_justify="left",
    )
    for run in runs:
        engine = run["engine"] + (" (full precision)" if run["precision"] == "full" else "")
        table.add_row(_name(run), engine, *(_share(run["metrics"][name]) for name in metrics))
    console.print(table)
    for run in runs:
        if run["truncated"]:
            console.print(f"{_name(run)}: {run['truncated']} prompts lost their beginning")
    for pair in result["agreement"]:
        for name, found in pair["metrics"].items():
            difference = found["max_loglikelihood_difference"]
            console.print(
                f"{_name(pair['second'])} ({pair['second']['engine']}) against the first, {name}: "
                f"{found['same']:.1%} equal answers, {found['lost']} lost, {found['gained']} gained, "
                f"McNemar p {found['p_value']:.2g}"
                + ("" if difference is None else f", log-likelihoods differ by at most {difference:.2g}"),
                soft_wrap=True,
            )


def _name(run: dict[str, Any]) -> str:
    """The path, and the adapter that was switched on."""
    from sparseport.show import printable

    return printable(run["path"] if run["adapter"] is None else f"{run['path']} with {run['adapter']}")


def _share(metric: dict[str, float | None]) -> str:
    error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.1%}"
    return f"{metric['value']:.1%}{error}"
