"""ONNX Runtime: the builder's graph without weights, exact layers in it, read back and computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.checkpoints.folder import ModelFolder
from sparseport.errors import VerificationError
from sparseport.targets.model_files import write_config, write_generation_config
from sparseport.targets.onnx.builder import build_graph
from sparseport.targets.onnx.data_file import DATA
from sparseport.targets.onnx.folder import write_genai_config
from sparseport.targets.onnx.graph import MODEL, write_model
from sparseport.targets.onnx.readback import OnnxReader
from sparseport.targets.onnx.store import Layout, OnnxStore
from sparseport.targets.onnx.writer import quantize_rows
from sparseport.weights.digest import digest
from sparseport.weights.grouping import collapse
from sparseport.weights.layouts import GroupLayout, in_layout, matmulnbits_layout
from sparseport.weights.linear import DenseWeight, QuantizedWeight
from sparseport.weights.rounding import choose_qparams_minmax, quantize_to_grid

pytest.importorskip("onnxruntime")
EMBEDDING = "model.embed_tokens"
KV_HEADS, HEAD_SIZE = 2, 16  # of the tiny model
Layers = dict[str, QuantizedWeight | DenseWeight]


@pytest.fixture(scope="module")
def skeleton(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The builder's graph of the tiny model, and what it says about it."""
    folder = tmp_path_factory.mktemp("onnx")
    with ModelFolder.open(tiny_base) as base:
        write_config(base.config, folder)
        write_generation_config(base.path, base.config, folder)
    answer = build_graph(str(folder / "config.json"), str(folder / "graph"))
    return folder, answer


def _layers(base: Path, group_size: int | None, *, order: bool = False, symmetric: bool = False) -> Layers:
    random = np.random.default_rng(0)
    found: Layers = {}
    with ModelFolder.open(base) as folder:
        for module in [*folder.linear_names(), EMBEDDING]:
            values = np.array(folder.read(f"{module}.weight"))
            if group_size is None or module in (EMBEDDING, folder.head_name):
                found[module] = DenseWeight(values)
                continue
            columns = values.shape[1]
            size = columns if group_size == -1 else group_size
            permutation = random.permutation(columns).astype(np.int32) if order else None
            real = values.astype(np.float32)
            real = real if permutation is None else real[:, permutation]
            scales, zero_points = choose_qparams_minmax(real, size, symmetric)
            codes = quantize_to_grid(real, scales, zero_points, size)
            found[module] = QuantizedWeight(codes, scales, zero_points, size, input_order=permutation)
    return found


def _small(base: Path) -> dict[str, np.ndarray]:
    with ModelFolder.open(base) as folder:
        return {name: np.array(folder.read(name)) for name in folder.names() if len(folder.info(name).shape) < 2}


def _written(
    skeleton: Any, base: Path, layers: Layers, out: Path, accuracy_level: int = 1, layout: Layout = Layout.NBITS
) -> Path:
    folder, answer = skeleton
    out.mkdir()
    with OnnxStore(out / "scratch", layout) as store:
        stored: dict[str, Any] = {}
        for module, weight in layers.items():
            if isinstance(weight, DenseWeight):
                stored[module] = store.add_dense(f"{module}.weight", weight.values)
                continue
            groups = matmulnbits_layout(weight.group_size, module)
            if layout is not Layout.NBITS:
                groups = GroupLayout(weight.group_size, weight.group_size)
            label = f"{module}.weight" if module == EMBEDDING else module
            stored[module] = store.add_quantized(label, in_layout(weight, groups))
        skeleton_file = folder / "graph" / "skeleton.onnx"
        written = write_model(skeleton_file, out, answer, stored, _small(base), store, accuracy_level)
    (out / "generation_config.json").write_text("{}")
    write_genai_config(folder / "graph", out, {}, fold=layout is Layout.ROWS)
    (out / "scratch").unlink()
    assert set(written.places) == set(layers) and written.plus_one == []
    return out


