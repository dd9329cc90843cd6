"""What an unpacker believes of an archive: literal bytes, and every lie that a table of contents can tell."""

from __future__ import annotations

import copy
import hashlib
import io
import shutil
from pathlib import Path

import pytest

import packed_archives as archives
from sparseport.errors import BadInput, EnvironmentProblem, SparseportError, Unsupported
from sparseport.transit.contents import MAX_CONTENTS, read_contents
from sparseport.transit.unpack import unpack

# Two files, one of them a copy of the other but for its last byte, written by hand and spelled out once.
HELLO = b"hello"
FILES = [
    archives.entry("a/hello.txt", HELLO),
    {
        **archives.entry("b.txt", HELLO[:4] + b"!"),
        "parts": [
            {"extents": [[0, 4]], "copy": [0, 0, 0]},
            {"extents": [[4, 1]], "packed": [len(archives.plain(b"!"))]},
        ],
    },
]
PIECES = archives.plain(HELLO) + archives.plain(b"!")
LITERAL = bytes.fromhex(
    "89 53 50 41 4b 0d 0a 1a  01000000 00000000  6200000000000000"  # magic, version, 0, where the contents begin
    "00 0e000000 28b52ffd 20 05 290000 68656c6c6f"  # a plain piece: its length, one raw block of 5 bytes
    "00 0a000000 28b52ffd 20 01 090000 21"
)


def test_literal_bytes(tmp_path):
    archive = archives.write(FILES, PIECES)
    assert archive[:24] == LITERAL[:24] and archive[64:98] == LITERAL[24:] and len(archive) - 98 > 0
    path = tmp_path / "x.sparseport"
    path.write_bytes(archive)
    result = unpack(path, tmp_path / "out")
    assert (tmp_path / "out" / "a" / "hello.txt").read_bytes() == HELLO
    assert (tmp_path / "out" / "b.txt").read_bytes() == b"hell!"
    assert result.as_dict() == {"folder": str(tmp_path / "out"), "size": 10, "files": 2, "certified": []}
    assert archives.read(archive) == {"a/hello.txt": HELLO, "b.txt": b"hell!"}


