"""The header of a safetensors file: 8 bytes of length, then JSON (format description in the safetensors repository).

The rules here are at least as strict as those of the format's own library: every byte after the header belongs to
exactly one tensor.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.checkpoints.json_files import parse_json
from sparseport.errors import BadInput, EnvironmentProblem, Unsupported

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
MAX_RANK = 8

# Stored dtype -> (bytes per element, numpy name). None: the size is known, but numpy has no such type.
DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (8, "<f8"),
    "F32": (4, "<f4"),
    "F16": (2, "<f2"),
    "BF16": (2, "bfloat16"),
    "I64": (8, "<i8"),
    "I32": (4, "<i4"),
    "I16": (2, "<i2"),
    "I8": (1, "i1"),
    "U64": (8, "<u8"),
    "U32": (4, "<u4"),
    "U16": (2, "<u2"),
    "U8": (1, "u1"),
    "BOOL": (1, "?"),
    "F8_E4M3": (1, None),
    "F8_E5M2": (1, None),
    "F8_E8M0": (1, None),
    "C64": (8, None),
}
READABLE = tuple(code for code, (_, name) in DTYPES.items() if name)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a safetensors file.

    stored  dtype as written in the header (`BF16`)
    shape   as stored
    begin   first byte, counted from the start of the file
    end     one past the last byte, counted from the start of the file
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype (bfloat16 comes from ml_dtypes).

        Raises:
            Unsupported: numpy has no such dtype.
        """
        return numpy_dtype(self.stored, self.name)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def numpy_dtype(stored: str, where: str) -> np.dtype[Any]:
    """The numpy dtype of a stored dtype.

    Raises:
        Unsupported: sparseport cannot read this dtype.
        EnvironmentProblem: bfloat16 is asked for and ml_dtypes is not installed.
    """
    name = DTYPES.get(stored, (0, None))[1]
    if name is None:
        raise Unsupported(
            "tensor dtype cannot be read", where=where, expected=", ".join(READABLE), found=stored, code="E_DTYPE"
        )
    if name == "bfloat16":
        return _bfloat16()
    return np.dtype(name)


