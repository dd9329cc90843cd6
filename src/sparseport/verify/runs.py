"""Logits of a written folder, computed by its runtime: the settings to compare, and how each engine is fed.

Every run reads a prefill in one go and then feeds one token at a time through the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.json_files import read_json
from sparseport.targets.onnx.products import EXACT_LEVEL, FAST_LEVEL

F32 = npt.NDArray[np.float32]

# Tokens read in one go, and tokens fed one by one through the KV cache afterwards.
PREFILL_TOKENS = 96
DECODE_TOKENS = 16

OPENVINO_FULL_PRECISION = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
# ONNX Runtime's own name of the accuracy level that it gives to DequantizeLinear + MatMul when it fuses them.
_QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
# Where external tensors lie when the graph itself comes from memory.
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Run:
    """One way to run a folder.

    label     `full_precision`, `default` (what applications get), or the name of settings that can be chosen
    logits    tokens -> float32 [tokens, vocabulary]
    settings  what was set, for the certificate
    judged    whether it has to agree with the reference
    """

    label: str
    logits: Callable[[list[int]], F32]
    settings: dict[str, str] = field(default_factory=dict)
    judged: bool = False


def adapter_run(folder: Path, adapter: str) -> Run:
    """The run of an ONNX folder at full precision with one of its adapters switched on."""
    return _onnx_runs(folder, folder / adapter)[0]


def runs_of(target: str, folder: Path, portable: bool = False) -> list[Run]:
    """The runs to compare for a folder, full precision first; a portable ONNX folder is run by OpenVINO as well."""
    if target == "openvino":
        return _openvino_runs(folder)
    return _onnx_runs(folder) + (_openvino_runs_of_onnx(folder) if portable else [])


def _openvino_runs(folder: Path) -> list[Run]:
    import openvino as ov

    model = ov.Core().read_model(folder / "openvino_model.xml")
    full = OPENVINO_FULL_PRECISION
    return [
        Run("full_precision", lambda tokens: openvino_logits(model, tokens, full), full, judged=True),
        Run("default", lambda tokens: openvino_logits(model, tokens, {})),
    ]


def _onnx_runs(folder: Path, adapter: Path | None = None) -> list[Run]:
    """Exact and fast products, and the one of them that the folder itself asks for."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    written = accuracy_levels(model)
    fused = any(node.op_type == "DequantizeLinear" for node in model.graph.node)

    def run(level: int | None) -> Callable[[list[int]], F32]:
        return lambda tokens: onnx_logits(folder, tokens, level, adapter)

    exact = {"accuracy_level": str(EXACT_LEVEL)} if written or fused else {}
    runs = [Run("full_precision", run(EXACT_LEVEL if exact else None), exact, judged=True)]
    runs.append(Run("default", run(None), {"accuracy_level": str(min(written))} if written else {}))
    if written and FAST_LEVEL not in written:
        runs.append(Run("fast", run(FAST_LEVEL), {"accuracy_level": str(FAST_LEVEL)}))
    return runs


def _openvino_runs_of_onnx(folder: Path) -> list[Run]:
    def run(settings: dict[str, str]) -> Callable[[list[int]], F32]:
        return lambda tokens: openvino_logits_of_onnx(folder, tokens, settings)

    full = OPENVINO_FULL_PRECISION
    return [Run("openvino_full_precision", run(full), full, judged=True), Run("openvino", run({}))]


def accuracy_levels(model: Any) -> set[int]:
    """The accuracy levels that the MatMulNBits nodes of a graph ask for."""
    return {
        next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }


def onnx_session(folder: Path, level: int | None = None, threads: int = 0) -> Any:
    """An ONNX Runtime session of a folder.

    Args:
        folder: with `model.onnx`.
        level: accuracy level for every INT4 product instead of the written one; None leaves the folder as it is.
        threads: threads inside an operator; 0 lets ONNX Runtime choose.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    # As the folder asks, which is what onnxruntime-genai does.
    for key, value in _decoder(folder)["session_options"].items():
        if key.startswith("session."):
            options.add_session_config_entry(key, str(value))
    if level is None:
        return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    options.add_session_config_entry(_DATA_FOLDER, str(folder))
    options.add_session_config_entry(_QDQ_LEVEL, str(level))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def onnx_logits(folder: Path, tokens: list[int], level: int | None = None, adapter: Path | None = None) -> F32:
    """Logits [tokens, vocabulary] of an ONNX folder, with an adapter's file switched on; see `onnx_session`."""
    session = onnx_session(folder, level)
    active, options = (None, None) if adapter is None else _with_adapter(adapter)
    cache = empty_cache(folder, [port.name for port in session.get_inputs()])
    names = [port.name for port in session.get_outputs()]
    pieces = []
    for feed in _feeds(tokens, {port.name for port in session.get_inputs()}):
        result = dict(zip(names, session.run(None, {**feed, **cache}, options), strict=True))
        pieces.append(np.array(result.pop("logits")[0], np.float32))
        cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
    del active  # ONNX Runtime does not keep an adapter alive, and goes on without it where it is gone
    return np.concatenate(pieces)


def _with_adapter(file: Path) -> tuple[Any, Any]:
    """An adapter, to be held until the runs are over, and options of a run that switch it on."""
    import onnxruntime

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    return adapter, options


def empty_cache(folder: Path, inputs: list[str]) -> dict[str, F32]:
    """A KV cache of no tokens for the inputs of a graph: float32 [1, KV heads, 0, head size] each."""
    decoder = _decoder(folder)
    shape = (1, int(decoder["num_key_value_heads"]), 0, int(decoder["head_size"]))
    return {name: np.zeros(shape, np.float32) for name in inputs if name.startswith("past_key_values")}


def _decoder(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(folder / "genai_config.json", what="genai_config.json")["model"]["decoder"]
    return config


def openvino_logits(model: Any, tokens: list[int], settings: dict[str, str]) -> F32:
    """Logits [tokens, vocabulary] of an IR whose KV cache is state of the model."""
    import openvino as ov

    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    inputs = {name for port in request.model_inputs for name in port.get_names()}
    pieces = []
    for feed in _feeds(tokens, inputs):
        request.infer(feed)
        pieces.append(np.array(request.get_tensor("logits").data[0], np.float32))
    return np.concatenate(pieces)


def openvino_logits_of_onnx(folder: Path, tokens: list[int], settings: dict[str, str]) -> F32:
    """Logits [tokens, vocabulary] of an ONNX folder, run by OpenVINO with the KV cache as inputs and outputs."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", settings)
    inputs = [port.get_any_name() for port in compiled.inputs]
    cache = empty_cache(folder, inputs)
    pieces = []
    for feed in _feeds(tokens, set(inputs)):
        result = {port.get_any_name(): np.array(value) for port, value in compiled({**feed, **cache}).items()}
        pieces.append(result.pop("logits")[0].astype(np.float32))
        cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
    return np.concatenate(pieces)


def _feeds(tokens: list[int], inputs: set[str]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """What each step is fed, as far as the graph has such inputs: the prefill, then token by token."""
    seen = 0
    for chunk in [tokens[:PREFILL_TOKENS], *([token] for token in tokens[PREFILL_TOKENS:])]:
        seen += len(chunk)
        feed: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array([chunk], np.int64),
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(seen - len(chunk), seen, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        yield {name: value for name, value in feed.items() if name in inputs}
