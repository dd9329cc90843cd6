"""The graph of onnxruntime-genai's model builder, made from a `config.json` alone; run as a child process.

The builder is given a model on the meta device, so no matrix ever exists. It is asked where it makes a MatMul, which
tells the layers that a node stands for. Matrices become references to a data file that does not exist yet; the main
process gives them their places.
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
EMBEDDING = "model.embed_tokens.weight"
HEAD_NODE = "/lm_head/MatMul"


def build_graph(config: str, small_tensors: str, output: str) -> dict[str, Any]:
    """Write `skeleton.onnx` and `genai_config.json` into `output`.

    Args:
        config: path of the model's config.json, with generation_config.json beside it.
        small_tensors: safetensors file with every tensor of fewer than two dimensions.
        output: folder to write into.

    Returns:
        `matmuls`: node name -> modules whose weights it multiplies with, in the order of their rows.
        `small`: names of the small tensors that the graph uses.
        `tied`: whether the head is the embedding.
        `versions` of the packages that made the graph.

    Raises:
        Unsupported: the builder does not know the architecture.
    """
    from importlib.metadata import version

    from sparseport.checkpoints.safetensors import SafeTensorsFile
    from sparseport.errors import Unsupported
    from sparseport.targets.empty_model import empty_model, load_config, quiet

    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    network = empty_model(load_config(Path(config)))
    with SafeTensorsFile.open(Path(small_tensors)) as tensors:
        small = _fill_small(network, tensors)
    with quiet():
        try:
            graph, nodes = _run_builder(network, Path(config).parent, target)
        except NotImplementedError as error:
            raise Unsupported("onnxruntime-genai's builder cannot build this model", found=error) from error
    names = {id(module): name for name, module in network.named_modules()}
    matmuls = {node: [names[id(part)] for part in parts] for node, parts in nodes.items()}
    _save_skeleton(graph, target / SKELETON)
    packages = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime-genai")
    tied = bool(network.config.get_text_config().tie_word_embeddings)
    return {
        "matmuls": matmuls,
        "small": small,
        "tied": tied,
        "versions": {name: version(name) for name in packages},
    }


def _fill_small(network: Any, tensors: Any) -> list[str]:
    """Give norms and biases their values; returns the names that the model has."""
    import numpy as np
    import torch

    used = []
    parameters = dict(network.named_parameters())
    for name in tensors.names():
        if name in parameters:
            values = torch.from_numpy(np.array(tensors.read(name), np.float32))
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
            used.append(name)
    return used


def _run_builder(network: Any, source: Path, target: Path) -> tuple[Any, dict[str, list[Any]]]:
    """The builder's graph, and the modules behind each of its MatMul nodes."""
    builder, base = _import_builder()
    nodes: dict[str, list[Any]] = {}
    captured: dict[str, Any] = {}
    plain = base.Model.make_matmul_float
    packed = base.Model.make_packed_matmul_float_class

    def make_matmul_float(self: Any, matmul: Any, name: str, root_input: str, **kwargs: Any) -> Any:
        nodes[name] = getattr(matmul, "sparseport_parts", [matmul])
        return plain(self, matmul, name, root_input, **kwargs)

    def make_packed_matmul_float_class(self: Any, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        matmul = packed(self, q, k, v, **kwargs)
        matmul.sparseport_parts = [q, k, v]
        return matmul

    changes: dict[str, Any] = {
        "load_weights": lambda self, path: network,
        "save_model": lambda self, folder: captured.update(graph=self.model),
        "save_processing": lambda self, *_: None,
        "make_matmul_float": make_matmul_float,
        "make_packed_matmul_float_class": make_packed_matmul_float_class,
    }
    arguments = {
        "model_name": None,
        "input_path": str(source),
        "output_dir": str(target),
        "precision": "fp32",
        "execution_provider": "cpu",
        "cache_dir": str(target / "cache"),
    }
    with mock.patch.multiple(base.Model, **changes), contextlib.redirect_stdout(io.StringIO()):
        options = builder.parse_extra_options(**arguments, extra_options=["shared_embeddings=false"])
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

    model.graph.sort()
    for name, value in model.graph.initializers.items():
        if len(value.shape) >= 2 and name not in ("cos_cache", "sin_cache"):
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
