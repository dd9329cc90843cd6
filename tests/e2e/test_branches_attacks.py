"""Branches that were changed, taken away, added or moved: `verify` finds each by following the graph, not by hashes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.in_process import in_process
from sparseport.errors import FidelityError
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.folder import verify

onnx = pytest.importorskip("onnx")
ov = pytest.importorskip("openvino")
pytest.importorskip("onnxruntime_genai")

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"  # has no branch
LABEL = "+".join(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def exported(tiny_int4: Path, tiny_adapter_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("branches")
    common = {"base": tiny_int4, "adapter": tiny_adapter_dense, "branches": "graph", "tokenizer": False}
    forms: dict[str, dict[str, Any]] = {"nbits": {}, "qdq": {"onnx": {"format": "qdq"}}}
    with in_process():
        folders = {
            name: export(
                make_recipe({**common, **fields, "output": root / name, "target": ["onnx"], "numerics": False})
            ).folder
            for name, fields in forms.items()
        }
        recipe = {**common, "output": root / "openvino", "numerics": False}
        return {**folders, "openvino": export(make_recipe(recipe)).folder}


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: Path(shutil.copytree(exported[form], tmp_path / form))


def _found(folder: Path) -> list[str]:
    return [line for line in verify(folder).differences if "content changed" not in line and " bytes, " not in line]


# --- OpenVINO --------------------------------------------------------------------------------------------------------


def _node(model: Any, name: str) -> Any:
    return next(op for op in model.get_ordered_ops() if op.get_friendly_name() == name)


def _matrix(shape: tuple[int, ...], name: str) -> Any:
    from openvino import opset13 as ops

    return ops.constant(np.full(shape, 0.01, np.float32), name=name)


def _branch_at(product: Any, x: Any, module: str, *, rank: int = 4) -> None:
    """Another branch, as the writer makes them, beside a product."""
    from openvino import opset13 as ops

    columns, rows = (int(port.get_partial_shape()[-1].get_length()) for port in (x, product.output(0)))
    users = list(product.output(0).get_target_inputs())
    low = ops.matmul(x, _matrix((rank, columns), f"{module}.lora_A.weight"), False, True)
    high = ops.matmul(low, _matrix((rows, rank), f"{module}.lora_B.weight"), False, True)
    scaled = ops.multiply(high, ops.constant(np.float32(2), name=f"{module}.lora_scaling"))
    total = ops.add(product.output(0), scaled)
    for user in users:
        user.replace_source_output(total.output(0))


def _product(model: Any, module: str) -> Any:
    return next(
        op
        for op in model.get_ordered_ops()
        if op.get_type_name() == "MatMul" and op.get_friendly_name().startswith(f"__module.{module}/")
    )


def _replace_constant(model: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from openvino import opset13 as ops

    node = _node(model, name)
    other = ops.constant(change(np.array(node.get_data())), name=name)
    for user in list(node.output(0).get_target_inputs()):
        user.replace_source_output(other.output(0))


def _one_bit(values: np.ndarray) -> np.ndarray:
    changed = np.ascontiguousarray(values)
    changed.reshape(-1).view(np.uint8)[0] ^= 1
    return changed


def ov_bit_in_a(model: Any) -> None:
    _replace_constant(model, f"{Q}.lora_A.weight", _one_bit)


def ov_bit_in_b(model: Any) -> None:
    _replace_constant(model, f"{Q}.lora_B.weight", _one_bit)


def ov_scaling(model: Any) -> None:
    _replace_constant(model, f"{Q}.lora_scaling", lambda values: values * np.float32(1.0000001))


def ov_removed(model: Any) -> None:
    total = _node(model, f"branch/{Q.replace('.', '/')}/sum")
    for user in list(total.output(0).get_target_inputs()):
        user.replace_source_output(_product(model, Q).output(0))


def ov_dead(model: Any) -> None:
    """The branch is computed, and its product used without it beside the sum."""
    total = _node(model, f"branch/{Q.replace('.', '/')}/sum")
    from openvino import opset13 as ops

    half = ops.multiply(ops.add(total.output(0), _product(model, Q).output(0)), ops.constant(np.float32(0.5)))
    for user in list(total.output(0).get_target_inputs()):
        if user.get_node().get_friendly_name() != half.input_value(0).get_node().get_friendly_name():
            user.replace_source_output(half.output(0))


def ov_other_activation(model: Any) -> None:
    _node(model, f"branch/{UP.replace('.', '/')}/A").input(0).replace_source_output(_product(model, Q).input_value(0))


def ov_scaled_activation(model: Any) -> None:
    from openvino import opset13 as ops

    first = _node(model, f"branch/{UP.replace('.', '/')}/A")
    twice = ops.multiply(first.input_value(0), ops.constant(np.float32(2)))
    first.input(0).replace_source_output(twice.output(0))


def ov_other_layer(model: Any) -> None:
    """up_proj's branch is added to gate_proj, which has the same shape."""
    total, gate = _node(model, f"branch/{UP.replace('.', '/')}/sum"), _product(model, GATE)
    for user in list(total.output(0).get_target_inputs()):
        user.replace_source_output(_product(model, UP).output(0))
    users = list(gate.output(0).get_target_inputs())
    total.input(0).replace_source_output(gate.output(0))
    for user in users:
        user.replace_source_output(total.output(0))


