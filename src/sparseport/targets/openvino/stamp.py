"""An N-layer decoder graph from a three-layer one.

Tracing costs time and memory per layer, and the layers of most decoders are alike. So three layers are traced, layers
1 and 2 are proven to be the same subgraph, and layer 2 is copied. (Layer 0 is no pattern: the exporter leaves nodes
in it that all layers share.) Whatever is not exactly alike is refused, and the caller traces all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from sparseport.checkpoints.sub_config import KEY, smaller_shapes
from sparseport.errors import Unsupported
from sparseport.targets.openvino.stamp_graph import Carrier, Graph, Node

TRACED_LAYERS = 3
# Model types whose stamped graph is compared with the fully traced one by a test.
STAMPED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Lists in a config that do not describe layers one by one.
_LAYER_FREE_LISTS = ("architectures", "eos_token_id")
# How a layer's number appears in node names, tensor names and variable ids. The export configs of optimum use these.
_LABELS = ("model.layers.{}.", "model.layers.{}/", "past_key_values.{}.", "present.{}.")

Source = tuple[Node, int]


class LayersDiffer(Unsupported):
    """The layers are not copies of each other, so the graph cannot be stamped."""

    default_code = "E_LAYERS_DIFFER"


def three_layer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `config.json`, defaults filled in, for the same model with `TRACED_LAYERS` layers.

    Raises LayersDiffer when the settings say, or might say, that layers differ.
    """
    if settings["model_type"] not in STAMPED_MODEL_TYPES:
        raise LayersDiffer("not a model type whose layers are known to be alike", found=settings["model_type"])
    layers = settings["num_hidden_layers"]
    if layers <= TRACED_LAYERS:
        raise LayersDiffer("nothing to copy", found=f"{layers} layers")
    if smaller_shapes(settings):
        raise LayersDiffer("the layers have shapes of their own", found="a sub-network")
    if settings.get("use_sliding_window"):
        raise LayersDiffer("the attention window depends on the layer", found="use_sliding_window")
    few = dict(settings, num_hidden_layers=TRACED_LAYERS)
    few.pop(KEY, None)
    for key, value in settings.items():
        if not isinstance(value, (list, tuple)) or key in _LAYER_FREE_LISTS:
            continue
        if key != "layer_types" or len(set(value)) != 1:
            raise LayersDiffer("a setting may describe layers one by one", found=key)
        few[key] = list(value[:TRACED_LAYERS])
    return few


def relabel(text: str, old: int, new: int) -> str:
    """`text` with the number of decoder layer `old` replaced by `new`."""
    for label in _LABELS:
        text = text.replace(label.format(old), label.format(new))
    return text


@dataclass(frozen=True)
class _Pattern:
    """Layer 2 as a thing to copy: its nodes in file order, the stream that enters it, the stream that leaves it."""

    nodes: list[Node]
    entry: Source
    exit: Source


def stamp_layers(graph: Graph, carriers: dict[str, Carrier], layers: int) -> dict[str, Carrier]:
    """Grow the three-layer `graph` to `layers` decoder layers, in place.

    `carriers` maps tensor names to their constants in the three-layer graph; these constants may differ in content
    from layer to layer, all others may not. Returns the same map for the grown graph. Copies keep the content of
    layer 2's constants until they are replaced.

    Raises LayersDiffer when layers 1 and 2 are not the same subgraph; the graph is then unchanged.
    """
    names = {carrier.node: name for name, carrier in carriers.items()}
    pattern = _pattern(graph, names)
    inside = set(pattern.nodes)
    grown = dict(carriers)
    stamped: list[Node] = []
    stream = pattern.exit
    for layer in range(TRACED_LAYERS, layers):
        copies = {node: _copy_node(graph, node, layer) for node in pattern.nodes}
        for node, twin in copies.items():
            for port, source in node.inputs.items():
                twin.inputs[port] = stream if source == pattern.entry else (copies.get(source[0], source[0]), source[1])
            if node in names:
                grown[relabel(names[node], TRACED_LAYERS - 1, layer)] = replace(carriers[names[node]], node=twin)
        stamped += copies.values()
        stream = (copies[pattern.exit[0]], pattern.exit[1])
    for node in graph.nodes:
        if node not in inside:
            node.inputs = {port: stream if src == pattern.exit else src for port, src in node.inputs.items()}
    last = max(index for index, node in enumerate(graph.nodes) if node in inside)
    graph.nodes = _ordered(graph.nodes[: last + 1] + stamped + graph.nodes[last + 1 :])
    return grown


def _pattern(graph: Graph, names: dict[Node, str]) -> _Pattern:
    """Prove that layers 1 and 2 are the same subgraph and return layer 2.

    The same means: paired nodes agree in type, attributes, port types, constant bytes and edges; whatever comes from
    outside comes from the same node, except one residual stream, which enters each layer from the layer before.
    """
    owner = _owners(graph)
    entry, leave = _exit(graph, owner, 1), _exit(graph, owner, 2)
    sinks_1, sinks_2 = _sinks(owner, 1), _sinks(owner, 2)
    if sinks_1.keys() != sinks_2.keys():
        raise LayersDiffer("layers 1 and 2 keep different states", expected=sorted(sinks_1), found=sorted(sinks_2))
    first_entry: Source | None = None
    twins: dict[Node, Node] = {}
    todo = [(entry[0], leave[0]), *((sinks_1[key], sinks_2[key]) for key in sorted(sinks_1))]
    while todo:
        first, second = todo.pop()
        if first in twins and twins[first] is second:
            continue
        if first in twins or owner[first] != 1 or owner[second] != 2 or not _alike(graph, first, second, names):
            raise LayersDiffer("layers 1 and 2 are not alike", where=second.name, expected=first.name)
        twins[first] = second
        for port, source in first.inputs.items():
            other = second.inputs[port]
            if source == other and owner[source[0]] not in (1, 2):
                continue
            if other == entry and owner[source[0]] == 0 and first_entry in (None, source):
                first_entry = source
            elif owner[source[0]] == 1 and owner[other[0]] == 2 and source[1] == other[1]:
                todo.append((source[0], other[0]))
            else:
                raise LayersDiffer("layers 1 and 2 take different inputs", where=f"{second.name} port {port}")
    for layer, reached in ((1, set(twins)), (2, set(twins.values()))):
        missed = [node.name for node, owned_by in owner.items() if owned_by == layer and node not in reached]
        if missed or len(reached) != len(twins):
            raise LayersDiffer(f"layer {layer} holds nodes without a twin", found=missed[:3])
    if first_entry is None or leave[1] != entry[1]:
        raise LayersDiffer("the residual stream does not pass through the layers")
    return _Pattern([node for node in graph.nodes if owner[node] == 2], entry, leave)