def stored_dtype(dtype: np.dtype[Any], where: str) -> str:
    """The header's name of a numpy dtype.

    Raises:
        Unsupported: the format has no name for it, or its byte order is big-endian.
    """
    for stored, (_, name) in DTYPES.items():
        if name == dtype.name or (name not in (None, "bfloat16") and np.dtype(name) == dtype):
            return stored
    raise Unsupported(
        "dtype cannot be stored", where=where, expected=", ".join(READABLE), found=dtype.str, code="E_DTYPE"
    )


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The length of the JSON header in bytes, from the first 8 bytes of the file.

    Raises:
        BadInput: the file is too short, or the length is impossible.
    """
    if len(prefix) < 8:
        raise BadInput(
            "file is too short for a safetensors header",
            where=where,
            expected="at least 8 bytes",
            found=len(prefix),
            fix="download it again",
            code="E_ST_TRUNC",
        )
    (length,) = struct.unpack("<Q", prefix[:8])
    if length < 2 or length > MAX_HEADER_BYTES:
        raise BadInput(
            "safetensors header length is impossible",
            where=where,
            expected=f"2..{MAX_HEADER_BYTES}",
            found=length,
            fix="this is no safetensors file, or it is damaged: download it again",
            code="E_ST_HEADER",
        )
    if 8 + length > file_size:
        raise BadInput(
            "file ends inside its header",
            where=where,
            expected=f"at least {8 + length} bytes",
            found=f"{file_size} bytes",
            fix="download it again",
            code="E_ST_TRUNC",
        )
    return int(length)


def parse_header(data: bytes, file_size: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (ordered by position in the file) and metadata of a safetensors header.

    data       the JSON bytes
    file_size  size of the whole file in bytes

    Raises:
        BadInput: E_ST_HEADER, E_ST_COVER (overlap, hole, trailing bytes), E_ST_TRUNC, E_LIMIT; names file and tensor.
        Unsupported: a dtype whose element size is not known.
    """
    # Counted before parsing, so that a header made to exhaust memory fails at once.
    if data.count(b'"data_offsets"') > MAX_TENSORS:
        raise _too_many(where)
    if not data.startswith(b"{"):
        raise BadInput(
            "safetensors header does not start with '{'", where=where, found=repr(data[:4]), code="E_ST_HEADER"
        )
    entries = parse_json(data, where=where, what="safetensors header", code="E_ST_HEADER")
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    if len(entries) > MAX_TENSORS:
        raise _too_many(where)
    start = 8 + len(data)
    infos = [_entry(name, entry, start, where) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    _check_cover(infos, start, file_size, where)
    return {info.name: info for info in infos}, metadata


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or any(not isinstance(v, str) for v in value.values()):
        raise BadInput("__metadata__ must map text to text", where=where, code="E_ST_HEADER")
    return value


def _entry(name: str, entry: Any, start: int, where: str) -> TensorInfo:
    spot = f"{where}, tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadInput(
            "header entry is malformed", where=spot, expected="dtype, shape and data_offsets", code="E_ST_HEADER"
        )
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in DTYPES:
        raise Unsupported(
            "unknown tensor dtype", where=spot, expected=", ".join(DTYPES), found=repr(stored), code="E_DTYPE"
        )
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise BadInput(
            "shape is not a list of whole numbers",
            where=spot,
            expected=f"at most {MAX_RANK} numbers >= 0",
            found=_short(shape),
            code="E_ST_HEADER",
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(
            "data_offsets are wrong",
            where=spot,
            expected="[begin, end] with 0 <= begin <= end",
            found=_short(offsets),
            code="E_ST_HEADER",
        )
    size = DTYPES[stored][0]
    for length in shape:
        size *= length
    if size >= 1 << 63 or size != offsets[1] - offsets[0]:
        raise BadInput(
            "shape and dtype do not fit the byte range",
            where=spot,
            expected=f"{_short(size)} bytes",
            found=f"{_short(offsets[1] - offsets[0])} bytes",
            code="E_ST_HEADER",
        )
    return TensorInfo(name, stored, tuple(shape), start + offsets[0], start + offsets[1])


def _check_cover(infos: list[TensorInfo], start: int, file_size: int, where: str) -> None:
    position, previous = start, "the header"
    for info in infos:
        if info.begin != position:
            kind = "overlap" if info.begin < position else "leave a hole between them"
            raise BadInput(
                f"tensors {previous} and {info.name} {kind}",
                where=where,
                expected=f"begin at byte {position}",
                found=f"byte {_short(info.begin)}",
                fix="write the file again",
                code="E_ST_COVER",
            )
        if info.nbytes:
            previous = info.name
        position = info.end
    if file_size < position:
        raise BadInput(
            f"file is truncated; tensor {previous} is the last it should hold",
            where=where,
            expected=f"{_short(position)} bytes",
            found=f"{file_size} bytes",
            fix="download it again",
            code="E_ST_TRUNC",
        )
    if file_size > position:
        raise BadInput(
            f"bytes follow after the last tensor ({previous})",
            where=where,
            expected=f"{position} bytes",
            found=f"{file_size} bytes",
            fix="download it again",
            code="E_ST_COVER",
        )


def _naturals(value: Any) -> bool:
    # bool is an int for isinstance, but not for the format
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _short(value: object) -> str:
    # A number of many thousand digits may not be turned into text at all (ValueError), so measure it first.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value[:9]) + "]"
    return repr(value)[:80]


def _too_many(where: str) -> BadInput:
    return BadInput("too many tensors in one file", where=where, expected=f"at most {MAX_TENSORS}", code="E_LIMIT")


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError:
        raise EnvironmentProblem(
            "bfloat16 tensors need the package ml_dtypes", fix="pip install ml_dtypes", code="E_PACKAGE"
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
