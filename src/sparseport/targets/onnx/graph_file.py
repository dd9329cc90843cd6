"""A parsed `model.onnx` and the bytes of its external tensors, for the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparseport.errors import VerificationError
from sparseport.targets.onnx.structure import constant_digest

# ONNX's numbers of element types: FLOAT, UINT8, INT32, INT64, FLOAT16, UINT4.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    10: np.dtype("<f2"),
    21: np.dtype("u1"),
}
_FLOAT, _UINT4 = 1, 21
_EXTERNAL = 1
# Operators that ONNX Runtime registers in ONNX's own domain, where ONNX has none of these names.
_NOT_ONNX = ("SimplifiedLayerNormalization",)
_CONTRIB = "com.microsoft"


class OnnxGraph:
    """The nodes and constants of a graph; external tensors are read when they are asked for, and not kept."""

    def __init__(self, folder: Path, name: str) -> None:
        """Parse a folder's graph.

        Raises:
            VerificationError: it cannot be parsed, two constants or results have one name, or it holds graphs or
                functions inside, whose weights would go unproven.
        """
        import onnx

        self.folder, self.name = folder, name
        try:
            self.model = onnx.load(folder / name, load_external_data=False)
        except Exception as error:
            raise VerificationError("ONNX cannot read the model", where=name, found=str(error)[:120]) from error
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.tensors: dict[str, Any] = {}
        self.inputs = {port.name: port for port in graph.input}
        self.producers: dict[str, Any] = {}
        self.users: dict[str, list[Any]] = {}
        for tensor in graph.initializer:
            self._once(tensor.name, self.tensors)
            self.tensors[tensor.name] = tensor
        inner = any(attribute.HasField("g") or attribute.graphs for node in self.nodes for attribute in node.attribute)
        if graph.sparse_initializer or self.model.functions or inner:
            raise VerificationError("the graph holds parts that are not read back: functions, subgraphs", where=name)
        for node in self.nodes:
            for output in node.output:
                self._once(output, self.producers)
                self.producers[output] = node
            for value in set(node.input):
                self.users.setdefault(value, []).append(node)
        # Results and constants that make up weights: what is left is the graph around them.
        self.spent: set[str] = set()

    def _once(self, name: str, known: dict[str, Any]) -> None:
        if name and (name in self.tensors or name in known):
            raise VerificationError("two constants or results have one name", where=name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a constant."""
        return tuple(int(length) for length in self.tensors[name].dims)

    def bits(self, name: str) -> int:
        """Bits per element of a constant of integers."""
        return 4 if self.tensors[name].data_type == _UINT4 else 8

    def values(self, name: str) -> Any:
        """A constant's values in the dtype it is stored in; 4-bit ones as uint8.

        Raises:
            VerificationError: no such constant, an unknown type, or a place outside its file.
        """
        tensor = self.tensors.get(name)
        dtype = _DTYPES.get(tensor.data_type) if tensor is not None else None
        if tensor is None or dtype is None:
            raise VerificationError("constant is missing or of an unknown type", where=name)
        shape = self.shape(name)
        if min(shape, default=1) < 0:
            raise VerificationError("constant has a negative length", where=name, found=shape)
        count = int(np.prod(shape, dtype=np.int64))
        nibbles = tensor.data_type == _UINT4
        size = -(-count // 2) if nibbles else count * dtype.itemsize
        data = self._external(tensor, size) if tensor.data_location == _EXTERNAL else self._inline(tensor, size)
        flat = np.frombuffer(data, dtype)
        if nibbles:
            # ONNX packs 4-bit elements two to a byte, the first in the low half.
            flat = np.stack([flat & np.uint8(15), flat >> np.uint8(4)], axis=-1).reshape(-1)[:count]
        return flat.reshape(shape)

    def _inline(self, tensor: Any, size: int) -> bytes:
        from onnx import numpy_helper

        if tensor.raw_data:
            data = bytes(tensor.raw_data)
        else:
            try:
                data = numpy_helper.to_array(tensor).tobytes()
            except Exception as error:
                raise VerificationError("constant cannot be read", where=tensor.name, found=str(error)[:80]) from error
        if len(data) != size:
            raise VerificationError("constant has too few or too many bytes", where=tensor.name, found=len(data))
        return data

    def _external(self, tensor: Any, size: int) -> bytes:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        try:
            offset, length = (int(entries.get(key, "0")) for key in ("offset", "length"))
        except ValueError as error:
            raise VerificationError("external data has no place", where=tensor.name, found=str(entries)[:80]) from error
        if not location or Path(location).name != location or location in (".", "..") or "\\" in location:
            raise VerificationError("external data lies outside the folder", where=tensor.name, found=location[:80])
        path = self.folder / location
        if path.is_symlink() or not path.is_file():
            raise VerificationError("external data file is missing", where=location)
        end = path.stat().st_size
        if length != size or offset < 0 or offset + size > end:
            raise VerificationError(
                "external data does not fit its tensor",
                where=f"{location}, {tensor.name}",
                expected=f"{size} bytes",
                found=f"{length} bytes at {offset} of {end}",
            )
        # Read, not mapped: pages of a map would stay in memory until the whole file is there.
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise VerificationError("external data cannot be read to its end", where=f"{location}, {tensor.name}")
        return data

    def digest_of(self, name: str) -> str:
        """Digest of a constant of any type; see `structure.constant_digest`."""
        from onnx import numpy_helper

        tensor = self.tensors[name]
        if tensor.data_type in _DTYPES:
            data = self.values(name).tobytes()
        elif tensor.data_location == _EXTERNAL:
            raise VerificationError("constant is of an unknown type", where=name)
        else:
            data = numpy_helper.to_array(tensor).tobytes()
        return constant_digest(tensor.data_type, self.shape(name), data)

    def constant_behind(self, name: str, kinds: tuple[str, ...], *, spend: bool = False) -> str | None:
        """The constant that a value is made of, looking through operations of some kinds; None if there is none.

        A Cast counts only if it is one to float32.

        spend  whether what is looked through makes up a weight
        """
        passed = [name]
        while name not in self.tensors:
            node = self.producers.get(name)
            if node is None or node.op_type not in kinds or (node.op_type == "Cast" and not _widens(node)):
                return None
            name = node.input[0]
            passed.append(name)
        if spend:
            self.spent.update(passed)
        return name

    def behind(self, name: str, kinds: tuple[str, ...]) -> str:
        """As `constant_behind`, for what makes up a weight.

        Raises:
            VerificationError: there is no constant behind it.
        """
        constant = self.constant_behind(name, kinds, spend=True)
        if constant is None:
            raise VerificationError("a weight is computed by something else", where=name)
        return constant

    def label(self, name: str, suffix: str) -> str:
        """The label of a constant whose name ends in a suffix.

        Raises:
            VerificationError: it is no constant, or named otherwise.
        """
        if name not in self.tensors or not name.endswith(suffix):
            raise VerificationError(f"a quantised layer's constant is not named *{suffix}", where=name)
        self.spent.add(name)
        return name.removesuffix(suffix)

    def producer(self, name: str, kind: str) -> Any:
        """The node that makes a value, which must be of a kind (and a Cast one to float32).

        Raises:
            VerificationError: it is not.
        """
        node = self.producers.get(name)
        if node is None or node.op_type != kind or (kind == "Cast" and not _widens(node)):
            raise VerificationError("operation missing around a weight", where=name, expected=kind)
        self.spent.add(name)
        return node

    def only_user(self, name: str, kind: str) -> Any:
        """The one node that uses a value, which must be of a kind.

        Raises:
            VerificationError: several use it, or one of another kind.
        """
        users = self.users.get(name, [])
        if len(users) != 1 or users[0].op_type != kind:
            found = [user.op_type for user in users]
            raise VerificationError("operation missing around a weight", where=name, expected=kind, found=found)
        self.spent.update(users[0].output)
        return users[0]

    def is_transposed(self, name: str) -> bool:
        """Whether a value is another one with its two axes exchanged."""
        node = self.producers.get(name)
        if node is None or node.op_type != "Transpose":
            return False
        return any(attribute.name == "perm" and list(attribute.ints) == [1, 0] for attribute in node.attribute)

    def check(self) -> None:
        """What onnx's checker says of the graph, apart from weights (read here) and ONNX Runtime's own operators.

        The checker does not know contrib operators, and refuses one that ONNX Runtime has put into ONNX's own domain.
        Weights become inputs of the copy that is checked, so that no data file is asked for.

        Raises:
            VerificationError: the checker refuses it.
        """
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        del copy.graph.initializer[:]
        for tensor in self.tensors.values():
            if tensor.name not in self.inputs:
                port = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                copy.graph.input.append(port)
        for node in copy.graph.node:
            if node.op_type in _NOT_ONNX:
                node.domain = _CONTRIB
        if not any(opset.domain == _CONTRIB for opset in copy.opset_import):
            copy.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))
        try:
            onnx.checker.check_model(copy)
        except onnx.checker.ValidationError as error:
            found = (str(error).strip().splitlines() or [""])[0]
            raise VerificationError("onnx's checker refuses the graph", where=self.name, found=found) from error


def _widens(cast: Any) -> bool:
    """Whether a Cast is one to float32."""
    return any(attribute.name == "to" and attribute.i == _FLOAT for attribute in cast.attribute)
