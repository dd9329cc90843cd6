"""`optimum-cli export sparseport`: sparseport's verb `export` as a command of optimum-cli.

Each time it starts, whatever the command, optimum-cli imports every file of this namespace package (no folder on this
path may have an `__init__.py`) and reads REGISTER_COMMANDS. So next to nothing is imported here, and a sparseport that
cannot be imported costs this command alone.
"""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand
from optimum.utils.logging import get_logger

_EXAMPLE = "optimum-cli export sparseport -m sparse-int4 --sparse-base sparse --adapter adapter out"

try:
    from sparseport.errors import UsageError
    from sparseport.verbs.export import HELP, add_export, run_export
    from sparseport.verbs.output import add_output
except Exception as error:  # whatever it is, the other commands are none the worse for it
    get_logger(__name__).warning(f"`optimum-cli export sparseport` is not there: {type(error).__name__}: {error}")
    REGISTER_COMMANDS = []
else:

    class SparseportExportCommand(BaseOptimumCLICommand):
        """The command; its options are those of `sparseport export`, and some names that optimum-cli's have."""

        COMMAND = CommandInfo(name="sparseport", help=HELP)

        @staticmethod
        def parse_args(parser: argparse.ArgumentParser) -> None:
            """Give the command its options."""
            add_output(parser, HELP, _EXAMPLE)
            parser.add_argument("folder", nargs="?", metavar="OUTPUT", help="folder to write, as --output")
            add_export(parser, base=("-m", "--model", "--base"))
            parser.set_defaults(run=_export)

        def run(self) -> None:
            """Run it, and leave with the exit status that `sparseport export` has."""
            from sparseport.cli import run_parsed

            raise SystemExit(run_parsed(self.args))

    def _export(options: argparse.Namespace) -> int:
        if options.folder is not None:
            if options.output is not None:
                raise UsageError("the output is named twice", where=f"--output {options.output}", found=options.folder)
            options.output = options.folder
        return run_export(options)

    REGISTER_COMMANDS = [(SparseportExportCommand, ExportCommand)]
