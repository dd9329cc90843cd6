"""`sparseport report`: one HTML page about exported folders, which verifies them on the way."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sparseport.errors import SparseportError
from sparseport.progress import Progress

NAME = "report"
HELP = "Write one self-contained HTML page about exported folders: proof, sparsity, speed, drift, origin."
EXAMPLE = "sparseport report out --bench bench.json --output report.html"


def add_report(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="exported folder, of one target or several")
    verb.add_argument(
        "--bench", action="append", type=Path, default=[], metavar="FILE", help="what `bench` wrote; may come twice"
    )
    verb.add_argument("--search", type=Path, metavar="FILE", help="search.json of `search`")
    verb.add_argument(
        "--naive", type=Path, metavar="FILE", help="comparison with the usual way (benchmarks/fidelity.py)"
    )
    verb.add_argument("--output", type=Path, required=True, metavar="FILE", help="page to write, such as report.html")
    verb.add_argument(
        "--card",
        action="store_true",
        help="also write each folder's model card (README.md) anew, with measured figures; seals its certificate again",
    )
    verb.set_defaults(run=run_report, interrupted="no half-written page was left")


def run_report(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status: 5 where a folder does not verify, with the page written all the same."""
    from sparseport.report.make import report, require_report

    result = report(
        options.folders,
        options.output,
        bench=options.bench,
        search=options.search,
        naive=options.naive,
        card=options.card,
        progress=Progress("quiet" if options.quiet else "auto"),
    )
    data, status = result.as_dict(), 0
    try:
        require_report(result)
    except SparseportError as error:
        if options.debug:
            raise
        data, status = {**data, "error": error.as_dict()}, error.exit_code
        print(error, file=sys.stderr)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        print(f"report: {result.output}")
        for name in result.cards:
            print(f"model card: {name}/README.md")
    return status
