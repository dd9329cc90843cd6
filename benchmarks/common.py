"""What every benchmark shares: the machine's description, the demo's folders, results as JSON and as a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparseport.errors import UsageError
from sparseport.machine import describe, load
from sparseport.recipe import Job, Recipe, load_job

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What a figure depends on, and the load before it was measured; no host name."""
    return {**describe(), "load_before": load()}


def demo_job(work_dir: Path) -> tuple[Job, Recipe]:
    """The demo's job and its export recipe, pointing at a finished demo folder.

    Raises:
        UsageError: the demo has not been run there.
    """
    for name in ("base", "sparse", "int4", "adapter", "openvino"):
        if not (work_dir / name).is_dir():
            raise UsageError("the demo has not been run", where=work_dir / name, fix="run `make demo` first")
    job = load_job(ROOT / "export_configs" / "demo.yaml")
    recipe = job.export.model_copy(
        update={
            "base": work_dir / "int4",
            "sparse_base": work_dir / "sparse",
            "adapter": work_dir / "adapter",
            "output": work_dir / "openvino",
            "overwrite": True,
        }
    )
    return job, recipe


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result as JSON; returns its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def optimum_export(source: Path, output: Path, *options: str) -> list[str]:
    """The command of the stock path: optimum-cli with the same group size as ours."""
    cli = Path(sys.executable).with_name("optimum-cli")
    return [
        str(cli),
        "export",
        "openvino",
        "--model",
        str(source),
        "--task",
        "text-generation-with-past",
        "--weight-format",
        "int4",
        "--group-size",
        "64",
        "--ratio",
        "1.0",
        *options,
        str(output),
    ]


def sparseport() -> str:
    """The command of this environment."""
    return str(Path(sys.executable).with_name("sparseport"))


def run(command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> None:
    """Run a command quietly, in an environment and a folder if they are given; its output is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
