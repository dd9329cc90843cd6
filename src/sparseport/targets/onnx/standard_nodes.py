"""What a pass over an ONNX graph needs: names, constants and shapes of the old nodes, and a writer for the new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sparseport.errors import Unsupported

# What the refusals advise: the other format keeps ONNX Runtime's own operators.
WAY_OUT = "use --onnx-format nbits"


class NodeWriter:
    """Collects the nodes of the new graph in order; those that replace a node are named after it.

    nodes         the new graph's nodes
    initializers  constants that the new nodes read
    scope         name of the node that is being replaced; new names start with it
    """

    def __init__(self, graph: Any) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.scope = ""
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {output: node for node in graph.node for output in node.output if output}
        self._infos = {info.name: info for info in [*graph.value_info, *graph.input, *graph.output]}
        self._taken = {node.name for node in graph.node} | set(self._tensors) | set(self._producers) | set(self._infos)
        self._shared: dict[object, str] = {}

    # --- new nodes ---------------------------------------------------------------------------------------------------

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Append a node with one result; returns the result's name."""
        return self._append(kind, inputs, [output], attributes)[0]

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Append a Split into parts of these sizes; returns the parts' names."""
        return self._append("Split", [x, self.ints(sizes)], [""] * len(sizes), {"axis": axis})

    def ints(self, values: Sequence[int]) -> str:
        """Name of a constant int64 [len(values)]."""
        import numpy as np

        return self._constant(f"INT64/{list(values)}", np.array(values, np.int64))

    def number(self, value: int | float) -> str:
        """Name of a constant scalar: int64 if the value is an int, else float32."""
        import numpy as np

        whole = isinstance(value, int)
        return self._constant(
            f"{'INT64' if whole else 'FLOAT'}/{value}", np.array(value, np.int64 if whole else np.float32)
        )

    def shared(self, key: object, scope: str, make: Callable[[], str]) -> str:
        """The result of a subgraph that the whole graph needs once: made where it is first asked for."""
        if key not in self._shared:
            outer, self.scope = self.scope, scope
            self._shared[key] = make()
            self.scope = outer
        return self._shared[key]

    def _append(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Any) -> list[str]:
        import onnx

        name = self._free(f"{self.scope}/{kind}")
        results = [output or self._free(f"{name}/output_{index}") for index, output in enumerate(outputs)]
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), results, name=name, **attributes))
        return results

    def _constant(self, label: str, values: Any) -> str:
        def make() -> str:
            import onnx

            name = self._free(f"/standard/constants/{label}")
            self.initializers.append(onnx.numpy_helper.from_array(values, name))
            return name

        return self.shared(("constant", label), self.scope, make)

    def _free(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name

    # --- the old graph -----------------------------------------------------------------------------------------------

    def producer(self, name: str) -> Any | None:
        """The old graph's node that makes this tensor, if one does."""
        return self._producers.get(name)

    def element_type(self, name: str) -> int:
        """ONNX's number of the element type, 0 where the graph does not say."""
        if name in self._tensors:
            return int(self._tensors[name].data_type)
        return int(self._infos[name].type.tensor_type.elem_type) if name in self._infos else 0

    def shape(self, name: str) -> list[int | None] | None:
        """Lengths, None for one that is not fixed; None where not even the rank is known."""
        if name in self._tensors:
            return [int(length) for length in self._tensors[name].dims]
        info = self._infos.get(name)
        if info is not None and info.type.tensor_type.HasField("shape"):
            return [dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim]
        return None

    def width(self, name: str) -> int | None:
        """Last length of a tensor, looked for in the branches too where an If chooses between two constants."""
        shape = self.shape(name)
        if shape and shape[-1] is not None:
            return shape[-1]
        node = self._producers.get(name)
        if node is None or node.op_type != "If":
            return None
        index, widths = list(node.output).index(name), set()
        for branch in subgraphs(node):
            made = {output: inner for inner in branch.node for output in inner.output}
            inner = made.get(branch.output[index].name)
            value = None if inner is None else next((a for a in inner.attribute if a.name == "value"), None)
            widths.add(value.t.dims[-1] if value is not None and value.t.dims else None)
        return widths.pop() if len(widths) == 1 else None

    def integers(self, name: str) -> list[int] | None:
        """Values of a constant that holds integers, or None."""
        import onnx

        node = self._producers.get(name)
        if name in self._tensors:
            tensor = self._tensors[name]
        elif node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
        else:
            return None
        whole = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        return [int(value) for value in onnx.numpy_helper.to_array(tensor).reshape(-1)] if whole else None


def refuse(node: Any, what: str, *, expected: object = None, found: object = None) -> Unsupported:
    """The error for a node that the standard operators do not express here."""
    kind = f"{node.domain or 'ai.onnx'}.{node.op_type}"
    return Unsupported(f"{kind}: {what}", where=node.name, expected=expected, found=found, fix=WAY_OUT, code="E_OP")


def read_attributes(node: Any, defaults: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Attributes of a node, with defaults for those that it leaves out.

    Args:
        node: the node.
        defaults: every attribute that the caller understands.
        fixed: attributes of which only these values are understood; absence is fine.

    Raises:
        Unsupported: an attribute, or a value of one, that is not understood.
    """
    import onnx

    found = dict(defaults)
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name in fixed:
            if value not in fixed[attribute.name]:
                raise refuse(
                    node,
                    f"attribute {attribute.name}",
                    expected=" or ".join(map(str, fixed[attribute.name])),
                    found=value,
                )
        elif attribute.name in defaults:
            found[attribute.name] = value
        else:
            raise refuse(node, f"attribute {attribute.name} has no counterpart", found=value)
    return found


def named(names: Sequence[str], index: int) -> str:
    """An optional input or output of a node: its name, empty where it is left out."""
    return names[index] if index < len(names) else ""


def subgraphs(node: Any) -> Iterator[Any]:
    """Graphs that a node holds: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
