"""Read and write safetensors files, one tensor at a time: memory does not grow with the file."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sparseport.checkpoints.paths import file_sha256, open_regular
from sparseport.checkpoints.safetensors_header import (
    TensorInfo,
    header_length,
    numpy_dtype,
    parse_header,
    stored_dtype,
)
from sparseport.checkpoints.sniff import SNIFF_BYTES, recognise
from sparseport.errors import BadInput, FidelityError
from sparseport.weights.linear import U8, Array

__all__ = ["SafeTensorsFile", "TensorInfo", "TensorSpec", "spec_of", "write_safetensors"]


class SafeTensorsFile:
    """A safetensors file, opened and checked; tensors are read on demand from a memory map.

    metadata  the `__metadata__` entry of the header
    """

    def __init__(self, path: Path, mapping: mmap.mmap, infos: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._infos = infos
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def open(cls, path: Path | str) -> SafeTensorsFile:
        """Open a file and check its whole header; no tensor is read.

        Raises:
            BadInput: the file is damaged or no safetensors file; the message names it, and the tensor if there is one.
            Unsupported: a dtype of unknown size.
        """
        path = Path(path)
        where = str(path)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(SNIFF_BYTES)
            # A header length can look like a magic number, so sniff only where no header starts.
            if head[8:9] != b"{" and (meaning := recognise(head)):
                raise BadInput(f"this is {meaning}", where=where, expected="a safetensors file", code="E_ST_HEADER")
            length = header_length(head, size, where)
            file.seek(8)
            header = file.read(length)
            infos, metadata = parse_header(header, size, where)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(path, mapping, infos, metadata)

    def names(self) -> list[str]:
        """Tensor names in the order of their bytes."""
        return list(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            BadInput: there is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise BadInput("tensor is missing", where=f"{self.path}, tensor {name}", code="E_TENSOR") from None

    def read(self, name: str) -> Array:
        """A tensor as a read-only array over the memory map: no bytes are copied.

        Raises:
            BadInput: there is no such tensor.
            Unsupported: numpy has no type for its dtype.
        """
        info = self.info(name)
        dtype = numpy_dtype(info.stored, f"{self.path}, tensor {name}")
        if self._mapping is None:
            raise ValueError(f"{self.path} is closed")
        count = info.nbytes // dtype.itemsize
        if count == 0:
            empty = np.empty(info.shape, dtype)
            empty.flags.writeable = False
            return empty
        array: Array = np.frombuffer(self._mapping, dtype, count, info.begin)
        return array.reshape(info.shape)

    def read_bytes(self, name: str) -> U8:
        """The bytes of a tensor, uint8 [nbytes], over the memory map; works for every dtype."""
        info = self.info(name)
        if self._mapping is None:
            raise ValueError(f"{self.path} is closed")
        if info.nbytes == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._mapping, np.uint8, info.nbytes, info.begin)

    def sha256(self) -> str:
        """SHA-256 of the whole file as lowercase hex."""
        return file_sha256(self.path)

    def release(self) -> None:
        """Give the pages read so far back to the system; they are read again from the file when needed.

        Mapped pages count as the process's memory until then. Arrays that were read stay valid.
        """
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Release the map. Arrays that were read stay valid: the map then goes with the last of them."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with contextlib.suppress(BufferError):
                mapping.close()

    def __enter__(self) -> SafeTensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its description now, its values when its turn comes.

    dtype    numpy dtype (little-endian)
    shape    as stored
    produce  makes the array; called once, when the tensors before it are on disk
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    produce: Callable[[], Array]


def spec_of(name: str, array: Array) -> TensorSpec:
    """The spec of an array that is in memory already."""
    return TensorSpec(name, array.dtype, tuple(array.shape), lambda: array)


def write_safetensors(
    path: Path | str, tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: header first, then one tensor after the other.

    Tensors keep the given order, unless that would leave one at an address its dtype does not divide; then larger
    elements come first (some readers view the bytes in place, and the format allows no padding). The same input gives
    the same bytes. The file appears under its name only when it is whole; its mode follows the umask.

    metadata  `__metadata__` of the header; default {"format": "pt"}, which transformers asks for

    Raises:
        FidelityError: a produced array is not what its spec says, or a name comes twice.
        Unsupported: the format has no such dtype.
    """
    path = Path(path)
    specs = _aligned(list(tensors), path)
    header = _header(specs, {"format": "pt"} if metadata is None else metadata, path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            for spec in specs:
                file.write(_bytes_of(spec, path))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _size(spec: TensorSpec) -> int:
    size = spec.dtype.itemsize
    for length in spec.shape:
        size *= length
    return size


def _aligned(specs: list[TensorSpec], path: Path) -> list[TensorSpec]:
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names) or "__metadata__" in names:
        twice = sorted({n for n in names if names.count(n) > 1 or n == "__metadata__"})[0]
        raise FidelityError("tensor name cannot be written", where=f"{path}, tensor {twice}", found="a second use")
    position = 0
    for spec in specs:
        if position % spec.dtype.itemsize:
            return sorted(specs, key=lambda s: -s.dtype.itemsize)
        position += _size(spec)
    return specs


def _header(specs: list[TensorSpec], metadata: Mapping[str, str], path: Path) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for spec in specs:
        stored = stored_dtype(spec.dtype, f"{path}, tensor {spec.name}")
        end = position + _size(spec)
        entries[spec.name] = {"dtype": stored, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # Spaces up to a multiple of 8 are part of the format: the first tensor is then aligned for any dtype.
    return text + b" " * (-len(text) % 8)


def _bytes_of(spec: TensorSpec, path: Path) -> memoryview:
    array = spec.produce()
    if array.dtype != spec.dtype or tuple(array.shape) != spec.shape:
        raise FidelityError(
            "tensor to be written is not what was announced",
            where=f"{path}, tensor {spec.name}",
            expected=f"{spec.dtype} {spec.shape}",
            found=f"{array.dtype} {tuple(array.shape)}",
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
