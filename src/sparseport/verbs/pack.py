"""`sparseport pack`: an exported folder as one archive, bit-exact when unpacked, small where weights are sparse."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sparseport.progress import Progress

if TYPE_CHECKING:
    from sparseport.transit.pack import Packed

NAME = "pack"
HELP = (
    "Pack an exported folder, or one with a folder per target, into one archive: bit-exact, small where it is sparse."
)
EXAMPLE = "sparseport pack out --output out.sparseport"


def add_pack(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument(
        "folder", type=Path, help="what to pack: an exported folder, one with a folder per target, or any other"
    )
    verb.add_argument("--output", type=Path, metavar="FILE", help="archive to write (default: FOLDER.sparseport)")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing archive")
    verb.add_argument("--ignore-extra", action="store_true", help="also pack files that the certificates do not know")
    verb.set_defaults(run=run_pack, interrupted="no half-written output was left")


def run_pack(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    from sparseport.transit.pack import pack

    result = pack(
        options.folder,
        options.output,
        overwrite=options.overwrite,
        ignore_extra=options.ignore_extra,
        progress=Progress("quiet" if options.quiet else "auto"),
    )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        show_packed(result)
    return 0


def show_packed(result: Packed) -> None:
    """Print each file's size before and after, and what an element of each kind of tensor takes."""
    from rich.console import Console
    from rich.table import Table

    from sparseport.errors import printable as plain
    from sparseport.show import printable

    console = Console(emoji=False)
    files = Table("file", "bytes", "packed", "ratio", "repeated")
    tensors = Table("tensors", "", "zeros", "bits stored", "packed", "by entropy")
    for table in (files, tensors):
        for column in table.columns[1:]:
            column.justify = "right"
    for file in result.files:
        repeated = f"{file.copied:,}" if file.copied else ""
        files.add_row(
            printable(file.name), f"{file.size:,}", f"{file.packed:,}", _ratio(file.packed, file.size), repeated
        )
    contents = result.size - sum(file.packed for file in result.files)
    files.add_row("(table of contents)", "", f"{contents:,}", "", "")
    files.add_section()
    files.add_row("together", f"{result.unpacked:,}", f"{result.size:,}", _ratio(result.size, result.unpacked), "")
    console.print(files)
    for tally in result.tallies:
        entropy = "" if tally.entropy_bits is None else f"{tally.entropy_bits:.3f}"
        kind = "sparse" if tally.sparse else "dense"
        share = f"{tally.zeros / tally.elements:.1%}"
        tensors.add_row(
            f"{tally.tensors} {kind}",
            f"{tally.elements:,}",
            share,
            str(tally.bits),
            f"{tally.packed_bits:.3f}",
            entropy,
        )
    if result.tallies:
        console.print(tensors)
    if not result.certified:
        console.print("no certificate: packed as it is, nothing was proven of it")
    command = f"sparseport unpack {shlex.quote(str(result.archive))} --output DIR"
    console.print(f"to unpack: {plain(command)}", markup=False, highlight=False, soft_wrap=True)


def _ratio(packed: int, size: int) -> str:
    return f"{packed / size:.1%}" if size else ""
