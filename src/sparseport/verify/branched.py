"""A torch model with un-merged branches: y = base(x) + scaling * B(A x), in the model's own precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparseport.errors import FidelityError
from sparseport.weights.linear import LowRankBranch


def attach(network: Any, module: str, branch: LowRankBranch) -> Any:
    """Put a branch beside a linear layer of a torch model; its matrices follow the model's dtype (`double()`).

    Returns:
        torch's handle of the branch; `remove()` takes it away again.

    Raises:
        FidelityError: the model has no such linear layer.
    """
    import torch

    linear = dict(network.named_modules()).get(module)
    if linear is None or tuple(linear.weight.shape) != (branch.b.shape[0], branch.a.shape[1]):
        raise FidelityError("the model has no linear layer for this branch", where=module)
    for side, matrix in (("a", branch.a), ("b", branch.b)):
        linear.register_buffer(f"lora_{side}", torch.from_numpy(np.array(matrix, np.float32)))

    def beside(layer: Any, inputs: tuple[Any], output: Any) -> Any:
        return output + branch.scaling * (inputs[0] @ layer.lora_a.T @ layer.lora_b.T)

    return linear.register_forward_hook(beside)
