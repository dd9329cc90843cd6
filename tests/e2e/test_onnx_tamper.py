"""What the ONNX reader finds in a graph whose files were changed: not by file hashes, but by following the graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialects import quantised_llama
from e2e.in_process import in_process
from sparseport.pipeline import export
from sparseport.recipe import make_recipe
from sparseport.verify.folder import verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")

UP = "model.layers.{}.mlp.up_proj"
FORMS: dict[str, dict[str, Any]] = {
    "nbits": {"embedding": "int8"},
    "rows": {"onnx": {"format": "qdq"}},
    "columns": {"onnx": {"format": "qdq", "accuracy": "fast"}},
}


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form -> a folder with act-order layers of 3 groups' zero-points to a row, in that form."""
    root = tmp_path_factory.mktemp("onnx")
    quantised_llama(tiny_base, root / "base", "gptq-v1", group_size=64)
    quantised_llama(tiny_base, root / "ordered-base", "gptq-act-order", group_size=32)
    folders = {}
    with in_process():
        for name, fields in {**FORMS, "ordered": {}}.items():
            base = root / ("ordered-base" if name == "ordered" else "base")
            common = {"base": base, "output": root / name, "target": ["onnx"], "tokenizer": False, "numerics": False}
            folders[name] = export(make_recipe({**common, **fields})).folder
    return folders


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(form: str) -> Path:
        return Path(shutil.copytree(exported[form], tmp_path / form))

    return make


def _found(folder: Path) -> list[str]:
    """Differences that reading the graph gives, without those of file hashes."""
    return [line for line in verify(folder).differences if "content changed" not in line and " bytes, " not in line]


def _change(folder: Path, change: Callable[[Any], None]) -> list[str]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / "model.onnx")
    return _found(folder)


