"""How much each weight counts when a model is pruned: magnitude, Wanda's metric, or a function of the user's.

Whatever the metric, weights are compared within an output row, as Wanda does (Sun et al. 2023, arXiv 2306.11695,
section 3); with an N:M pattern, within each aligned group of M of its columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from sparseport.errors import BadInput, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Metric: TypeAlias = "Callable[[Tensor, Tensor, str], Any]"
"""Called with a weight float32 [out, in], the squared norms of its inputs float32 [in], and the module's name; returns
the weights' importance, [out, in]: the smallest are pruned."""

WANDA, MAGNITUDE = "wanda", "magnitude"


def _wanda(weight: Tensor, input_sq_norms: Tensor, _module: str) -> Tensor:
    return weight.abs() * input_sq_norms.sqrt()


def _magnitude(weight: Tensor, _input_sq_norms: Tensor, _module: str) -> Tensor:
    return weight.abs()


METRICS: dict[str, Metric] = {WANDA: _wanda, MAGNITUDE: _magnitude}


def find_metric(name: str) -> Metric:
    """The metric of a name, or the function `package.module:function`, which is imported here and nowhere else.

    Raises:
        UsageError: there is no such metric, or nothing callable can be imported by that name.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise UsageError(
            "unknown importance metric", expected=f"{' | '.join(METRICS)} | package.module:function", found=name
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            "the importance metric cannot be imported",
            where=name,
            found=f"{type(error).__name__}: {error}",
            fix="install the package, or put its folder into PYTHONPATH",
        ) from error
    if not callable(found):
        raise UsageError("the importance metric is no function", where=name, found=type(found).__name__)
    metric: Metric = found
    return metric


def importance(name: str, metric: Metric, weight: Tensor, input_sq_norms: Tensor, where: str) -> Tensor:
    """What a metric says of a weight, checked: float32 [out, in], on the weight's device.

    Args:
        name: of the metric, for messages.
        metric: called with copies, so that it cannot change the model.
        weight: [out, in], any float dtype.
        input_sq_norms: float32 [in].
        where: name of the module.

    Raises:
        BadInput: the norms do not fit the weight, or the result has another shape, is no real number, or not finite.
    """
    import torch

    columns = weight.shape[1]
    if tuple(input_sq_norms.shape) != (columns,):
        raise BadInput(
            "input norms do not fit the weight", where=where, expected=(columns,), found=tuple(input_sq_norms.shape)
        )
    values = weight.detach().to(torch.float32, copy=True)
    try:
        result = torch.as_tensor(metric(values, input_sq_norms.to(weight.device, copy=True), where))
    except (TypeError, ValueError, RuntimeError) as error:
        if metric in METRICS.values():
            raise
        raise BadInput(
            "the importance metric failed", where=f"{name}, {where}", found=f"{type(error).__name__}: {error}"
        ) from error
    if tuple(result.shape) != tuple(weight.shape) or result.is_complex():
        raise BadInput(
            "the importance metric has the wrong form",
            where=f"{name}, {where}",
            expected=f"real numbers {tuple(weight.shape)}",
            found=f"{result.dtype} {tuple(result.shape)}",
        )
    result = result.detach().to(weight.device, torch.float32)
    if not bool(torch.isfinite(result).all()):
        raise BadInput(
            "weights or calibration inputs hold NaN or Inf"
            if metric in METRICS.values()
            else "the importance metric gives NaN or Inf",
            where=where,
            fix="run the calibration in float32 or bfloat16" if metric in METRICS.values() else f"look at {name}",
            code="E_NAN",
        )
    return result
