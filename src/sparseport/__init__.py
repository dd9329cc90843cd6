"""sparseport: carry sparse and INT4 fine-tuned language models to their runtimes, bit for bit, with proof.

The public names are loaded on first use, so that importing the package stays light. None of them is the name of a
module: whoever imports `sparseport.verify.certificate` puts the package `verify` where a function of that name would
be. So the functions behind the verbs plan (`export --dry-run`), verify and bench are `plan_export`, `verify_export` and
`measure`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseport.bench.rounds import Asked
    from sparseport.bench.run import bench as measure
    from sparseport.bench.sweep import Budget
    from sparseport.bench.sweeping import sweep_folders
    from sparseport.errors import SparseportError
    from sparseport.further import add_adapter
    from sparseport.inspection import Inspection, inspect
    from sparseport.job.run import run_job
    from sparseport.job.search import search_sub_networks
    from sparseport.nls.evaluation import Evaluation, compare, evaluate
    from sparseport.nls.tasks import load_task
    from sparseport.pipeline import ExportResult, export
    from sparseport.pipeline import plan as plan_export
    from sparseport.plan import Plan
    from sparseport.progress import Progress
    from sparseport.recipe import Recipe, make_recipe
    from sparseport.report.make import report as write_report
    from sparseport.transit.pack import pack
    from sparseport.transit.unpack import unpack
    from sparseport.verify.certificate import Certificate
    from sparseport.verify.folder import Verdict
    from sparseport.verify.folder import verify as verify_export

__version__ = "0.1.0.dev0"

# Public name -> module that it comes from, and its name there. docs/api.md is written from it, in this order.
_PUBLIC = {
    "make_recipe": "sparseport.recipe:make_recipe",
    "Recipe": "sparseport.recipe:Recipe",
    "inspect": "sparseport.inspection:inspect",
    "Inspection": "sparseport.inspection:Inspection",
    "plan_export": "sparseport.pipeline:plan",
    "Plan": "sparseport.plan:Plan",
    "export": "sparseport.pipeline:export",
    "ExportResult": "sparseport.pipeline:ExportResult",
    "add_adapter": "sparseport.further:add_adapter",
    "verify_export": "sparseport.verify.folder:verify",
    "Verdict": "sparseport.verify.folder:Verdict",
    "Certificate": "sparseport.verify.certificate:Certificate",
    "load_task": "sparseport.nls.tasks:load_task",
    "evaluate": "sparseport.nls.evaluation:evaluate",
    "compare": "sparseport.nls.evaluation:compare",
    "Evaluation": "sparseport.nls.evaluation:Evaluation",
    "measure": "sparseport.bench.run:bench",
    "Asked": "sparseport.bench.rounds:Asked",
    "sweep_folders": "sparseport.bench.sweeping:sweep_folders",
    "Budget": "sparseport.bench.sweep:Budget",
    "pack": "sparseport.transit.pack:pack",
    "unpack": "sparseport.transit.unpack:unpack",
    "write_report": "sparseport.report.make:report",
    "run_job": "sparseport.job.run:run_job",
    "search_sub_networks": "sparseport.job.search:search_sub_networks",
    "Progress": "sparseport.progress:Progress",
    "SparseportError": "sparseport.errors:SparseportError",
}

__all__ = [
    "Asked",
    "Budget",
    "Certificate",
    "Evaluation",
    "ExportResult",
    "Inspection",
    "Plan",
    "Progress",
    "Recipe",
    "SparseportError",
    "Verdict",
    "add_adapter",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "load_task",
    "make_recipe",
    "measure",
    "pack",
    "plan_export",
    "run_job",
    "search_sub_networks",
    "sweep_folders",
    "unpack",
    "verify_export",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparseport' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
