"""`sparseport pack DIR`: a folder as one archive, bit-exact when unpacked, as small as sparsity allows."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, UsageError
from sparseport.progress import Progress
from sparseport.publish import staged_file
from sparseport.transit.certified import check_certified
from sparseport.transit.contents import HEADER, MAGIC, MAX_FILES, PackedFile, write_end
from sparseport.transit.copies import Copies
from sparseport.transit.layout import Elements, Part
from sparseport.transit.pieces import pack_elements, pack_plain, points_extent, points_of_rows, to_elements
from sparseport.transit.regions import map_folder, parts_of
from sparseport.transit.streams import FAST, SLOW, zstandard
from sparseport.transit.stretches import gather
from sparseport.transit.tally import Tally, TensorTally, by_kind
from sparseport.verify.certificate import file_facts, is_inside
from sparseport.weights.linear import U8

SUFFIX = ".sparseport"

# Bytes of no known structure beyond which the slow level would take minutes.
_SLOW_UP_TO = 64 << 20


@dataclass(frozen=True)
class FileReport:
    """A file of an archive.

    name    relative to the folder
    size    bytes of the file
    packed  bytes in the archive
    copied  bytes of the file that other parts of the archive hold already
    """

    name: str
    size: int
    packed: int
    copied: int


@dataclass(frozen=True)
class Packed:
    """What was packed, and how small it became.

    archive    the file
    size       its bytes
    certified  places with a certificate: "" for the folder itself, or names of subfolders
    files      in order of their names
    tallies    bits per element, by kind of tensor
    """

    archive: Path
    size: int
    certified: list[str]
    files: list[FileReport]
    tallies: list[Tally]

    @property
    def unpacked(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "archive": str(self.archive),
            "size": self.size,
            "unpacked": self.unpacked,
            "certified": self.certified,
            "files": [vars(file) for file in self.files],
            "elements": [tally.as_dict() for tally in self.tallies],
        }


def pack(
    folder: Path | str,
    output: Path | str | None = None,
    *,
    overwrite: bool = False,
    ignore_extra: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Pack a folder into one archive; the same folder gives the same bytes, with the same version of zstandard.

    A folder with certificates is held against them first. One without (a checkpoint, a folder of another tool) is
    packed as well.

    Args:
        folder: an exported folder, one with a subfolder for each target, or any other.
        output: the archive; by default beside the folder, with its name and `.sparseport`.
        overwrite: replace an existing archive.
        ignore_extra: also pack files that the certificates do not know.
        progress: where to report steps; quiet by default.

    Returns:
        What was packed: sizes before and after, file by file.

    Raises:
        UsageError: there is no such folder, or the output lies in it.
        BadInput: E_PATH, the folder holds what an archive does not carry: links, empty folders, odd names.
        VerificationError: a file is not what its certificate says.
        OutputExists: the output is there.
        EnvironmentProblem: zstandard is not installed, the disk is full, or a file changed meanwhile.
    """
    folder = Path(folder).absolute()
    progress = progress or Progress("quiet")
    zstandard()
    names = _names(folder)
    output = Path(output) if output is not None else folder.resolve().with_name(folder.resolve().name + SUFFIX)
    if output.absolute().resolve().is_relative_to(folder.resolve()):
        raise UsageError("the archive would lie in the folder itself", where=output, fix="choose another --output")
    if output.exists() and not overwrite:
        raise OutputExists("output exists already", where=output, fix="choose another --output or give --overwrite")
    stamps = {name: _stamp(folder / name) for name in names}
    facts: dict[str, Mapping[str, Any]] = {}
    with progress.task("hashing files", len(names)) as step:
        for name in names:
            try:
                facts[name] = file_facts(folder / name)
            except OSError as error:
                fix = "check its permissions"
                raise EnvironmentProblem(
                    "cannot read a file", where=folder / name, found=error.strerror, fix=fix, code="E_READ"
                ) from error
            step()
    certified = check_certified(folder, facts, strict=not ignore_extra)
    with staged_file(output, overwrite, ours=is_archive) as stage:
        files, size, tallies = _write(folder, stage, facts, progress)
        changed = next((name for name in names if _stamp(folder / name) != stamps[name]), None)
        if changed is not None:
            raise BadInput("a file changed while it was packed", where=folder / changed, fix="pack the folder again")
    reports = [FileReport(one.name, one.size, one.packed, _copied(one)) for one in files]
    return Packed(output, size, certified, sorted(reports, key=lambda report: report.name), tallies)


