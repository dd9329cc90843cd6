"""The transformers model of a `config.json` without its weights: what every target traces or builds its graph from."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseport.checkpoints.sub_config import smaller_shapes
from sparseport.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Where attention modules keep numbers of heads that their forward needs.
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")


def load_config(config_json: Path) -> PretrainedConfig:
    """The transformers config of a `config.json`, as the dense architecture: how weights are stored is left out.

    Raises: BadInput, Unsupported (a model type that transformers does not have).
    """
    return config_of(read_settings(config_json), str(config_json))


def read_settings(config_json: Path) -> dict[str, Any]:
    """What stands in a `config.json`.

    Raises: BadInput.
    """
    try:
        settings = json.loads(config_json.read_text("utf-8"))
        settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput("the model's config cannot be read", where=config_json, found=repr(error)) from error
    return dict(settings)


def config_of(settings: dict[str, Any], where: str) -> PretrainedConfig:
    """The transformers config of settings, as `load_config` makes it.

    Raises: BadInput, Unsupported.
    """
    from transformers import CONFIG_MAPPING

    model_type = settings["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise Unsupported("transformers has no such model_type", where=where, found=model_type)
    settings = {key: value for key, value in settings.items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(settings)
    except Exception as error:
        raise BadInput("transformers refuses the model's config", where=where, found=error) from error


def empty_model(config: PretrainedConfig, dtype: str = "float16", attention: str | None = None) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary frequencies are computed, not stored).

    Args:
        config: the architecture.
        dtype: torch's name of the parameters' dtype.
        attention: transformers' name of the attention implementation; None leaves it to the config.

    Raises:
        Unsupported: transformers makes no such model, or a buffer of it has no value before training.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            chosen = {} if attention is None else {"attn_implementation": attention}
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **chosen)
    except Exception as error:
        raise Unsupported("transformers makes no causal model of this config", found=error) from error
    _shrink(model, config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Numbers that the model computes (frequencies, Gemma's scale of the embedding) in float32, as the reference
            # of the logits has them: torch would round some of them to the parameters' dtype.
            unset, kept = (float("nan"), torch.float32) if buffer.is_floating_point() else (0, buffer.dtype)
            module._buffers[name] = torch.full_like(buffer, unset, device="cpu", dtype=kept)
    # What transformers itself runs after a load on the meta device. Parameters are still meta, so this costs nothing.
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise Unsupported("a computed buffer has no initial value", where=name)
    return model.eval()


def _shrink(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Give the layers that a sub-network cut their own shapes, where config.json has such shapes.

    Raises:
        Unsupported: a name in the config is no linear layer of the model.
    """
    import torch

    shapes = smaller_shapes(config.to_dict())
    modules = dict(model.named_modules())
    for name, (rows, columns) in shapes.items():
        layer = modules.get(name)
        if not isinstance(layer, torch.nn.Linear) or rows > layer.out_features or columns > layer.in_features:
            raise Unsupported(
                "a layer of the sub-network is no part of the model",
                where=name,
                expected="a linear layer that is at least as large",
                found=type(layer).__name__,
                fix="check that config.json belongs to the weights",
            )
        layer.weight = torch.nn.Parameter(torch.empty_like(layer.weight[:rows, :columns]), requires_grad=False)
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(torch.empty_like(layer.bias[:rows]), requires_grad=False)
        layer.out_features, layer.in_features = rows, columns
    for name, module in modules.items():
        if f"{name}.k_proj" in shapes and isinstance(getattr(module, "head_dim", None), int):
            size = module.head_dim
            set_heads(module, shapes[f"{name}.q_proj"][0] // size, shapes[f"{name}.k_proj"][0] // size)


def set_heads(attention: Any, queries: int, key_values: int) -> dict[str, int]:
    """Tell an attention module that keeps numbers of heads how many are left; returns what it had.

    Llama and its kin keep none: they take them from the width of what their projections put out.
    """
    own = vars(attention)
    had = {key: own[key] for key in (*QUERY_HEADS, *KEY_VALUE_HEADS) if type(own.get(key)) is int}
    own.update({key: queries if key in QUERY_HEADS else key_values for key in had})
    return had


def key_value_heads(model: PreTrainedModel) -> list[int] | None:
    """Key-value heads of each decoder block, if a sub-network cut some; None for an ordinary model."""
    if not any(name.endswith(".k_proj") for name in smaller_shapes(model.config.to_dict())):
        return None
    return [heads for _, heads in attention_heads(model)]


def attention_heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(query heads, key-value heads) of each decoder block, from the rows of its projections.

    Raises:
        Unsupported: the attention modules have no q_proj, k_proj and head_dim.
    """
    found = []
    for name, module in model.named_modules():
        query, key, size = (getattr(module, part, None) for part in ("q_proj", "k_proj", "head_dim"))
        if query is None and key is None:
            continue
        if query is None or key is None or not isinstance(size, int):
            raise Unsupported("cannot tell the heads of this attention module", where=name, found=type(module).__name__)
        found.append((query.out_features // size, key.out_features // size))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's warnings and the libraries' notes off the terminal."""
    loggers = [logging.getLogger(name) for name in ("optimum", "transformers", "openvino", "nncf", "torch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
