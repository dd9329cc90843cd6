"""The builder's graph without ONNX Runtime's own operators, for runtimes that know only the ONNX standard.

Every node outside the standard is replaced by nodes of the model's own opset; com.microsoft is then no longer imported.
Names and types of the model's inputs and outputs stay, and so do all weights. What differs is the cache: it is exactly
past + new tokens long. It cannot be a buffer of the full length that past and present share, and a layer with a window
keeps what the window has passed.

Operators: com.microsoft GroupQueryAttention, RotaryEmbedding, SkipSimplifiedLayerNormalization, SkipLayerNormalization,
Gelu, FastGelu, BiasGelu, QuickGelu, and SimplifiedLayerNormalization, which ONNX Runtime keeps in the standard's domain
although the standard does not have it. Their definitions: ONNX Runtime's operator schemas and CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sparseport.errors import Unsupported
from sparseport.targets.onnx.standard_attention import group_query_attention, rotary_embedding, window_dimensions
from sparseport.targets.onnx.standard_nodes import (
    WAY_OUT,
    NodeWriter,
    named,
    read_attributes,
    refuse,
    subgraphs,
)

# The first opset with Gelu; all other operators that are written here are older.
OLDEST_OPSET = 20
_CONTRIB = "com.microsoft"


def to_standard_ops(model: Any) -> None:
    """Replace, in place, every node that the ONNX standard does not define.

    Args:
        model: `onnx.ModelProto` whose nodes are in order; weights may be outside, and are not read.

    Raises:
        Unsupported: a node has no counterpart in the standard, or computes in another type than float32; the model is
            then as it was.
    """
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise Unsupported("the model's opset is too old", expected=f">= {OLDEST_OPSET}", found=opset, fix=WAY_OUT)
    writer = NodeWriter(graph)
    dimensions: dict[str, str] = {}
    for node in graph.node:
        if _is_standard(node, opset):
            for inner in _inside(node):
                if not _is_standard(inner, opset):
                    raise refuse(inner, f"inside {node.op_type} {node.name}, where nothing is replaced")
            writer.nodes.append(node)
            continue
        rewrite = _REWRITES.get((node.domain, node.op_type))
        if rewrite is None:
            raise refuse(node, "has no counterpart in standard ONNX")
        _need_float32(node, writer)
        writer.scope = node.name or node.output[0]
        rewrite(node, writer)
        dimensions.update(window_dimensions(node))
    _replace(graph, writer)
    for value in [*graph.input, *graph.output]:
        if value.name in dimensions:
            value.type.tensor_type.shape.dim[2].dim_param = dimensions[value.name]
    kept = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _is_standard(node: Any, opset: int) -> bool:
    import onnx

    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def _inside(node: Any) -> Iterable[Any]:
    """Nodes of the graphs that a node holds, and of the graphs that these hold."""
    for graph in subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from _inside(inner)


def _need_float32(node: Any, writer: NodeWriter) -> None:
    import onnx

    for name in node.input:
        kind = writer.element_type(name)
        if kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE):
            raise refuse(node, f"input {name}", expected="FLOAT", found=onnx.TensorProto.DataType.Name(kind))


def _replace(graph: Any, writer: NodeWriter) -> None:
    """Put the new nodes into the graph, without nodes and initializers that nothing reads any more."""
    before = {name for node in graph.node for name in _reads(node)}
    needed = {value.name for value in graph.output}
    nodes: list[Any] = []
    for node in reversed(writer.nodes):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(_reads(node))
    # The builder describes some of its constant vectors as scalars; a constant needs no description.
    made = {output for node in nodes if node.op_type != "Constant" for output in node.output}
    infos = [info for info in graph.value_info if info.name in made]
    for field, values in (("node", nodes[::-1]), ("value_info", infos)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    gone = before - needed
    for index in reversed(range(len(graph.initializer))):  # one by one: `extend` would copy the weights
        if graph.initializer[index].name in gone:
            del graph.initializer[index]
    graph.initializer.extend(tensor for tensor in writer.initializers if tensor.name in needed)


def _reads(node: Any) -> Iterable[str]:
    """Tensors that a node reads, from within its graphs too."""
    yield from node.input
    for graph in subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from _reads(inner)


# --- norms -----------------------------------------------------------------------------------------------------------


def _simplified_layer_norm(node: Any, writer: NodeWriter) -> None:
    attributes = read_attributes(node, {"epsilon": 1e-5}, {"axis": (-1,), "stash_type": (1,)})
    _only_outputs(node, 0)
    _rms_norm(writer, node.input[0], node.input[1], attributes["epsilon"], node.output[0])


def _skip_simplified_layer_norm(node: Any, writer: NodeWriter) -> None:
    attributes = read_attributes(node, {"epsilon": 1e-12}, {})
    total = _skip(node, writer, named(node.input, 3))
    _rms_norm(writer, total, node.input[2], attributes["epsilon"], node.output[0])


def _skip_layer_norm(node: Any, writer: NodeWriter) -> None:
    attributes = read_attributes(node, {"epsilon": 1e-12}, {})
    total = _skip(node, writer, named(node.input, 4))
    inputs = [total, node.input[2], *filter(None, [named(node.input, 3)])]
    writer.add("LayerNormalization", inputs, node.output[0], axis=-1, epsilon=attributes["epsilon"])


def _skip(node: Any, writer: NodeWriter, bias: str) -> str:
    """Input + skip [+ bias], which is the node's last output if anybody wants it."""
    _only_outputs(node, 0, 3)
    wanted = named(node.output, 3)
    total = writer.add("Add", node.input[:2], "" if bias else wanted)
    return writer.add("Add", [total, bias], wanted) if bias else total


