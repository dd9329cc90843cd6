"""How many bytes a token reads: decoding reads every weight once, but of an input embedding only one row."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Literal

from sparseport.bench.subjects import Subject
from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.verify.certificate import Certificate
from sparseport.verify.folder import GRAPH_FILES

Counted = Literal["certificate", "gguf", "file"]

_EMBEDDING_BYTES = {"fp16": 2, "fp32": 4, "int8": 1}


def bytes_per_token(subject: Subject) -> tuple[int | None, Counted | None]:
    """Bytes of weights that one token reads, and how they were counted.

    `certificate`: the file of weights without the input embedding, where the head has a table of its own. `gguf`: the
    same from a GGUF file's header. `file`: whole files of weights of somebody else's folder, so that an embedding of
    its own is counted too much.
    """
    if subject.kind == "gguf":
        return _of_gguf(subject.path), "gguf"
    if subject.certified:
        certificate = Certificate.read(subject.path)
        weights = int(certificate.files[GRAPH_FILES[certificate.target][1]]["size"])
        return weights - _input_table(certificate), "certificate"
    patterns = {"openvino": "openvino_model.bin", "onnx": "*.onnx*data", "checkpoint": "*.safetensors"}
    sizes = [file.stat().st_size for file in subject.path.glob(patterns[subject.kind])]
    return (sum(sizes), "file") if sizes else (None, None)


def _input_table(certificate: Certificate) -> int:
    """Bytes of an embedding that only looks rows up; 0 if the head multiplies with it."""
    tables = {name: facts for name, facts in certificate.tensors.items() if len(facts["shape"]) == 2}
    matrices: dict[str, dict[str, Any]] = {**tables, **certificate.linears}
    # The input embedding is the largest table that is no linear layer; a head of its own has the same shape.
    name = max(tables, key=lambda one: prod(tables[one]["shape"]), default=None)
    if name is None or not any(
        facts["shape"] == tables[name]["shape"] for other, facts in matrices.items() if other != name
    ):
        return 0
    stored = str(certificate.body.get("recipe", {}).get("embedding", "fp16"))
    return prod(tables[name]["shape"]) * _EMBEDDING_BYTES.get(stored, 2)


def _of_gguf(path: Path) -> int:
    tensors = GgufFile.open(path).tensors
    own_head = "output.weight" in tensors
    return sum(
        tensor.rows * tensor.row_bytes
        for name, tensor in tensors.items()
        if not (own_head and name == "token_embd.weight")
    )