def refused(tmp_path: Path, archive: bytes) -> SparseportError:
    """The error of unpacking; nothing may be left beside the archive."""
    path = tmp_path / "x.sparseport"
    path.write_bytes(archive)
    with pytest.raises(SparseportError) as caught:
        unpack(path, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["x.sparseport"]
    return caught.value


@pytest.mark.parametrize(
    "header",
    [
        {"magic": b"PK\x03\x04\0\0\0\0"},
        {"magic": archives.MAGIC.replace(b"\r\n", b"\n") + b"\0"},
        {"version": 0},
        {"reserved": 1},
        {"begin": 97},
        {"begin": 63},
        {"length": 1 << 63},
        {"length": 0},
        {"digest": bytes(32)},
    ],
)
def test_a_wrong_header(tmp_path, header):
    error = refused(tmp_path, archives.write(FILES, PIECES, **header))
    assert isinstance(error, BadInput) and error.code == "E_ARCHIVE" and "x.sparseport" in str(error)


def test_a_newer_version(tmp_path):
    error = refused(tmp_path, archives.write(b"whatever", version=2))
    assert isinstance(error, Unsupported) and "upgrade sparseport" in str(error)


def test_every_cut_and_every_changed_byte(tmp_path):
    archive = archives.write(FILES, PIECES)
    path = tmp_path / "x.sparseport"
    for position in range(len(archive)):
        path.write_bytes(archive[:position])
        with pytest.raises((BadInput, Unsupported)):
            unpack(path, tmp_path / "out")
        path.write_bytes(archive[:position] + bytes([archive[position] ^ 0x11]) + archive[position + 1 :])
        with pytest.raises((BadInput, Unsupported)):
            unpack(path, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["x.sparseport"]
    refused(tmp_path, archive + b"\0")


UP = ["/etc/passwd", "../up", "a/../../up", "a//b", "./a", "", "a/"]
ODD = ["a\\b", "c:x", "a\0b", "a\nb", "x" * 256, "\u202eb"]


@pytest.mark.parametrize("name", UP + ODD)
def test_names_that_leave_the_folder_or_fool_the_eye(tmp_path, name):
    error = refused(tmp_path, archives.write([archives.entry(name, HELLO)], archives.plain(HELLO)))
    assert error.code == "E_ARCHIVE" and "no name of a file inside a folder" in str(error)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b/c", "a")])
def test_names_that_stand_for_two_things(tmp_path, names):
    files = [archives.entry(name, HELLO) for name in names]
    assert "a name stands for two things" in str(refused(tmp_path, archives.write(files, 2 * archives.plain(HELLO))))


def test_names_that_differ_in_case_only(tmp_path, monkeypatch):
    """Two files on one disk, one file on another, where the second must not replace the first."""
    plain = Path.open

    def fold(path, *args, **kwargs):
        return plain(path.with_name(path.name.lower()) if path.name == "A" else path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fold)
    files = [archives.entry("a", HELLO), archives.entry("A", HELLO)]
    error = refused(tmp_path, archives.write(files, 2 * archives.plain(HELLO)))
    assert error.code == "E_PATH" and "case" in str(error)


def with_change(change) -> bytes:
    files = copy.deepcopy(FILES)
    change(files)
    return archives.write(files, PIECES)


def part(**fields):
    """Replace the first file's only part."""
    return lambda files: files[0]["parts"].__setitem__(0, {"extents": [[0, 5]], "packed": [19], **fields})


def first(**fields):
    return lambda files: files[0].update(fields)


def copied(**fields):
    return lambda files: files[1]["parts"][0].update(fields)


HUGE = 1 << 62
CHANGES = {
    "no files": lambda files: files.clear(),
    "another key": first(mode=0o777),
    "no name": lambda files: files[0].pop("name"),
    "name of another type": first(name=5),
    "size of another type": first(size=True),
    "negative size": first(size=-1),
    "another size": first(size=6),
    "huge size": first(size=1 << 70),
    "digest in capitals": first(sha256=FILES[0]["sha256"].upper()),
    "another digest": first(sha256="0" * 64),
    "no parts": first(parts=[]),
    "parts of another type": first(parts={}),
    "entry of another type": lambda files: files.append(7),
    "part of another type": first(parts=[[]]),
    "bytes twice": part(extents=[[0, 5], [0, 5]]),
    "bytes left out": part(extents=[[1, 4]]),
    "outside the file": part(extents=[[0, 6]]),
    "empty extent": part(extents=[[0, 5], [5, 0]]),
    "no extent": part(extents=[]),
    "extent of three": part(extents=[[0, 5, 0]]),
    "too many pieces": part(packed=[19, 0]),
    "no pieces": part(packed=[]),
    "a shorter piece": part(packed=[18]),
    "a piece larger than any": part(packed=[5 + 1025]),
    "both kinds": part(copy=[0, 0, 0]),
    "columns without bits": part(columns=5),
    "bits without columns": part(bits=8),
    "unknown bits": part(bits=7, columns=5),
    "no columns": part(bits=8, columns=0),
    "broken rows": part(bits=8, columns=4),
    "rows too long": part(bits=8, columns=HUGE),
    "elements broken": part(bits=16, columns=1),
    "centre too large": part(bits=8, columns=5, centre=256),
    "points of wide elements": part(bits=32, columns=1, points=[0, 1, 1, 1, 1]),
    "points outside": part(bits=8, columns=5, points=[1, 5, 5, 1, 1]),
    "too few points": part(bits=8, columns=5, points=[0, 4, 5, 1, 1]),
    "no pitch": part(bits=8, columns=5, points=[0, 5, 0, 1, 1]),
    "no columns per point": part(bits=8, columns=5, points=[0, 5, 5, 1, 0]),
    "points and centre": part(bits=8, columns=5, points=[0, 1, 1, 5, 5], centre=1),
    "four numbers of points": part(bits=8, columns=5, points=[0, 1, 1, 5]),
    "copy of a later file": copied(copy=[2, 0, 0]),
    "copy of itself": copied(copy=[1, 0, 0]),
    "copy of a later part": copied(copy=[1, 1, 0]),
    "copy of no part": copied(copy=[0, 1, 0]),
    "copy beyond the part": copied(copy=[0, 0, 2]),
    "copy from a negative byte": copied(copy=[0, 0, -1]),
    "copy of other bytes": copied(copy=[0, 0, 1]),
    "copy with pieces": copied(packed=[4]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tables_of_contents_that_lie(tmp_path, change):
    error = refused(tmp_path, with_change(change))
    assert error.code == "E_ARCHIVE" and "x.sparseport" in str(error)


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"another digest", "copy of other bytes"}))
def test_lies_are_seen_before_anything_is_unpacked(change):
    """All but the two that contradict nothing in the table of contents: those show in the SHA-256."""
    archive = with_change(CHANGES[change])
    with pytest.raises(BadInput):
        read_contents(io.BytesIO(archive), len(archive), "x")


def test_a_piece_that_would_have_to_be_read_whole(tmp_path):
    """A packed piece is held in memory, so it may not be larger than what it gives, but for a frame around it."""
    piece = archives.plain(HELLO).ljust(1030, b"\0")
    files = [archives.entry("a", HELLO, [{"extents": [[0, 5]], "packed": [len(piece)]}])]
    assert "impossible number or size" in str(refused(tmp_path, archives.write(files, piece)))


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"5", b'{"files": 5}', b'{"files": [], "more": 1}', b'{"files": [NaN]}', b"\xff", b"[" * 5000],
)
def test_tables_of_contents_that_are_none(tmp_path, text):
    assert refused(tmp_path, archives.write(text)).code == "E_ARCHIVE"


