"""safetensors: literal bytes, damaged files, and agreement with the format's own library in both directions."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparseport.checkpoints.safetensors import SafeTensorsFile, TensorSpec, spec_of, write_safetensors
from sparseport.errors import BadInput, EnvironmentProblem, FidelityError, SparseportError, Unsupported

GOLDEN = (
    b"\x78\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},'
    b'"n":{"dtype":"I8","shape":[1],"data_offsets":[4,5]}}'
)
NUMPY_DTYPES = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1", "?")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_golden_bytes(tmp_path):
    header = GOLDEN[8:]
    padded = header + b" " * (-len(header) % 8)
    want = struct.pack("<Q", len(padded)) + padded + b"\x00\x3c\x00\xc0\xff"
    tensors = [spec_of("w", np.array([[1, -2]], np.float16)), spec_of("n", np.array([-1], np.int8))]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert (tmp_path / "x.safetensors").read_bytes() == want
    with SafeTensorsFile.open(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert file.names() == ["w", "n"]
        assert file.read("w").tolist() == [[1.0, -2.0]]
        assert (file.info("w").begin, file.info("w").end) == (8 + len(padded), 12 + len(padded))
        assert file.sha256() == hashlib.sha256(want).hexdigest()


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, raw_safetensors):
    header = b'{"__metadata__":{"k":"' + b"v" * (0x280 - 25) + b'"}}'
    data = raw_safetensors(header)
    assert data.startswith(b"\x80\x02")
    with SafeTensorsFile.open(write(tmp_path / "x.safetensors", data)) as file:
        assert file.names() == []


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = {"w": entry()}
DAMAGED = {
    "empty file": (b"", "E_ST_TRUNC", None),
    "seven bytes": (b"\x01\0\0\0\0\0\0", "E_ST_TRUNC", None),
    "one byte short": ((ONE, b"\0" * 3), "E_ST_TRUNC", "w"),
    "no data": ((ONE, b""), "E_ST_TRUNC", "w"),
    "trailing byte": ((ONE, b"\0" * 5), "E_ST_COVER", "w"),
    "length 2^62": (struct.pack("<Q", 1 << 62) + b"{}", "E_ST_HEADER", None),
    "length 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "E_ST_HEADER", None),
    "length -1": (b"\xff" * 8 + b"{}", "E_ST_HEADER", None),
    "length 0": (b"\0" * 8, "E_ST_HEADER", None),
    "length over the file": (struct.pack("<Q", 4096) + b"{}", "E_ST_TRUNC", None),
    "header shorter than the JSON": (struct.pack("<Q", 5) + json.dumps(ONE).encode(), "E_ST_HEADER", None),
    "not UTF-8": ((b'{"\xff":1}', b""), "E_ST_HEADER", None),
    "byte-order mark": ((b"\xef\xbb\xbf{}", b""), "E_ST_HEADER", None),
    "leading NUL": ((b"\0{}", b""), "E_ST_HEADER", None),
    "array": ((b"[1]", b""), "E_ST_HEADER", None),
    "NaN": ((b'{"w":NaN}', b""), "E_ST_HEADER", None),
    "deep": ((b'{"w":' + b"[" * 50 + b"]" * 50 + b"}", b""), "E_LIMIT", None),
    "very deep": ((b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "E_LIMIT", None),
    "overlap": (({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6), "E_ST_COVER", "a and b"),
    "same range twice": (({"a": entry(), "b": entry()}, b"\0" * 4), "E_ST_COVER", "a and b"),
    "hole": (({"a": entry(), "b": entry(offsets=(6, 10))}, b"\0" * 10), "E_ST_COVER", "a and b"),
    "hole at the start": (({"a": entry(offsets=(4, 8))}, b"\0" * 8), "E_ST_COVER", "a"),
    "duplicate key": (
        (
            b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"\0\0",
        ),
        "E_ST_HEADER",
        "w",
    ),
    "negative offset": (({"w": entry(offsets=(-4, 0))}, b""), "E_ST_HEADER", "w"),
    "float offset": (({"w": entry(offsets=(0, 4.0))}, b"\0" * 4), "E_ST_HEADER", "w"),
    "text offset": (({"w": entry(offsets=("0", "4"))}, b"\0" * 4), "E_ST_HEADER", "w"),
    "bool offset": (({"w": entry("U8", offsets=(False, True))}, b"\0"), "E_ST_HEADER", "w"),
    "three offsets": (({"w": entry(offsets=(0, 4, 4))}, b"\0" * 4), "E_ST_HEADER", "w"),
    "begin after end": (({"w": entry(offsets=(4, 0))}, b"\0" * 4), "E_ST_HEADER", "w"),
    "shape over 2^64": (({"w": entry(shape=(1 << 40, 1 << 40))}, b"\0" * 4), "E_ST_HEADER", "w"),
    "enormous number": (
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}', b"\0" * 4),
        "E_ST_HEADER",
        "w",
    ),
    "negative shape": (({"w": entry(shape=(-1, -1))}, b"\0" * 4), "E_ST_HEADER", "w"),
    "rank 9": (({"w": entry(shape=(1,) * 9)}, b"\0" * 4), "E_ST_HEADER", "w"),
    "range too long": (({"w": entry(offsets=(0, 8))}, b"\0" * 8), "E_ST_HEADER", "w"),
    "unknown key": (({"w": {**entry(), "x": 1}}, b"\0" * 4), "E_ST_HEADER", "w"),
    "missing key": (({"w": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "E_ST_HEADER", "w"),
    "entry is a number": (({"w": 1}, b""), "E_ST_HEADER", "w"),
    "metadata is a number": (({"__metadata__": {"a": 1}}, b""), "E_ST_HEADER", None),
    "pickle": (b"\x80\x02}q\x00.", "E_ST_HEADER", "pickle"),
    "zip": (b"PK\x03\x04" + b"\0" * 30, "E_ST_HEADER", "zip"),
    "HTML": (b"<!DOCTYPE html><html></html>", "E_ST_HEADER", "HTML"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "E_ST_HEADER", "Git LFS"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_by_name(case, tmp_path, raw_safetensors):
    content, code, named = DAMAGED[case]
    data = content if isinstance(content, bytes) else raw_safetensors(*content)
    path = write(tmp_path / "bad.safetensors", data)
    with pytest.raises(BadInput) as caught:
        SafeTensorsFile.open(path)
    assert caught.value.code == code
    assert str(path) in str(caught.value)
    assert named is None or named in str(caught.value)


@pytest.mark.parametrize("dtype", ["I4", "C128", "f32", "", 7, None])
def test_unknown_dtype_lists_the_known_ones(dtype, tmp_path, raw_safetensors):
    path = write(tmp_path / "bad.safetensors", raw_safetensors({"w": entry(dtype)}, b"\0" * 4))
    with pytest.raises(Unsupported, match="BF16") as caught:
        SafeTensorsFile.open(path)
    assert "tensor w" in str(caught.value) and str(path) in str(caught.value)


def test_known_but_unreadable_dtype_fails_only_when_read(tmp_path, raw_safetensors):
    header = {"q": entry("F8_E4M3", (4,)), "w": entry("U8", (1,), (4, 5))}
    with SafeTensorsFile.open(write(tmp_path / "f8.safetensors", raw_safetensors(header, b"abcde"))) as file:
        assert file.read("w").tolist() == [ord("e")]
        assert file.read_bytes("q").tobytes() == b"abcd"
        with pytest.raises(Unsupported, match="tensor q"):
            file.read("q")


def test_a_million_entries_fail_fast(tmp_path):
    entries = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000))
    header = b"{" + entries + b"}"
    path = write(tmp_path / "many.safetensors", struct.pack("<Q", len(header)) + header)
    start = time.monotonic()
    with pytest.raises(BadInput) as caught:
        SafeTensorsFile.open(path)
    assert caught.value.code == "E_LIMIT"
    assert time.monotonic() - start < 5


def test_bfloat16_without_its_package_says_what_to_install(tmp_path, raw_safetensors, monkeypatch):
    path = write(tmp_path / "b.safetensors", raw_safetensors({"w": entry("BF16", (1,), (0, 2))}, b"\x80\x3f"))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with SafeTensorsFile.open(path) as file, pytest.raises(EnvironmentProblem, match="pip install ml_dtypes"):
        file.read("w")


def test_bfloat16_values(tmp_path, raw_safetensors):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    data = raw_safetensors({"w": entry("BF16", (2,))}, b"\x80\x3f\x00\xc0")
    with SafeTensorsFile.open(write(tmp_path / "b.safetensors", data)) as file:
        array = file.read("w")
        assert array.dtype == ml_dtypes.bfloat16
        assert array.astype(np.float32).tolist() == [1.0, -2.0]
        write_safetensors(tmp_path / "c.safetensors", [spec_of("w", array)])
    assert (tmp_path / "c.safetensors").read_bytes().endswith(b"\x80\x3f\x00\xc0")


def test_arrays_are_read_only_and_outlive_the_file(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", [spec_of("w", np.arange(4, dtype=np.float32))])
    file = SafeTensorsFile.open(tmp_path / "x.safetensors")
    array = file.read("w")
    file.close()
    file.close()
    assert array.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="closed"):
        file.read("w")
    with pytest.raises(BadInput, match="tensor nothing"):
        file.info("nothing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="FIFO") as caught:
        SafeTensorsFile.open(tmp_path / "x.safetensors")
    assert caught.value.code == "E_PATH"


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "x.safetensors", [])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [spec_of("w", np.zeros(1, np.float32))])
    before = path.read_bytes()
    wrong = TensorSpec("w", np.dtype("<f4"), (2,), lambda: np.zeros(3, np.float32))
    with pytest.raises(FidelityError, match="tensor w"):
        write_safetensors(path, [wrong])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_made_one_at_a_time(tmp_path):
    made = []

    def produce(i):
        made.append(i)
        partial = tmp_path / ".x.safetensors.partial"
        assert partial.exists()
        return np.full(3, i, np.int32)

    specs = [TensorSpec(f"t{i}", np.dtype("<i4"), (3,), lambda i=i: produce(i)) for i in range(4)]
    assert made == []
    write_safetensors(tmp_path / "x.safetensors", specs)
    assert made == [0, 1, 2, 3]


def test_names_and_dtypes_that_cannot_be_written(tmp_path):
    one = spec_of("w", np.zeros(1, np.float32))
    with pytest.raises(FidelityError, match="tensor w"):
        write_safetensors(tmp_path / "x", [one, one])
    with pytest.raises(FidelityError, match="__metadata__"):
        write_safetensors(tmp_path / "x", [spec_of("__metadata__", np.zeros(1))])
    for dtype in (">f4", "<c16", "U3"):
        with pytest.raises(Unsupported, match="tensor w"):
            write_safetensors(tmp_path / "x", [spec_of("w", np.zeros(1, dtype))])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("round-trip")


arrays = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__"),
    st.sampled_from(NUMPY_DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    ),
    max_size=5,
)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@settings(max_examples=150, deadline=None)
@given(tensors=arrays)
def test_our_writer_their_reader(tensors, scratch):
    path = scratch / "ours.safetensors"
    write_safetensors(path, [spec_of(name, array) for name, array in tensors.items()])
    theirs = reference.load_file(path)
    assert set(theirs) == set(tensors)
    assert all(same(theirs[name], tensors[name]) for name in tensors)


@settings(max_examples=150, deadline=None)
@given(tensors=arrays)
def test_their_writer_our_reader(tensors, scratch):
    path = scratch / "theirs.safetensors"
    reference.save_file({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}, path)
    with SafeTensorsFile.open(path) as file:
        assert set(file.names()) == set(tensors)
        assert all(same(file.read(name), tensors[name]) for name in tensors)


@settings(max_examples=100, deadline=None)
@given(tensors=arrays)
def test_written_tensors_are_aligned(tensors, scratch):
    path = scratch / "aligned.safetensors"
    write_safetensors(path, [spec_of(name, array) for name, array in tensors.items()])
    with SafeTensorsFile.open(path) as file:
        assert all(file.info(name).begin % array.dtype.itemsize == 0 for name, array in tensors.items())


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_accepted_by_both(data, scratch):
    tensors = {"a": np.arange(3, dtype=np.float32), "b": np.arange(4, dtype=np.int8)}
    content = bytearray(reference.save(tensors, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = scratch / "mutant.safetensors"
    path.write_bytes(content)
    try:
        with SafeTensorsFile.open(path) as file:
            ours = file.names()
            shapes = {name: list(file.info(name).shape) for name in ours}
    except SparseportError as error:
        assert str(path) in str(error)
        return
    # What we accept, the format's own library accepts too, and reads alike.
    with reference.safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(ours)
        assert all(theirs.get_slice(name).get_shape() == shapes[name] for name in ours)