def _read(folder: Path, layers: Layers) -> Layers:
    """Module -> weight as found in the graph, in the groups of the source."""
    found: Layers = {}
    graph = OnnxReader.open(folder)
    shapes = {name: layers[name].shape for name in layers}
    norms = {name: graph.graph.shape(name) for name in graph.graph.tensors if name.endswith("norm.weight")}
    for item in graph.weights({**shapes, **norms}):
        module = item.name.removesuffix(".weight")
        source = layers.get(module)
        if source is None:
            assert item.name in norms and item.places
            continue
        assert module not in found
        assert graph.misplaced(module, item.places, tied_head=True) is None
        weight = item.weight
        if isinstance(source, QuantizedWeight):
            assert isinstance(weight, QuantizedWeight)
            weight = collapse(weight, source.group_size, module)
        found[module] = weight
    assert graph.unnamed_matrices({*layers, *(f"{module}.weight" for module in layers)}) == []
    return found


def _logits(folder: Path, tokens: list[int], level: int | None = None) -> np.ndarray:
    """Prefill, then one token at a time through the KV cache."""
    from sparseport.verify.runs import onnx_session

    session = onnx_session(folder, level)
    past = {
        port.name: np.zeros((1, KV_HEADS, 0, HEAD_SIZE), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past")
    }
    names = [port.name for port in session.get_outputs()]
    pieces, seen = [], 0
    for chunk in [tokens[:12], *([token] for token in tokens[12:])]:
        seen += len(chunk)
        feed = {"input_ids": np.array([chunk], np.int64), "attention_mask": np.ones((1, seen), np.int64), **past}
        result = dict(zip(names, session.run(None, feed), strict=True))
        pieces.append(result.pop("logits")[0])
        past = {name.replace("present", "past_key_values"): value for name, value in result.items()}
    return np.concatenate(pieces)


CASES: dict[str, dict[str, Any]] = {
    "fp16": {"group_size": None},
    "int4 g32": {"group_size": 32},
    "int4 sym": {"group_size": 32, "symmetric": True},
    "act-order": {"group_size": 32, "order": True},
    "one group per row": {"group_size": -1},
    "groups of 8, filled up": {"group_size": 8},
}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("case", sorted(CASES))
def test_weights_arrive_and_the_graph_computes_the_model(
    case: str, layout: Layout, skeleton: Any, tiny_base: Path, tmp_path: Path
) -> None:
    layers = _layers(tiny_base, **CASES[case])
    folder = _written(skeleton, tiny_base, layers, tmp_path / "out", layout=layout)
    found = _read(folder, layers)
    assert set(found) == set(layers)
    for module, weight in layers.items():
        assert digest(found[module]) == digest(weight), module
    # By columns ONNX Runtime would round activations to int8 unless it is told otherwise.
    _agrees(tiny_base, layers, _logits(folder, [(7 * n) % 250 for n in range(20)], 1))


def _agrees(base: Path, layers: Layers, logits: np.ndarray) -> None:
    from sparseport.verify.numerics import drift, logits_of, reference_model

    small = {name: DenseWeight(values) for name, values in _small(base).items()}
    network = reference_model(base, {**layers, **small}.items())
    tokens = [(7 * n) % 250 for n in range(20)]
    assert float(drift(logits_of(network, tokens), logits)["max_abs"]) < 1e-4


@pytest.mark.parametrize("layout", [Layout.NBITS, Layout.ROWS])
def test_an_embedding_in_8_bits_is_looked_up_and_multiplied(
    layout: Layout, skeleton: Any, tiny_base: Path, tmp_path: Path
) -> None:
    layers = _layers(tiny_base, 32)
    embedding = layers[EMBEDDING]
    assert isinstance(embedding, DenseWeight)
    layers[EMBEDDING] = quantize_rows(embedding.values, 16)
    folder = _written(skeleton, tiny_base, layers, tmp_path / "out", layout=layout)
    assert digest(_read(folder, layers)[EMBEDDING]) == digest(layers[EMBEDDING])
    _agrees(tiny_base, layers, _logits(folder, [(7 * n) % 250 for n in range(20)], 1))


def test_layers_that_cannot_share_a_product_are_joined(skeleton: Any, tiny_base: Path, tmp_path: Path) -> None:
    """k_proj in floating point between quantised q and v: three products and a concatenation."""
    layers = _layers(tiny_base, 32)
    plain = _layers(tiny_base, None)
    for layer in range(2):
        layers[f"model.layers.{layer}.self_attn.k_proj"] = plain[f"model.layers.{layer}.self_attn.k_proj"]
    folder = _written(skeleton, tiny_base, layers, tmp_path / "out")
    found = _read(folder, layers)
    assert all(digest(found[module]) == digest(weight) for module, weight in layers.items())
    _agrees(tiny_base, layers, _logits(folder, [(7 * n) % 250 for n in range(20)]))


def test_packed_bytes_are_onnx_runtimes_own(tmp_path: Path) -> None:
    """Literal bytes: low nibble first, each row of zero-points filled up to a whole byte."""
    weight = _counting()
    with OnnxStore(tmp_path / "scratch") as store:
        stored = store.add_quantized("layer", weight)
        assert stored.codes.shape == (1, 3, 8)
        assert bytes(store.view(stored.codes)) == bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 3)
        assert bytes(store.view(stored.zero_points)) == bytes([0xF3, 0x08])


