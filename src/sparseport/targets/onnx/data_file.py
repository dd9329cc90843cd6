"""The external data of an ONNX model: one file beside it, written front to back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseport.targets.blocks import Block, BlockFile

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

        offset = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.write(b"\0" * (offset - self._file.tell()))
        for block in blocks:
            for piece in self._store.pieces(block):
                self._file.write(piece)
        tensor = onnx.TensorProto(
            name=name,
            dims=shape,
            data_type=onnx.TensorProto.DataType.Value(blocks[0].element_type),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", DATA), ("offset", offset), ("length", sum(block.size for block in blocks))):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
