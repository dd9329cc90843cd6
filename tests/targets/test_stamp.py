"""A stamped graph is the fully traced graph; whatever breaks the likeness of two layers is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.targets.openvino.stamp import (
    STAMPED_MODEL_TYPES,
    TRACED_LAYERS,
    LayersDiffer,
    stamp_layers,
    three_layer_settings,
)
from sparseport.targets.openvino.stamp_graph import Carrier, Graph, Node

VOCABULARY = 50


def tiny_settings(model_type: str, layers: int) -> dict[str, Any]:
    """A small random architecture; the same arguments give the same one."""
    random = np.random.default_rng([*model_type.encode(), layers])
    kv_heads = int(random.choice([1, 2]))
    heads = kv_heads * int(random.choice([2, 3]))
    head_dim = int(random.choice([8, 16]))
    settings = {
        "model_type": model_type,
        "hidden_size": heads * head_dim,
        "intermediate_size": int(random.integers(3, 6)) * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": bool(layers % 2),
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
    }
    if model_type == "llama":
        settings |= {"attention_bias": True, "mlp_bias": bool(layers % 2)}
    if model_type == "mistral":
        settings["sliding_window"] = 8 if layers % 2 else None
    return settings


def small_tensors(settings: dict[str, Any]) -> Callable[[str], np.ndarray]:
    """Random norms and biases of the shapes that `settings` calls for, a function of the name alone."""
    query, key = (settings[n] * settings["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    sizes = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": settings["intermediate_size"]}
    sizes |= {"up_proj": settings["intermediate_size"], "q_norm": settings["head_dim"], "k_norm": settings["head_dim"]}

    def values(name: str) -> np.ndarray:
        size = sizes.get(name.split(".")[-2], settings["hidden_size"])
        return np.random.default_rng(list(name.encode())).normal(1, 0.2, size).astype(np.float32)

    return values


def build(settings: dict[str, Any], folder: Path, stamp: bool | None) -> Any:
    pytest.importorskip("optimum.exporters.openvino")
    from sparseport.targets.openvino.skeleton import build_skeleton

    folder.mkdir(parents=True)
    config = folder / "config.json"
    config.write_text(json.dumps(settings), "utf-8")
    return build_skeleton(config, folder / "ir", small_tensors=small_tensors(settings), stamp=stamp)


# --- the stamped graph is the traced graph ---------------------------------------------------------------------------


def assert_same_graph(first: Graph, second: Graph) -> None:
    """Walk both graphs from their ends in parallel. Names of nodes and of inner tensors may differ, nothing else."""
    twins: dict[Node, Node] = {}
    ends = [{end_key(node): node for node in g.nodes if node.kind in ("Result", "Assign")} for g in (first, second)]
    assert ends[0].keys() == ends[1].keys()
    todo = [(ends[0][key], ends[1][key]) for key in ends[0]]
    while todo:
        a, b = todo.pop()
        if a in twins:
            assert twins[a] is b
            continue
        twins[a] = b
        assert described(a) == described(b), (a.name, b.name)
        if a.kind == "Const":
            assert first.payload(a) == second.payload(b), (a.name, b.name)
        assert a.inputs.keys() == b.inputs.keys()
        for port in a.inputs:
            assert a.inputs[port][1] == b.inputs[port][1]
            todo.append((a.inputs[port][0], b.inputs[port][0]))
    assert len(set(twins.values())) == len(twins) == len(first.nodes) == len(second.nodes)


def end_key(node: Node) -> str:
    return node.data.get("variable_id") or described(next(iter(node.inputs.values()))[0])[3][-1][1]


def described(node: Node) -> tuple[Any, ...]:
    data = {key: value for key, value in node.data.items() if key != "offset"}
    dims = [[dim.text for dim in port] for port in node.element.iter("port")]
    kept = ("Parameter", "ReadValue")
    names = [
        (p.get("precision"), p.get("names") if node.kind in kept else "logits" in p.get("names", "") and "logits")
        for p in node.element.iter("port")
    ]
    runtime = sorted(tuple(sorted(a.items())) for a in (e.attrib for e in node.element.iter("attribute")))
    return node.kind, data, dims, names, runtime, node.name if node.kind == "Parameter" else ""


def logits_of_two_steps(skeleton: Any, settings: dict[str, Any]) -> list[np.ndarray]:
    """Fill every matrix at random, run a prompt and one more token through the stateful model on the CPU."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(skeleton.xml)
    by_name = {op.get_friendly_name(): op for op in model.get_ops()}
    kept = []
    for name, constant in sorted(skeleton.constants.items()):
        node = by_name[constant]
        if len(node.shape) == 2:
            values = np.random.default_rng(list(name.encode())).normal(0, 0.1, tuple(node.shape)).astype(np.float16)
            kept.append(ov.op.Constant(values))
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(kept[-1].output(0))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    request = compiled.create_infer_request()
    ids = np.random.default_rng(7).integers(0, VOCABULARY, (1, 6))
    steps = []
    for begin, end in ((0, 5), (5, 6)):
        request.infer(
            {
                "input_ids": ids[:, begin:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(begin, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        steps.append(request.get_tensor("logits").data.copy())
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("layers", [5, 6])
@pytest.mark.parametrize("model_type", STAMPED_MODEL_TYPES)
def test_stamped_graph_equals_the_fully_traced_one(model_type: str, layers: int, tmp_path: Path) -> None:
    settings = tiny_settings(model_type, layers)
    stamped = build(settings, tmp_path / "stamped", stamp=None)
    traced = build(settings, tmp_path / "traced", stamp=False)
    assert (stamped.stamped, stamped.traced_layers) == (True, TRACED_LAYERS)
    assert (traced.stamped, traced.traced_layers) == (False, layers)
    assert stamped.constants == traced.constants
    graphs = [Graph.read(Path(skeleton.xml)) for skeleton in (stamped, traced)]
    assert_same_graph(*graphs)
    sinks = [[node.data["variable_id"] for node in graph.nodes if node.kind == "Assign"] for graph in graphs]
    assert sinks[0] == sinks[1]
    for a, b in zip(logits_of_two_steps(stamped, settings), logits_of_two_steps(traced, settings), strict=True):
        assert np.isfinite(a).all() and np.ptp(a) > 0
        np.testing.assert_array_equal(a, b)


def test_the_comparison_notices_a_single_changed_edge(three_layers: Path) -> None:
    first, second = Graph.read(three_layers), Graph.read(three_layers)
    assert_same_graph(first, second)
    node = next(node for node in second.nodes if node.name.endswith("layers.1/aten::add/Add"))
    node.inputs[0] = node.inputs[1]
    with pytest.raises(AssertionError):
        assert_same_graph(first, second)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The IR of a fully traced three-layer model, with its tensor map beside it."""
    settings = tiny_settings("qwen3", 3)
    skeleton = build(settings, tmp_path_factory.mktemp("three") / "model", stamp=False)
    Path(skeleton.xml).with_suffix(".json").write_text(json.dumps(skeleton.constants), "utf-8")
    return Path(skeleton.xml)


def load(xml: Path) -> tuple[Graph, dict[str, Carrier]]:
    graph = Graph.read(xml)
    by_name = {node.name: node for node in graph.nodes}
    constants = json.loads(xml.with_suffix(".json").read_text("utf-8"))
    return graph, {name: Carrier(by_name[c], by_name[c].shape) for name, c in constants.items()}


def test_the_untouched_graph_is_stamped(three_layers: Path) -> None:
    graph, carriers = load(three_layers)
    per_layer = sum(name.startswith("model.layers.2.") for name in carriers)
    assert len(stamp_layers(graph, carriers, 10)) == len(carriers) + 7 * per_layer


def test_any_broken_edge_in_layer_2_is_refused(three_layers: Path) -> None:
    graph, carriers = load(three_layers)
    foreign = next(node for node in graph.nodes if node.kind == "Parameter")
    edges = [(n, port) for n in graph.nodes if "layers.2." in n.name or "layers.2/" in n.name for port in n.inputs]
    assert len(edges) > 50
    before = len(graph.nodes)
    for node, port in edges:
        kept = node.inputs[port]
        node.inputs[port] = (foreign, 0)
        with pytest.raises(LayersDiffer):
            stamp_layers(graph, carriers, 5)
        node.inputs[port] = kept
    assert len(graph.nodes) == before
    stamp_layers(graph, carriers, 5)


def test_a_changed_constant_is_refused(three_layers: Path) -> None:
    graph, carriers = load(three_layers)
    carrying = {carrier.node for carrier in carriers.values()}
    in_layer = [
        source
        for node in graph.nodes
        if "layers.2.input_layernorm" in node.name
        for source, _ in node.inputs.values()
        if source.kind == "Const" and source not in carrying
    ]
    assert in_layer
    for constant in in_layer:
        kept = graph.payload(constant)
        graph.set_payload(constant, bytes(byte ^ 1 for byte in kept))
        with pytest.raises(LayersDiffer):
            stamp_layers(graph, carriers, 5)
        graph.set_payload(constant, kept)


def test_a_changed_attribute_is_refused(three_layers: Path) -> None:
    graph, carriers = load(three_layers)
    attention = [n for n in graph.nodes if n.kind == "ScaledDotProductAttention" and "layers.2." in n.name]
    attention[0].data["causal"] = "true" if attention[0].data["causal"] == "false" else "false"
    with pytest.raises(LayersDiffer):
        stamp_layers(graph, carriers, 5)


def test_exchanged_tensors_are_refused(three_layers: Path) -> None:
    graph, carriers = load(three_layers)
    gate, up = (f"model.layers.2.mlp.{which}_proj.weight" for which in ("gate", "up"))
    with pytest.raises(LayersDiffer):
        stamp_layers(graph, carriers | {gate: carriers[up], up: carriers[gate]}, 5)


def test_an_inner_layer_that_others_use_is_refused(three_layers: Path) -> None:
    graph, carriers = load(three_layers)
    tail = next(node for node in graph.nodes if node.name.startswith("__module.model.norm") and len(node.inputs) == 2)
    inner = next(node for node in graph.nodes if node.name.endswith("layers.1/aten::add/Add_1"))
    tail.inputs[1] = (inner, 2)
    with pytest.raises(LayersDiffer):
        stamp_layers(graph, carriers, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"num_hidden_layers": 3},
        {"layer_types": ["full_attention", "sliding_attention"] * 3},
        {"use_sliding_window": True},
        {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
        {"mlp_only_layers": []},
    ],
)
def test_settings_that_tell_layers_apart_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LayersDiffer):
        three_layer_settings(tiny_settings("qwen2", 6) | change)


def test_three_layer_settings_keep_everything_but_the_count() -> None:
    settings = tiny_settings("llama", 6) | {"layer_types": ["full_attention"] * 6}
    few = three_layer_settings(settings)
    assert few == settings | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}


@pytest.mark.slow
def test_layers_that_differ_are_all_traced(tmp_path: Path) -> None:
    settings = tiny_settings("qwen2", 4) | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    skeleton = build(settings, tmp_path / "auto", stamp=None)
    assert (skeleton.stamped, skeleton.traced_layers) == (False, 4)
    with pytest.raises(LayersDiffer):
        build(settings, tmp_path / "must", stamp=True)