def _owners(graph: Graph) -> dict[Node, int | None]:
    """The decoder layer that each node belongs to, None for the rest of the graph.

    Names and variable ids tell it for most nodes. A node without them belongs to a layer when only that layer uses it.
    """
    owner = {node: _labelled_layer(node) for node in graph.nodes}
    consumers = graph.consumers()
    for node in reversed(_ordered(graph.nodes)):
        if owner[node] is None:
            users = {owner[user] for user, _ in consumers[node]}
            owner[node] = users.pop() if len(users) == 1 else None
    return owner


def _labelled_layer(node: Node) -> int | None:
    for layer in range(TRACED_LAYERS):
        for text in (node.name, node.data.get("variable_id", "")):
            if relabel(text, layer, TRACED_LAYERS) != text:
                return layer
    return None


def _exit(graph: Graph, owner: dict[Node, int | None], layer: int) -> Source:
    """The one output of `layer` that other nodes use. Only the last layer's may go to the rest of the graph."""
    found: set[Source] = set()
    for node in graph.nodes:
        for source in node.inputs.values():
            if owner[source[0]] == layer and owner[node] != layer:
                found.add(source)
                if layer < TRACED_LAYERS - 1 and owner[node] != layer + 1:
                    raise LayersDiffer(f"layer {layer} is used outside the next layer", where=node.name)
    if len(found) != 1:
        raise LayersDiffer(f"layer {layer} has not one output", found=sorted(node.name for node, _ in found))
    return found.pop()


def _sinks(owner: dict[Node, int | None], layer: int) -> dict[str, Node]:
    """The nodes of `layer` that end in a state variable, by variable id without the layer's number."""
    sinks = (node for node, owned_by in owner.items() if owned_by == layer and node.kind == "Assign")
    return {relabel(node.data["variable_id"], layer, TRACED_LAYERS): node for node in sinks}


def _alike(graph: Graph, first: Node, second: Node, names: dict[Node, str]) -> bool:
    """Whether a node of layer 1 and one of layer 2 are the same but for names, layer number and tensor content."""
    if _signature(first.element, 1) != _signature(second.element, 2) or first.inputs.keys() != second.inputs.keys():
        return False
    if first in names or second in names:
        return relabel(names.get(first, ""), 1, 2) == names.get(second, "")
    return first.kind != "Const" or graph.payload(first) == graph.payload(second)


def _signature(element: ElementTree.Element, layer: int) -> tuple[Any, ...]:
    dropped = {"layer": ("id", "name"), "data": ("offset",), "port": ("names",)}.get(element.tag, ())
    attributes = {k: relabel(v, layer, TRACED_LAYERS) for k, v in element.attrib.items() if k not in dropped}
    return element.tag, sorted(attributes.items()), [_signature(child, layer) for child in element]


def _copy_node(graph: Graph, node: Node, layer: int) -> Node:
    """A copy of a node of layer 2 as a node of `layer`, without inputs. Constants keep their content."""
    twin = Node(_copy_element(node.element, layer))
    if twin.name == node.name:
        twin.element.set("name", f"{node.name}_layer_{layer}")
    if node.kind == "Const":
        graph.set_payload(twin, graph.payload(node))
    return twin


def _copy_element(element: ElementTree.Element, layer: int) -> ElementTree.Element:
    attributes = {key: relabel(value, TRACED_LAYERS - 1, layer) for key, value in element.attrib.items()}
    if "names" in attributes:
        # Tensor names that do not carry the layer are the tracer's serial numbers, which must stay unique.
        pairs = zip(element.attrib["names"].split(","), attributes["names"].split(","), strict=True)
        attributes["names"] = ",".join(new for old, new in pairs if new != old)
        if not attributes["names"]:
            del attributes["names"]
    twin = ElementTree.Element(element.tag, attributes)
    twin.text = element.text
    # Input ports hold nothing but shapes, which no one changes, so the copies share them.
    twin[:] = [child if child.tag == "input" else _copy_element(child, layer) for child in element]
    return twin


def _ordered(nodes: list[Node]) -> list[Node]:
    """Producers before consumers, states sorted by variable id and then results at the end, as OpenVINO writes them."""
    ends = {"Assign": 1, "Result": 2}
    roots = sorted(
        nodes, key=lambda node: (ends.get(node.kind, 0), node.data["variable_id"] if node.kind == "Assign" else "")
    )
    order: dict[Node, None] = {}
    for root in roots:
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = [source for source, _ in node.inputs.values() if source not in order]
            if node not in order and waiting:
                stack += reversed(waiting)
            else:
                order.setdefault(stack.pop())
    return list(order)
