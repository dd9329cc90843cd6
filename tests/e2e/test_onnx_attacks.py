"""Changes around the weights of an ONNX graph, all of them valid ONNX: every weight is still there, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialects import quantised_llama
from e2e.in_process import in_process
from sparseport.errors import FidelityError
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.folder import verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")

FORMS: dict[str, dict[str, Any]] = {
    "nbits": {},
    "rows": {"onnx": {"format": "qdq"}},
    "columns": {"onnx": {"format": "qdq", "accuracy": "fast"}},
}
DOWN = "layers.1/mlp/down_proj"


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("onnx")
    quantised_llama(tiny_base, root / "base", "gptq-v1")
    folders = {}
    with in_process():
        for name, fields in FORMS.items():
            common = {"base": root / "base", "output": root / name, "target": ["onnx"], "tokenizer": False}
            folders[name] = export(make_recipe({**common, "numerics": False, **fields})).folder
    return folders


def _node(model: Any, kind: str, part: str = "") -> Any:
    return next(node for node in model.graph.node if node.op_type == kind and part in node.name)


def _insert(model: Any, at: Any, *new: Any, after: bool) -> None:
    nodes = list(model.graph.node)
    place = nodes.index(at) + int(after)
    nodes[place:place] = new
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _add(model: Any, name: str, values: np.ndarray) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))


def _instead_of_down(model: Any, *new: Any, inputs: list[str], kind: str = "MatMul", **attributes: Any) -> None:
    """The product stays with all its inputs, but what goes on is the result of another node."""
    node = _node(model, "MatMulNBits", DOWN)
    output = node.output[0]
    node.output[0] = "dead"
    inputs = [node.input[0] if name == "x" else name for name in inputs]
    _insert(model, node, *new, onnx.helper.make_node(kind, inputs, [output], "other", **attributes), after=True)


def constant_node(model: Any) -> None:
    values = onnx.numpy_helper.from_array(np.ones((128, 64), np.float32))
    constant = onnx.helper.make_node("Constant", [], ["evil"], "c", value=values)
    _instead_of_down(model, constant, inputs=["x", "evil"])


def einsum(model: Any) -> None:
    _add(model, "stray", np.ones((64, 128), np.float32))
    _instead_of_down(model, inputs=["x", "stray"], kind="Einsum", equation="bsk,nk->bsn")


def named_like_a_rotary_table(model: Any) -> None:
    _add(model, "cos_cache_w", np.ones((128, 64), np.float32))
    _instead_of_down(model, inputs=["x", "cos_cache_w"])


def a_dense_twin(model: Any) -> None:
    _add(model, "model.layers.1.mlp.down_proj.weight", np.ones((64, 128), np.float32))
    turn = onnx.helper.make_node("Transpose", ["model.layers.1.mlp.down_proj.weight"], ["turned"], "t", perm=[1, 0])
    _instead_of_down(model, turn, inputs=["x", "turned"])


def rows_scaled(model: Any) -> None:
    node = _node(model, "MatMulNBits", DOWN)
    output = node.output[0]
    node.output[0] = "raw"
    _add(model, "vector", np.full(64, 2, np.float32))
    _insert(model, node, onnx.helper.make_node("Mul", ["raw", "vector"], [output], "mul"), after=True)


def columns_permuted(model: Any) -> None:
    node = _node(model, "MatMulNBits", DOWN)
    _add(model, "order", np.arange(128)[::-1].copy())
    gather = onnx.helper.make_node("Gather", [node.input[0], "order"], ["permuted"], "g", axis=-1)
    node.input[0] = "permuted"
    _insert(model, node, gather, after=False)


def scales_through_int8(model: Any) -> None:
    node = _node(model, "MatMulNBits", DOWN)
    scales, node.input[2] = node.input[2], "again"
    narrow = onnx.helper.make_node("Cast", [scales], ["narrow"], "narrow", to=onnx.TensorProto.INT8)
    again = onnx.helper.make_node("Cast", ["narrow"], ["again"], "again", to=onnx.TensorProto.FLOAT)
    _insert(model, node, narrow, again, after=False)


def head_transposed_twice(model: Any) -> None:
    node = _node(model, "MatMul", "lm_head")
    once, node.input[1] = node.input[1], "twice"
    _insert(model, node, onnx.helper.make_node("Transpose", [once], ["twice"], "twice", perm=[1, 0]), after=False)


def norms_exchanged(model: Any) -> None:
    one, two = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            node.input[index] = {one: two, two: one}.get(value, value)


def another_norm(model: Any) -> None:
    own = "model.layers.1.input_layernorm.weight"
    _add(model, "x", np.full(64, 3, np.float32))
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            node.input[index] = "x" if value == own else value
    _insert(model, model.graph.node[0], onnx.helper.make_node("Identity", [own], ["unused"], "id"), after=False)


def rotary_table_zeroed(model: Any) -> None:
    table = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("cos_cache"))
    table.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(table.dims), np.float32), table.name))


def late_rows_of_the_rotary_table(model: Any) -> None:
    """No logit check reads as many tokens as this table has rows."""
    table = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("cos_cache"))
    values = np.ones(tuple(table.dims), np.float32)
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))


def fast_in_an_exact_folder(model: Any) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4


def results_exchanged(model: Any) -> None:
    one, two = (_node(model, "MatMulNBits", f"layers.0/mlp/{part}_proj") for part in ("up", "gate"))
    one.output[0], two.output[0] = two.output[0], one.output[0]


def window_of_attention(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [attribute for attribute in node.attribute if attribute.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("local_window_size", 128)])


def other_tokens(model: Any) -> None:
    _add(model, "zero", np.array(0))
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] == "input_ids":
            node.input[1] = "other_ids"
    first = model.graph.node[0]
    _insert(model, first, onnx.helper.make_node("Mul", ["input_ids", "zero"], ["other_ids"], "m"), after=False)


def keys_for_values(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Concat" and "qkv" in node.name)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def output_renamed(model: Any) -> None:
    first, second = model.graph.output[1], model.graph.output[2]
    first.name, second.name = second.name, first.name


def another_opset(model: Any) -> None:
    next(opset for opset in model.opset_import if not opset.domain).version -= 1


ATTACKS: list[tuple[str, Callable[[Any], None]]] = [
    *(
        ("nbits", change)
        for change in (
            constant_node,
            einsum,
            named_like_a_rotary_table,
            a_dense_twin,
            rows_scaled,
            columns_permuted,
            scales_through_int8,
            norms_exchanged,
            another_norm,
            rotary_table_zeroed,
            late_rows_of_the_rotary_table,
            fast_in_an_exact_folder,
            results_exchanged,
            window_of_attention,
            other_tokens,
            output_renamed,
            another_opset,
        )
    ),
    *(("rows", change) for change in (head_transposed_twice, norms_exchanged, rotary_table_zeroed, output_renamed)),
    *(("columns", change) for change in (keys_for_values, norms_exchanged)),
]


@pytest.mark.parametrize(("form", "change"), ATTACKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_graph_that_computes_something_else_is_found(
    form: str, change: Callable[[Any], None], exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / form
    shutil.copytree(exported[form], folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    before = model.SerializeToString()
    change(model)
    assert model.SerializeToString() != before
    onnx.save(model, folder / "model.onnx")
    found = [line for line in verify(folder).differences if "content changed" not in line and " bytes, " not in line]
    assert found and all(line.startswith("model.onnx") for line in found)


def test_a_writer_that_gets_the_graph_wrong_publishes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest that read-back has to find is taken before any weight is put in."""
    from sparseport.targets.onnx import products

    plain = products.Products.product

    def wrong(self: Any, name: str, x: str, y: str, parts: Any) -> None:
        plain(self, name, x, f"{y}/raw", parts)
        self.node("Identity", [f"{y}/raw"], y, f"{name}/Identity")

    monkeypatch.setattr(products.Products, "product", wrong)
    recipe = {"base": tiny_base, "output": tmp_path / "out", "target": ["onnx"], "tokenizer": False, "numerics": False}
    with in_process(), pytest.raises(FidelityError, match="not the one that was built") as caught:
        export(make_recipe(recipe))
    assert caught.value.code == "E_READBACK" and not (tmp_path / "out").exists()
