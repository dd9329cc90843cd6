"""From a `config.json` to the IR that optimum-intel's own export makes, without any weights."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from sparseport.errors import Unsupported
from sparseport.targets.empty_model import key_value_heads, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Model types that optimum-intel 2.1 refuses with transformers 5, and that tests/e2e/test_architectures.py proves ->
# optimum's class for them.
_TRIED_HERE = {
    "gemma": "GemmaOpenVINOConfig",
    "gemma2": "Gemma2OpenVINOConfig",
    "gemma3_text": "Gemma3TextOpenVINOConfig",
    "glm": "GLMOpenVINOConfig",
    "exaone4": "Exaone4OpenVINOConfig",
}


def wide_names(model: PreTrainedModel) -> set[str]:
    """Names of the matrices that the frontend takes in float32: those of modules with a forward of their own.

    Gemma's embedding scales what it looks up, OPT's shifts positions, Falcon's linear layers multiply by themselves.
    The frontend keeps 16 bits for plain modules alone.
    """
    import torch

    plain = (torch.nn.Embedding, torch.nn.Linear)
    own = {name for name, module in model.named_modules() if isinstance(module, plain) and type(module) not in plain}
    return {name for name, _ in model.named_parameters() if name.removesuffix(".weight") in own}


def fill_parameters(model: PreTrainedModel, small: dict[str, npt.NDArray[Any]]) -> None:
    """Give every parameter storage: the given values for the small ones, one shared block of zeros for all matrices."""
    import torch

    # numpy asks the system for zero pages and nothing touches them, so the block costs address space only.
    zeros = torch.from_numpy(np.zeros(max(p.numel() for p in model.parameters()), np.float16))
    wide = wide_names(model)
    wide_zeros = torch.from_numpy(np.zeros(max((model.get_parameter(n).numel() for n in wide), default=0), np.float32))
    filled: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        block = wide_zeros if name in wide else zeros
        values = torch.from_numpy(small[name]) if name in small else block[: parameter.numel()].view(parameter.shape)
        filled[parameter] = torch.nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = filled[parameter]  # keeps tied parameters tied


def export(model: PreTrainedModel, folder: Path) -> None:
    """Optimum's export of `model`, at its own settings, without its quantisation and without preprocessors."""
    from optimum.exporters.openvino.convert import export_from_model

    kind = model.config.model_type
    with quiet(), _tried_here(kind), _single_trace(kind), _frozen_garbage(), _cache_of(key_value_heads(model)):
        try:
            export_from_model(
                model, folder, task="text-generation-with-past", stateful=True, patch_16bit_model=True, preprocessors=[]
            )
        except Exception as error:
            raise Unsupported("optimum-intel cannot export this architecture", found=error) from error


@contextlib.contextmanager
def _cache_of(heads: list[int] | None) -> Iterator[None]:
    """Let optimum trace with a cache of the given key-value heads per block; it takes the config's number for all."""
    if heads is None:
        yield
        return
    from optimum.exporters.openvino import convert

    plain = convert.remove_none_from_dummy_inputs

    def cut(inputs: dict[str, Any]) -> Any:
        if "past_key_values" in inputs:
            pairs = zip(inputs["past_key_values"], heads, strict=True)
            inputs["past_key_values"] = [tuple(part[:, :kept] for part in pair) for pair, kept in pairs]
        return plain(inputs)

    with mock.patch.object(convert, "remove_none_from_dummy_inputs", cut):
        yield


@contextlib.contextmanager
def _tried_here(model_type: str) -> Iterator[None]:
    """Let optimum export a model type that it has not tried with this version of transformers, where we have.

    Its own code for such a type knows transformers 5; what comes out is compared with transformers' logits.
    """
    from optimum.exporters.openvino import model_configs

    if model_type not in _TRIED_HERE:
        yield
        return
    with mock.patch.object(getattr(model_configs, _TRIED_HERE[model_type]), "MAX_TRANSFORMERS_VERSION", None):
        yield


@contextlib.contextmanager
def _single_trace(model_type: str) -> Iterator[None]:
    """Trace once. Optimum lists the model types that torch need not trace a second time for comparison.

    The second trace finds graphs that depend on input values, which the architectures here do not have; it costs as
    much as the first.
    """
    from optimum.exporters.openvino import utils

    listed = utils.SKIP_CHECK_TRACE_MODELS
    utils.SKIP_CHECK_TRACE_MODELS = (*listed, model_type)
    try:
        yield
    finally:
        utils.SKIP_CHECK_TRACE_MODELS = listed


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Optimum collects garbage after each model; hide the thousands of objects that the imports have made from it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """For a process that only traces: what is imported inside does without packages that tracing does not need.

    transformers imports scikit-learn for assisted generation and scipy for detection losses when they are installed;
    OpenVINO's converter reports its use over the network when openvino_telemetry is installed. All three handle a
    missing package, so these are declared missing. Modules imported inside stay that way: not for a user's process.
    """
    from transformers import utils
    from transformers.utils import import_utils

    names = ("is_sklearn_available", "is_scipy_available")
    kept = [(module, name, getattr(module, name)) for module in (utils, import_utils) for name in names]
    hidden = "openvino_telemetry" not in sys.modules
    for module, name, _ in kept:
        setattr(module, name, lambda: False)
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
        if hidden:
            del sys.modules["openvino_telemetry"]
