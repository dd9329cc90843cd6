"""The archive's frame: a header, the packed pieces one after the other, and the table of contents at the end.

    byte  0   8 bytes   89 53 50 41 4B 0D 0A 1A: "SPAK" between bytes that a transfer as text would change
          8   uint32    version, 1
         12   uint32    0
         16   uint64    first byte of the table of contents
         24   uint64    length of the table of contents; it ends where the archive ends
         32   32 bytes  SHA-256 of the table of contents
         64   ...       packed pieces, without gaps, in the order of the table of contents

Numbers are little endian. The table of contents is one frame of the coder (see `streams`) that holds JSON:

    {"files": [{"name": "openvino_model.bin", "size": 113995461, "sha256": "...", "parts": [PART, ...]}, ...]}

    PART  {"extents": [[first byte, bytes], ...], "packed": [bytes of each piece, ...]}
          and, where it is known what the bytes are, {"bits": 4, "columns": 576}, with
              {"centre": 8}, or {"points": [offset, count, pitch, rows, columns]} (see `layout`)
          or, for bytes that are there already, {"extents": [...], "copy": [file, part, first byte]}

The extents of a file's parts cover the file, each byte once. Nothing says where a piece begins but the lengths before
it, so pieces cannot overlap.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from sparseport.checkpoints.json_files import parse_json
from sparseport.errors import BadInput, SparseportError, Unsupported
from sparseport.transit.layout import BITS, Elements, Part, Points
from sparseport.transit.streams import SLOW, compress, damaged, decompress, stated_size
from sparseport.verify.certificate import is_inside

MAGIC = b"\x89SPAK\r\n\x1a"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")

# Bounds of what is believed before anything is allocated.
MAX_CONTENTS = 32 << 20
MAX_FILES = 100_000
_LARGEST = 1 << 62


@dataclass(frozen=True)
class PackedFile:
    """A file of the archive: its name relative to the folder, size, SHA-256 in hex, and how it is packed."""

    name: str
    size: int
    sha256: str
    parts: tuple[Part, ...]

    @property
    def packed(self) -> int:
        """Bytes that it takes in the archive."""
        return sum(sum(part.packed) for part in self.parts)


def write_end(file: BinaryIO, files: list[PackedFile]) -> int:
    """Write the table of contents at the end of an archive, and then its header; returns the archive's size."""
    text = json.dumps({"files": [_file_entry(one) for one in files]}, separators=(",", ":"), ensure_ascii=True)
    contents = compress(text.encode("ascii"), SLOW)
    begin = file.seek(0, 2)
    file.write(contents)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, VERSION, 0, begin, len(contents), hashlib.sha256(contents).digest()))
    return begin + len(contents)


def read_contents(file: BinaryIO, size: int, where: str) -> list[PackedFile]:
    """The files of an archive.

    Args:
        file: the archive.
        size: its size in bytes.
        where: its name, for messages.

    Raises:
        BadInput: E_ARCHIVE, it is no archive, cut off, damaged, or not one that a packer writes.
        Unsupported: it was written by a newer sparseport.
    """
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise BadInput(
            "this is no archive of `sparseport pack`",
            where=where,
            found=f"a file that begins with {header[:8].hex(' ') or 'nothing'}",
            fix="a transfer as text damages archives: copy it again, in binary mode",
            code="E_ARCHIVE",
        )
    _, version, reserved, begin, length, digest = HEADER.unpack(header)
    if version > VERSION:
        raise Unsupported(
            "the archive has a newer version",
            where=where,
            expected=f"<= {VERSION}",
            found=version,
            fix="upgrade sparseport",
        )
    if version != VERSION or reserved or begin < HEADER.size or begin + length != size or length > MAX_CONTENTS:
        raise damaged(
            where, expected=f"{min(begin + length, _LARGEST)} bytes", found=f"{size} bytes, version {version}"
        )
    file.seek(begin)
    contents = file.read(length)
    if hashlib.sha256(contents).digest() != digest:
        raise damaged(where, found="a table of contents that was changed")
    stated = stated_size(contents, where)
    if not 0 < stated <= MAX_CONTENTS:
        raise damaged(where, expected=f"a table of contents of at most {MAX_CONTENTS} bytes", found=stated)
    try:
        data = parse_json(decompress(contents, stated, where), where=where, what="table of contents")
        files = _files(data)
    except (LookupError, TypeError, ValueError, SparseportError) as error:
        what = error.what if isinstance(error, SparseportError) else str(error)
        raise damaged(where, found=f"a table of contents that no packer writes: {what}") from error
    if HEADER.size + sum(one.packed for one in files) != begin:
        raise damaged(where, found="pieces that do not fill the archive")
    return files


