"""ONNX folders, whoever wrote them: read back from their files, and run by ONNX Runtime.

The reader here shares nothing with sparseport's own. It follows the node names of onnxruntime-genai's model builder,
which every path that is compared goes through:

/model/layers.N/attn/qkv_proj/MatMul...  MatMulNBits; rows of q, then k, then v
/model/layers.N/mlp/up_proj/MatMul...    the same for one layer
/model/embed_tokens/...                  Gather, or GatherBlockQuantized
/lm_head/MatMul...                       MatMul, or MatMulNBits
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.weights.linear import QuantizedWeight

MODEL = "model.onnx"
F32 = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, int]]
_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_MAX_NEW_TOKENS = 16  # as answers_openvino


class Graph:
    """A parsed folder; values of constants are loaded when they are asked for."""

    def __init__(self, folder: Path) -> None:
        import onnx

        self.folder = folder
        self.model = onnx.load(folder / MODEL, load_external_data=False)
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producers = {output: node for node in self.model.graph.node for output in node.output}

    def array(self, name: str) -> Any:
        """A constant, seen through operations that change neither its values nor their order, and Transpose."""
        import onnx

        if name in self.constants:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(self.constants[name])
            if tensor.external_data:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
            return onnx.numpy_helper.to_array(tensor)
        node = self.producers[name]
        if node.op_type == "Reshape":
            # To which shape does not matter: whoever reads packed codes gives them their own.
            return self.array(node.input[0])
        if node.op_type == "Transpose":
            return self.array(node.input[0]).T
        if node.op_type == "Cast":
            return self.array(node.input[0])
        raise RuntimeError(f"{name} is computed by {node.op_type}")

    def node(self, start: str) -> Any:
        """The product or look-up whose name starts like this."""
        kinds = ("MatMul", "MatMulNBits", "Gather", "GatherBlockQuantized")
        return next(n for n in self.model.graph.node if n.name.startswith(start) and n.op_type in kinds)

    def accuracy_levels(self) -> list[int]:
        """The accuracy levels that MatMulNBits nodes ask for; 0 leaves it to the runtime."""
        return sorted({_attributes(n).get("accuracy_level", 0) for n in self.nbits()})

    def nbits(self) -> list[Any]:
        """Every MatMulNBits node."""
        return [node for node in self.model.graph.node if node.op_type == "MatMulNBits"]


def read_linears(graph: Graph, shapes: Shapes) -> dict[str, QuantizedWeight]:
    """The quantised layers of a graph, by the names that Hugging Face gives them.

    Args:
        graph: the folder.
        shapes: module -> (rows, columns) of the layers that are wanted.

    Raises:
        RuntimeError: a layer is missing or does not fit.
    """
    found: dict[str, QuantizedWeight] = {}
    for node in graph.nbits():
        match = _LAYER.match(node.name)
        if match is None:
            continue
        layer, block, name = match.groups()
        weight, start = _quantised(graph, node), 0
        for part in _FUSED.get(name, (name,)):
            module = f"model.layers.{layer}.{'self_attn' if block == 'attn' else block}.{part}"
            rows = slice(start, start + shapes[module][0])
            start = rows.stop
            found[module] = replace(
                weight, codes=weight.codes[rows], scales=weight.scales[rows], zero_points=weight.zero_points[rows]
            )
        if start != weight.shape[0]:
            raise RuntimeError(f"{node.name}: {weight.shape[0]} rows for {start}")
    for module, shape in shapes.items():
        if module not in found or found[module].shape != shape:
            raise RuntimeError(f"{module} is not in {graph.folder.name}, or not of the shape {shape}")
    return found


def read_embedding(graph: Graph) -> F32:
    """What the embedding looks up, float32 [vocabulary, hidden]."""
    node = graph.node("/model/embed_tokens/")
    values = graph.array(node.input[0])
    if node.op_type == "Gather":
        return np.asarray(values, np.float32)
    attributes = _attributes(node)
    scales = np.asarray(graph.array(node.input[2]), np.float32)
    if len(node.input) > 3 and node.input[3]:
        raise RuntimeError("an embedding with zero-points")
    # Without zero-points, codes packed into bytes are meant around 8, and int4 around 0.
    codes = _unpacked(values.reshape(values.shape[0], -1)) - 8.0 if values.dtype == np.uint8 else values
    codes = np.asarray(codes, np.float32)
    return codes * np.repeat(scales, int(attributes["block_size"]), axis=1)


def read_head(graph: Graph) -> F32:
    """What the head multiplies with, float32 [vocabulary, hidden]."""
    node = graph.node("/lm_head/")
    if node.op_type == "MatMul":
        return np.asarray(graph.array(node.input[1]).T, np.float32)
    weight = _quantised(graph, node)
    zeros, scales = (np.repeat(part, weight.group_size, axis=1) for part in (weight.zero_points, weight.scales))
    codes = weight.codes.astype(np.float32) - zeros.astype(np.float32)
    return codes * scales.astype(np.float32)


def logits(folder: Path, tokens: Sequence[int], accuracy_level: int | None = None) -> F32:
    """Logits [tokens, vocabulary] of one prefill, in ONNX Runtime.

    Args:
        folder: the folder.
        tokens: the prompt.
        accuracy_level: for every MatMulNBits node instead of its own; 1 is float32, 4 is int8 activations.
    """
    import onnxruntime

    graph = Graph(folder)
    if accuracy_level is not None:
        for node in graph.nbits():
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.add(name="accuracy_level", i=accuracy_level, type=2)  # INT
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(graph.model.SerializeToString(), options, ["CPUExecutionProvider"])
    head_size = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    ids = np.array([tokens], np.int64)
    feed: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
    }
    for port in session.get_inputs():
        if port.name.startswith("past_key_values"):
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[port.type]
            feed[port.name] = np.zeros((1, port.shape[1], 0, head_size), dtype)
    wanted = {port.name for port in session.get_inputs()}
    (result,) = session.run(["logits"], {name: value for name, value in feed.items() if name in wanted})
    return np.asarray(result[0], np.float32)


def answers(folder: Path, prompts: Sequence[str]) -> list[str]:
    """Greedy answers to chat messages through onnxruntime-genai and its own tokenizer, as an application would ask."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    found = []
    for prompt in prompts:
        message = json.dumps([{"role": "user", "content": prompt}])
        tokens = tokenizer.encode(tokenizer.apply_chat_template(message, add_generation_prompt=True))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(tokens) + _MAX_NEW_TOKENS, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        found.append(str(tokenizer.decode(generator.get_sequence(0)[len(tokens) :])).strip())
    return found


def _quantised(graph: Graph, node: Any) -> QuantizedWeight:
    """A MatMulNBits node's weight; zero-points that are left out are 8."""
    attributes = _attributes(node)
    rows, columns, block = (int(attributes[key]) for key in ("N", "K", "block_size"))
    groups = columns // block
    if attributes.get("bits", 4) != 4 or columns % block:
        raise RuntimeError(f"{node.name}: not 4 bits, or {columns} columns in blocks of {block}")
    codes = _unpacked(graph.array(node.input[1]).reshape(rows, columns // 2))
    scales = graph.array(node.input[2]).reshape(rows, groups)
    zero_points = np.full((rows, groups), 8, np.uint8)
    if len(node.input) > 3 and node.input[3]:
        zero_points = _unpacked(graph.array(node.input[3]).reshape(rows, -1))[:, :groups]
    return QuantizedWeight(codes, scales, zero_points, block)


def _unpacked(packed: Any) -> Any:
    """uint8 [rows, n] -> uint8 [rows, 2 n], low half of each byte first."""
    values = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    values[:, 0::2] = packed & 15
    values[:, 1::2] = packed >> 4
    return values


def _attributes(node: Any) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}
