"""The OpenVINO IR of a causal language model, made from its `config.json` alone ("skeleton").

The graph comes from optimum-intel's own export, so it is the graph that every tool of that family expects. The
weights are never materialised: all matrices of the traced model are views of one untouched block of zero pages, and
become f16 placeholder constants (f32 in modules with a forward of their own) that a later step replaces. The small
tensors (norms, biases) are in place already. `frontend` runs this in a child process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.targets.empty_model import empty_model, load_config
from sparseport.targets.openvino.stamp import LayersDiffer, stamp_layers, three_layer_settings
from sparseport.targets.openvino.stamp_graph import NUMPY_TYPES, Carrier, Graph, Zeros
from sparseport.targets.openvino.trace import export, fill_parameters, wide_names

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Array = npt.NDArray[Any]
SmallTensors = Callable[[str], Array]

XML_NAME = "openvino_model.xml"

_PLUS_ONE = "1 + weight"
# How a small tensor may appear in the graph after constant folding. Gemma's norms multiply by (1 + weight).
FOLDED_FORMS: dict[str, Callable[[Array], Array]] = {
    "weight": lambda values: values,
    _PLUS_ONE: lambda values: np.float32(1) + values.astype(np.float32),
}


@dataclass(frozen=True)
class Skeleton:
    """A written IR whose 2-D constants are zero placeholders.

    `constants` maps each tensor name of the checkpoint to the friendly name of the constant that carries it.
    `stamped` says that only `traced_layers` decoder layers were traced and the others are copies of the last one.
    `plus_one` names the tensors whose constants hold 1 more than the checkpoint in every element.
    """

    xml: str
    bin: str
    traced_layers: int
    stamped: bool
    constants: dict[str, str]
    plus_one: list[str]


def build_skeleton(
    config_json: Path, out_dir: Path, *, small_tensors: SmallTensors, stamp: bool | None = None
) -> Skeleton:
    """Write `openvino_model.xml` and `.bin` into `out_dir` for the model that `config_json` describes.

    `small_tensors(name)` gives the values of a 0-D or 1-D tensor (f16, bf16 or f32) under its checkpoint name. They are
    in the IR exactly: norms as f32 (optimum's own choice), biases as f16 if given so, else as f32. Matrices are f16
    zeros. `stamp` asks for a graph grown from three traced layers: None where possible, False never, True or an error.

    Raises: BadInput (the config or a small tensor is damaged), Unsupported (no such architecture, or a tensor that
    cannot be found in the graph), FidelityError (the written file does not hold what it should).
    """
    config = load_config(config_json)
    if stamp is not False:
        try:
            few = type(config).from_dict(three_layer_settings(config.to_dict()))
            return _build(few, config.num_hidden_layers, out_dir, small_tensors)
        except LayersDiffer:
            if stamp:
                raise
    return _build(config, config.num_hidden_layers, out_dir, small_tensors)


def _build(traced: PretrainedConfig, layers: int, out_dir: Path, small_tensors: SmallTensors) -> Skeleton:
    """Trace the model of `traced`, put the small tensors in, and stamp if it has fewer than `layers` layers."""
    # Only transformers' plain attention caps scores; the fused one leaves the cap out without a word.
    capped = getattr(traced, "attn_logit_softcapping", None) is not None
    model = empty_model(traced, attention="eager" if capped else None)
    _require_linear_layers(model)
    small = {n: _small_value(n, tuple(p.shape), small_tensors) for n, p in model.named_parameters() if p.ndim < 2}
    markers = _markers(small)
    fill_parameters(model, markers)
    out_dir.mkdir(parents=True, exist_ok=True)
    xml = out_dir / XML_NAME
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        export(model, Path(scratch))
        graph = Graph.read(Path(scratch) / XML_NAME)
        carriers = _locate_matrices(model, graph) | _locate_small(markers, graph)
        tied = {name for name, aliases in _aliases(model).items() if len(aliases) > 1}
        if traced.num_hidden_layers < layers:
            carriers = stamp_layers(graph, carriers, layers)
        small = {n: _small_value(n, c.shape, small_tensors) for n, c in carriers.items() if c.is_small}
        for name, values in small.items():
            _place(graph, name, carriers[name], values)
        graph.number_names()
        graph.write(xml)
    _check_written(xml, carriers, small, tied)
    constants = {name: carrier.node.name for name, carrier in sorted(carriers.items())}
    stamped = traced.num_hidden_layers < layers
    plus_one = sorted(name for name, carrier in carriers.items() if carrier.form == _PLUS_ONE)
    return Skeleton(str(xml), str(xml.with_suffix(".bin")), traced.num_hidden_layers, stamped, constants, plus_one)


def _require_linear_layers(model: PreTrainedModel) -> None:
    """Refuse weights that are no matrices [out, in]: experts in one tensor, convolutions, GPT-2's layers.

    Raises:
        Unsupported: names the first.
    """
    for name, parameter in model.named_parameters():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if parameter.ndim > 2 or (parameter.ndim == 2 and owner == "Conv1D"):
            raise Unsupported(
                "only linear layers stored as [out, in] are carried",
                where=name,
                found=f"{owner} {tuple(parameter.shape)}",
                fix="export this model with optimum-cli",
            )


def _small_value(name: str, shape: tuple[int, ...], small_tensors: SmallTensors) -> Array:
    values = np.asarray(small_tensors(name), order="C")
    if values.dtype.name == "bfloat16":
        values = values.astype(np.float32)
    if tuple(values.shape) != tuple(shape):
        raise BadInput("a tensor does not fit the config", where=name, expected=tuple(shape), found=values.shape)
    if values.dtype not in (np.float16, np.float32):
        raise BadInput("a small tensor must be f16, bf16 or f32", where=name, found=values.dtype)
    return values


def _markers(small: dict[str, Array]) -> dict[str, Array]:
    """Stand-ins for the small tensors: random f16 values in [0.5, 1), so their bytes name them after folding.

    Every value is exact in f16, and so is one plus it in f32.
    """
    seed = 0
    while True:
        random = np.random.default_rng(seed)
        markers = {n: ((1024 + random.integers(1024, size=v.shape)) / 2048).astype(v.dtype) for n, v in small.items()}
        if len({marker.astype(np.float32).tobytes() for marker in markers.values()}) == len(markers):
            return markers
        seed += 1


def _locate_matrices(model: PreTrainedModel, graph: Graph) -> dict[str, Carrier]:
    """Find the constant of each matrix by the name that OpenVINO's frontend derives from the module path."""
    by_name = {node.name: node for node in graph.constants()}
    located: dict[str, Carrier] = {}
    wide = wide_names(model)
    for name, aliases in _aliases(model).items():
        shape = tuple(model.get_parameter(name).shape)
        if len(shape) < 2:
            continue
        found = [by_name[traced] for alias in aliases for traced in _traced_names(alias) if traced in by_name]
        if len(found) != 1:
            raise Unsupported("a weight matrix was not found once in the traced graph", where=name, found=len(found))
        element_type, expected = found[0].data["element_type"], "f32" if name in wide else "f16"
        if element_type != expected or found[0].shape != shape:
            raise Unsupported(
                "tracing changed a weight matrix",
                where=name,
                expected=f"{expected} {shape}",
                found=f"{element_type} {found[0].shape}",
            )
        graph.set_payload(found[0], Zeros(int(found[0].data["size"])))
        located[name] = Carrier(found[0], shape)
    return located


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each tensor of the checkpoint all parameter names that share it, its own first."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _traced_names(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(".")
    return f"self.{module}._openvino_orig_{attribute}", f"self.{name}"


def _locate_small(markers: dict[str, Array], graph: Graph) -> dict[str, Carrier]:
    """Find each marker's constant by its bytes, and name the constant after its tensor."""
    wanted: dict[tuple[str, bytes], tuple[str, str]] = {}
    for name, marker in markers.items():
        for form, fold in FOLDED_FORMS.items():
            for element_type in ("f32", "f16"):
                wanted[element_type, fold(marker).astype(NUMPY_TYPES[element_type]).tobytes()] = (name, form)
    located: dict[str, Carrier] = {}
    for node in graph.constants():
        if node.data["element_type"] not in ("f32", "f16"):
            continue
        payload = graph.payload(node)
        match = wanted.get((node.data["element_type"], payload)) if isinstance(payload, bytes) else None
        if match is None:
            continue
        name, form = match
        if name in located:
            raise Unsupported("a small tensor appears twice in the traced graph", where=name)
        node.element.set("name", f"self.{name}")
        located[name] = Carrier(node, markers[name].shape, form)
    for name in markers:
        if name not in located:
            raise Unsupported("a small tensor was not found in the traced graph", where=name)
    return located


def _place(graph: Graph, name: str, carrier: Carrier, values: Array) -> None:
    """Put the real values of a small tensor into its constant; refuse when its element type cannot hold them."""
    dtype = NUMPY_TYPES[carrier.node.data["element_type"]]
    folded = FOLDED_FORMS[carrier.form](values)
    placed = folded.astype(dtype)
    if not np.array_equal(placed.astype(folded.dtype), folded, equal_nan=True):
        raise Unsupported("a small tensor does not fit its constant", where=name, expected=folded.dtype, found=dtype)
    graph.set_payload(carrier.node, placed.tobytes())


def _check_written(xml: Path, carriers: dict[str, Carrier], small: dict[str, Array], tied: set[str]) -> None:
    """Read the files back with OpenVINO's own parser and compare every constant with what it should carry.

    A constant of tied tensors must reach both consumers: the embedding's Gather and the head's MatMul.
    """
    import openvino

    by_name: dict[str, list[Any]] = {}
    model = openvino.Core().read_model(xml)
    for operation in model.get_ops():
        if operation.get_type_name() == "Constant":
            by_name.setdefault(operation.get_friendly_name(), []).append(operation)
    if len({carrier.node.name for carrier in carriers.values()}) != len(carriers):
        raise FidelityError("two tensors share one constant", where=xml)
    for name, carrier in carriers.items():
        found = by_name.get(carrier.node.name, [])
        if len(found) != 1:
            raise FidelityError("a tensor is not once in the IR", where=f"{xml}: {name}", found=len(found))
        values = found[0].data
        if name in small:
            if values.tobytes() != FOLDED_FORMS[carrier.form](small[name]).astype(values.dtype).tobytes():
                raise FidelityError("a small tensor is not in the IR bit for bit", where=f"{xml}: {name}")
        elif values.dtype != NUMPY_TYPES[carrier.node.data["element_type"]] or values.shape != carrier.shape:
            raise FidelityError("a placeholder has not the tensor's type and shape", where=f"{xml}: {name}")
        if name in tied and not {"Gather", "MatMul"} <= _users(found[0]):
            raise FidelityError("a tied tensor does not feed embedding and head", where=f"{xml}: {name}")


def _users(operation: Any) -> set[str]:
    """Types of the nodes that use a constant, past any Convert."""
    users: set[str] = set()
    for target in operation.output(0).get_target_inputs():
        node = target.get_node()
        users |= _users(node) if node.get_type_name() == "Convert" else {node.get_type_name()}
    return users