def ov_exchanged(model: Any) -> None:
    """The branches of up_proj in two layers change places, names and all."""
    for part in ("lora_A.weight", "lora_B.weight", "lora_scaling"):
        names = [f"model.layers.{layer}.mlp.up_proj.{part}" for layer in (0, 1)]
        one, two = (_node(model, name) for name in names)
        uses = [list(node.output(0).get_target_inputs()) for node in (one, two)]
        for node, places in ((two, uses[0]), (one, uses[1])):
            for place in places:
                place.replace_source_output(node.output(0))


def ov_additional(model: Any) -> None:
    product = _product(model, GATE)
    _branch_at(product, product.input_value(0), GATE)


def ov_additional_under_another_name(model: Any) -> None:
    product = _product(model, GATE)
    _branch_at(product, product.input_value(0), "x")


def ov_additional_of_rank_one(model: Any) -> None:
    """Vectors with a dimension of 1 are matrices too; their names are those of no branch."""
    from openvino import opset13 as ops

    product = _product(model, GATE)
    users = list(product.output(0).get_target_inputs())
    low = ops.matmul(product.input_value(0), _matrix((1, 64), "stray"), False, True)
    high = ops.matmul(low, _matrix((128, 1), "stray_too"), False, True)
    total = ops.add(product.output(0), high)
    for user in users:
        user.replace_source_output(total.output(0))


def ov_second_on_the_same_layer(model: Any) -> None:
    product = _product(model, Q)
    _branch_at(product, product.input_value(0), Q)


def ov_transposed(model: Any) -> None:
    """A square product the wrong way round: x B^T A^T."""
    base = f"branch/{Q.replace('.', '/')}"
    first, second = _node(model, f"{base}/A"), _node(model, f"{base}/B")
    a, b = first.input_value(1), second.input_value(1)
    from openvino import opset13 as ops

    wrong = ops.matmul(ops.matmul(first.input_value(0), b, False, False), a, False, False)
    for user in list(second.output(0).get_target_inputs()):
        user.replace_source_output(wrong.output(0))


OPENVINO = [
    ov_bit_in_a, ov_bit_in_b, ov_scaling, ov_removed, ov_dead, ov_other_activation, ov_scaled_activation,
    ov_other_layer, ov_exchanged, ov_additional, ov_additional_under_another_name, ov_additional_of_rank_one,
    ov_second_on_the_same_layer, ov_transposed,
]  # fmt: skip


@pytest.mark.parametrize("change", OPENVINO, ids=lambda change: change.__name__)
def test_openvino(change: Callable[[Any], None], copy: Callable[[str], Path]) -> None:
    folder = copy("openvino")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    change(model)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, folder.parent / "changed.xml", compress_to_fp16=False)
    del model
    for suffix in ("xml", "bin"):
        (folder.parent / f"changed.{suffix}").replace(folder / f"openvino_model.{suffix}")
    found = _found(folder)
    assert found, "the change passed"
    assert any(word in " ".join(found) for word in ("branch", "not certified", "two constants have one name")), found


def test_openvino_names_the_layer_of_a_changed_bit(copy: Callable[[str], Path]) -> None:
    folder = copy("openvino")
    values = np.memmap(folder / "openvino_model.bin", np.uint8, "r+")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    a = np.array(_node(model, f"{UP}.lora_A.weight").get_data()).tobytes()
    at = values.tobytes().find(a)
    assert at >= 0
    del model
    values[at + 5] ^= 16
    values.flush()
    assert _found(folder) == [f"openvino_model.bin: branch of {UP} changed"]


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _by_name(model: Any, name: str) -> Any:
    return next(node for node in model.graph.node if node.name == name)


