"""Norms, activations and rotary positions of ONNX Runtime in standard operators, what stays, and what is refused.

A small model of one operator is run by ONNX Runtime's kernel, rewritten, and run by ONNX Runtime, by the reference
implementation of the standard, and by OpenVINO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contrib_models import (
    CONTRIB,
    FLOAT,
    INT32,
    INT64,
    Feed,
    Run,
    attention_model,
    each_runtime,
    make_model,
    model_with_an_if,
    node,
    normal,
    onnx,
    ort,
    rewritten,
    rotary_tables,
    saved,
    tensor_info,
)
from sparseport.errors import Unsupported
from sparseport.targets.onnx.standard_ops import to_standard_ops

Runtime = Callable[[Path], Run]


def compare(model: Any, feed: Feed, runtime: Runtime, tmp_path: Path) -> Any:
    """Run ONNX Runtime's own kernel, and the rewritten model; returns the rewritten model."""
    wanted = ort(saved(model, tmp_path / "old.onnx"))(feed)
    new = rewritten(model)
    found = runtime(saved(new, tmp_path / "new.onnx"))(feed)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=2e-6, err_msg=name)
    return new


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


@each_runtime
@pytest.mark.parametrize("case", sorted(SIMPLE))
def test_norms_and_activations(case: str, runtime: Runtime, tmp_path: Path) -> None:
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
    scale = 0.3 if attributes or "gelu" in case else 1e-3
    feed = {port.name: scale * normal(2, 5, width, seed=index) for index, port in enumerate(ports)}
    new = compare(model, feed, runtime, tmp_path)
    assert all(n.name.startswith("layer/norm/") for n in new.graph.node)
    kept = {t.name: t.SerializeToString() for t in new.graph.initializer}
    assert all(kept[t.name] == t.SerializeToString() for t in model.graph.initializer)


# --- rotary positions ------------------------------------------------------------------------------------------------


@each_runtime
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("partial", [False, True])
def test_rotary_embedding(interleaved: int, partial: bool, runtime: Runtime, tmp_path: Path) -> None:
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
    compare(model, feed, runtime, tmp_path)


@each_runtime
def test_a_wrong_description_of_a_constant_goes(runtime: Runtime, tmp_path: Path) -> None:
    """The model builder calls its constant vectors scalars; then no tool could infer the standard model's shapes."""
    shape = onnx.numpy_helper.from_array(np.array([0, -1], np.int64))
    model = make_model(
        [node("Constant", [], ["shape"], "c", value=shape), node("Reshape", ["x", "shape"], ["y"], "r")],
        [tensor_info("x", FLOAT, ["batch", 4, 2])],
        [tensor_info("y", FLOAT, ["batch", 8])],
        {},
        [tensor_info("shape", INT64, [])],
    )
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(model, full_check=True)
    compare(model, {"x": normal(3, 4, 2)}, runtime, tmp_path)  # checks fully


# --- what stays, and what is refused ---------------------------------------------------------------------------------


def test_a_standard_model_stays_as_it_is() -> None:
    model = rewritten(attention_model(rotary=8))
    before = model.SerializeToString(deterministic=True)
    to_standard_ops(model)
    assert model.SerializeToString(deterministic=True) == before


def test_weights_that_are_elsewhere_are_not_read() -> None:
    model = one_node("SimplifiedLayerNormalization", "xw", domain="")
    del model.graph.input[1:]
    weight = onnx.TensorProto(name="w", dims=[8], data_type=FLOAT, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="nowhere.data")
    model.graph.initializer.append(weight)
    to_standard_ops(model)
    assert model.graph.initializer[0] == weight


def one_node(
    kind: str,
    inputs: Sequence[str],
    domain: str = CONTRIB,
    element: int = FLOAT,
    outputs: Sequence[str] = "y",
    **attributes: Any,
) -> Any:
    dims = ["batch", "new", 8]
    return make_model(
        [node(kind, list(inputs), list(outputs), "the node", domain=domain, **attributes)],
        [tensor_info(name, element, dims if name != "p" else dims[:2]) for name in inputs],
        [tensor_info(name, element, dims) for name in outputs],
        {},
    )


def attention_with(changed: Sequence[tuple[int, str]] = (), **arguments: Any) -> Any:
    """Attention with some of its inputs changed."""
    model = attention_model(**{"rotary": 8, **arguments})
    attention = model.graph.node[-1]
    attention.name = "the node"
    for index, name in changed:
        attention.input.extend([""] * (index + 1 - len(attention.input)))
        attention.input[index] = name
    return model


def with_products() -> Any:
    model = attention_with()
    model.graph.node[-1].output.append("products")
    return model


def lengths_made_otherwise(index: int, **changes: Any) -> Any:
    """seqlens_k that are not the sums of the mask's rows less one."""
    model = attention_with()
    for field, value in changes.items():
        if field == "input":
            model.graph.node[index].input[1] = value
        else:
            setattr(model.graph.node[index], field, value)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "zero"))
    return model


def with_int32_mask() -> Any:
    model = attention_with()
    mask = next(port for port in model.graph.input if port.name == "attention_mask")
    mask.type.tensor_type.elem_type = INT32
    return model


def with_tables_of_two_widths() -> Any:
    model = model_with_an_if((8, 4))
    model.graph.node[-1].name = "the node"
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
    "statistics of a norm": (
        lambda: one_node("SimplifiedLayerNormalization", "xw", domain="", outputs="yi"),
        "output 1",
    ),
    "statistics of a sum": (lambda: one_node("SkipLayerNormalization", "xsw", outputs="ym"), "output 1"),
    "rotary, three positions": (lambda: one_node("RotaryEmbedding", "xqcs"), "position_ids"),
    "rotary, scaled": (lambda: one_node("RotaryEmbedding", "xpcs", scale=2.0), "scale"),
    "rotary, rows in one": (lambda: one_node("RotaryEmbedding", "xpcs", is_packed_batching=1), "is_packed_batching"),
    "sinks": (lambda: attention_with([(11, "sinks")]), "sinks"),
    "positions": (lambda: attention_with([(9, "position_ids")]), "position_ids"),
    "bias": (lambda: attention_with([(10, "bias")]), "bias"),
    "quantised cache": (lambda: attention_with([(12, "k_scale")]), "k_scale"),
    "norms of q and k": (lambda: attention_with([(14, "q_norm"), (15, "k_norm")]), "q_norm"),
    "no cache": (lambda: attention_with([(3, "")]), "past_key"),
    "no tables": (lambda: attention_with([(7, "")]), "rotary tables"),
    "wide tables": (lambda: attention_with(rotary=16), "wider"),
    "tables of two widths": (with_tables_of_two_widths, "rotary tables"),
    "heads that do not divide": (lambda: attention_with(heads=3), "heads"),
    "products": (with_products, "products"),
    "products of a kind": (lambda: attention_with(qk_output=1), "qk_output"),
    "both directions": (lambda: attention_with(causal=0), "causal"),
    "smooth softmax": (lambda: attention_with(smooth_softmax=1), "smooth_softmax"),
    "lengths plus one": (lambda: lengths_made_otherwise(2, op_type="Add"), "seqlens_k"),
    "lengths less zero": (lambda: lengths_made_otherwise(2, input="zero"), "seqlens_k"),
    "sums of columns": (lambda: lengths_made_otherwise(1, input="zero"), "seqlens_k"),
    "mask of another type": (with_int32_mask, "seqlens_k"),
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
