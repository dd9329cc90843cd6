"""Small models of ONNX Runtime's own operators, and the programs that run them before and after they are rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
each_runtime = pytest.mark.parametrize("runtime", RUNTIMES, ids=[runtime.__name__ for runtime in RUNTIMES])


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


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotary_tables(width: int) -> Feed:
    angles = np.arange(LONGEST)[:, None] / 7.0 ** (np.arange(width) / width)
    return {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}


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
    outputs: list[Any] = []
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


def model_with_an_if(widths: Sequence[int] = (8, 8)) -> Any:
    """Rotary tables that depend on the length: other ones behind 6 tokens."""
    model = attention_model(rotary=8)
    names = ["cos_cache", "sin_cache"]
    del model.graph.initializer[1:]
    branches = [
        onnx.helper.make_graph(
            [
                node("Constant", [], [f"{name}.{label}"], value=onnx.numpy_helper.from_array(sign * values))
                for name, values in rotary_tables(width).items()
            ],
            label,
            [],
            [tensor_info(f"{name}.{label}", FLOAT, [LONGEST, width]) for name in names],
        )
        for label, width, sign in zip(("near", "far"), widths, (np.float32(1), np.float32(-1)), strict=True)
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(6, np.int64), "limit"))
    nodes = list(model.graph.node)
    nodes[-1:-1] = [
        node("Greater", ["total", "limit"], ["long"], "Greater"),
        node("If", ["long"], names, "If", then_branch=branches[1], else_branch=branches[0]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
