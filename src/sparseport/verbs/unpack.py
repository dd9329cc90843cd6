"""`sparseport unpack`: the folder that was packed, every byte of it, or nothing."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from sparseport.errors import printable
from sparseport.progress import Progress

NAME = "unpack"
HELP = "Unpack an archive of `sparseport pack`; the folder appears when every file is, by SHA-256, what was packed."
EXAMPLE = "sparseport unpack out.sparseport --output out"


def add_unpack(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("archive", type=Path, help="a file that `sparseport pack` wrote")
    verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing exported folder")
    verb.set_defaults(run=run_unpack, interrupted="no half-written output was left")


def run_unpack(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    from sparseport.transit.unpack import unpack

    progress = Progress("quiet" if options.quiet else "auto")
    result = unpack(options.archive, options.output, overwrite=options.overwrite, progress=progress)
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
        return 0
    print(f"{result.files} files, {result.size:,} bytes, each with the SHA-256 that it was packed with")
    if result.certified:
        print("they are the files of the certificate")
        command = f"sparseport verify {shlex.quote(str(result.folder))}"
        print(f"to read the weights back once more: {printable(command)}")
    else:
        print("no certificate: nothing is proven of them but that they arrived")
    return 0