def _tensor(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _place(tensor: Any, key: str) -> Any:
    return next(entry for entry in tensor.external_data if entry.key == key)


def _node(model: Any, kind: str, part: str = "") -> Any:
    return next(node for node in model.graph.node if node.op_type == kind and part in node.name)


def _edit_bytes(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> list[str]:
    """Change the bytes of an external tensor in the data file."""
    tensor = _tensor(onnx.load(folder / "model.onnx", load_external_data=False), name)
    data = np.memmap(folder / "model.onnx.data", np.uint8, "r+")
    start = int(_place(tensor, "offset").value)
    change(data[start : start + int(_place(tensor, "length").value)])
    data.flush()
    return _found(folder)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_an_untouched_folder_has_no_differences(form: str, copy: Any) -> None:
    assert verify(copy(form)).differences == []


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("part", ["codes", "zero_points", "scales"])
def test_one_bit_names_the_layer(form: str, part: str, copy: Any) -> None:
    name = UP.format(1)
    found = _edit_bytes(copy(form), f"{name}.{part}", lambda data: data.__setitem__(3, data[3] ^ 4))
    assert found == [f"model.onnx.data: weight {name} changed"]


def test_one_bit_in_one_of_three_joined_layers(copy: Any) -> None:
    """Rows of q, k and v lie in one tensor: the last byte is v's."""
    prefix = "model.layers.0.self_attn"
    label = "+".join(f"{prefix}.{name}_proj" for name in "qkv")
    found = _edit_bytes(copy("nbits"), f"{label}.codes", lambda data: data.__setitem__(-1, data[-1] ^ 16))
    assert found == [f"model.onnx.data: weight {prefix}.v_proj changed"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_scales_that_are_not_finite(value: float, form: str, copy: Any) -> None:
    bad = np.array([value], np.float16).view(np.uint8)
    found = _edit_bytes(copy(form), f"{UP.format(0)}.scales", lambda data: data.__setitem__(slice(0, 2), bad))
    assert len(found) == 1 and "scales hold NaN or Inf" in found[0] and UP.format(0) in found[0]


def test_a_zero_point_beyond_the_last_group(copy: Any) -> None:
    """64 columns in groups of 64 are one zero-point to a row; the other half of its byte has to stay empty."""
    found = _edit_bytes(copy("nbits"), f"{UP.format(0)}.zero_points", lambda data: data.__setitem__(0, data[0] | 0x30))
    assert len(found) == 1 and "more values than groups" in found[0]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_swapped_data(form: str, copy: Any) -> None:
    """Every byte is as certified, but two tensors are told to lie in each other's place."""

    def change(model: Any) -> None:
        one, two = (_place(_tensor(model, f"{UP.format(i)}.codes"), "offset") for i in (0, 1))
        one.value, two.value = two.value, one.value

    found = _change(copy(form), change)
    assert found == [f"model.onnx.data: weight {UP.format(i)} changed" for i in (0, 1)]


@pytest.mark.parametrize("form", ["nbits", "rows"])
def test_weights_in_each_others_place(form: str, copy: Any) -> None:
    """Two products exchange their weights; the names of layers go along, so only the places tell."""
    kind = "MatMulNBits" if form == "nbits" else "MatMul"

    def swap(one: Any, two: Any) -> None:
        first = 1
        ours, theirs = list(one.input)[first:], list(two.input)[first:]
        for node, inputs in ((one, theirs), (two, ours)):
            del node.input[first:]
            node.input.extend(inputs)

    def layers(model: Any) -> None:
        swap(_node(model, kind, "layers.0/mlp/up_proj"), _node(model, kind, "layers.1/mlp/up_proj"))

    def neighbours(model: Any) -> None:
        swap(_node(model, kind, "layers.0/mlp/up_proj"), _node(model, kind, "layers.0/mlp/gate_proj"))

    folder = copy(form)
    original = (folder / "model.onnx").read_bytes()
    assert any("feeds another layer than its own" in line for line in _change(folder, layers))
    (folder / "model.onnx").write_bytes(original)
    assert any("used elsewhere than certified" in line for line in _change(folder, neighbours))


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "sub/data", "..", ".", "", "a\\b"])
def test_external_data_stays_inside_the_folder(location: str, copy: Any) -> None:
    found = _change(
        copy("nbits"), lambda m: setattr(_place(_tensor(m, f"{UP.format(0)}.codes"), "location"), "value", location)
    )
    assert len(found) == 1 and "outside the folder" in found[0]


def test_external_data_behind_a_link(copy: Any, tmp_path: Path) -> None:
    folder = copy("nbits")
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    assert any("model.onnx.data: missing" in line for line in verify(folder).differences)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_truncated_data(length: int, copy: Any) -> None:
    folder = copy("nbits")
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[:length])
    assert any("external data does not fit its tensor" in line for line in _found(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-4096"), ("offset", "99999999999"), ("length", "7"), ("offset", "x"), ("length", "1e3")],
)
def test_places_that_do_not_fit(key: str, value: str, copy: Any) -> None:
    found = _change(copy("nbits"), lambda m: setattr(_place(_tensor(m, f"{UP.format(0)}.codes"), key), "value", value))
    assert len(found) == 1 and ("does not fit" in found[0] or "has no place" in found[0])


@pytest.mark.parametrize("attribute", ["K", "N", "bits", "block_size"])
def test_attributes_that_do_not_fit_the_tensors(attribute: str, copy: Any) -> None:
    def change(model: Any) -> None:
        node = _node(model, "MatMulNBits", "layers.1/mlp/down_proj")
        found = next(item for item in node.attribute if item.name == attribute)
        found.i *= 2

    found = _change(copy("nbits"), change)
    assert len(found) == 1 and ("wrong shape" in found[0] or "unknown layout" in found[0])


@pytest.mark.parametrize(("attribute", "value"), [("axis", 0), ("block_size", 32)])
def test_blocks_of_dequantize_linear(attribute: str, value: int, copy: Any) -> None:
    def change(model: Any) -> None:
        node = _node(model, "DequantizeLinear", "layers.1/mlp/down_proj")
        next(item for item in node.attribute if item.name == attribute).i = value

    found = _change(copy("rows"), change)
    assert len(found) == 1 and ("unknown layout" in found[0] or "wrong shape" in found[0])


def test_a_matrix_that_nobody_certified(copy: Any) -> None:
    def change(model: Any) -> None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "stray"))
        node = _node(model, "MatMulNBits", "layers.1/mlp/down_proj")
        output = node.output[0]
        node.output[0] = "before"
        nodes = list(model.graph.node)
        at = nodes.index(node) + 1
        nodes.insert(at, onnx.helper.make_node("Transpose", ["stray"], ["turned"], "t", perm=[1, 0]))
        nodes.insert(at + 1, onnx.helper.make_node("MatMul", ["before", "turned"], [output], "extra"))
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    assert "model.onnx: matrix stray is used but not certified" in _change(copy("nbits"), change)


def test_a_weight_the_wrong_way_round(copy: Any) -> None:
    def change(model: Any) -> None:
        node = _node(model, "Transpose", "layers.1/mlp/up_proj")
        next(item for item in node.attribute if item.name == "perm").ints[:] = [0, 1]

    assert any("unknown layout" in line or "transposed" in line for line in _change(copy("rows"), change))


