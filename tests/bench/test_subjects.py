"""What a path is, which engines run it, and how many bytes a token of it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.bench import energy
from sparseport.bench.subjects import Contender, Subject, contenders, subjects_at, subjects_of
from sparseport.bench.traffic import bytes_per_token
from sparseport.errors import BadInput, UsageError
from sparseport.verify.certificate import Certificate


def openvino(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "openvino_model.xml").write_text("<net/>")
    (folder / "openvino_model.bin").write_bytes(bytes(100))
    return folder


def onnx(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "genai_config.json").write_text("{}")
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(bytes(70))
    return folder


def test_kinds(tmp_path: Path) -> None:
    checkpoint = tmp_path / "hf"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    paths = {openvino(tmp_path / "ov"): "openvino", onnx(tmp_path / "ort"): "onnx"}
    paths |= {checkpoint: "checkpoint", file: "gguf"}
    for path, kind in paths.items():
        (subject,) = subjects_of(path)
        assert (subject.kind, subject.label) == (kind, path.name)


def test_a_folder_of_two_targets_stands_for_both(tmp_path: Path) -> None:
    openvino(tmp_path / "out" / "openvino")
    onnx(tmp_path / "out" / "onnx")
    assert [(one.label, one.kind) for one in subjects_of(tmp_path / "out")] == [
        ("out/openvino", "openvino"),
        ("out/onnx", "onnx"),
    ]


def test_folders_of_one_name_have_labels_of_their_own(tmp_path: Path) -> None:
    paths = [openvino(tmp_path / "one" / "out"), openvino(tmp_path / "two" / "out"), onnx(tmp_path / "other")]
    assert [one.label for one in subjects_at(paths)] == ["one/out", "two/out", "other"]
    (alone,) = subjects_at(paths[:1])
    assert alone.label == "out" and subjects_at([alone]) == [alone]
    deep = [openvino(tmp_path / name / "a" / "b" / "c" / "d") for name in "xy"]
    assert len({one.label for one in subjects_at(deep)}) == 2
    with pytest.raises(BadInput, match="named twice"):
        subjects_at([paths[0], str(paths[0])])


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "notes.txt", tmp_path / "empty"):
        with pytest.raises(BadInput) as raised:
            subjects_of(path)
        assert str(path) in str(raised.value)


def test_engines_by_default_and_as_asked(tmp_path: Path) -> None:
    subjects = subjects_of(openvino(tmp_path / "a")) + subjects_of(onnx(tmp_path / "b"))
    assert [row.engine for row in contenders(subjects, None)] == ["openvino-genai", "onnxruntime-genai"]
    both = contenders(subjects, ["openvino", "openvino-genai", "onnxruntime-genai"])
    assert [row.engine for row in both] == ["openvino-genai", "openvino", "onnxruntime-genai"]
    with pytest.raises(UsageError, match="no such engine"):
        contenders(subjects, ["vllm"])
    with pytest.raises(UsageError, match="none of the engines runs this"):
        contenders(subjects, ["openvino"])
    with pytest.raises(UsageError, match="runs none of these"):
        contenders(subjects[:1], ["openvino", "llama.cpp"])


def test_labels_name_what_differs(tmp_path: Path) -> None:
    subject = Subject(tmp_path, "openvino", "out")
    assert Contender(subject, "openvino").label == "out, openvino"
    row = Contender(subject, "openvino", "GPU", {"B": 2, "A": 1})
    assert row.label == "out, openvino on GPU (A=1, B=2)"


def certificate(folder: Path, tensors: dict[str, list[int]], linears: dict[str, list[int]], embedding: str) -> None:
    """A folder's certificate as far as the count of bytes reads it."""

    def entry(shape: list[int]) -> dict[str, Any]:
        return {"shape": shape, "readback": {"openvino": "0"}}

    size = (folder / "openvino_model.bin").stat().st_size
    totals = dict.fromkeys(("linears", "int4_linears", "weights", "masked_weights", "pruned", "revived"), 0)
    Certificate(
        {
            "schema": 1,
            "sparseport": "0",
            "target": "openvino",
            "recipe": {"embedding": embedding},
            "files": {"openvino_model.bin": {"sha256": "0", "size": size}},
            "linears": {name: entry(shape) for name, shape in linears.items()},
            "tensors": {name: entry(shape) for name, shape in tensors.items()},
            "totals": {**totals, "sparsity": "0"},
        }
    ).write(folder)


