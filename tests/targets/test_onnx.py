"""ONNX Runtime: the builder's graph without weights, exact layers in it, read back and computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.errors import Unsupported, VerificationError
from sparseport.targets.onnx.builder import build_graph
from sparseport.targets.onnx.graph import DATA, MODEL, write_model
from sparseport.targets.onnx.layout import BLOCK_SIZES, OnnxStore, block_size_for, for_matmulnbits
from sparseport.targets.onnx.readback import OnnxGraph, unnamed_matrices, weights
from sparseport.targets.openvino.folder import write_config, write_generation_config
from sparseport.weights.digest import digest
from sparseport.weights.grouping import collapse
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
        small = [spec_of(n, np.array(base.read(n))) for n in base.names() if len(base.info(n).shape) < 2]
        write_safetensors(folder / "small.safetensors", small)
    answer = build_graph(str(folder / "config.json"), str(folder / "small.safetensors"), str(folder / "graph"))
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


def _written(skeleton: Any, layers: Layers, out: Path, accuracy_level: int = 1) -> Path:
    folder, answer = skeleton
    out.mkdir()
    with OnnxStore(out / "scratch") as store:
        stored = {
            module: store.add_quantized(for_matmulnbits(weight, module))
            if isinstance(weight, QuantizedWeight)
            else store.add_dense(weight.values)
            for module, weight in layers.items()
        }
        write_model(
            folder / "graph" / "skeleton.onnx",
            out,
            answer["matmuls"],
            stored,
            EMBEDDING,
            answer["tied"],
            store,
            accuracy_level,
        )
    (out / "scratch").unlink()
    return out


def _read(folder: Path, layers: Layers) -> Layers:
    """Module -> weight as found in the graph, in the groups of the source."""
    found: Layers = {}
    for item in weights(OnnxGraph(folder)):
        start = 0
        for module in item.name.split("+"):
            source, weight = layers[module], item.weight
            rows = slice(start, start + source.shape[0])
            start += source.shape[0]
            if isinstance(weight, DenseWeight):
                found[module] = DenseWeight(weight.values[rows])
                continue
            assert isinstance(source, QuantizedWeight)
            part = replace(
                weight, codes=weight.codes[rows], scales=weight.scales[rows], zero_points=weight.zero_points[rows]
            )
            found[module] = collapse(part, source.group_size, module)
    return found


def _logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """Prefill, then one token at a time through the KV cache."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
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


@pytest.mark.parametrize("case", sorted(CASES))
def test_weights_arrive_and_the_graph_computes_the_model(
    case: str, skeleton: Any, tiny_base: Path, tmp_path: Path
) -> None:
    from sparseport.verify.numerics import drift, logits_of, reference_model

    layers = _layers(tiny_base, **CASES[case])
    folder = _written(skeleton, layers, tmp_path / "out")
    found = _read(folder, layers)
    assert set(found) == set(layers)
    for module, weight in layers.items():
        assert digest(found[module]) == digest(weight), module
    assert unnamed_matrices(OnnxGraph(folder), layers) == []
    tokens = [(7 * n) % 250 for n in range(20)]
    with ModelFolder.open(tiny_base) as base:
        small = {n: DenseWeight(np.array(base.read(n))) for n in base.names() if len(base.info(n).shape) < 2}
    network = reference_model(tiny_base, {**layers, **small}.items())
    assert float(drift(logits_of(network, tokens), _logits(folder, tokens))["max_abs"]) < 1e-4


def test_layers_that_cannot_share_a_product_are_joined(skeleton: Any, tiny_base: Path, tmp_path: Path) -> None:
    """k_proj in floating point between quantised q and v: three products and a concatenation."""
    from sparseport.verify.numerics import drift, logits_of, reference_model

    layers = _layers(tiny_base, 32)
    plain = _layers(tiny_base, None)
    for layer in range(2):
        layers[f"model.layers.{layer}.self_attn.k_proj"] = plain[f"model.layers.{layer}.self_attn.k_proj"]
    folder = _written(skeleton, layers, tmp_path / "out")
    found = _read(folder, layers)
    assert all(digest(found[module]) == digest(weight) for module, weight in layers.items())
    tokens = [(11 * n) % 250 for n in range(16)]
    with ModelFolder.open(tiny_base) as base:
        small = {n: DenseWeight(np.array(base.read(n))) for n in base.names() if len(base.info(n).shape) < 2}
    network = reference_model(tiny_base, {**layers, **small}.items())
    assert float(drift(logits_of(network, tokens), _logits(folder, tokens))["max_abs"]) < 1e-4


def test_every_group_size_has_a_block_size() -> None:
    assert [block_size_for(size, "m") for size in (16, 32, 96, 12, 8, 576, 1000, 512)] == [
        (16, 16),
        (32, 32),
        (32, 32),
        (12, 16),
        (8, 16),
        (64, 64),
        (250, 256),
        (256, 256),
    ]
    for size in range(1, 1100):
        try:
            part, block = block_size_for(size, "m")
        except Unsupported as error:
            assert error.code == "E_GROUP" and error.fix
            continue
        assert size % part == 0 and part <= block <= 4 * part and block in BLOCK_SIZES


def test_packed_bytes_are_onnx_runtimes_own(tmp_path: Path) -> None:
    """Literal bytes: low nibble first, each row of zero-points filled up to a whole byte."""
    codes = np.arange(48, dtype=np.uint8).reshape(1, 48) % 16
    weight = QuantizedWeight(codes, np.ones((1, 3), np.float16), np.array([[3, 15, 8]], np.uint8), 16)
    with OnnxStore(tmp_path / "scratch") as store:
        stored = store.add_quantized(weight)
        assert stored.codes.shape == (1, 3, 8)
        assert bytes(store.view(stored.codes)) == bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 3)
        assert bytes(store.view(stored.zero_points)) == bytes([0xF3, 0x08])


@pytest.mark.parametrize("damage", ["truncated", "missing", "elsewhere", "code"])
def test_damage_is_found(damage: str, skeleton: Any, tiny_base: Path, tmp_path: Path) -> None:
    import onnx

    layers = _layers(tiny_base, 32)
    folder = _written(skeleton, layers, tmp_path / "out")
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
        graph = OnnxGraph(folder)
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
