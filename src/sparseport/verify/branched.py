"""A torch model with un-merged branches: y = base(x) + scaling * B(A x), in the model's own precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparseport.errors import FidelityError
from sparseport.weights.linear import LowRankBranch


def attach(network: Any, module: str, branch: LowRankBranch) -> Any:
    """Put a branch beside a linear layer of a torch model; its matrices follow the model's dtype (`double()`).

    A branch of a cut layer stands at the beginning of the whole one; what was cut away is zero.

    Returns:
        torch's handle of the branch; `remove()` takes it away again.

    Raises:
        FidelityError: the model has no such linear layer.
    """
    import torch

    linear = dict(network.named_modules()).get(module)
    rows, columns = branch.b.shape[0], branch.a.shape[1]
    if linear is None or rows > linear.weight.shape[0] or columns > linear.weight.shape[1]:
        raise FidelityError("the model has no linear layer for this branch", where=module)
    a = np.zeros((branch.rank, linear.weight.shape[1]), np.float32)
    b = np.zeros((linear.weight.shape[0], branch.rank), np.float32)
    a[:, :columns], b[:rows] = branch.a, branch.b
    linear.register_buffer("lora_a", torch.from_numpy(a))
    linear.register_buffer("lora_b", torch.from_numpy(b))

    def beside(layer: Any, inputs: tuple[Any], output: Any) -> Any:
        return output + branch.scaling * (inputs[0] @ layer.lora_a.T @ layer.lora_b.T)

    return linear.register_forward_hook(beside)
