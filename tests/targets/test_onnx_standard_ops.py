"""Operators of ONNX Runtime in standard ones: the same results, by its own kernels and by three other readers.

Every test makes a small model of one operator, runs it with ONNX Runtime's kernel, rewrites it, and runs that with ONNX
Runtime, with the reference implementation of the standard, and with OpenVINO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.errors import Unsupported
from sparseport.targets.onnx.standard_ops import to_standard_ops

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CONTRIB = "com.microsoft"
OPSET = 22
LONGEST = 48  # rows of the rotary tables
Feed = dict[str, np.ndarray]
Run = Callable[[Feed], Feed]
node, tensor_info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
FLOAT, INT32, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64


# --- models and the programs that run them ---------------------------------------------------------------------------


def make_model(nodes: Sequence[Any], inputs: Any, outputs: Any, tensors: Feed, infos: Any = ()) -> Any:
    initializers = [onnx.numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, initializers, value_info=infos)
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def ort(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, feed), strict=True))


def reference(path: Path) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda feed: dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))


def openvino(path: Path) -> Run:
    ov = pytest.importorskip("openvino")
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.outputs]
    return lambda feed: {
        name: np.array(values) for name, values in zip(names, request.infer(feed).values(), strict=True)
    }


RUNTIMES: list[Callable[[Path], Run]] = [ort, reference, openvino]


def rewritten(model: Any) -> Any:
    """A copy in standard operators, checked for everything that holds for every model."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    to_standard_ops(new)
    onnx.checker.check_model(new, full_check=True)
    assert [entry.domain for entry in new.opset_import] == [""]
    assert {n.domain for n in new.graph.node} == {""}
    for side in ("input", "output"):
        assert [v.name for v in getattr(new.graph, side)] == [v.name for v in getattr(model.graph, side)]
    names = [n.name for n in new.graph.node]
    assert all(names) and len(set(names)) == len(names)
    return new


def saved(model: Any, path: Path) -> Path:
    onnx.save(model, path)
    return path


def compare(model: Any, feed: Feed, tmp_path: Path) -> Any:
    """Run with ONNX Runtime's own kernel, and rewritten everywhere; returns the rewritten model."""
    wanted = ort(saved(model, tmp_path / "old.onnx"))(feed)
    new = rewritten(model)
    path = saved(new, tmp_path / "new.onnx")
    for runtime in RUNTIMES:
        found = runtime(path)(feed)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=2e-6, err_msg=f"{runtime.__name__} {name}")
    return new


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- norms and activations -------------------------------------------------------------------------------------------

# operator, domain, names of its inputs after x, its outputs, attributes
SIMPLE: dict[str, tuple[str, str, list[str], list[str], dict[str, float]]] = {
    "rms": ("SimplifiedLayerNormalization", "", ["weight"], ["y"], {"epsilon": 0.1}),
    "rms, epsilon left out": ("SimplifiedLayerNormalization", "", ["weight"], ["y"], {}),
    "skip rms": ("SkipSimplifiedLayerNormalization", CONTRIB, ["skip", "weight"], ["y"], {"epsilon": 0.1}),
    "skip rms, sum": ("SkipSimplifiedLayerNormalization", CONTRIB, ["skip", "weight"], ["y", "", "", "sum"], {}),
    "skip rms, bias, sum": (
        "SkipSimplifiedLayerNormalization",
        CONTRIB,
        ["skip", "weight", "bias"],
        ["y", "", "", "sum"],
        {},
    ),
    "skip": ("SkipLayerNormalization", CONTRIB, ["skip", "weight"], ["y"], {"epsilon": 0.1}),
    "skip, shift, sum": (
        "SkipLayerNormalization",
        CONTRIB,
        ["skip", "weight", "shift"],
        ["y", "", "", "sum"],
        {"epsilon": 0.1},
    ),
    "skip, bias": ("SkipLayerNormalization", CONTRIB, ["skip", "weight", "shift", "bias"], ["y", "", "", "sum"], {}),
    "skip, bias alone": ("SkipLayerNormalization", CONTRIB, ["skip", "weight", "", "bias"], ["y"], {}),
    "gelu": ("Gelu", CONTRIB, [], ["y"], {}),
    "fast gelu": ("FastGelu", CONTRIB, [], ["y"], {}),
    "fast gelu, bias": ("FastGelu", CONTRIB, ["bias"], ["y"], {}),
    "bias gelu": ("BiasGelu", CONTRIB, ["bias"], ["y"], {}),
    "quick gelu": ("QuickGelu", CONTRIB, [], ["y"], {}),
    "quick gelu, alpha": ("QuickGelu", CONTRIB, [], ["y"], {"alpha": 0.5}),
}


