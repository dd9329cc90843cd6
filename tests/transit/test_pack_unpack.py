"""Folders there and back: any files, determinism, what is refused, what is left behind, and the two verbs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import packed_archives as archives
import sparseport
from sparseport import cli
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, EnvironmentProblem, OutputExists, UsageError, VerificationError
from sparseport.progress import Progress
from sparseport.publish import TEMP_PREFIX
from sparseport.transit import copies, layout
from sparseport.transit.pack import pack
from sparseport.transit.unpack import unpack
from sparseport.verify.certificate import Certificate, file_facts


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def sparse_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A safetensors file with a sparse matrix, a dense one, small tensors, and one that comes twice."""
    random = np.random.default_rng(seed)
    sparse = np.where(random.random((300, 192)) < 0.5, 0, random.normal(size=(300, 192))).astype(np.float16)
    dense = random.normal(size=(200, 256)).astype(np.float32)
    arrays = {"a": sparse, "b": dense, "c": sparse, "n": np.ones(64, np.float32), "i": np.arange(9)}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "m.safetensors", [spec_of(name, array) for name, array in arrays.items()])
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


def certified(folder: Path) -> Path:
    """A folder whose certificate knows its files; what it says of weights does not matter here."""
    fill(folder, {"openvino_model.bin": bytes(range(256)) * 9, "openvino_model.xml": b"<net/>"})
    totals = dict.fromkeys(("linears", "int4_linears", "weights", "masked_weights", "pruned", "revived"), 0)
    files = {name: file_facts(folder / name) for name in tree(folder)}
    body = {"schema": 1, "sparseport": "1", "linears": {}, "tensors": {}, "files": files}
    Certificate(body | {"totals": totals | {"sparsity": "0"}}).write(folder)
    return folder


# --- there and back --------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b.xml", "b.bin", "c.onnx", "d/e.safetensors", "d/f/ü.txt"]),
        st.binary(max_size=300) | st.sampled_from([b"", bytes(5000), b"ab" * 3000]),
        min_size=1,
    )
)
def test_any_files(tmp_path_factory, files):
    """Whatever the files are and are called; the plain reader finds the same in the archive."""
    root = tmp_path_factory.mktemp("any")
    archive = pack(fill(root / "in", files), root / "x").archive
    unpack(archive, root / "out")
    assert tree(root / "out") == files == archives.read(archive.read_bytes())


def test_tensors(tmp_path):
    folder = sparse_checkpoint(tmp_path / "in")
    result = pack(folder, tmp_path / "x")
    unpack(tmp_path / "x", tmp_path / "out")
    files = tree(folder)
    assert tree(tmp_path / "out") == files == archives.read((tmp_path / "x").read_bytes())
    sparse, dense = result.tallies
    assert (sparse.bits, sparse.sparse, sparse.tensors, sparse.elements) == (16, True, 1, 300 * 192)
    assert (dense.bits, dense.sparse, dense.entropy) == (32, False, None)
    with SafeTensorsFile.open(folder / "m.safetensors") as file:
        _, counts = np.unique(file.read("a").view(np.uint16), return_counts=True)
    share = counts / counts.sum()
    assert sparse.entropy_bits == pytest.approx(-(share * np.log2(share)).sum())
    (report,) = (file for file in result.files if file.name == "m.safetensors")
    assert report.copied == 300 * 192 * 2 and report.packed < 0.75 * (report.size - report.copied)
    assert result.size == (tmp_path / "x").stat().st_size and result.unpacked == sum(map(len, files.values()))


def test_the_header_and_a_short_file_byte_by_byte(tmp_path):
    archive = pack(fill(tmp_path / "in", {"a.txt": b"hi\n"}), tmp_path / "x").archive.read_bytes()
    assert archive[:24].hex(" ", 8) == "895350414b0d0a1a 0100000000000000 5500000000000000"
    # A plain piece; its frame has a raw block of three bytes, and behind it the low half of their XXH64.
    assert archive[64:81].hex(" ", 1) == "00 10 00 00 00 28 b5 2f fd 24 03 19 00 00 68 69 0a"
    assert archives.read(archive) == {"a.txt": b"hi\n"}


