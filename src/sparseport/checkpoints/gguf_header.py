"""The header of a GGUF file: settings with their types, and where each tensor lies; every length is checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sparseport.checkpoints.paths import open_regular
from sparseport.errors import BadInput, EnvironmentProblem, Unsupported
from sparseport.weights.linear import U8

T = TypeVar("T", bool, int, float, str)

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Number of a value type -> struct character. Text and arrays are numbers 8 and 9; a boolean is a byte of 0 or 1.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_CALLED = {bool: "true or false", int: "a whole number", float: "a floating-point number", str: "text"}


class _Damaged(ValueError):
    """The file breaks the format; the text says how."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in a GGUF file.

    kind       block type as ggml calls it ("Q4_1", "F32")
    shape      rows first, as numpy and PyTorch count; the file itself stores the columns first
    begin      first byte, counted from the start of the file
    row_bytes  bytes of one row, a whole number of blocks
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last."""
        count = 1
        for length in self.shape[:-1]:
            count *= length
        return count


class GgufFile:
    """A GGUF file, with its whole header read and checked; weights are read on demand.

    fields   settings as plain Python values; every array is a list of one type
    tensors  name -> place
    """

    def __init__(self, path: Path, fields: dict[str, Any], tensors: dict[str, GgufTensor]) -> None:
        self.path = path
        self.fields = fields
        self.tensors = tensors

    @classmethod
    def open(cls, path: Path | str) -> GgufFile:
        """Read the header; no weight is read.

        Raises:
            BadInput: there is no such file, it is no GGUF file, or it is damaged.
            Unsupported: big-endian, an array of arrays, or a block type that the package `gguf` does not know.
            EnvironmentProblem: the package `gguf` is not installed.
        """
        path = Path(path)
        if not path.is_file():
            raise BadInput("no such GGUF file", where=path, code="E_FILE")
        sizes = _block_sizes()
        with open_regular(path) as file:
            try:
                if os.fstat(file.fileno()).st_size < len(_MAGIC):
                    raise _Damaged("a file of less than 4 bytes")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls(path, *_parse(_Cursor(data), sizes, path))
            except (_Damaged, UnicodeDecodeError) as error:
                raise BadInput(
                    "not a readable GGUF file",
                    where=path,
                    expected="GGUF version 2 or 3",
                    found=error,
                    fix="download the file again",
                    code="E_GGUF",
                ) from error

    def value(self, key: str, kind: type[T], *, code: str = "E_GGUF") -> T | None:
        """A single setting, or None where the file has none.

        Raises:
            BadInput: it is of another type.
        """
        value = self.fields.get(key)
        if value is not None and type(value) is not kind:
            raise self._wrong(key, _CALLED[kind], value, code)
        return value

    def values(self, key: str, kind: type[T], *, code: str = "E_GGUF") -> list[T] | None:
        """A setting that is an array, or None where the file has none.

        Raises:
            BadInput: it is no array, or one of another type.
        """
        value = self.fields.get(key)
        if value is not None and (type(value) is not list or any(type(item) is not kind for item in value)):
            raise self._wrong(key, f"an array, each item {_CALLED[kind]}", value, code)
        return value

    def _wrong(self, key: str, expected: str, value: object, code: str) -> BadInput:
        return BadInput(
            "a setting has the wrong type",
            where=f"{self.path}, {key}",
            expected=expected,
            found=repr(value[:3] if isinstance(value, list) else value)[:80],
            fix="download the file again, or make it again from the model's Hugging Face folder",
            code=code,
        )

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> U8:
        """Rows [start, stop) of a tensor as stored: uint8 [rows, row_bytes], over a map of the file."""
        offset = tensor.begin + start * tensor.row_bytes
        return np.asarray(np.memmap(self.path, np.uint8, "r", offset, (stop - start, tensor.row_bytes)))


def describe_gguf(path: str | Path) -> tuple[dict[str, str], dict[str, int]]:
    """What a GGUF file says about itself, and how many tensors it holds of each type; no weight is read.

    Returns:
        facts (`architecture`, `name`, `layers`, ...) and type name (`Q4_K`) -> number of tensors, the most first.

    Raises:
        BadInput: not a GGUF file, or damaged.
        Unsupported: a block type that the package `gguf` does not know.
        EnvironmentProblem: the package `gguf` is not installed.
    """
    file = GgufFile.open(path)
    architecture = file.fields.get("general.architecture")
    wanted = {
        "architecture": "general.architecture",
        "name": "general.name",
        "layers": f"{architecture}.block_count",
        "hidden size": f"{architecture}.embedding_length",
        "tokenizer": "tokenizer.ggml.model",
    }
    found = {label: file.fields.get(key) for label, key in wanted.items()}
    facts = {label: str(value) for label, value in found.items() if value is not None and not isinstance(value, list)}
    return facts, dict(Counter(tensor.kind for tensor in file.tensors.values()).most_common())


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise _Damaged(f"the file ends inside its header, at byte {len(self.data)}")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def numbers(self, letter: str, count: int) -> list[Any]:
        data = self.take(count * struct.calcsize(letter))
        return list(struct.unpack(f"<{count}{letter}", data))

    def natural(self, letter: str) -> int:
        return int(self.numbers(letter, 1)[0])

    def text(self) -> str:
        return self.take(self.natural("Q")).decode("utf-8")

    def items(self, kind: int, count: int) -> list[Any]:
        """`count` values of one type."""
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise _Damaged(f"value type {kind}")
        found = self.numbers(_SCALARS[kind], count)
        if kind != _BOOL:
            return found
        if not set(found) <= {0, 1}:
            raise _Damaged("a boolean that is neither 0 nor 1")
        return [bool(value) for value in found]


def _parse(
    cursor: _Cursor, sizes: dict[int, tuple[str, int, int]], path: Path
) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if cursor.take(4) != _MAGIC:
        raise _Damaged("another kind of file")
    version = cursor.natural("I")
    if version & 0xFFFF == 0 and version:
        raise Unsupported("big-endian GGUF files are not carried", where=path, fix="take the little-endian file")
    if version not in _VERSIONS:
        raise _Damaged(f"version {version}")
    tensor_count, field_count = cursor.natural("Q"), cursor.natural("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in fields:
            raise _Damaged(f"{key} twice")
        fields[key] = _field(cursor, f"{path}, {key}")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment {repr(alignment)[:40]}, which is no power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, dimensions, kind, offset in entries:
        if name in tensors:
            raise _Damaged(f"tensor {name} twice")
        if kind not in sizes:
            raise Unsupported(
                "unknown GGUF block type",
                where=f"{path}, tensor {name}",
                expected=", ".join(label for label, _, _ in sizes.values()),
                found=f"type {kind}",
                fix="start from the model's Hugging Face folder instead",
            )
        label, block, block_bytes = sizes[kind]
        if dimensions[0] % block or offset % alignment:
            raise _Damaged(f"tensor {name}: {dimensions[0]} columns at offset {offset}")
        tensor = GgufTensor(name, label, dimensions[::-1], start + offset, dimensions[0] // block * block_bytes)
        if tensor.begin + tensor.rows * tensor.row_bytes > len(cursor.data):
            raise _Damaged(f"the file ends before the end of tensor {name}, at byte {len(cursor.data)}")
        tensors[name] = tensor
    return fields, tensors


def _field(cursor: _Cursor, where: str) -> Any:
    kind = cursor.natural("I")
    if kind != _ARRAY:
        return cursor.items(kind, 1)[0]
    kind, count = cursor.natural("I"), cursor.natural("Q")
    if kind == _ARRAY:
        raise Unsupported("an array of arrays is not carried", where=where)
    return cursor.items(kind, count)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions (columns first), number of the block type, offset in the data."""
    name = cursor.text()
    count = cursor.natural("I")
    if not 1 <= count <= _MAX_DIMENSIONS:
        raise _Damaged(f"tensor {name} with {count} dimensions")
    dimensions = tuple(cursor.numbers("Q", count))
    if 0 in dimensions:
        raise _Damaged(f"tensor {name} with an empty dimension")
    return name, dimensions, cursor.natural("I"), cursor.natural("Q")


def _block_sizes() -> dict[int, tuple[str, int, int]]:
    """Number of a block type -> its name, values per block, bytes per block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise EnvironmentProblem("the package gguf is not installed", fix="pip install 'sparseport[train]'") from error
    return {int(kind): (kind.name, block, size) for kind, (block, size) in GGML_QUANT_SIZES.items()}