@pytest.mark.parametrize("case", sorted(SIMPLE))
def test_norms_and_activations(case: str, tmp_path: Path) -> None:
    kind, domain, inputs, outputs, attributes = SIMPLE[case]
    width, dims = 24, ["batch", "new", 24]
    tensors = {name: normal(width, seed=ord(name[0])) for name in inputs if name and name != "skip"}
    ports = [tensor_info(name, FLOAT, dims) for name in ["x", *(["skip"] if "skip" in inputs else [])]]
    model = make_model(
        [node(kind, ["x", *inputs], outputs, "layer/norm", domain=domain, **attributes)],
        ports,
        [tensor_info(name, FLOAT, dims) for name in outputs if name],
        tensors,
    )
    # Values so small that a wrong epsilon shows.
    feed = {port.name: 0.3 * normal(2, 5, width, seed=index) for index, port in enumerate(ports)}
    new = compare(model, feed, tmp_path)
    assert all(n.name.startswith("layer/norm/") for n in new.graph.node)
    kept = {t.name: t.SerializeToString() for t in new.graph.initializer}
    assert all(kept[t.name] == t.SerializeToString() for t in model.graph.initializer)


# --- rotary positions ------------------------------------------------------------------------------------------------


def rotary_tables(width: int) -> Feed:
    angles = np.arange(LONGEST)[:, None] / 7.0 ** (np.arange(width) / width)
    return {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("partial", [False, True])
def test_rotary_embedding(interleaved: int, partial: bool, tmp_path: Path) -> None:
    heads, size = 3, 32
    attributes: dict[str, int] = {"num_heads": heads, "rotary_embedding_dim": 16} if partial else {}
    dims = ["batch", "new", heads * size]
    positions = tensor_info("position_ids", INT64, ["batch", "new"])
    inputs = ["x", "position_ids", "cos_cache", "sin_cache"]
    model = make_model(
        [node("RotaryEmbedding", inputs, ["y"], "rotary", domain=CONTRIB, interleaved=interleaved, **attributes)],
        [tensor_info("x", FLOAT, dims), positions],
        [tensor_info("y", FLOAT, dims)],
        rotary_tables(8 if partial else 16),
    )
    feed = {"x": normal(2, 4, heads * size), "position_ids": np.array([[0, 1, 2, 3], [9, 4, 30, 0]])}
    compare(model, feed, tmp_path)


# --- attention -------------------------------------------------------------------------------------------------------


def attention_model(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    packed: bool = True,
    rotary: int | None = None,
    layers: int = 1,
    past_width: bool = True,
    **attributes: Any,
) -> Any:
    """Attention layers one after the other, fed like the model builder feeds them; `rotary` is the tables' width."""
    widths = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
    ports = {"x": sum(widths.values())} if packed else widths
    nodes = [
        node("Constant", [], ["one"], "one", value=onnx.numpy_helper.from_array(np.array([1], np.int64))),
        node("ReduceSum", ["attention_mask", "one"], ["sums"], "ReduceSum", keepdims=0),
        node("Sub", ["sums", "one"], ["sums_less_one"], "Sub"),
        node("Cast", ["sums_less_one"], ["seqlens_k"], "Cast", to=INT32),
        node("Shape", ["attention_mask"], ["mask_shape"], "Shape"),
        node("Gather", ["mask_shape", "index"], ["total"], "Gather"),
        node("Cast", ["total"], ["total_sequence_length"], "Cast_1", to=INT32),
    ]
    tensors = {"index": np.array(1, np.int64)} | (rotary_tables(rotary) if rotary else {})
    inputs = [tensor_info(name, FLOAT, ["batch", "new", width]) for name, width in ports.items()]
    inputs.append(tensor_info("attention_mask", INT64, ["batch", "total_sequence_length"]))
    outputs = []
    for layer in range(layers):
        past, present = ([f"{side}.{layer}.{kind}" for kind in ("key", "value")] for side in ("past", "present"))
        tables = ["cos_cache", "sin_cache"] if rotary else ["", ""]
        x = ["x", "", ""] if packed else ["q", "k", "v"]
        nodes.append(
            node(
                "GroupQueryAttention",
                [*x, *past, "seqlens_k", "total_sequence_length", *tables, "", "", ""],
                [f"y.{layer}", *present],
                f"/layers.{layer}/attn",
                domain=CONTRIB,
                num_heads=heads,
                kv_num_heads=kv_heads,
                do_rotary=int(rotary is not None),
                **attributes,
            )
        )
        for names, ports_, length in ((past, inputs, "past"), (present, outputs, "total_sequence_length")):
            dims = ["batch", kv_heads, f"{length}.{layer}", size if past_width else "head"]
            ports_.extend(tensor_info(name, FLOAT, dims) for name in names)
        outputs.append(tensor_info(f"y.{layer}", FLOAT, ["batch", "new", heads * size]))
    return make_model(nodes, inputs, outputs, tensors)


def attend(run: Run, model: Any, tokens: Sequence[tuple[Feed, np.ndarray]], capacity: int = 0) -> list[Feed]:
    """Feed chunks of tokens with their part of the mask, each with the cache of the chunk before."""
    past: Feed = {}
    for port in model.graph.input:
        if port.name.startswith("past"):
            heads, size = (port.type.tensor_type.shape.dim[axis].dim_value or 16 for axis in (1, 3))
            past[port.name] = np.zeros((tokens[0][1].shape[0], heads, capacity, size), np.float32)
    mask = np.zeros((tokens[0][1].shape[0], 0), np.int64)
    answers = []
    for new, real in tokens:
        mask = np.concatenate([mask, real], axis=1)
        answers.append(run({**new, "attention_mask": mask, **past}))
        past = {name: answers[-1][name.replace("past", "present")] for name in past}
    return answers


def random_tokens(model: Any, real: Sequence[Sequence[int]] | np.ndarray, seed: int) -> tuple[Feed, np.ndarray]:
    mask = np.array(real, np.int64)
    ports = [port for port in model.graph.input if port.name in "xqkv"]
    widths = {port.name: port.type.tensor_type.shape.dim[2].dim_value for port in ports}
    return {name: normal(*mask.shape, width, seed=seed) for name, width in widths.items()}, mask


def row(tokens: Sequence[tuple[Feed, np.ndarray]], index: int) -> list[tuple[Feed, np.ndarray]]:
    """One row of a batch without its padding."""
    kept = []
    for new, real in tokens:
        here = real[index].astype(bool)
        kept.append(({name: x[index : index + 1, here] for name, x in new.items()}, real[index : index + 1, here]))
    return kept


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {"scale": 0.3},
    "scale left out": {},
    "q, k, v apart": {"packed": False, "rotary": 8},
    "every head its own key": {"heads": 3, "kv_heads": 3, "rotary": 8},
    "one key head": {"heads": 4, "kv_heads": 1, "rotary": 8, "packed": False},
    "rotary": {"rotary": 8},
    "rotary, neighbours": {"rotary": 8, "rotary_interleaved": 1},
    "rotary, half of the head": {"rotary": 8, "size": 32},
    "rotary, half of the head, neighbours": {"rotary": 8, "size": 32, "rotary_interleaved": 1, "packed": False},
    "window": {"rotary": 8, "local_window_size": 3},
    "softcap": {"softcap": 0.7, "scale": 0.5},
    "window and softcap": {"rotary": 8, "softcap": 0.7, "local_window_size": 2, "packed": False},
    "unknown width of the cache": {"rotary": 8, "past_width": False},
}


