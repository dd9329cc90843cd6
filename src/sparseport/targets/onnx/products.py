"""The nodes that compute with one weight, and the initializers that hold it.

nbits     MatMulNBits(x, codes, Cast(scales), zero_points), with an explicit accuracy_level
rows      MatMul(x, Transpose(DequantizeLinear(codes, Cast(scales), zero_points, axis 1)))
columns   MatMul(x, DequantizeLinear(codes, Cast(scales), zero_points, axis 0))
floating  MatMul(x, Transpose(Cast(weight))); runtimes fold the right side when they load
8 bits    MatMul(x, Transpose((Cast(codes) - Cast(zero_points)) * Cast(scales))), folded likewise: in float32 ONNX
          Runtime's MatMulNBits is fifteen times slower at 8 bits; at its fast level it is the best, and taken
look-up   Cast(Gather(weight)), so that only the rows that are looked up are widened; a quantised table is looked up in
          codes, scales and zero-points, and the rows are dequantised as above

With act-order, x is gathered by `input_order` first. Initializers are named `<label>.codes`, `.zero_points`, `.scales`,
`.input_order`; a floating one is its label. Rows of several layers in one tensor have their labels joined by `+`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparseport.errors import Unsupported
from sparseport.targets.blocks import Block
from sparseport.targets.onnx.data_file import DataFile
from sparseport.targets.onnx.store import Layout, Stored, StoredMatrix, StoredNBits

JOIN = "+"
EXACT_LEVEL, FAST_LEVEL = 1, 4
"""MatMulNBits' accuracy_level: 1 multiplies in float32, 4 rounds activations to int8 first."""