def test_text_is_packed_as_well_as_the_coder_can(tmp_path):
    text = " ".join(str(number**3) for number in range(3000)).encode()
    (report,) = pack(fill(tmp_path / "in", {"a.txt": text}), tmp_path / "x").files
    frame = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(text)
    assert report.packed == 1 + 4 + len(frame) < len(zstandard.ZstdCompressor(level=3).compress(text))


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    """Order of creation, times and the folder's name do not enter."""
    files = {"b/x.txt": b"1" * 5000, "a.txt": b"1" * 5000, "c": b""}
    one = fill(tmp_path / "one", files)
    other = fill(tmp_path / "other", dict(reversed(files.items())))
    os.utime(other / "c", (1, 1))
    assert pack(one).archive.read_bytes() == pack(other).archive.read_bytes()
    assert pack(one, overwrite=True).archive == tmp_path / "one.sparseport"


def test_pieces_follow_one_another_without_holding_the_file(tmp_path, monkeypatch):
    """Memory goes with the size of a piece, not of the file."""
    monkeypatch.setattr(layout, "PIECE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(layout, "PIECE_BYTES", 1 << 15)
    random = np.random.default_rng(0)
    big = {"w": random.integers(0, 4, (2048, 2048)).astype(np.float16)}
    folder = fill(tmp_path / "in", {"text": bytes(8 << 20)})
    write_safetensors(folder / "m.safetensors", [spec_of(name, array) for name, array in big.items()])
    pack(folder, tmp_path / "warm")
    tracemalloc.start()
    pack(folder, tmp_path / "x")
    unpack(tmp_path / "x", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tree(tmp_path / "out") == tree(folder)
    assert peak < 3 << 20, f"{peak / 2**20:.1f} MiB for a file of 8 MiB"


def test_fused_layers_of_a_second_folder_are_copies(tmp_path, monkeypatch):
    """Three layers that stand one after another in the other folder, and one that is new in its last byte."""
    random = np.random.default_rng(0)
    q, k, v, o = (random.integers(0, 1 << 16, (40, 64)).astype(np.uint16).view(np.float16) for _ in range(4))
    changed = o.copy()
    changed.view(np.uint8)[-1, -1] ^= 1
    folder = tmp_path / "in"
    for name, arrays in (
        ("one", {"q": q, "k": k, "v": v, "o": o}),
        ("two", {"o": changed, "qkv": np.concatenate([q, k, v])}),
    ):
        (folder / name).mkdir(parents=True)
        write_safetensors(folder / name / "m.safetensors", [spec_of(key, array) for key, array in arrays.items()])
    monkeypatch.setattr(copies, "_BLOCK", 1000)
    result = pack(folder, tmp_path / "x")
    unpack(tmp_path / "x", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(folder) == archives.read((tmp_path / "x").read_bytes())
    assert {file.name: file.copied for file in result.files} == {"one/m.safetensors": 0, "two/m.safetensors": 3 * 5120}


# --- certificates ----------------------------------------------------------------------------------------------------


def test_a_certified_folder(tmp_path):
    folder = certified(tmp_path / "in")
    assert pack(folder, tmp_path / "x").certified == [""] == unpack(tmp_path / "x", tmp_path / "out").certified
    both = tmp_path / "both"
    certified(both / "openvino")
    assert pack(both, tmp_path / "y").certified == ["openvino"]
    assert unpack(tmp_path / "y", tmp_path / "out2").certified == ["openvino"]


@pytest.mark.parametrize("prefix", ["", "openvino/"])
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(tmp_path, prefix):
    folder = tmp_path / "in"
    certified(folder / prefix)
    path = folder / f"{prefix}openvino_model.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(VerificationError, match=f"{prefix}openvino_model.bin: content changed"):
        pack(folder, tmp_path / "x")
    path.unlink()
    with pytest.raises(VerificationError, match=f"{prefix}openvino_model.bin: missing"):
        pack(folder, tmp_path / "x")
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


def test_a_changed_certificate_is_refused(tmp_path):
    folder = certified(tmp_path / "in")
    path = folder / "sparseport.json"
    path.write_bytes(path.read_bytes().replace(b'"1"', b'"2"'))
    with pytest.raises(VerificationError, match="certificate was changed"):
        pack(folder, tmp_path / "x")


def test_files_that_the_certificate_does_not_know(tmp_path):
    folder = certified(tmp_path / "in")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError, match=r"notes.txt: not in the certificate.*--ignore-extra"):
        pack(folder, tmp_path / "x")
    pack(folder, tmp_path / "x", ignore_extra=True)
    unpack(tmp_path / "x", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(folder)


def test_an_archive_whose_files_contradict_the_certificate_inside(tmp_path):
    """Somebody who writes an archive anew, with digests that fit, still has the certificate against them."""
    files = tree(certified(tmp_path / "in"))
    files["openvino_model.bin"] = b"other"
    pieces = b"".join(archives.plain(data) for data in files.values())
    (tmp_path / "x").write_bytes(archives.write([archives.entry(name, data) for name, data in files.items()], pieces))
    with pytest.raises(VerificationError, match=r"openvino_model\.bin: content changed"):
        unpack(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is refused, and what is left --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "dangling", "folder link", "empty folder", "fifo", "name", "backslash"])
def test_what_an_archive_does_not_carry(tmp_path, kind):
    folder = fill(tmp_path / "in", {"a": b"1", "d/b": b"2"})
    path = folder / {"name": "a\nb", "backslash": "a\\b"}.get(kind, "x")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty folder":
        path.mkdir()
    elif kind in ("name", "backslash"):
        path.write_text("")
    else:
        path.symlink_to({"link": "a", "dangling": "none", "folder link": "d"}[kind])
    with pytest.raises(BadInput) as caught:
        pack(folder, tmp_path / "out")
    assert caught.value.code == "E_PATH" and caught.value.where == str(path)
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


def test_places_that_cannot_be(tmp_path):
    folder = fill(tmp_path / "in", {"a": b"1"})
    for wrong in (folder, folder / "x", folder / "a" / ".." / "y"):
        with pytest.raises(UsageError, match="in the folder itself"):
            pack(folder, wrong)
    for nothing in (tmp_path / "none", folder / "a"):
        with pytest.raises(UsageError, match="no such folder"):
            pack(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no files"):
        pack(tmp_path / "empty")
    with pytest.raises(BadInput) as caught:
        unpack(tmp_path / "none", tmp_path / "out")
    assert caught.value.code == "E_MISSING"
    with pytest.raises(BadInput, match="no archive"):
        unpack(folder / "a", tmp_path / "out")


def test_an_existing_archive(tmp_path):
    folder = fill(tmp_path / "in", {"a": b"1"})
    output = tmp_path / "x"
    output.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExists):
            pack(folder, output, overwrite=overwrite)
    assert output.read_text() == "precious"
    output.unlink()
    pack(folder, output)
    before = output.read_bytes()
    (folder / "a").write_bytes(b"2")
    with pytest.raises(OutputExists, match="--overwrite"):
        pack(folder, output)
    assert output.read_bytes() == before
    pack(folder, output, overwrite=True)
    assert archives.read(output.read_bytes()) == {"a": b"2"}
    output.unlink()
    output.mkdir()
    with pytest.raises(OutputExists):
        pack(folder, output, overwrite=True)


def test_an_existing_folder(tmp_path):
    pack(certified(tmp_path / "in"), tmp_path / "x")
    out = fill(tmp_path / "out", {"mine": b"precious"})
    for overwrite in (False, True):
        with pytest.raises(OutputExists):
            unpack(tmp_path / "x", out, overwrite=overwrite)
    assert tree(out) == {"mine": b"precious"}
    unpack(tmp_path / "x", tmp_path / "out2")
    (tmp_path / "out2" / "openvino_model.bin").write_bytes(b"spoilt")
    unpack(tmp_path / "x", tmp_path / "out2", overwrite=True)
    assert tree(tmp_path / "out2") == tree(tmp_path / "in")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    folder = sparse_checkpoint(tmp_path / "in")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch("sparseport.transit.pack.write_end", full), pytest.raises(EnvironmentProblem) as caught:
        pack(folder, tmp_path / "x")
    assert caught.value.code == "E_NOSPC"
    assert [one.name for one in tmp_path.iterdir()] == ["in"]
    pack(folder, tmp_path / "x")
    with mock.patch("sparseport.transit.unpack.scatter", full), pytest.raises(EnvironmentProblem) as caught:
        unpack(tmp_path / "x", tmp_path / "out")
    assert caught.value.code == "E_NOSPC"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "x"]


def test_a_file_that_changes_while_it_is_packed(tmp_path):
    folder = fill(tmp_path / "in", {"a": b"1" * 100})

    class Meddler(Progress):
        def task(self, label: str, total: int | None = None) -> Any:
            if label == "packing":
                (folder / "a").write_bytes(b"2" * 100)
                os.utime(folder / "a", (1, 1))
            return super().task(label, total)

    with pytest.raises(BadInput, match="changed while it was packed"):
        pack(folder, tmp_path / "x", progress=Meddler("quiet"))
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


def test_only_one_process_writes_an_archive(tmp_path):
    import fcntl

    folder = fill(tmp_path / "in", {"a": b"1"})
    with (tmp_path / f"{TEMP_PREFIX}lock-x").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputExists) as caught:
            pack(folder, tmp_path / "x")
    assert caught.value.code == "E_LOCKED"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    folder = fill(tmp_path / "in", {"a": b"1"})
    (folder / "a").chmod(0)
    with pytest.raises(EnvironmentProblem) as caught:
        pack(folder, tmp_path / "x")
    assert caught.value.code == "E_READ"


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    folder = fill(tmp_path / "in", {"a": b"1"})
    for call in (lambda: pack(folder, tmp_path / "x"), lambda: unpack(tmp_path / "x", tmp_path / "out")):
        with pytest.raises(EnvironmentProblem, match=r"zstandard.*pip install 'sparseport\[pack\]'"):
            call()


