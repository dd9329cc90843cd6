"""Everything that a report shows, from the files as plain data. Every folder is verified on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparseport.checkpoints.json_files import read_json
from sparseport.errors import BadInput, VerificationError
from sparseport.model_card.facts import ModelFacts, model_facts
from sparseport.nls.search.front import SearchResult
from sparseport.progress import Progress
from sparseport.report.bench_file import EVIDENCE, Bench, Row, read_bench
from sparseport.report.naive_file import Naive
from sparseport.verify.certificate import FILE_NAME, TARGETS, Certificate, exported_folders
from sparseport.verify.folder import Verdict, strangers, verify
from sparseport.verify.pairs import differences_between

SEALS_BEFORE = "seals_before"
"""Key of a certificate: seals that the same folder had before its README.md was written anew."""


@dataclass(frozen=True)
class Folder:
    """One exported folder.

    name         as the page shows it; never an absolute path
    differences  from its certificate; empty if it verifies
    facts        None where there is no certificate to take them from
    seal, proof  SHA-256 of the certificate, and of the part of it that is the same on every machine
    seals        by which measurements of this folder are known: its own, those before its card was written anew, and
                 those that stand in the evidence of its sweep
    files        name -> size in bytes and SHA-256, as certified
    weights      digest of each layer's merged weight, by which folders of one model are known
    """

    name: str
    differences: tuple[str, ...]
    facts: ModelFacts | None = None
    seal: str = ""
    proof: str = ""
    seals: tuple[str, ...] = ()
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    weights: tuple[tuple[str, str], ...] = ()
    evidence: Bench | None = None
    """What a sweep measured when it gave the folder its settings."""
    compared: tuple[int, int, int] = (0, 0, 0)
    """How many files, linear layers and other tensors were compared."""

    @property
    def ok(self) -> bool:
        return not self.differences

    @property
    def size(self) -> int:
        """Bytes of all certified files."""
        return sum(size for size, _ in self.files.values())

    def measured(self, row: Row) -> bool:
        """Whether a bench row is of this very folder."""
        return row.seal is not None and row.seal in self.seals


@dataclass(frozen=True)
class Gathered:
    """What the page is made of.

    folders  in the order that they were given
    between  differences between folders of one export, or files beside them
    search   the name of the file and its result
    """

    version: str
    folders: tuple[Folder, ...]
    between: tuple[str, ...]
    benches: tuple[Bench, ...] = ()
    search: tuple[str, SearchResult] | None = None
    naive: Naive | None = None

    @property
    def ok(self) -> bool:
        return not self.between and all(folder.ok for folder in self.folders)

    def models(self) -> list[list[Folder]]:
        """Folders with facts, those of the same weights together."""
        found: dict[tuple[tuple[str, str], ...], list[Folder]] = {}
        for folder in self.folders:
            if folder.facts is not None:
                found.setdefault(folder.weights, []).append(folder)
        return list(found.values())

    def rows_of(self, folder: Folder) -> list[tuple[Bench, Row]]:
        """Bench rows of a folder."""
        return [(bench, row) for bench in self.benches for row in bench.rows if folder.measured(row)]


@dataclass(frozen=True)
class Place:
    """A folder of one target: where it is, and what the page calls it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Given:
    """What the user named: a folder of one target, or one that holds the folders of several (then it is `parent`)."""

    places: tuple[Place, ...]
    parent: Path | None


def places_of(folders: Sequence[Path]) -> list[Given]:
    """For every place that was given, the folders of single targets there.

    Raises:
        BadInput: one of them is no folder, or is named twice.
    """
    if not folders:
        raise BadInput("no folder to report on", fix="give exported folders")
    found = []
    for given in folders:
        if not given.is_dir():
            what = "a file" if given.exists() else "nothing"
            raise BadInput("no exported folder", where=given, expected="a folder", found=what, code="E_MISSING")
        found.append((given, exported_folders(given)))
    paths = [path for _, parts in found for path in parts]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise BadInput("a folder is named twice", where=path)
    names = _names(paths)
    return [
        Given(tuple(Place(path, names[path]) for path in parts), None if parts == [given] else given)
        for given, parts in found
    ]


