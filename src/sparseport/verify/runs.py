"""Logits of a written folder, computed by its runtime: the settings to compare.

Every run reads a prefill in one go and then feeds one token at a time through the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparseport.checkpoints.json_files import read_json
from sparseport.checkpoints.sub_config import block_of, smaller_shapes
from sparseport.targets.onnx.products import EXACT_LEVEL, FAST_LEVEL
from sparseport.verify.sessions import OnnxSession, OpenVinoSession, Session, feeds

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
    written, level = accuracy_levels(model), _exact_level(model)

    def run(level: int | None) -> Callable[[list[int]], F32]:
        return lambda tokens: onnx_logits(folder, tokens, level, adapter)

    exact = {} if level is None else {"accuracy_level": str(level)}
    runs = [Run("full_precision", run(level), exact, judged=True)]
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
    return _logits(open_onnx(folder, level, adapter=adapter), tokens)


def open_onnx(folder: Path, level: int | None = None, threads: int = 0, adapter: Path | None = None) -> OnnxSession:
    """An ONNX folder, ready to read tokens; arguments as for `onnx_session`, and an adapter's file to switch on."""
    session = onnx_session(folder, level, threads)
    active = None if adapter is None else _with_adapter(adapter)
    return OnnxSession(session, empty_cache(folder, [port.name for port in session.get_inputs()]), active)


def exact_level(folder: Path) -> int | None:
    """The accuracy level that makes an ONNX folder compute in float32; None if it has no choice to make."""
    import onnx

    return _exact_level(onnx.load(folder / "model.onnx", load_external_data=False))


def _exact_level(model: Any) -> int | None:
    fused = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    return EXACT_LEVEL if accuracy_levels(model) or fused else None


def _with_adapter(file: Path) -> tuple[Any, Any]:
    """An adapter, to be held until the runs are over, and options of a run that switch it on."""
    import onnxruntime

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    return adapter, options


def empty_cache(folder: Path, inputs: list[str]) -> dict[str, F32]:
    """A KV cache of no tokens for the inputs of a graph: float32 [1, KV heads, 0, head size] each.

    `genai_config.json` has one number of heads for all blocks; a sub-network's config.json knows those that have fewer.
    Folders of the model builder itself have no config.json, and no such blocks.
    """
    config = folder / "config.json"
    shapes = smaller_shapes(read_json(config, what="config.json")) if config.is_file() else {}
    decoder = _decoder(folder)
    size = int(decoder["head_size"])
    heads = {block_of(name): shape[0] // size for name, shape in shapes.items() if name.endswith(".k_proj")}
    every = int(decoder["num_key_value_heads"])
    names = [name for name in inputs if name.startswith("past_key_values")]
    return {name: np.zeros((1, heads.get(block_of(name), every), 0, size), np.float32) for name in names}


def _decoder(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(folder / "genai_config.json", what="genai_config.json")["model"]["decoder"]
    return config


def openvino_logits(model: Any, tokens: list[int], settings: dict[str, str]) -> F32:
    """Logits [tokens, vocabulary] of an IR whose KV cache is state of the model."""
    import openvino as ov

    return _logits(OpenVinoSession(ov.Core().compile_model(model, "CPU", settings)), tokens)


def openvino_logits_of_onnx(folder: Path, tokens: list[int], settings: dict[str, str]) -> F32:
    """Logits [tokens, vocabulary] of an ONNX folder, run by OpenVINO with the KV cache as inputs and outputs."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", settings)
    inputs = [port.get_any_name() for port in compiled.inputs]
    cache = empty_cache(folder, inputs)
    pieces, seen = [], 0
    for chunk in _chunks(tokens):
        seen += len(chunk)
        feed = feeds(np.array([chunk], np.int64), seen, set(inputs))
        result = {port.get_any_name(): np.array(value) for port, value in compiled({**feed, **cache}).items()}
        pieces.append(result.pop("logits")[0].astype(np.float32))
        cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
    return np.concatenate(pieces)


def _logits(session: Session, tokens: list[int]) -> F32:
    return np.concatenate([session.read(chunk) for chunk in _chunks(tokens)])


def _chunks(tokens: list[int]) -> list[list[int]]:
    """The prefill, then token by token."""
    return [tokens[:PREFILL_TOKENS], *([token] for token in tokens[PREFILL_TOKENS:])]
