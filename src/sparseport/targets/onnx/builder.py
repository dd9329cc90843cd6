"""The graph of onnxruntime-genai's model builder, made from a `config.json` alone; run as a child process.

The builder is given a model on the meta device, so no matrix ever exists. It is asked where it makes a MatMul, which
tells the layers that a node stands for. Norms and biases hold marks instead of values: whatever the builder makes of
them (copies, joins, adds 1), the marks tell which element of which tensor each element of the graph came from. The main
process puts all values in.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SKELETON = "skeleton.onnx"
PLACEHOLDER = "placeholder.data"
# Marks are whole numbers that float32 holds exactly, above any number that a builder would write by itself. Each
# element has an even one; an odd one is an element that 1 was added to.
_FIRST_MARK, _LAST_MARK = 1 << 22, 1 << 24


def build_graph(config: str, output: str, tokenizer: str | None = None) -> dict[str, Any]:
    """Write `skeleton.onnx` and `genai_config.json` into `output`.

    Args:
        config: path of the model's config.json, with generation_config.json beside it.
        output: folder to write into.
        tokenizer: folder of the tokenizer that onnxruntime-genai has to read right, or None.

    Returns:
        `matmuls`: node name -> modules whose weights it multiplies with, in the order of their rows.
        `small`: initializer -> pieces `[tensor, first element, last element + 1, added]` that it is made of.
        `embedding`: module of the embedding; `tied`: whether the head is the embedding.
        `notes`: what is worth knowing about the tokenizer; `versions` of the packages that made the graph.

    Raises:
        Unsupported: the builder does not know the architecture, or computes with norms and biases in a way that the
            marks do not follow.
        BadInput, FidelityError: there is no usable tokenizer, or onnxruntime-genai reads it in another way.
    """
    from importlib.metadata import version

    from sparseport.errors import Unsupported
    from sparseport.targets.empty_model import empty_model, load_config, quiet
    from sparseport.targets.onnx.tokenizer import check_tokenizer

    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    network = empty_model(load_config(Path(config)))
    marked = _mark_small(network)
    # Taken before the builder runs: it hangs parts of layers that it takes apart into the model.
    names = {id(module): name for name, module in network.named_modules()}
    with quiet():
        try:
            graph, nodes = _run_builder(network, Path(config).parent, target)
        except Exception as error:  # a script for many architectures, which can fail on one anywhere
            raise Unsupported(
                "onnxruntime-genai's builder cannot build this model",
                where=network.config.model_type,
                # It names a model by its folder.
                found=f"{type(error).__name__}: {error}".replace(str(Path(config).parent), network.config.model_type),
                fix="export to OpenVINO",
            ) from error
    matmuls = {node: _modules_of(node, parts, names) for node, parts in nodes.items()}
    small = _find_marks(graph, marked)
    _save_skeleton(graph, target / SKELETON)
    notes = [] if tokenizer is None else check_tokenizer(Path(tokenizer), target)
    packages = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")
    return {
        "matmuls": matmuls,
        "small": small,
        "embedding": names[id(network.get_input_embeddings())],
        "tied": bool(network.config.get_text_config().tie_word_embeddings),
        "notes": notes,
        "versions": {name: version(name) for name in packages},
    }


def _modules_of(node: str, parts: list[Any], names: dict[int, str]) -> list[str]:
    """Names of the modules that a node stands for.

    Raises:
        Unsupported: the builder multiplies with something that is no layer of the model, such as half of one.
    """
    from sparseport.errors import Unsupported

    if any(id(part) not in names for part in parts):
        raise Unsupported(
            "onnxruntime-genai's builder takes a layer of this model apart", where=node, fix="export to OpenVINO"
        )
    return [names[id(part)] for part in parts]


def _mark_small(network: Any) -> dict[str, tuple[int, int]]:
    """Fill every parameter of fewer than two dimensions with marks; returns name -> first mark, elements.

    Raises:
        Unsupported: the model has more elements in norms and biases than there are marks.
    """
    import torch

    from sparseport.errors import Unsupported

    marked: dict[str, tuple[int, int]] = {}
    mark = _FIRST_MARK
    for name, parameter in list(network.named_parameters()):
        if parameter.dim() > 1:
            continue
        marked[name] = (mark, parameter.numel())
        last = mark + 2 * parameter.numel()
        if last > _LAST_MARK:
            raise Unsupported("the model has too many norms and biases to be followed through the builder", where=name)
        values = torch.arange(mark, last, 2, dtype=torch.float32).reshape(parameter.shape)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
        mark = last
    return marked


def _find_marks(model: Any, marked: dict[str, tuple[int, int]]) -> dict[str, list[list[Any]]]:
    """Which pieces of which tensors every small initializer holds.

    Raises:
        Unsupported: marks were changed in another way than by adding 1.
    """
    import numpy as np

    from sparseport.errors import Unsupported

    starts = np.array([first for first, _ in marked.values()])
    names = list(marked)
    found: dict[str, list[list[Any]]] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None or len(value.shape) != 1 or not value.dtype.is_floating_point():
            continue
        marks = value.const_value.numpy().astype(np.float64)
        # Numbers that no mark can be, such as rotary frequencies, are the builder's own.
        if not marks.size or (marks < _FIRST_MARK).any() or (marks >= _LAST_MARK).any():
            continue
        whole = marks.astype(np.int64)
        owners = np.searchsorted(starts, whole, side="right") - 1
        elements, added = np.divmod(whole - starts[owners], 2)
        # A piece ends where the tensor, the addition or the order of elements changes.
        ends = np.flatnonzero((np.diff(owners) != 0) | (np.diff(added) != 0) | (np.diff(elements) != 1)) + 1
        pieces = []
        for part in np.split(np.arange(marks.size), ends):
            owner, first = names[owners[part[0]]], int(elements[part[0]])
            pieces.append([owner, first, first + part.size, int(added[part[0]])])
        if (whole != marks).any() or any(last > marked[owner][1] for owner, _, last, _ in pieces):
            raise Unsupported(
                "the builder computes with this tensor in a way that cannot be followed",
                where=name,
                fix="export to OpenVINO, and report the model's config",
            )
        found[name] = pieces
    return found


def _run_builder(network: Any, source: Path, target: Path) -> tuple[Any, dict[str, list[Any]]]:
    """The builder's graph, and the modules behind each of its MatMul nodes."""
    from sparseport.targets.empty_model import attention_heads, key_value_heads
    from sparseport.targets.onnx.builder_changes import (
        ConfigWithOldNames,
        JoinedLayers,
        TokenizerOrNone,
        build_heads_layer_by_layer,
        scale_embedding_exactly,
        with_mean,
    )

    builder, base = _import_builder()
    nodes: dict[str, list[Any]] = {}
    captured: dict[str, Any] = {}
    plain = base.Model.make_matmul_float
    packed = base.Model.make_packed_matmul_float_class
    layers = JoinedLayers(base)

    def make_matmul_float(self: Any, matmul: Any, name: str, root_input: str, **kwargs: Any) -> Any:
        nodes[name] = layers.parts(name) or getattr(matmul, "sparseport_parts", [matmul])
        return plain(self, matmul, name, root_input, **kwargs)

    def make_packed_matmul_float_class(self: Any, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        matmul = packed(self, q, k, v, **kwargs)
        matmul.sparseport_parts = [q, k, v]
        return matmul

    heads = attention_heads(network) if key_value_heads(network) is not None else None
    plain_cache = base.Model.make_key_value_cache_shape

    def make_key_value_cache_shape(self: Any, layer_id: int, shape: list[Any]) -> Any:
        own = plain_cache(self, layer_id, shape)
        return own if heads is None else [own[0], heads[layer_id][1], *own[2:]]

    def load_weights(self: Any, path: str) -> Any:
        if heads is not None:
            build_heads_layer_by_layer(self, heads)
        if network.config.model_type.startswith("gemma"):
            scale_embedding_exactly(self)
        return network

    changes: dict[str, Any] = {
        "load_weights": load_weights,
        "make_key_value_cache_shape": make_key_value_cache_shape,
        "save_model": lambda self, folder: captured.update(graph=self.model),
        "save_processing": lambda self, *_: None,
        "make_matmul_float": make_matmul_float,
        "make_packed_matmul_float_class": make_packed_matmul_float_class,
        **layers.changes(),
    }
    if network.config.model_type == "olmo":
        changes["make_layernorm"] = with_mean(base.Model.make_layernorm)
    arguments = {
        "model_name": None,
        "input_path": str(source),
        "output_dir": str(target),
        "precision": "fp32",
        "execution_provider": "cpu",
        "cache_dir": str(target / "cache"),
    }
    with (
        mock.patch.multiple(base.Model, **changes),
        mock.patch.object(builder, "AutoTokenizer", TokenizerOrNone),
        mock.patch.object(builder, "AutoConfig", ConfigWithOldNames),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        extra = [
            "shared_embeddings=false",
            "windowed_kv_cache=false",
            f"fuse_mlp_gate_up={layers.has_gate_up(network)}",
        ]
        options = builder.parse_extra_options(**arguments, extra_options=extra)
        builder.create_model(**arguments, **options)
    with contextlib.suppress(OSError):
        (target / "cache").rmdir()
    return captured["graph"], nodes


def _import_builder() -> tuple[Any, Any]:
    """The builder's modules; it is written as a script, and imports its neighbours by their bare names."""
    from importlib.util import find_spec

    spec = find_spec("onnxruntime_genai")
    assert spec is not None and spec.submodule_search_locations
    with _on_path(str(Path(spec.submodule_search_locations[0]) / "models")):
        return importlib.import_module("builder"), importlib.import_module("builders.base")


@contextlib.contextmanager
def _on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _save_skeleton(model: Any, path: Path) -> None:
    """Write the graph; matrices without values become references into a file that is not there."""
    import onnx
    import onnx_ir as ir

    from sparseport.errors import Unsupported

    model.graph.sort()
    for node in model.graph:
        if any(value.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for value in node.attributes.values()):
            raise Unsupported(
                "onnxruntime-genai's builder makes a graph with branches of this model, which cannot be read back",
                where=node.name,
                found=node.op_type,
                fix="export to OpenVINO",
            )
    for name, value in model.graph.initializers.items():
        if len(value.shape) >= 2 and not name.startswith(("cos_cache", "sin_cache")):
            size = value.dtype.itemsize
            for length in value.shape:
                size *= int(length)
            value.const_value = ir.ExternalTensor(
                PLACEHOLDER, 0, size, value.dtype, shape=value.shape, name=name, base_dir=str(path.parent)
            )
    onnx.save(ir.to_proto(model), path)


if __name__ == "__main__":
    from sparseport.child import serve

    serve(build_graph)