def look(given: Sequence[Given], progress: Progress) -> tuple[list[Folder], list[str]]:
    """Verify every folder.

    Returns:
        The folders in their order, and what is wrong between folders of one export.

    Raises:
        Unsupported: a certificate has a newer schema.
        EnvironmentProblem: a target's packages, which read the graph, are not installed.
    """
    folders, between = [], []
    for one in given:
        verdicts = []
        for place in one.places:
            with progress.task(f"verifying {place.name}") as step:
                verdicts.append(_verdict(place, step))
            folders.append(_folder(place, verdicts[-1]))
        between += differences_between(verdicts)
        if one.parent is not None:
            between += strangers(one.parent, [place.path for place in one.places])
    return folders, between


def _verdict(place: Place, step: Callable[[], None]) -> Verdict:
    try:
        return verify(place.path, on_step=step)
    except VerificationError as error:
        found = f" ({error.found})" if error.found else ""
        return Verdict(place.path, 0, 0, 0, [f"{FILE_NAME}: {error.what}{found}"])


def looked_at(place: Place, compared: tuple[int, int, int]) -> Folder:
    """A folder whose certificate was sealed a moment ago, as `look` would find it."""
    return _folder(place, Verdict(place.path, *compared, [], Certificate.read(place.path)))


def _folder(place: Place, verdict: Verdict) -> Folder:
    differences = [_without_path(line, place) for line in verdict.differences]
    certificate = verdict.certificate
    if certificate is None:
        return Folder(place.name, tuple(differences))
    facts = None
    try:
        facts = model_facts(certificate, read_json(place.path / "config.json", what="config.json"))
    except VerificationError as error:
        differences.append(f"{FILE_NAME}: {error.what} ({_without_path(error.where or '', place)})")
    except BadInput as error:
        differences.append(f"config.json: {error.what}")
    evidence = None
    if EVIDENCE in certificate.files and not differences:
        try:
            evidence = replace(read_bench(place.path / EVIDENCE), name=f"{place.name}/{EVIDENCE}")
        except BadInput as error:
            differences.append(f"{EVIDENCE}: {error.what}")
    seal = certificate.seal()
    measured = () if evidence is None else tuple(row.seal for row in evidence.rows if row.seal is not None)
    return Folder(
        place.name,
        tuple(differences),
        facts,
        seal,
        certificate.proof(),
        (seal, *_seals_before(certificate), *measured),
        {name: (one["size"], one["sha256"]) for name, one in sorted(certificate.files.items())},
        tuple(sorted((name, str(one.get("weight_sha256"))) for name, one in certificate.linears.items())),
        evidence,
        (verdict.files, verdict.linears, verdict.tensors),
    )


def _seals_before(certificate: Certificate) -> tuple[str, ...]:
    before = certificate.body.get(SEALS_BEFORE, [])
    return tuple(seal for seal in before if isinstance(seal, str)) if isinstance(before, list) else ()


def _without_path(line: str, place: Place) -> str:
    """A message without the folder's place on this machine."""
    for path in sorted({str(place.path), str(place.path.resolve()), str(place.path.absolute())}, key=len, reverse=True):
        if path not in ("", ".", "/"):
            line = line.replace(f"{path}/", "").replace(path, place.name)
    return line


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """What the page calls each folder: as it was given, or so much of an absolute path's end as tells it apart."""
    given = list(paths)
    names = {path: _shown(path, 1) for path in given}
    for length in (2, 3, 4):
        shared = list(names.values())
        names = {path: name if shared.count(name) == 1 else _shown(path, length) for path, name in names.items()}
    if len(set(names.values())) < len(names):
        names = {path: f"{name} ({number})" for number, (path, name) in enumerate(names.items(), 1)}
    return names


def _shown(path: Path, length: int) -> str:
    if path.is_absolute() or ".." in path.parts or path.name == "":
        parts = [part for part in path.resolve().parts if part != path.anchor]
        # A target's folder is called `openvino` or `onnx` by itself: its parent's name says which export it is of.
        length += bool(parts) and parts[-1] in TARGETS
        return "/".join(part.strip("/\\") for part in parts[-length:]) or "folder"
    return path.as_posix()