# --- verbs -----------------------------------------------------------------------------------------------------------


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verbs(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    folder = certified(sparse_checkpoint(tmp_path / "in"))
    status, out, err = run(capsys, "pack", folder)
    assert status == 0 and '{"step": "packing", "state": "start"' in err
    assert "m.safetensors" in out and "together" in out and "1 sparse" in out and "no certificate" not in out
    assert f"to unpack: sparseport unpack {tmp_path / 'in.sparseport'} --output DIR" in out
    status, out, err = run(capsys, "unpack", tmp_path / "in.sparseport", "--output", tmp_path / "out", "--quiet")
    assert status == 0 and err == "" and "5 files" in out and f"sparseport verify {tmp_path / 'out'}" in out
    assert tree(tmp_path / "out") == tree(folder)
    assert run(capsys, "unpack", tmp_path / "in.sparseport", "--output", tmp_path / "out", "--quiet")[0] == 6
    shutil.rmtree(tmp_path / "out")
    damaged = bytearray((tmp_path / "in.sparseport").read_bytes())
    damaged[100] ^= 1
    (tmp_path / "in.sparseport").write_bytes(damaged)
    status, out, err = run(capsys, "unpack", tmp_path / "in.sparseport", "--output", tmp_path / "out", "--quiet")
    assert status == 3 and out == "" and err.startswith("error[E_ARCHIVE]: the archive is damaged; in in.sparseport, ")


def test_the_verbs_in_json(capsys, tmp_path):
    folder = sparse_checkpoint(tmp_path / "in")
    status, out, _ = run(capsys, "pack", folder, "--output", tmp_path / "x", "--json", "--quiet")
    said = json.loads(out)
    assert status == 0 and said["certified"] == [] and said["size"] == (tmp_path / "x").stat().st_size
    assert [file["name"] for file in said["files"]] == ["config.json", "m.safetensors"]
    assert said["elements"][0]["packed_bits"] < 16 * 0.75 and said["elements"][0]["zeros"] == pytest.approx(
        0.5, abs=0.01
    )
    status, out, _ = run(capsys, "unpack", tmp_path / "x", "--output", tmp_path / "out", "--json", "--quiet")
    assert status == 0 and json.loads(out) == {
        "folder": str(tmp_path / "out"),
        "size": said["unpacked"],
        "files": 2,
        "certified": [],
    }
    status, out, _ = run(capsys, "pack", folder, "--output", tmp_path / "x", "--json", "--quiet")
    assert status == 6 and json.loads(out)["error"]["code"] == "E_EXISTS"


def test_from_python():
    assert sparseport.pack is pack and sparseport.unpack is unpack
