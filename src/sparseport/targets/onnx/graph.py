"""Put exact weights into the builder's graph: each MatMul's placeholder becomes the layer that was stored.

INT4      [Gather input_order] -> MatMulNBits(codes, Cast(scales), zero_points), with an explicit accuracy_level
floating  Cast(weight) -> Transpose -> MatMul; ONNX Runtime folds both when it loads
embedding Gather(weight) -> Cast, so that only the rows that are looked up are widened

Initializers are named `<module>.codes`, `.zero_points`, `.scales`, `.input_order` and `<module>.weight`. A node that
stands for several layers (q, k and v in one product) has their rows one after the other, and their names joined by `+`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseport.errors import FidelityError
from sparseport.targets.blocks import Block
from sparseport.targets.onnx.layout import OnnxStore, StoredMatrix, StoredNBits

MODEL, DATA = "model.onnx", "model.onnx.data"
JOIN = "+"
Stored = StoredNBits | StoredMatrix
# External tensors start at whole pages, so that a runtime can map them.
_PAGE = 4096
_CHUNK = 16 << 20


class DataFile:
    """The external data file, written front to back."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._name = path.name

    def close(self) -> None:
        self._file.close()

    def tensor(self, name: str, blocks: Sequence[Block], shape: Sequence[int], store: OnnxStore) -> Any:
        """Append blocks of one type, one after the other, as one tensor; returns its `TensorProto`."""
        import onnx

        offset = -(-self._file.tell() // _PAGE) * _PAGE
        self._file.write(b"\0" * (offset - self._file.tell()))
        size = 0
        for block in blocks:
            data = store.view(block)
            for start in range(0, data.size, _CHUNK):
                self._file.write(data[start : start + _CHUNK].data)
            size += data.size
        tensor = onnx.TensorProto(
            name=name,
            dims=shape,
            data_type=onnx.TensorProto.DataType.Value(blocks[0].element_type),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._name), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def write_model(
    skeleton: Path,
    folder: Path,
    matmuls: Mapping[str, Sequence[str]],
    stored: Mapping[str, Stored],
    embedding: str,
    tied: bool,
    store: OnnxStore,
    accuracy_level: int,
) -> None:
    """Write `model.onnx` and `model.onnx.data` into a folder.

    Args:
        skeleton: the builder's graph.
        folder: where to write.
        matmuls: node name -> modules whose weights it multiplies with, in the order of their rows.
        stored: module -> its weight in `store`; the embedding and an untied head among them.
        embedding: module path of the embedding.
        tied: whether the head is the embedding.
        store: the scratch file.
        accuracy_level: of MatMulNBits; 1 computes in float32, 4 quantises activations to int8.

    Raises:
        FidelityError: a layer has no place in the graph, or a place no layer.
    """
    import onnx

    model = onnx.load(skeleton, load_external_data=False)
    writer = _Writer(model.graph, DataFile(folder / DATA), store, accuracy_level)
    try:
        writer.run(matmuls, stored, embedding, tied)
    finally:
        writer.data.close()
    onnx.save(model, folder / MODEL)


class _Writer:
    def __init__(self, graph: Any, data: DataFile, store: OnnxStore, accuracy_level: int) -> None:
        self.graph, self.data, self.store, self.accuracy_level = graph, data, store, accuracy_level
        self.inline = {tensor.name: tensor for tensor in graph.initializer if not tensor.external_data}
        self.outside = {tensor.name for tensor in graph.initializer if tensor.external_data}
        self.initializers: list[Any] = []
        self.nodes: list[Any] = []
        self.made: set[str] = set()  # names of tensors and results

    def run(
        self, matmuls: Mapping[str, Sequence[str]], stored: Mapping[str, Stored], embedding: str, tied: bool
    ) -> None:
        used: set[str] = set()
        for node in list(self.graph.node):
            if node.name in matmuls:
                modules = [embedding] if tied and matmuls[node.name][0] not in stored else list(matmuls[node.name])
                self._linear(node, modules, stored)
                used.update(modules)
            elif node.op_type == "Gather" and node.input[0] in self.outside:
                self._embedding(node, embedding, stored)
                used.add(embedding)
            else:
                self.nodes.append(node)
        if missing := sorted(set(stored) - used):
            raise FidelityError(
                "the graph has no place for this layer",
                where=missing[0],
                fix="check that config.json belongs to the weights",
            )
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.initializer[:]
        self.graph.initializer.extend([*self.inline.values(), *self.initializers])

    def _linear(self, node: Any, modules: list[str], stored: Mapping[str, Stored]) -> None:
        parts = [self._stored(module, stored) for module in modules]
        if len(parts) > 1 and not _joinable(parts):
            # Layers that are stored differently cannot share one product; their results are joined instead.
            outputs = []
            for module, part in zip(modules, parts, strict=True):
                outputs.append(f"{node.output[0]}/{module}")
                self._product(f"{node.name}/{module}", node.input[0], outputs[-1], [module], [part])
            self._node("Concat", outputs, node.output[0], f"{node.name}/Concat", axis=-1)
            return
        self._product(node.name, node.input[0], node.output[0], modules, parts)

    def _product(self, name: str, x: str, y: str, modules: list[str], parts: list[Stored]) -> None:
        label = JOIN.join(modules)
        first = parts[0]
        if isinstance(first, StoredMatrix):
            weight = self._matrix(f"{label}.weight", [part.values for part in parts if isinstance(part, StoredMatrix)])
            self._node("Transpose", [weight], f"{label}.weight/transposed", f"{name}/Transpose", perm=[1, 0])
            self._node("MatMul", [x, f"{label}.weight/transposed"], y, name)
            return
        quantized = [part for part in parts if isinstance(part, StoredNBits)]
        if first.input_order is not None:
            order = self._tensor(f"{label}.input_order", [first.input_order], first.input_order.shape)
            self._node("Gather", [x, order], f"{name}/gathered", f"{name}/Gather", axis=-1)
            x = f"{name}/gathered"
        rows = sum(part.rows for part in quantized)
        inputs = [
            x,
            self._tensor(f"{label}.codes", [part.codes for part in quantized], (rows, *first.codes.shape[1:])),
            self._floats(f"{label}.scales", [part.scales for part in quantized]),
        ]
        if not all(part.symmetric for part in quantized):
            points = [part.zero_points for part in quantized]
            inputs.append(self._tensor(f"{label}.zero_points", points, (rows, *first.zero_points.shape[1:])))
        self._node(
            "MatMulNBits",
            inputs,
            y,
            name,
            domain="com.microsoft",
            K=first.columns,
            N=rows,
            bits=first.bits,
            block_size=first.block_size,
            accuracy_level=self.accuracy_level,
        )

    def _embedding(self, node: Any, module: str, stored: Mapping[str, Stored]) -> None:
        part = self._stored(module, stored)
        if not isinstance(part, StoredMatrix):
            raise FidelityError("a quantised embedding has no place in the ONNX graph yet", where=module)
        name, output = f"{module}.weight", node.output[0]
        if name not in self.made:
            self._tensor(name, [part.values], part.values.shape)
        wide = part.values.element_type == "FLOAT"
        self._node("Gather", [name, node.input[1]], output if wide else f"{output}/half", node.name)
        if not wide:
            self._cast(f"{output}/half", output)

    def _matrix(self, name: str, blocks: list[Block]) -> str:
        """A floating-point matrix made of rows of several, widened to float32; written once."""
        return f"{name}/float" if f"{name}/float" in self.made else self._floats(name, blocks)

    def _floats(self, name: str, blocks: list[Block]) -> str:
        if name not in self.made:
            self._tensor(name, blocks, (sum(block.shape[0] for block in blocks), *blocks[0].shape[1:]))
        if blocks[0].element_type == "FLOAT":
            return name
        self._cast(name, f"{name}/float")
        return f"{name}/float"

    def _cast(self, source: str, target: str) -> None:
        import onnx

        self._node("Cast", [source], target, f"{target}/Cast", to=onnx.TensorProto.FLOAT)

    def _tensor(self, name: str, blocks: Sequence[Block], shape: Iterable[int]) -> str:
        self.initializers.append(self.data.tensor(name, blocks, [int(n) for n in shape], self.store))
        self.made.add(name)
        return name

    def _node(self, kind: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        self.made.add(output)

    def _stored(self, module: str, stored: Mapping[str, Stored]) -> Stored:
        try:
            return stored[module]
        except KeyError:
            raise FidelityError("the graph needs a layer that the checkpoint does not hold", where=module) from None


def _joinable(parts: Sequence[Stored]) -> bool:
    """Whether the rows of these layers can lie in one tensor: same kind, same groups, same column order."""
    first = parts[0]
    if isinstance(first, StoredMatrix):
        return all(
            isinstance(part, StoredMatrix) and part.values.element_type == first.values.element_type for part in parts
        )
    return all(
        isinstance(part, StoredNBits)
        and part.input_order is None
        and first.input_order is None
        and (part.bits, part.block_size, part.columns, part.scales.element_type)
        == (first.bits, first.block_size, first.columns, first.scales.element_type)
        for part in parts
    )