class Products:
    """Collects nodes and initializers; a tensor that several nodes use is written once."""

    def __init__(self, data: DataFile, accuracy_level: int) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._data, self._accuracy_level = data, accuracy_level
        self._fast = accuracy_level == FAST_LEVEL
        self._made: set[str] = set()  # names of tensors and results

    def product(self, name: str, x: str, y: str, parts: Sequence[Stored]) -> None:
        """y = x @ W^T with the rows of all `parts`, which `joinable` allows in one tensor.

        Args:
            name: name of the node that multiplies.
            x: its input.
            y: its output.
            parts: the layers.
        """
        matrices = [part for part in parts if isinstance(part, StoredMatrix)]
        if matrices:
            weight = self._floats(JOIN.join(part.label for part in matrices), [part.values for part in matrices])
            self._transposed(weight, name)
            self.node("MatMul", [x, f"{weight}/transposed"], y, name)
            return
        quantized = [part for part in parts if isinstance(part, StoredNBits)]
        first, label = quantized[0], JOIN.join(part.label for part in quantized)
        if first.input_order is not None:
            order = self._tensor(f"{label}.input_order", [first.input_order], first.input_order.shape)
            self.node("Gather", [x, order], f"{name}/gathered", f"{name}/Gather", axis=-1)
            x = f"{name}/gathered"
        inputs = self._parts_of(label, quantized)
        if first.bits == 8 and not (first.layout is Layout.NBITS and self._fast):
            weight = f"{label}/dequantized"
            if weight not in self._made:
                self._dequantize(weight, inputs, first, [-1], weight)
            self._transposed(weight, name)
            self.node("MatMul", [x, f"{weight}/transposed"], y, name)
            return
        if first.layout is Layout.NBITS:
            self.node(
                "MatMulNBits",
                [x, *inputs],
                y,
                name,
                domain="com.microsoft",
                K=first.columns,
                N=sum(part.rows for part in quantized),
                bits=first.bits,
                block_size=first.block_size,
                accuracy_level=self._accuracy_level,
            )
            return
        weight = f"{label}/dequantized"
        if weight not in self._made:
            axis = 1 if first.layout is Layout.ROWS else 0
            kind = "DequantizeLinear"
            self.node(kind, inputs, weight, f"{name}/{kind}", axis=axis, block_size=first.block_size)
        if first.layout is Layout.ROWS:
            self._transposed(weight, name)
            weight = f"{weight}/transposed"
        self.node("MatMul", [x, weight], y, name)

    def look_up(self, name: str, indices: str, y: str, part: Stored) -> None:
        """y = the rows of a table that the indices name.

        Raises:
            Unsupported: a table in 4 bits.
        """
        if isinstance(part, StoredMatrix):
            if part.label not in self._made:
                self._tensor(part.label, [part.values], part.values.shape)
            wide = part.values.element_type == "FLOAT"
            self.node("Gather", [part.label, indices], y if wide else f"{y}/half", name)
            if not wide:
                self._cast(f"{y}/half", y)
            return
        if part.bits != 8:
            raise Unsupported(
                "an embedding in 4 bits has no look-up",
                where=part.label,
                fix="use a base with an embedding in 8 or 16 bits",
            )
        self._quantized_look_up(name, indices, y, part)

    def node(self, kind: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> None:
        """Add a node with one output."""
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        self._made.add(output)

    def _quantized_look_up(self, name: str, indices: str, y: str, part: StoredNBits) -> None:
        found = []
        for kind, table in zip(("codes", "scales", "zero_points"), self._parts_of(part.label, [part]), strict=True):
            # The look-up of the codes keeps the node's name: it is where the table is used.
            self.node(
                "Gather", [table, indices], f"{name}/{kind}", name if kind == "codes" else f"{name}/{kind}/Gather"
            )
            found.append(f"{name}/{kind}")
        self._dequantize(name, found, part, [0, 0], y)

    def _dequantize(self, name: str, values: Sequence[str], part: StoredNBits, lead: list[int], y: str) -> None:
        """y = (codes - zero_points) * scales, group by group.

        Args:
            name: prefix of the nodes' names.
            values: codes [*lead, columns, in any shape], scales and zero-points [*lead, groups].
            part: the groups.
            lead: the leading lengths as Reshape writes them: 0 keeps one, -1 is what is left.
            y: the result, [*lead, columns].
        """
        codes, scales, points = values
        for value in (codes, points):
            self._cast(value, f"{value}/wide")
        reshaped: list[str] = []
        for value, lengths in (
            (f"{codes}/wide", [part.groups, part.block_size]),
            (f"{points}/wide", [part.groups, 1]),
            (scales, [part.groups, 1]),
        ):
            shape = self._constant(f"{name}/shape/{len(reshaped)}", [*lead, *lengths])
            self.node("Reshape", [value, shape], f"{value}/grouped", f"{value}/Reshape")
            reshaped.append(f"{value}/grouped")
        self.node("Sub", reshaped[:2], f"{name}/steps", f"{name}/Sub")
        self.node("Mul", [f"{name}/steps", reshaped[2]], f"{name}/values", f"{name}/Mul")
        self.node(
            "Reshape", [f"{name}/values", self._constant(f"{name}/shape", [*lead, part.columns])], y, f"{name}/Reshape"
        )

    def _parts_of(self, label: str, parts: Sequence[StoredNBits]) -> list[str]:
        """Names of codes, scales as float32, and zero-points (left out where 4-bit ones are all 8 and may be)."""
        first = parts[0]
        names = [
            self._joined(f"{label}.codes", [part.codes for part in parts]),
            self._floats(f"{label}.scales", [part.scales for part in parts]),
        ]
        # MatMulNBits takes the middle for absent zero-points, DequantizeLinear takes 0.
        if not (first.layout is Layout.NBITS and first.bits == 4 and all(part.symmetric for part in parts)):
            names.append(self._joined(f"{label}.zero_points", [part.zero_points for part in parts]))
        return names

    def _transposed(self, weight: str, name: str) -> None:
        if f"{weight}/transposed" not in self._made:
            self.node("Transpose", [weight], f"{weight}/transposed", f"{name}/Transpose", perm=[1, 0])

    def _floats(self, name: str, blocks: list[Block]) -> str:
        """Rows of several blocks as one float32 tensor; half precision is stored as it is and widened."""
        self._joined(name, blocks)
        return self.widened(name, blocks[0].element_type)

    def widened(self, name: str, element_type: str) -> str:
        """A value as float32: itself, or what a Cast makes of it."""
        if element_type == "FLOAT":
            return name
        if f"{name}/float" not in self._made:
            self._cast(name, f"{name}/float")
        return f"{name}/float"

    def _cast(self, source: str, target: str) -> None:
        import onnx

        self.node("Cast", [source], target, f"{target}/Cast", to=onnx.TensorProto.FLOAT)

    def _joined(self, name: str, blocks: Sequence[Block]) -> str:
        if name not in self._made:
            self._tensor(name, blocks, (sum(block.shape[0] for block in blocks), *blocks[0].shape[1:]))
        return name

    def _tensor(self, name: str, blocks: Sequence[Block], shape: Iterable[int]) -> str:
        self.initializers.append(self._data.tensor(name, blocks, [int(n) for n in shape]))
        self._made.add(name)
        return name

    def _constant(self, name: str, values: Sequence[int]) -> str:
        import onnx

        if name not in self._made:
            shape = [len(values)]
            self.initializers.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, shape, list(values)))
            self._made.add(name)
        return name


def joinable(parts: Sequence[Stored]) -> bool:
    """Whether the rows of these layers can lie in one tensor: same kind, same groups, same column order."""
    first = parts[0]
    if len(parts) == 1:
        return True
    if isinstance(first, StoredMatrix):
        return all(
            isinstance(part, StoredMatrix) and part.values.element_type == first.values.element_type for part in parts
        )
    return first.layout is not Layout.COLUMNS and all(
        isinstance(part, StoredNBits)
        and part.input_order is None
        and first.input_order is None
        and (part.bits, part.block_size, part.columns, part.scales.element_type)
        == (first.bits, first.block_size, first.columns, first.scales.element_type)
        for part in parts
    )