def _ending(model: Any, kind: str, end: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == kind and node.name.endswith(end))


def _first(model: Any, module: str) -> Any:
    return _ending(model, "MatMul", f"{module}/lora_A")


def _add(model: Any, name: str, values: np.ndarray) -> str:
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return name


def _insert(model: Any, at: Any, *new: Any) -> None:
    nodes = list(model.graph.node)
    place = nodes.index(at) + 1
    nodes[place:place] = new
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _sort(model: Any) -> None:
    """Nodes in an order that ONNX allows."""
    known = {tensor.name for tensor in model.graph.initializer} | {port.name for port in model.graph.input} | {""}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if set(node.input) <= known]
        assert ready
        ordered += ready
        known.update(output for node in ready for output in node.output)
        waiting = [node for node in waiting if not set(node.output) <= known]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def onnx_scaling(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"{Q}.lora_scaling")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([2.5], np.float32), tensor.name))


def onnx_removed(model: Any) -> None:
    add = next(node for node in model.graph.node if node.op_type == "Add" and f"{UP}/lora" in node.input[1])
    base, output = add.input[0], add.output[0]
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value == output:
                node.input[index] = base
    dead = {add.name}
    for _ in range(4):
        used = {value for node in model.graph.node if node.name not in dead for value in node.input}
        dead |= {node.name for node in model.graph.node if not set(node.output) & used and f"{UP}/" in node.name}
    kept = [node for node in model.graph.node if node.name not in dead]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def onnx_half_removed(model: Any) -> None:
    """Everything is computed, but what goes on is the product alone."""
    add = next(node for node in model.graph.node if node.op_type == "Add" and f"{UP}/lora" in node.input[1])
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value == add.output[0]:
                node.input[index] = add.input[0]


def onnx_other_activation(model: Any) -> None:
    _first(model, UP).input[0] = _first(model, Q).input[0]


def onnx_scaled_activation(model: Any) -> None:
    first = _first(model, UP)
    twice = onnx.helper.make_node("Mul", [first.input[0], _add(model, "two", np.array([2], np.float32))], ["tw"], "tw")
    first.input[0] = "tw"
    model.graph.node.append(twice)
    _sort(model)


def onnx_other_layer(model: Any) -> None:
    """up_proj's branch is added to gate_proj."""
    add = next(node for node in model.graph.node if node.op_type == "Add" and f"{UP}/lora" in node.input[1])
    gate = _ending(model, "MatMulNBits", "layers.1/mlp/gate_proj/MatMul")
    base, up, output = add.input[0], _ending(model, "MatMulNBits", "layers.1/mlp/up_proj/MatMul"), add.output[0]
    assert up.output[0] == base
    up.output[0], add.output[0] = output, gate.output[0]
    gate.output[0] = add.input[0] = "gate/base"
    _sort(model)


def onnx_branches_of_two_layers_exchanged(model: Any) -> None:
    """The results of k's and v's branches, of the same shape, change places in the Concat."""
    concat = _ending(model, "Concat", "layers.1/attn/qkv_proj/MatMul/branches/Concat")
    concat.input[1], concat.input[2] = concat.input[2], concat.input[1]


def onnx_additional(model: Any) -> None:
    _another(model, GATE, 4)


def onnx_additional_under_another_name(model: Any) -> None:
    _another(model, "x", 4)


def onnx_additional_of_rank_one(model: Any) -> None:
    _another(model, "x", 1)


def _another(model: Any, name: str, rank: int) -> None:
    node = onnx.helper.make_node
    gate = _ending(model, "MatMulNBits", "layers.1/mlp/gate_proj/MatMul")
    output = gate.output[0]
    gate.output[0] = "raw"
    _add(model, f"{name}.lora_A.weight", np.full((rank, 64), 0.01, np.float32))
    _add(model, f"{name}.lora_B.weight", np.full((128, rank), 0.01, np.float32))
    _add(model, f"{name}.lora_scaling", np.array([2], np.float32))
    model.graph.node.extend(
        [
            node("Transpose", [f"{name}.lora_A.weight"], ["ta"], "ta", perm=[1, 0]),
            node("Transpose", [f"{name}.lora_B.weight"], ["tb"], "tb", perm=[1, 0]),
            node("MatMul", [gate.input[0], "ta"], ["low"], "low"),
            node("MatMul", ["low", "tb"], ["high"], "high"),
            node("Mul", ["high", f"{name}.lora_scaling"], ["scaled"], "scaled"),
            node("Add", ["raw", "scaled"], [output], "sum"),
        ]
    )
    _sort(model)