def test_a_copy_of_a_copy_is_refused(tmp_path):
    """Chains of copies would have to be followed; the packer names the first."""
    files = copy.deepcopy(FILES)
    files.append({**archives.entry("c", b"hell"), "parts": [{"extents": [[0, 4]], "copy": [1, 0, 0]}]})
    assert refused(tmp_path, archives.write(files, PIECES)).code == "E_ARCHIVE"


def test_a_table_of_contents_that_would_not_fit_into_memory(tmp_path):
    """The frame states its size; nothing is allocated for one that is too large."""
    size = MAX_CONTENTS + 1
    frame = b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little") + b"\x03\x00\x00a"  # one byte, repeated
    with pytest.raises(BadInput, match="at most"):
        raise refused(tmp_path, header_for(frame))


def header_for(contents: bytes) -> bytes:
    return archives.HEADER.pack(archives.MAGIC, 1, 0, 64, len(contents), hashlib.sha256(contents).digest()) + contents


def test_a_piece_that_states_another_size_is_not_unpacked(tmp_path):
    """A bomb: 5 bytes are declared, and the frame would give 4 GiB."""
    frame = b"\x28\xb5\x2f\xfd\xa0\xff\xff\xff\xff\x03\x00\x00a"
    piece = b"\0" + len(frame).to_bytes(4, "little") + frame
    files = [archives.entry("a", HELLO, [{"extents": [[0, 5]], "packed": [len(piece)]}])]
    assert "a frame of 4294967295" in str(refused(tmp_path, archives.write(files, piece)))


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 91, 9))
    error = refused(tmp_path, archives.write(FILES, PIECES))
    assert isinstance(error, EnvironmentProblem) and error.code == "E_NOSPC"


def test_sizes_that_no_disk_has(tmp_path):
    """A file of 2 EiB, all of it one copied byte after the other, is refused by its size alone."""
    size = 1 << 61
    files = [{**archives.entry("a", HELLO), "size": size, "parts": [{"extents": [[0, size]], "copy": [0, 0, 0]}]}]
    assert refused(tmp_path, archives.write(files)).code == "E_ARCHIVE"
    pieces = -(-size // (8 << 20))
    assert pieces > 1 << 30  # so many pieces cannot be listed, so such a file can only be one of elements or copies
    files = [archives.entry("a", HELLO), {**archives.entry("b", HELLO), "size": size}]
    files[1]["parts"] = [{"extents": [[5 * i, 5]], "copy": [0, 0, 0]} for i in range(1000)]
    files[1]["size"] = 5000
    assert "another SHA-256" in str(refused(tmp_path, archives.write(files, archives.plain(HELLO))))
