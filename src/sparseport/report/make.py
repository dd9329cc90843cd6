"""Make a report: verify the folders, read the files, write the page, and the model cards where that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseport import __version__
from sparseport.errors import EnvironmentProblem, OutputExists, UsageError, VerificationError
from sparseport.nls.search.front import read_result
from sparseport.progress import Progress
from sparseport.report import words
from sparseport.report.bench_file import Bench, read_bench
from sparseport.report.card import write_cards
from sparseport.report.gather import Folder, Gathered, look, places_of
from sparseport.report.naive_file import read_naive
from sparseport.report.page import MADE_BY, page


@dataclass(frozen=True)
class ReportResult:
    """A finished report.

    output   the page
    ok       whether every folder verifies
    folders  what was found, in the order that the folders were given
    between  differences between folders of one export
    cards    names of folders whose model card was written anew
    """

    output: Path
    ok: bool
    folders: tuple[Folder, ...]
    between: tuple[str, ...]
    cards: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "output": str(self.output),
            "ok": self.ok,
            "differences": list(self.between),
            "folders": {
                folder.name: {
                    "ok": folder.ok,
                    "differences": list(folder.differences),
                    "certificate_sha256": folder.seal,
                }
                for folder in self.folders
            },
            "cards": list(self.cards),
        }


def report(
    folders: Sequence[Path | str],
    output: Path | str,
    *,
    bench: Sequence[Path | str] = (),
    search: Path | str | None = None,
    naive: Path | str | None = None,
    card: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write one HTML page about exported folders. It verifies them, and says in red if one is not as it was certified.

    Args:
        folders: exported folders, of one target or of several.
        output: the page; an older one is replaced, any other file is not.
        bench: files of `sparseport bench`; the evidence that a sweep left in a folder is shown by itself.
        search: `search.json` of a search.
        naive: comparison of ways, as `benchmarks/fidelity.py` writes it.
        card: also write README.md in every folder anew, with measured logits and the speeds of the bench files. Each
            certificate is sealed again; nothing is done unless all folders verify.
        progress: where to report steps; quiet by default.

    Returns:
        Where the page is, and whether every folder verifies.

    Raises:
        BadInput: a folder or a file is missing, or a file is damaged.
        OutputExists: there is another file at `output`.
        EnvironmentProblem: a target's packages are not installed, or the page cannot be written.
        Unsupported: a file or a certificate has a newer schema.
    """
    progress, output = progress or Progress("quiet"), Path(output)
    given = places_of([Path(folder) for folder in folders])
    _require_replaceable(output, [place.path for one in given for place in one.places])
    benches = tuple(read_bench(Path(file)) for file in bench)
    found = None if search is None else (Path(search).name, read_result(Path(search)))
    compared = None if naive is None else read_naive(Path(naive))
    looked, between = look(given, progress)
    benches += tuple(
        folder.evidence
        for folder in looked
        if folder.evidence is not None and not any(_within(folder.evidence, one) for one in benches)
    )
    cards: tuple[str, ...] = ()
    if card and not between and all(folder.ok for folder in looked):
        with progress.task("writing model cards"):
            looked = write_cards(given, looked, benches)
        cards = tuple(folder.name for folder in looked)
    elif card:
        progress.note("no model card was written: the folders do not verify")
    gathered = Gathered(__version__, tuple(looked), tuple(between), benches, found, compared)
    _write(output, page(gathered))
    return ReportResult(output, gathered.ok, gathered.folders, gathered.between, cards)


def _within(evidence: Bench, bench: Bench) -> bool:
    """Whether everything in a folder's evidence stands in a bench file too."""
    return all(row in bench.rows for row in evidence.rows)


def require_report(result: ReportResult) -> None:
    """Raise if a folder of a report does not verify; the page is there all the same.

    Raises:
        VerificationError: names the first differences.
    """
    if result.ok:
        return
    lines = [*result.between, *(line for folder in result.folders for line in folder.differences)]
    wrong = [folder.name for folder in result.folders if not folder.ok]
    raise VerificationError(
        f"{words.differences(len(lines))} from the certificate: {'; '.join(lines[:5])}",
        where=", ".join(wrong) or result.folders[0].name,
        fix="export again, or copy the folder again from its source; the report says so in red",
    )


def _require_replaceable(output: Path, folders: Sequence[Path]) -> None:
    """Refuse, before any work, an output that would cost somebody a file or break a folder's certificate.

    Raises:
        UsageError: the page would lie inside an exported folder.
        OutputExists: something else is there.
    """
    if any(output.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise UsageError("the page would lie inside an exported folder, which would not verify any more", where=output)
    if output.is_dir():
        raise OutputExists("the output is a folder", where=output, fix="name a file, such as report.html")
    if output.exists():
        with output.open("rb") as file:
            head = file.read(200)
        if MADE_BY.encode() not in head:
            raise OutputExists("the file to replace is no report", where=output, fix="choose another --output")


def _write(output: Path, text: str) -> None:
    """Write the page; it appears whole or not at all.

    Raises:
        EnvironmentProblem: the folder is missing or cannot be written, or the disk is full.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(output)
    except OSError as error:
        raise EnvironmentProblem("cannot write the report", where=output, found=error.strerror) from error
    finally:
        partial.unlink(missing_ok=True)
