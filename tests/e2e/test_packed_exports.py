"""Real exports of both targets as archives: there and back bit by bit, verified, and damaged at every part."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import packed_archives as archives
from e2e.in_process import in_process
from sparseport.errors import BadInput
from sparseport.transit.contents import HEADER, read_contents
from sparseport.transit.pack import Packed, pack
from sparseport.transit.unpack import unpack
from sparseport.verify.folder import unequal_weights, verify


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def packed(tiny_both: Any, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The archive of the tiny model for both runtimes."""
    return pack(tiny_both[1].folder, tmp_path_factory.mktemp("packed") / "both.sparseport")


def test_both_targets_there_and_back(packed, tiny_both, tmp_path):
    result = unpack(packed.archive, tmp_path / "out")
    assert result.certified == packed.certified == ["openvino", "onnx"]
    assert tree(tmp_path / "out") == tree(tiny_both[1].folder)
    verdicts = [verify(tmp_path / "out" / target) for target in result.certified]
    assert [verdict.differences for verdict in verdicts] == [[], []] and unequal_weights(verdicts) == []


def test_a_reader_in_plain_loops_finds_the_same(packed, tiny_both):
    assert archives.read(packed.archive.read_bytes()) == tree(tiny_both[1].folder)


def test_the_second_runtime_is_mostly_copies(packed):
    """The same codes, fused or not, the same embedding and the same tokenizer are packed once."""
    files = {file.name: file for file in packed.files}
    assert files["onnx/model.onnx.data"].copied > 0.5 * files["onnx/model.onnx.data"].size
    assert [file.copied for name, file in files.items() if name.endswith("/tokenizer.json")].count(0) == 1


@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_every_pruned_code_is_a_zero(tiny_both, target, tmp_path):
    """The map finds the zero-points of each layer in each runtime: what was pruned equals its own."""
    result = pack(tiny_both[1].folder / target, tmp_path / "x")
    codes = result.tallies[0]
    assert codes.bits == 4 and codes.sparse and codes.packed_bits < codes.entropy_bits * 1.25 < 4
    (certificate,) = (one.certificate for one in tiny_both[1].exports if one.target == target)
    assert codes.elements == certificate.totals["weights"] - _dense(certificate)
    assert codes.zeros >= certificate.totals["pruned"] > 0.49 * codes.elements


def _dense(certificate: Any) -> int:
    shapes = [facts["shape"] for facts in certificate.linears.values() if "bits" not in facts]
    return sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_standard_operators_by_rows_and_by_columns(run_export, tiny_qa_inputs, accuracy, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    settings = {"format": "qdq", "accuracy": accuracy}
    with in_process():
        _, exported = run_export(
            **tiny_qa_inputs, target=["onnx"], onnx=settings, numerics=False, tokenizer=False, embedding="int8"
        )
    result = pack(exported.folder, tmp_path / "x")
    unpack(tmp_path / "x", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(exported.folder)
    codes = result.tallies[0]
    assert codes.bits == 4 and codes.zeros >= exported.exports[0].certificate.totals["pruned"] > 0.49 * codes.elements


def test_a_changed_bit_in_every_part_is_found(packed, tmp_path):
    """Each part names its file; nothing is left of the attempt."""
    data = packed.archive.read_bytes()
    with packed.archive.open("rb") as file:
        files = read_contents(file, len(data), "x")
    path, position = tmp_path / "x.sparseport", HEADER.size
    for one in files:
        for part in one.parts:
            for length in part.packed:
                damaged = bytearray(data)
                damaged[position + length // 2] ^= 4
                path.write_bytes(damaged)
                with pytest.raises(BadInput, match="damaged") as caught:
                    unpack(path, tmp_path / "out")
                assert caught.value.where == f"x.sparseport, {one.name}"
                position += length
    assert position < len(data) and [left.name for left in tmp_path.iterdir()] == ["x.sparseport"]


def test_a_damaged_export_is_not_packed(tiny_both, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(tiny_both[1].folder, folder)
    data = folder / "onnx" / "model.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    with pytest.raises(Exception, match=r"onnx/model\.onnx\.data: content changed"):
        pack(folder)
    assert [one.name for one in tmp_path.iterdir()] == ["both"]
