"""Strict JSON, bare file names, and recognising files that are not what they are called."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sparseport.checkpoints.json_files import read_json, write_json
from sparseport.checkpoints.paths import bare_file, file_sha256
from sparseport.errors import BadInput

REFUSED = {
    "empty": (b"", "E_JSON", "empty"),
    "not JSON": (b"{", "E_JSON", "not valid"),
    "array": (b"[]", "E_JSON", "an array"),
    "string": (b'"x"', "E_JSON", "a string"),
    "number": (b"1", "E_JSON", "a number"),
    "null": (b"null", "E_JSON", "null"),
    "duplicate key": (b'{"a":1,"a":1}', "E_JSON", "'a' appears twice"),
    "duplicate key inside": (b'{"x":{"a":1,"a":2}}', "E_JSON", "'a' appears twice"),
    "NaN": (b'{"a":NaN}', "E_JSON", "NaN"),
    "Infinity": (b'{"a":-Infinity}', "E_JSON", "Infinity"),
    "overflow": (b'{"a":1e999}', "E_JSON", "too large"),
    "long integer": (b'{"a":' + b"9" * 10_000 + b"}", "E_JSON", "not valid"),
    "not UTF-8": (b'{"a":"\xff"}', "E_JSON", "byte 6"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "E_JSON", "byte-order mark"),
    "half a surrogate pair": (b'{"a":["\\ud800"]}', "E_JSON", "surrogate"),
    "trailing text": (b"{} x", "E_JSON", "not valid"),
    "trailing comma": (b'{"a":1,}', "E_JSON", "not valid"),
    "too deep": (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "E_LIMIT", "deeply"),
    "far too deep": (b"[" * 200_000, "E_LIMIT", "deeply"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "E_JSON", "Git LFS"),
    "HTML": (b"\n<!DOCTYPE html>", "E_JSON", "HTML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_json(case, tmp_path):
    content, code, text = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_json(path)
    assert caught.value.code == code
    assert text in str(caught.value) and str(path) in str(caught.value)


def test_depth_of_32_is_fine_and_lists_on_request(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"[" * 32 + b"]" * 32)
    assert read_json(path, allow_list=True) != []
    path.write_bytes(b'{"emoji":"\\ud83d\\ude00","n":1.5}')
    assert read_json(path) == {"emoji": "\U0001f600", "n": 1.5}


def test_size_limit(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a":"0123456789"}')
    assert read_json(path, limit=18) == {"a": "0123456789"}
    with pytest.raises(BadInput) as caught:
        read_json(path, limit=17, what="index")
    assert caught.value.code == "E_LIMIT" and "index is too large" in str(caught.value)


def test_write_json_is_literal(tmp_path):
    write_json(tmp_path / "x.json", {"b": [1], "a": "é"})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "b": [\n    1\n  ],\n  "a": "é"\n}\n'.encode()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../b",
        "a/b",
        "C:\\x",
        "C:x",
        "\\\\srv\\x",
        "",
        ".",
        "..",
        "a\nb",
        "a\0b",
        " x",
        "x" * 256,
        7,
        None,
        ["x"],
    ],
)
def test_only_bare_names(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "lstat", lambda *_: pytest.fail("the disk was touched"))
    with pytest.raises(BadInput) as caught:
        bare_file(tmp_path, name, "shard")
    assert caught.value.code == "E_PATH"
    assert "shard" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_folder_and_regular_file(tmp_path):
    with pytest.raises(BadInput) as caught:
        bare_file(tmp_path, "x", "shard")
    assert caught.value.code == "E_MISSING" and str(tmp_path / "x") in str(caught.value)
    (tmp_path / "d").mkdir()
    with pytest.raises(BadInput, match="a folder"):
        bare_file(tmp_path, "d", "shard")
    (tmp_path / "f").write_bytes(b"abc")
    os.link(tmp_path / "f", tmp_path / "hard")
    assert bare_file(tmp_path, "hard", "shard").read_bytes() == b"abc"
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_links(tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes(b"s")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "real").write_bytes(b"r")
    (folder / "inside").symlink_to("real")
    (folder / "outside").symlink_to(outside)
    (folder / "nowhere").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    assert bare_file(folder, "inside", "shard").read_bytes() == b"r"
    for name in ("outside", "nowhere", "loop"):
        with pytest.raises(BadInput) as caught:
            bare_file(folder, name, "shard")
        assert caught.value.code == "E_PATH"


def test_hugging_face_cache_links(tmp_path):
    entry = tmp_path / "models--a--b"
    snapshot = entry / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "abc").write_bytes(b"x")
    (entry / "other").write_bytes(b"y")
    (snapshot / "good").symlink_to("../../blobs/abc")
    (snapshot / "bad").symlink_to("../../other")
    assert bare_file(snapshot, "good", "shard").read_bytes() == b"x"
    with pytest.raises(BadInput, match="leaves its folder"):
        bare_file(snapshot, "bad", "shard")


def test_fifo(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for read in (lambda: bare_file(tmp_path, "config.json", "config"), lambda: read_json(tmp_path / "config.json")):
        with pytest.raises(BadInput, match="FIFO"):
            read()
