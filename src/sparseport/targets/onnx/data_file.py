"""The external data of an ONNX model: one file beside it, written front to back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseport.targets.blocks import Block, BlockFile
from sparseport.weights.linear import Array

DATA = "model.onnx.data"
# External tensors start at whole pages, so that a runtime can map them.
_PAGE = 4096


class DataFile:
    """Copies blocks of the scratch file to their places, a piece at a time, so that memory does not grow."""

    def __init__(self, folder: Path, store: BlockFile) -> None:
        self._file = (folder / DATA).open("wb")
        self._store = store

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensor(self, name: str, blocks: Sequence[Block], shape: Sequence[int]) -> Any:
        """Append blocks of one type, one after the other, as one tensor; returns its `TensorProto`."""
        import onnx

        offset = self._next_page()
        for block in blocks:
            for piece in self._store.pieces(block):
                self._file.write(piece)
        return self._proto(name, onnx.TensorProto.DataType.Value(blocks[0].element_type), shape, offset)

    def array(self, name: str, values: Array, data_type: int) -> Any:
        """Append an array as a tensor of ONNX's element type `data_type`."""
        offset = self._next_page()
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return self._proto(name, data_type, values.shape, offset)

    def _next_page(self) -> int:
        offset = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.write(b"\0" * (offset - self._file.tell()))
        return offset

    def _proto(self, name: str, data_type: int, shape: Sequence[int], offset: int) -> Any:
        """The tensor whose bytes go from `offset` to the end of the file."""
        import onnx

        external = onnx.TensorProto.EXTERNAL
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=data_type, data_location=external)
        for key, value in (("location", DATA), ("offset", offset), ("length", self._file.tell() - offset)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
