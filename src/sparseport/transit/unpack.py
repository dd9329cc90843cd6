"""`sparseport unpack FILE`: the folder that was packed, every byte of it, or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sparseport.checkpoints.paths import open_regular
from sparseport.errors import BadInput
from sparseport.progress import Progress, Step
from sparseport.publish import check_space, staged_output
from sparseport.transit.certified import check_certified
from sparseport.transit.contents import HEADER, PackedFile, read_contents
from sparseport.transit.layout import Part
from sparseport.transit.pack import zero_points_of
from sparseport.transit.pieces import unpack_piece
from sparseport.transit.streams import damaged, zstandard
from sparseport.transit.stretches import gather, scatter
from sparseport.verify.certificate import certified_folders, file_facts

_BLOCK = 8 << 20


@dataclass(frozen=True)
class Unpacked:
    """What was unpacked.

    folder     the output
    size       bytes of all files
    files      how many
    certified  places with a certificate that their files fit: "" for the folder itself, or names of subfolders
    """

    folder: Path
    size: int
    files: int
    certified: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"folder": str(self.folder), "size": self.size, "files": self.files, "certified": self.certified}


def unpack(
    archive: Path | str, output: Path | str, *, overwrite: bool = False, progress: Progress | None = None
) -> Unpacked:
    """Unpack an archive; the folder appears when every file has the SHA-256 that it was packed with.

    Certificates inside are read as well, and their digests compared with those of the files. The graph is not read
    back again, which would need the runtime's packages: these are the bytes that were proven.

    Args:
        archive: a file that `pack` wrote.
        output: folder to make.
        overwrite: replace an existing folder, if it is an exported one.
        progress: where to report steps; quiet by default.

    Returns:
        What was unpacked, file by file, and which certificates were held against it.

    Raises:
        BadInput: E_ARCHIVE, this is no archive, or it is cut off or damaged; E_MISSING.
        Unsupported: it was written by a newer sparseport.
        VerificationError: a file is not what the certificate beside it says.
        OutputExists: the output is there.
        EnvironmentProblem: zstandard is not installed, or the disk is too small.
    """
    archive, output = Path(archive), Path(output)
    progress = progress or Progress("quiet")
    zstandard()
    with open_regular(archive) as source:
        files = read_contents(source, os.fstat(source.fileno()).st_size, archive.name)
        total = sum(one.size for one in files)
        check_space(output, total)
        with staged_output(output, overwrite, ours=lambda folder: bool(certified_folders(folder))) as stage:
            _write(source, files, stage, archive.name, progress)
            facts: dict[str, Mapping[str, Any]] = {}
            with progress.task("hashing files", len(files)) as step:
                for one in files:
                    facts[one.name] = file_facts(stage / one.name)
                    if facts[one.name]["sha256"] != one.sha256:
                        raise damaged(f"{archive.name}, {one.name}", found="a file with another SHA-256")
                    step()
            certified = check_certified(stage, facts, strict=False)
    return Unpacked(output, total, len(files), certified)


def _write(source: BinaryIO, files: list[PackedFile], stage: Path, archive: str, progress: Progress) -> None:
    position = HEADER.size
    with progress.task("unpacking", sum(len(part.packed) or 1 for one in files for part in one.parts)) as step:
        for one in files:
            path = stage / one.name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = path.open("x+b")
            except FileExistsError:
                # Names that differ in case only are two files elsewhere.
                raise BadInput(
                    "this disk cannot hold two files whose names differ in case only",
                    where=f"{archive}, {one.name}",
                    fix="unpack it on another disk",
                    code="E_PATH",
                ) from None
            with file:
                file.truncate(one.size)
                for part in one.parts:
                    if part.copy is None:
                        position = _unpack_part(source, position, part, file, f"{archive}, {one.name}", step)
                    else:
                        number, place, first = part.copy
                        _copy(stage / files[number].name, files[number].parts[place], first, part, file)
                        step()


def _unpack_part(source: BinaryIO, position: int, part: Part, file: BinaryIO, where: str, step: Step) -> int:
    """Unpack the pieces that begin at a position of the archive; returns where they end."""
    for (first, size), length in zip(part.pieces(), part.packed, strict=True):
        packed = gather(source, [(position, length)])
        points = zero_points_of(file, part.elements, first, size) if part.elements else None
        data = unpack_piece(packed, size, part.elements, points, where)
        scatter(file, part.within(first, size), data.data)
        position += length
        step()
    return position


def _copy(path: Path, origin: Part, first: int, part: Part, file: BinaryIO) -> None:
    """Fill a part with what an earlier one has unpacked, from byte `first` of it."""
    # The source may be the file that is being written: what is still in its buffer has to be on the disk.
    file.flush()
    with path.open("rb") as source:
        for start in range(0, part.size, _BLOCK):
            size = min(_BLOCK, part.size - start)
            data = gather(source, origin.within(first + start, size))
            scatter(file, part.within(start, size), memoryview(data))