@pytest.mark.parametrize("layout", [Layout.ROWS, Layout.COLUMNS])
def test_packed_bytes_are_those_of_onnx(layout: Layout, tmp_path: Path) -> None:
    """Elements of a whole tensor one after the other, against the onnx package's own packing."""
    import onnx

    weight = replace(
        _counting(),
        codes=np.concatenate([_counting().codes, _counting().codes[:, ::-1]]),
        scales=np.ones((2, 3), np.float16),
        zero_points=np.array([[3, 15, 8], [1, 2, 4]], np.uint8),
    )
    with OnnxStore(tmp_path / "scratch", layout) as store:
        stored = store.add_quantized("layer", weight)
        for block, values in ((stored.codes, weight.codes), (stored.zero_points, weight.zero_points)):
            wanted = values if layout is Layout.ROWS else values.T
            tensor = onnx.helper.make_tensor("t", onnx.TensorProto.UINT4, wanted.shape, wanted.flatten().tolist())
            packed = np.array(tensor.int32_data, np.uint8)
            assert block.element_type == "UINT4" and block.shape == wanted.shape
            assert bytes(store.view(block)) == packed.tobytes()


def _counting() -> QuantizedWeight:
    codes = np.arange(48, dtype=np.uint8).reshape(1, 48) % 16
    return QuantizedWeight(codes, np.ones((1, 3), np.float16), np.array([[3, 15, 8]], np.uint8), 16)


@pytest.mark.parametrize("damage", ["truncated", "missing", "elsewhere", "code"])
def test_damage_is_found(damage: str, skeleton: Any, tiny_base: Path, tmp_path: Path) -> None:
    import onnx

    layers = _layers(tiny_base, 32)
    folder = _written(skeleton, tiny_base, layers, tmp_path / "out")
    data = folder / DATA
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "missing":
        data.unlink()
    elif damage == "elsewhere":
        model = onnx.load(folder / MODEL, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../model.onnx.data"
        onnx.save(model, folder / MODEL)
    else:
        graph = OnnxReader.open(folder).graph
        tensor = graph.tensors["model.layers.1.mlp.up_proj.codes"]
        offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        content = bytearray(data.read_bytes())
        content[offset] ^= 1
        data.write_bytes(content)
        found = _read(folder, layers)
        wrong = [module for module, weight in layers.items() if digest(found[module]) != digest(weight)]
        assert wrong == ["model.layers.1.mlp.up_proj"]
        return
    with pytest.raises(VerificationError):
        _read(folder, layers)