def test_act_order_of_another_axis_or_layer(copy: Any, exported: dict[str, Path]) -> None:
    def axis(model: Any) -> None:
        next(item for item in _node(model, "Gather", "layers.1/mlp/down_proj").attribute if item.name == "axis").i = 1

    def dropped(model: Any) -> None:
        gather = _node(model, "Gather", "layers.1/mlp/down_proj")
        product = _node(model, "MatMulNBits", "layers.1/mlp/down_proj")
        product.input[0] = gather.input[0]

    folder = copy("ordered")
    assert any("another axis" in line for line in _change(folder, axis))
    shutil.copyfile(exported["ordered"] / "model.onnx", folder / "model.onnx")
    assert "model.onnx.data: weight model.layers.1.mlp.down_proj changed" in _change(folder, dropped)


@pytest.mark.parametrize("where", ["embed_tokens/Gather", "lm_head.weight/dequantized"])
@pytest.mark.parametrize("step", ["other rows", "other way", "other shape", "other zero-points", "other type"])
def test_a_quantised_table_is_followed_to_its_end(step: str, where: str, copy: Any) -> None:
    """Rows of the embedding are looked up and dequantised; the head is dequantised as a whole."""
    if step == "other rows" and "lm_head" in where:
        pytest.skip("the head is not looked up")

    def change(model: Any) -> None:
        if step == "other rows":
            gather = next(n for n in model.graph.node if n.op_type == "Gather" and "scales" in n.input[0])
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 1), np.int64), "first"))
            gather.input[1] = "first"
        elif step == "other way":
            node = _node(model, "Sub", where)
            node.input[0], node.input[1] = node.input[1], node.input[0]
        elif step == "other shape":
            shape = next(t for t in model.graph.initializer if t.name.endswith(f"{where}/shape/0"))
            shape.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 2, 32]), shape.name))
        elif step == "other type":
            cast = _node(model, "Cast", "embed_tokens/Gather/codes" if "embed" in where else "lm_head.weight.codes")
            next(item for item in cast.attribute if item.name == "to").i = onnx.TensorProto.FLOAT16
        else:
            kind, name = ("Gather", "embed_tokens") if "embed" in where else ("Cast", "lm_head")
            nodes = (n for n in model.graph.node if n.op_type == kind and f"{name}.weight.zero_points" in n.input[0])
            next(nodes).input[0] = f"{'model.' if 'embed' in where else ''}{name}.weight.codes"

    found = _change(copy("nbits"), change)
    assert found and all(line.startswith("model.onnx: ") for line in found)


def test_a_norm_in_anothers_place_or_unused(copy: Any) -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]

    def swap(model: Any) -> None:
        one, two = (_tensor(model, name) for name in names)
        one.raw_data, two.raw_data = two.raw_data, one.raw_data

    def unused(model: Any) -> None:
        for node in model.graph.node:
            for index, value in enumerate(node.input):
                if value == names[1]:
                    node.input[index] = names[0]

    assert _change(copy("nbits"), swap) == [f"model.onnx.data: tensor {name} changed" for name in names]
    assert any("weight is not used" in line for line in _change(copy("rows"), unused))


def test_graphs_inside_the_graph_and_second_names(copy: Any) -> None:
    def function(model: Any) -> None:
        model.functions.append(onnx.helper.make_function("own", "F", ["x"], ["x"], [], []))

    def twice(model: Any) -> None:
        model.graph.initializer.append(_tensor(model, f"{UP.format(0)}.codes"))

    assert any("not read back" in line for line in _change(copy("nbits"), function))
    assert any("one name" in line for line in _change(copy("rows"), twice))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json", "config.json"])
def test_missing_and_changed_files(name: str, copy: Any) -> None:
    folder = copy("nbits")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b"\0")
    assert any(line.startswith(name) for line in verify(folder).differences)
    (folder / name).unlink()
    assert f"{name}: missing" in verify(folder).differences


def test_a_file_that_is_no_model(copy: Any) -> None:
    folder = copy("nbits")
    (folder / "model.onnx").write_bytes(b"\x08\x07garbage" * 50)
    assert any(line.startswith("model.onnx: ") and "content" not in line for line in _found(folder))


def test_a_graph_that_is_no_onnx(copy: Any, exported: dict[str, Path]) -> None:
    def unordered(model: Any) -> None:
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend(reversed(nodes))

    def attribute(model: Any) -> None:
        _node(model, "Concat" if any(n.op_type == "Concat" for n in model.graph.node) else "Reshape").attribute.append(
            onnx.helper.make_attribute("no_such", 1)
        )

    folder = copy("rows")
    for change in (unordered, attribute):
        assert any("onnx's checker refuses" in line for line in _change(folder, change))
        shutil.copyfile(exported["rows"] / "model.onnx", folder / "model.onnx")