def onnx_without_transpose(model: Any) -> None:
    """A's transposed values lie in a constant of another name."""
    a = _add(model, "other", np.zeros((64, 8), np.float32))
    _first(model, UP).input[1] = a


def onnx_scaled_by_a_vector(model: Any) -> None:
    multiply = _ending(model, "Mul", f"{UP}/Mul")
    multiply.input[1] = _add(model, "vector", np.full(128, 2, np.float32))


ONNX = [
    onnx_scaling, onnx_removed, onnx_half_removed, onnx_other_activation, onnx_scaled_activation, onnx_other_layer,
    onnx_branches_of_two_layers_exchanged, onnx_additional, onnx_additional_under_another_name,
    onnx_additional_of_rank_one, onnx_without_transpose, onnx_scaled_by_a_vector,
]  # fmt: skip


@pytest.mark.parametrize("change", ONNX, ids=lambda change: change.__name__)
def test_onnx(change: Callable[[Any], None], copy: Callable[[str], Path]) -> None:
    folder = copy("nbits")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    before = model.SerializeToString()
    change(model)
    assert model.SerializeToString() != before
    onnx.save(model, folder / "model.onnx")
    found = _found(folder)
    assert found and all(line.startswith("model.onnx") for line in found), found


@pytest.mark.parametrize("form", ["nbits", "qdq"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_onnx_names_the_layer_of_a_changed_bit(form: str, side: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"{Q}.lora_{side}.weight")
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    data = np.memmap(folder / "model.onnx.data", np.uint8, "r+")
    data[offset + 9] ^= 2
    data.flush()
    assert _found(folder) == [f"model.onnx.data: branch of {Q} changed"]


@pytest.mark.parametrize("form", ["openvino", "nbits", "qdq"])
def test_untouched_folders_have_no_differences(form: str, exported: dict[str, Path]) -> None:
    assert verify(exported[form]).differences == []


def test_a_certificate_that_forgets_a_branch(copy: Callable[[str], Path]) -> None:
    """Sealed anew without one layer's branch: it is in the graph, and nobody answers for it."""
    from sparseport.verify.certificate import Certificate

    folder = copy("openvino")
    body = Certificate.read(folder).body
    del body["linears"][Q]["branch"]
    Certificate(body).write(folder)
    assert _found(folder) == [f"openvino_model.xml: branch of {Q} is in the graph but not certified"]


@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_a_writer_that_loses_a_branch_publishes_nothing(
    target: str, tiny_int4: Path, tiny_adapter_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseport.targets.onnx import writer as onnx_writer
    from sparseport.targets.openvino import writer as openvino_writer

    writers: dict[str, Any] = {"openvino": openvino_writer.OpenVinoWriter, "onnx": onnx_writer.OnnxWriter}
    plain = writers[target].add_branch

    def lossy(self: Any, module: str, branch: Any) -> None:
        if module != UP:
            plain(self, module, branch)

    monkeypatch.setattr(writers[target], "add_branch", lossy)
    recipe = {"base": tiny_int4, "adapter": tiny_adapter_dense, "branches": "graph", "tokenizer": False}
    with in_process(), pytest.raises(FidelityError) as caught:
        export(make_recipe({**recipe, "output": tmp_path / "out", "target": [target], "numerics": False}))
    assert caught.value.code == "E_READBACK" and UP in str(caught.value) and not (tmp_path / "out").exists()


def test_targets_that_certify_different_branches(exported: dict[str, Path], tmp_path: Path) -> None:
    from sparseport.verify.certificate import Certificate
    from sparseport.verify.folder import unequal_weights

    verdicts = [verify(exported[form]) for form in ("openvino", "nbits")]
    assert unequal_weights(verdicts) == []
    copy = Path(shutil.copytree(exported["nbits"], tmp_path / "onnx"))
    body = Certificate.read(copy).body
    body["linears"][Q]["branch"]["branch_sha256"] = "0" * 64
    Certificate(body).write(copy)
    assert unequal_weights([verdicts[0], verify(copy)]) == [f"{Q}: the targets' certificates name different weights"]