def is_archive(path: Path) -> bool:
    """Whether a file begins as an archive does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _names(folder: Path) -> list[str]:
    """The files of a folder, sorted.

    Raises:
        UsageError: it is no folder, or there is nothing in it.
        BadInput: E_PATH, it holds something else than plain files.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=folder)
    names = []
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISREG(mode):
            names.append(name)
        if (problem := _problem(path, name, mode)) is not None:
            fix = "copy the folder with its links followed (cp -rL)" if stat.S_ISLNK(mode) else "remove or rename it"
            raise BadInput(f"an archive cannot carry {problem}", where=path, fix=fix, code="E_PATH")
    if not 0 < len(names) <= MAX_FILES:
        raise UsageError("the folder has no files, or too many", where=folder, expected=f"1 to {MAX_FILES}")
    return names


def _problem(path: Path, name: str, mode: int) -> str | None:
    """What an archive cannot carry of something in a folder, or None."""
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return None if any(path.iterdir()) else "an empty folder"
    if not stat.S_ISREG(mode):
        return "what is no plain file"
    return None if is_inside(name) and name.isprintable() else "a name that not every system can have"


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _copied(file: PackedFile) -> int:
    return sum(part.size for part in file.parts if part.copy is not None)


def _write(
    folder: Path, stage: Path, facts: Mapping[str, Mapping[str, Any]], progress: Progress
) -> tuple[list[PackedFile], int, list[Tally]]:
    regions = map_folder(folder, facts)
    # Copies begin where a part begins, so the folder whose layers stand alone comes before the one that fuses them.
    order = sorted(facts, key=lambda name: (-len(regions.get(name, ())), name))
    plans = {name: parts_of(regions.get(name, []), facts[name]["size"]) for name in order}
    tensors: list[Tally] = []
    copies = Copies(folder)
    files: list[PackedFile] = []
    with stage.open("w+b") as archive:
        archive.write(bytes(HEADER.size))
        with progress.task("packing", sum(map(len, plans.values()))) as step:
            for name in order:
                parts: list[Part] = []
                for plan in plans[name]:
                    known, new = copies.split(name, plan)
                    parts += known
                    if new is not None:
                        part = _pack_part(folder / name, new, archive, tensors)
                        copies.add(name, len(files), len(parts), part)
                        parts.append(part)
                    step()
                files.append(PackedFile(name, facts[name]["size"], facts[name]["sha256"], tuple(parts)))
        return files, write_end(archive, files), by_kind(tensors)


def _pack_part(path: Path, part: Part, archive: BinaryIO, tensors: list[Tally]) -> Part:
    """Pack the pieces of a part behind what the archive holds; returns the part with their lengths."""
    elements, lengths = part.elements, []
    level = SLOW if part.size <= _SLOW_UP_TO else FAST
    # Elements of several small tensors are no tensor.
    tally = TensorTally(elements.bits) if elements and len(part.extents) == 1 else None
    with path.open("rb") as file:
        for first, size in part.pieces():
            data = np.frombuffer(gather(file, part.within(first, size)), np.uint8)
            if elements is None:
                packed = pack_plain(data, level)
            else:
                values = to_elements(data, elements, zero_points_of(file, elements, first, size))
                packed = min(pack_elements(values, elements.bits), pack_plain(data, FAST), key=len)
                if tally is not None:
                    tally.add(values, len(packed))
            archive.write(packed)
            lengths.append(len(packed))
    if tally is not None:
        tensors.append(tally.total())
    return replace(part, packed=tuple(lengths))


def zero_points_of(file: BinaryIO, elements: Elements, first: int, size: int) -> U8 | None:
    """The zero-point of every element of a piece: uint8 [rows, columns] from the same file; None if it has none.

    Args:
        file: the file that holds the tensor and its zero-points.
        elements: what the tensor is.
        first: where the piece begins in the tensor, in bytes.
        size: of the piece in bytes.
    """
    points = elements.points
    if points is None:
        return None
    row, rows = (count * 8 // (elements.bits * elements.columns) for count in (first, size))
    offset, length, skip = points_extent(points, elements.bits, elements.columns, row, rows)
    data = np.frombuffer(gather(file, [(offset, length)]), np.uint8)
    return points_of_rows(data, skip, points, elements.bits, elements.columns, row, rows)