@pytest.mark.parametrize("case", sorted(ATTENTION))
def test_attention_of_one_sequence(case: str, tmp_path: Path) -> None:
    """A prompt, one token, several tokens with a cache, one token; outputs and caches."""
    model = attention_model(**ATTENTION[case])
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((6, 1, 4, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for runtime in RUNTIMES:
        for old, new in zip(wanted, attend(runtime(path), model, tokens), strict=True):
            for name, values in old.items():
                np.testing.assert_allclose(new[name], values, rtol=1e-4, atol=2e-6, err_msg=runtime.__name__)


@pytest.mark.parametrize("case", ["rotary", "window and softcap", "plain"])
def test_right_padding_is_as_in_onnx_runtime(case: str, tmp_path: Path) -> None:
    """Prompts of 6, 3 and 1 tokens, then one token at a time; ONNX Runtime packs its cache, the new graph does not."""
    model = attention_model(**ATTENTION[case])
    prompt = [[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5]
    tokens = [random_tokens(model, prompt, 0), *(random_tokens(model, np.ones((3, 1)), seed) for seed in (1, 2, 3))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for runtime in RUNTIMES:
        for (_, real), old, new in zip(tokens, wanted, attend(runtime(path), model, tokens), strict=True):
            seen = real.astype(bool)
            np.testing.assert_allclose(new["y.0"][seen], old["y.0"][seen], rtol=1e-4, atol=2e-6)
            assert np.isfinite(new["y.0"]).all()


@pytest.mark.parametrize("case", ["rotary", "window", "softcap"])
def test_any_padding_is_as_without(case: str, tmp_path: Path) -> None:
    """Left, right and inner padding, several tokens with a cache: each row as ONNX Runtime computes it alone."""
    model = attention_model(**ATTENTION[case])
    chunks = [
        [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]],
        [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1]],
        [[1], [1], [1], [1]],
    ]
    tokens = [random_tokens(model, real, seed) for seed, real in enumerate(chunks)]
    old = ort(saved(model, tmp_path / "old.onnx"))
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for runtime in RUNTIMES:
        found = attend(runtime(path), model, tokens)
        for index in range(4):
            alone = attend(old, model, row(tokens, index))
            for (_, real), one, many in zip(tokens, alone, found, strict=True):
                here = many["y.0"][index][real[index].astype(bool)]
                np.testing.assert_allclose(here, one["y.0"][0], rtol=1e-4, atol=2e-6)


def test_a_cache_that_ends_at_the_window_becomes_a_whole_one(tmp_path: Path) -> None:
    """ONNX Runtime keeps four tokens and evicts the others; the new graph keeps all and hides them."""
    model = attention_model(rotary=8, local_window_size=4, sliding_window_cache=1)
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((6, 1, 1, 3, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens, capacity=4)
    new = rewritten(model)
    lengths = [v.type.tensor_type.shape.dim[2].dim_param for v in [*new.graph.input[2:], *new.graph.output[:2]]]
    assert lengths == ["past_sequence_length"] * 2 + ["total_sequence_length"] * 2
    path = saved(new, tmp_path / "new.onnx")
    for runtime in RUNTIMES:
        found = attend(runtime(path), model, tokens)
        assert found[-1]["present.0.key"].shape[2] == 12
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(other["y.0"], one["y.0"], rtol=1e-4, atol=2e-6)


def test_what_layers_share_is_made_once(tmp_path: Path) -> None:
    model = attention_model(layers=3, rotary=8)
    new = rewritten(model)
    kinds = [n.op_type for n in new.graph.node]
    assert kinds.count("MatMul") == 6  # two for each layer
    once = ("CumSum", "Slice", "LessOrEqual", "Where", "Tile")
    assert [kinds.count(kind) for kind in once] == [1, 1, 1, 2, 1] and kinds.count("Neg") == 1
    assert not {"ReduceSum", "Sub", "Constant"} & set(kinds)  # seqlens_k is not needed any more
    assert {t.name for t in model.graph.initializer} - {t.name for t in new.graph.initializer} == {"index"}
    read = {name for n in new.graph.node for name in n.input}
    assert {t.name for t in new.graph.initializer} <= read
    tokens = [random_tokens(model, np.ones((1, 5)), 0), random_tokens(model, np.ones((1, 1)), 1)]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    found = attend(ort(saved(new, tmp_path / "new.onnx")), model, tokens)
    for old, now in zip(wanted, found, strict=True):
        np.testing.assert_allclose(now["y.2"], old["y.2"], rtol=1e-4, atol=2e-6)


def test_tables_that_an_if_chooses(tmp_path: Path) -> None:
    """As in models whose rotary tables depend on the length."""
    model = attention_model(rotary=8)
    tables = {t.name: t for t in model.graph.initializer if t.name != "index"}
    del model.graph.initializer[1:]
    far = {name: onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(t)) for name, t in tables.items()}
    branches = [
        onnx.helper.make_graph(
            [node("Constant", [], [f"{name}.{label}"], value=t) for name, t in values.items()],
            label,
            [],
            [tensor_info(f"{name}.{label}", FLOAT, [LONGEST, 8]) for name in values],
        )
        for label, values in (("near", tables), ("far", far))
    ]
    nodes = [
        node("Greater", ["total", "limit"], ["long"], "Greater"),
        node("If", ["long"], list(tables), "If", then_branch=branches[1], else_branch=branches[0]),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(6, np.int64), "limit"))
    before, last = list(model.graph.node)[:-1], model.graph.node[-1]
    ordered = [*before, *nodes, last]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((5, 1, 1, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for runtime in RUNTIMES:
        for old, new in zip(wanted, attend(runtime(path), model, tokens), strict=True):
            np.testing.assert_allclose(new["y.0"], old["y.0"], rtol=1e-4, atol=2e-6)


# --- what stays, and what is refused ---------------------------------------------------------------------------------


def test_a_standard_model_stays_as_it_is() -> None:
    model = rewritten(attention_model(rotary=8))
    before = model.SerializeToString(deterministic=True)
    to_standard_ops(model)
    assert model.SerializeToString(deterministic=True) == before


def one_node(kind: str, inputs: Sequence[str], domain: str = CONTRIB, element: int = FLOAT, **attributes: Any) -> Any:
    return make_model(
        [node(kind, list(inputs), ["y"], "the node", domain=domain, **attributes)],
        [tensor_info(name, element, ["batch", "new", 8]) for name in inputs],
        [tensor_info("y", element, ["batch", "new", 8])],
        {},
    )


def changed_attention(index: int, name: str) -> Any:
    model = attention_model(rotary=8)
    while len(model.graph.node[-1].input) <= index:
        model.graph.node[-1].input.append("")
    model.graph.node[-1].input[index] = name
    model.graph.node[-1].name = "the node"
    return model


def attention_with(**attributes: Any) -> Any:
    model = attention_model(rotary=8, **attributes)
    model.graph.node[-1].name = "the node"
    return model


def unlike_the_builder() -> Any:
    """seqlens_k that are not the sums less one."""
    model = attention_with()
    model.graph.node[2].op_type = "Add"
    return model


def hidden_in_a_branch() -> Any:
    ports = [tensor_info("y", FLOAT, ["batch", "new", 8])]
    inner = node("Gelu", ["x"], ["y"], "the node", domain=CONTRIB)
    branches = [onnx.helper.make_graph([inner], name, [], ports) for name in ("a", "b")]
    chosen = node("If", ["c"], ["z"], "If", then_branch=branches[0], else_branch=branches[1])
    inputs = [tensor_info("x", FLOAT, ["batch", "new", 8]), tensor_info("c", onnx.TensorProto.BOOL, [])]
    return make_model([chosen], inputs, [tensor_info("z", FLOAT, ["batch", "new", 8])], {})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "packed weights": (lambda: one_node("MatMulNBits", "abc", K=32, N=8, bits=4, block_size=32), "MatMulNBits"),
    "packed embedding": (lambda: one_node("GatherBlockQuantized", "abc", block_size=32), "GatherBlockQuantized"),
    "multi-head": (lambda: one_node("MultiHeadAttention", "qkv", num_heads=2), "MultiHeadAttention"),
    "unknown": (lambda: one_node("MoE", "abc"), "MoE"),
    "another domain": (lambda: one_node("Gelu", "x", domain="somewhere.else"), r"somewhere\.else\.Gelu"),
    "of a later opset": (lambda: one_node("RMSNormalization", "xw", domain=""), "RMSNormalization"),
    "half precision": (lambda: one_node("FastGelu", "x", element=onnx.TensorProto.FLOAT16), "FLOAT16"),
    "unknown attribute": (lambda: one_node("QuickGelu", "x", beta=1.0), "beta"),
    "another axis": (
        lambda: one_node("SimplifiedLayerNormalization", "xw", domain="", axis=1),
        "axis",
    ),
    "rotary of rank 4": (lambda: one_node("RotaryEmbedding", "xpcs"), "position_ids"),
    "sinks": (lambda: changed_attention(11, "sinks"), "sinks"),
    "positions": (lambda: changed_attention(9, "position_ids"), "position_ids"),
    "bias": (lambda: changed_attention(10, "bias"), "bias"),
    "quantised cache": (lambda: changed_attention(12, "k_scale"), "k_scale"),
    "no cache": (lambda: changed_attention(3, ""), "past_key"),
    "no tables": (lambda: changed_attention(7, ""), "rotary tables"),
    "both directions": (lambda: attention_with(causal=0), "causal"),
    "smooth softmax": (lambda: attention_with(smooth_softmax=1), "smooth_softmax"),
    "other lengths": (unlike_the_builder, "seqlens_k"),
    "inside an If": (hidden_in_a_branch, "inside If"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_has_no_counterpart_is_refused(case: str) -> None:
    make, word = REFUSED[case]
    model = make()
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(Unsupported, match=word) as caught:
        to_standard_ops(model)
    assert caught.value.where == "the node" and "--onnx-format nbits" in str(caught.value)
    assert model.SerializeToString(deterministic=True) == before


def test_an_old_opset_is_refused() -> None:
    model = attention_model(rotary=8)
    model.opset_import[0].version = 19
    with pytest.raises(Unsupported, match="opset"):
        to_standard_ops(model)
