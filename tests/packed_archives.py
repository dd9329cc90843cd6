"""Archives without the code under test: a reader in plain loops, after docs/transit.md, and a writer for bad ones."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import zstandard

HEADER = struct.Struct("<8sIIQQ32s")
MAGIC = bytes.fromhex("89 53 50 41 4b 0d 0a 1a")


def read(archive: bytes) -> dict[str, bytes]:
    """Every file of an archive, by name; checks nothing but that the pieces fill it."""
    magic, version, reserved, begin, length, digest = HEADER.unpack(archive[:64])
    packed = archive[begin:]
    assert (magic, version, reserved, begin + length) == (MAGIC, 1, 0, len(archive))
    assert hashlib.sha256(packed).digest() == digest
    entries = json.loads(zstandard.ZstdDecompressor().decompress(packed))["files"]
    position, streams, files = 64, [], {}
    for entry in entries:
        content = bytearray(entry["size"])
        streams.append([])
        for part in entry["parts"]:
            size = sum(length for _, length in part["extents"])
            if "copy" in part:
                number, place, first = part["copy"]
                data = streams[number][place][first : first + size]
            else:
                data, at = b"", position
                for length, count in zip(part["packed"], piece_sizes(part, size), strict=True):
                    data += unpack_piece(archive[at : at + length], count, part, len(data), content)
                    at += length
                position = at
            streams[-1].append(data)
            for first, length in part["extents"]:
                content[first : first + length], data = data[:length], data[length:]
        files[entry["name"]] = bytes(content)
    assert position == begin
    return files


def piece_sizes(part: dict[str, Any], size: int) -> list[int]:
    if "bits" not in part:
        whole = 8 << 20
    else:
        row = part["columns"] * part["bits"]
        row = row // 8 if row % 8 == 0 else part["columns"]
        whole = max((4 << 20) * part["bits"] // 8 // row, 1) * row
    return [min(whole, size - first) for first in range(0, size, whole)]


def unpack_piece(packed: bytes, size: int, part: dict[str, Any], begin: int, content: bytes) -> bytes:
    """One piece, an element at a time; `begin` is where it stands in its part, `content` the file as far as it is."""
    classes, at = packed[0], 1

    def take() -> bytes:
        nonlocal at
        (length,) = struct.unpack_from("<I", packed, at)
        at += 4 + length
        return zstandard.ZstdDecompressor().decompress(packed[at - length : at]) if length else b""

    if classes == 0:
        return take()
    bits, columns = part["bits"], part["columns"]
    rows = size * 8 // bits // columns
    table = nibbles(take()) if classes > 1 else [0] * columns
    values = [[0] * columns for _ in range(rows)]
    for number in range(classes):
        members = [column for column in range(columns) if table[column] == number]
        flags = take()
        places = [(row, column) for row in range(rows) for column in members]
        kept = [place for i, place in enumerate(places) if flags[i // 8] >> (7 - i % 8) & 1]
        for (row, column), value in zip(kept, elements(take, len(kept), bits), strict=True):
            values[row][column] = value
    first_row = begin * 8 // bits // columns
    out = []
    for row in range(rows):
        for column in range(columns):
            centre = part.get("centre", 0)
            if "points" in part:
                offset, _, pitch, high, wide = part["points"]
                number = (first_row + row) // high * pitch + column // wide
                centre = element(content, offset * 8 // bits + number, bits)
            out.append((values[row][column] + centre) % (1 << bits))
    if bits == 4:
        return bytes(low | high << 4 for low, high in zip(out[0::2], out[1::2], strict=True))
    return b"".join(value.to_bytes(bits // 8, "little") for value in out)


def elements(take: Any, count: int, bits: int) -> list[int]:
    if bits == 4:
        return nibbles(take())[:count]
    width = bits // 8
    highest = take()
    order = sorted(range(count), key=lambda i: highest[i])
    values = [highest[i] << 8 * (width - 1) for i in range(count)]
    for place in range(width - 2, -1, -1):
        run: list[int] = []
        for i, which in enumerate(order):
            run.append(which)
            last = i + 1 == count
            changes = not last and highest[order[i + 1]] != highest[which]
            if last or (changes and len(run) >= 8192):
                for which, byte in zip(run, take(), strict=True):
                    values[which] |= byte << 8 * place
                run = []
        if not count:
            take()
    return values


def nibbles(data: bytes) -> list[int]:
    return [half for byte in data for half in (byte & 15, byte >> 4)]


def element(content: bytes, number: int, bits: int) -> int:
    return content[number] if bits == 8 else content[number // 2] >> 4 * (number % 2) & 15


def frame(data: bytes) -> bytes:
    """A Zstandard frame of one raw block, by hand (RFC 8878): magic, single segment and size, last block, content."""
    assert len(data) < 256 + (1 << 16)
    size = bytes([0x20, len(data)]) if len(data) < 256 else b"\x60" + struct.pack("<H", len(data) - 256)
    return b"\x28\xb5\x2f\xfd" + size + (len(data) << 3 | 1).to_bytes(3, "little") + data


def stream(data: bytes) -> bytes:
    """A stream of a piece."""
    return struct.pack("<I", len(frame(data))) + frame(data) if data else bytes(4)


def plain(data: bytes) -> bytes:
    """A piece without elements."""
    return b"\0" + stream(data)


def write(files: Any, pieces: bytes = b"", **header: Any) -> bytes:
    """An archive with any table of contents; `header` overrides version, reserved, begin, length or digest."""
    contents = frame(json.dumps({"files": files}).encode() if not isinstance(files, bytes) else files)
    values = {
        "magic": MAGIC,
        "version": 1,
        "reserved": 0,
        "begin": 64 + len(pieces),
        "length": len(contents),
        "digest": hashlib.sha256(contents).digest(),
    } | header
    return HEADER.pack(*values.values()) + pieces + contents


def entry(name: str, data: bytes, parts: Any = None) -> dict[str, Any]:
    """An entry of the table of contents; by default one plain piece."""
    if parts is None:
        parts = [{"extents": [[0, len(data)]], "packed": [len(plain(data))]}] if data else []
    return {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "parts": parts}
