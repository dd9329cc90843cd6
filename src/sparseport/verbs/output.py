"""What every verb has: its help, the options about its output, its progress, and how its result is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from sparseport.errors import SparseportError
from sparseport.progress import Progress


def add_output(verb: argparse.ArgumentParser, description: str, example: str) -> None:
    """Give a verb's parser its help and the options that all verbs have."""
    verb.description = description
    verb.epilog = f"example:\n  {example}"
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")


def progress_for(options: argparse.Namespace) -> Progress:
    """Where a verb reports its steps."""
    return Progress("quiet" if options.quiet else "auto")


def print_judged(
    data: dict[str, Any], options: argparse.Namespace, show: Callable[[], None], judge: Callable[[], None]
) -> int:
    """Print a result, then the error if it is judged bad; with `--json` both are one document."""
    try:
        judge()
    except SparseportError as error:
        print_result({**data, "error": error.as_dict()}, options.json, show)
        if options.debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    print_result(data, options.json, show)
    return 0


def print_result(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print a result as JSON, or as `show` does."""
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        show()