def _file_entry(file: PackedFile) -> dict[str, Any]:
    parts = [_part_entry(part) for part in file.parts]
    return {"name": file.name, "size": file.size, "sha256": file.sha256, "parts": parts}


def _part_entry(part: Part) -> dict[str, Any]:
    entry: dict[str, Any] = {"extents": [list(extent) for extent in part.extents]}
    if part.copy is not None:
        return entry | {"copy": list(part.copy)}
    if part.elements is not None:
        entry |= {"bits": part.elements.bits, "columns": part.elements.columns}
        if part.elements.centre:
            entry["centre"] = part.elements.centre
        if (points := part.elements.points) is not None:
            entry["points"] = [points.offset, points.count, points.pitch, points.rows, points.columns]
    return entry | {"packed": list(part.packed)}


def _files(data: Any) -> list[PackedFile]:
    """The files of a table of contents.

    Raises:
        LookupError, TypeError, ValueError: something in it is not as the head of this file says.
    """
    _only(data, {"files"})
    entries = data["files"]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_FILES:
        raise ValueError(f"files must be a list of 1 to {MAX_FILES}")
    files: list[PackedFile] = []
    for entry in entries:
        _only(entry, {"name", "size", "sha256", "parts"})
        name, size, sha256 = entry["name"], _count(entry["size"]), entry["sha256"]
        if not isinstance(name, str) or not name.isprintable() or not is_inside(name):
            raise ValueError(f"{name!r:.80} is no name of a file inside a folder")
        if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise ValueError(f"{name} has no SHA-256")
        if not isinstance(entry["parts"], list):
            raise TypeError(f"{name} has no list of parts")
        parts: list[Part] = []
        for part in entry["parts"]:
            parts.append(_part(part, name, size, files, parts))
        _check_cover(parts, size, name)
        files.append(PackedFile(name, size, sha256, tuple(parts)))
    _check_names([file.name for file in files])
    return files


def _part(entry: Any, name: str, size: int, files: list[PackedFile], parts: list[Part]) -> Part:
    allowed = {"copy"} if "copy" in entry else {"packed", "bits", "columns", "centre", "points"}
    _only(entry, {"extents"}, allowed)
    extents = tuple((_count(first), _count(length)) for first, length in entry["extents"])
    if not extents or any(length == 0 or first + length > size for first, length in extents):
        raise ValueError(f"{name} has a part outside the file")
    if "copy" in entry:
        number, place, first = map(_count, entry["copy"])
        copied = Part(extents, copy=(number, place, first))
        source = (parts if number == len(files) else files[number].parts)[place]
        if source.copy is not None or first + copied.size > source.size:
            raise ValueError(f"{name} has a copy of what is not there")
        return copied
    part = Part(extents, _elements(entry, name), packed=tuple(map(_count, entry["packed"])))
    if part.elements and not (part.elements.is_whole(part.size) and part.elements.points_fit(part.size, size)):
        raise ValueError(f"{name} has a part that is no whole matrix")
    if len(part.packed) != part.piece_count() or max(part.packed) > part.packed_limit():
        raise ValueError(f"{name} has pieces of impossible number or size")
    return part


def _elements(entry: dict[str, Any], name: str) -> Elements | None:
    if "bits" not in entry:
        _only(entry, {"extents", "packed"})
        return None
    bits, columns, centre = entry["bits"], _count(entry["columns"]), _count(entry.get("centre", 0))
    if bits not in BITS or centre >= 1 << bits or (centre and "points" in entry):
        raise ValueError(f"{name} has elements of an unknown kind")
    points = Points(*map(_count, entry["points"])) if "points" in entry else None
    return Elements(bits, columns, centre, points)


def _check_cover(parts: list[Part], size: int, name: str) -> None:
    position = 0
    for first, length in sorted(extent for part in parts for extent in part.extents):
        if first != position:
            raise ValueError(f"{name} has bytes that belong to no part or to two")
        position += length
    if position != size:
        raise ValueError(f"{name} has bytes that belong to no part")


def _check_names(names: list[str]) -> None:
    """No file twice, and none where another needs a folder."""
    folders = {name.rpartition("/")[0] for name in names}
    while parents := {folder.rpartition("/")[0] for folder in folders} - folders:
        folders |= parents
    if len(set(names)) != len(names) or folders & set(names):
        raise ValueError("a name stands for two things")


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise TypeError(f"{value!r:.40} is no size")
    return value


def _only(entry: Any, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    if not isinstance(entry, dict) or not required <= set(entry) <= required | optional:
        raise TypeError(f"an entry needs {', '.join(sorted(required))}, and has other keys")