def _rms_norm(writer: NodeWriter, x: str, weight: str, epsilon: float, output: str) -> None:
    """x / sqrt(mean(x^2) + epsilon) * weight, along the last axis; in the form that runtimes fuse again."""
    square = writer.add("Pow", [x, writer.number(2.0)])
    mean = writer.add("ReduceMean", [square, writer.ints([-1])], keepdims=1)
    root = writer.add("Sqrt", [writer.add("Add", [mean, writer.number(float(epsilon))])])
    writer.add("Mul", [writer.add("Div", [x, root]), weight], output)


def _only_outputs(node: Any, *allowed: int) -> None:
    for index, name in enumerate(node.output):
        if name and index not in allowed:
            raise refuse(node, f"output {index} ({name}) has no counterpart")


# --- activations -----------------------------------------------------------------------------------------------------


def _gelu(node: Any, writer: NodeWriter) -> None:
    read_attributes(node, {}, {})
    fast = node.op_type == "FastGelu"
    x = node.input[0]
    if named(node.input, 1):
        x = writer.add("Add", node.input[:2])
    writer.add("Gelu", [x], node.output[0], approximate="tanh" if fast else "none")


def _quick_gelu(node: Any, writer: NodeWriter) -> None:
    alpha = float(read_attributes(node, {"alpha": 1.702}, {})["alpha"])
    x = node.input[0]
    gate = writer.add("Sigmoid", [writer.add("Mul", [x, writer.number(alpha)])])
    writer.add("Mul", [x, gate], node.output[0])


_REWRITES: dict[tuple[str, str], Callable[[Any, NodeWriter], None]] = {
    ("", "SimplifiedLayerNormalization"): _simplified_layer_norm,
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): _skip_simplified_layer_norm,
    (_CONTRIB, "SkipLayerNormalization"): _skip_layer_norm,
    (_CONTRIB, "Gelu"): _gelu,
    (_CONTRIB, "FastGelu"): _gelu,
    (_CONTRIB, "BiasGelu"): _gelu,
    (_CONTRIB, "QuickGelu"): _quick_gelu,
    (_CONTRIB, "GroupQueryAttention"): group_query_attention,
    (_CONTRIB, "RotaryEmbedding"): rotary_embedding,
}