@pytest.mark.parametrize(
    ("tensors", "linears", "embedding", "expected"),
    [
        # A tied table is multiplied with: every byte of it is read for each token.
        ({"embed.weight": [8, 4], "norm.weight": [4]}, {"up": [6, 4]}, "fp16", 1000),
        # With a head of its own, the table is only looked up.
        ({"embed.weight": [8, 4]}, {"up": [6, 4], "head": [8, 4]}, "fp16", 1000 - 64),
        ({"embed.weight": [8, 4]}, {"up": [6, 4], "head": [8, 4]}, "fp32", 1000 - 128),
        ({"embed.weight": [8, 4], "head.weight": [8, 4]}, {"up": [6, 4]}, "int8", 1000 - 32),
    ],
)
def test_bytes_of_a_certified_folder(
    tmp_path: Path, tensors: dict[str, list[int]], linears: dict[str, list[int]], embedding: str, expected: int
) -> None:
    folder = openvino(tmp_path / "out")
    (folder / "openvino_model.bin").write_bytes(bytes(1000))
    certificate(folder, tensors, linears, embedding)
    assert bytes_per_token(subjects_of(folder)[0]) == (expected, "certificate")


def test_bytes_of_other_folders_are_those_of_their_files(tmp_path: Path) -> None:
    assert bytes_per_token(subjects_of(openvino(tmp_path / "a"))[0]) == (100, "file")
    assert bytes_per_token(subjects_of(onnx(tmp_path / "b"))[0]) == (70, "file")


@pytest.mark.parametrize(("own_head", "expected"), [(True, 4 * 32 * 4 + 8 * 32 * 4), (False, 4 * 32 * 4 + 8 * 32 * 4)])
def test_bytes_of_a_gguf_file(tmp_path: Path, own_head: bool, expected: int) -> None:
    """Written by the gguf package; with a head of its own the embedding does not count, else it does."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((4, 32), np.float32))
    if own_head:
        writer.add_tensor("output.weight", np.ones((8, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert bytes_per_token(subjects_of(tmp_path / "model.gguf")[0]) == (expected, "gguf")


def test_vocabulary_of_a_config(tmp_path: Path) -> None:
    folder = openvino(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    assert subjects_of(folder)[0].vocabulary() == 7
    (folder / "config.json").write_text(json.dumps({}))
    with pytest.raises(BadInput, match="vocabulary"):
        subjects_of(folder)[0].vocabulary()


def zone(root: Path, name: str, counter: str, limit: int = 1000) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "energy_uj").write_text(counter)
    (root / name / "max_energy_range_uj").write_text(str(limit))


def test_energy_of_packages_with_a_counter_that_turns_over(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "900")
    zone(tmp_path, "intel-rapl:0:0", "5")  # the cores of package 0: counted in it
    zone(tmp_path, "intel-rapl:1", "100")
    before = energy.read(tmp_path)
    assert before is not None
    assert sorted(before) == ["intel-rapl:0", "intel-rapl:1"]
    zone(tmp_path, "intel-rapl:0", "100")
    zone(tmp_path, "intel-rapl:1", "150")
    after = energy.read(tmp_path)
    assert after is not None
    assert energy.between(before, after) == pytest.approx((200 + 50) / 1e6)


def test_energy_is_none_where_nothing_tells(tmp_path: Path) -> None:
    assert energy.read(tmp_path / "absent") is None
    assert energy.read(tmp_path) is None
    zone(tmp_path, "intel-rapl:0", "not a number")
    assert energy.read(tmp_path) is None
