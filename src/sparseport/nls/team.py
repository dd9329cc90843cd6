"""The processes that train one model together: one, or those that `accelerate launch` started.

Every process has all adapters and samples the same sub-network; each takes its part of a microbatch, and gradients are
averaged over all. Adapters are small, so that is one all-reduce a step. With FSDP (`accelerate launch --use_fsdp
--fsdp_version 2`) the weights are spread over the processes, and gradients are averaged where they are made.

`accelerate launch --cpu` starts a single process unless MPI does it; several on CPUs are started by torchrun, or by
`accelerate launch --multi_gpu` with ACCELERATE_USE_CPU=true.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sparseport.errors import EnvironmentProblem, UsageError
from sparseport.nls.linears import decoder_layers


class Team:
    """The processes of a training run, seen from one of them; this class alone is a team of one.

    index   number of this process, from 0
    count   number of processes
    device  where this process computes
    """

    index = 0
    count = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def part(self, items: Sequence[object]) -> list:  # type: ignore[type-arg]
        """This process' items of a microbatch, which all processes know."""
        return list(items[self.index :: self.count])

    def place(self, model: nn.Module, whole: nn.Module) -> None:
        """Put a model where it is trained; `whole` is the module whose forward pass is the training step."""
        whole.to(self.device)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        return values

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes."""

    def gathered(self, parameter: Tensor) -> Tensor:
        """A whole parameter, wherever its parts lie. Every process has to call this, in the same order."""
        return parameter.detach()


class LaunchedTeam(Team):
    """Processes started by `accelerate launch` or `torchrun`.

    Raises:
        EnvironmentProblem: accelerate is not installed.
        UsageError: the launcher asks for another precision than the recipe, or for a way to spread the model that is
            not supported.
    """

    def __init__(self, precision: str) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedType
        except ModuleNotFoundError as error:
            raise EnvironmentProblem(
                "several processes need a package that is not installed",
                where=error.name,
                fix="pip install 'sparseport[distributed]'",
            ) from error
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked not in ("no", {"bfloat16": "bf16", "float32": "no"}[precision]):
            raise UsageError(
                "the launcher and the recipe ask for different precisions",
                where="accelerate launch --mixed_precision",
                expected="bf16 with finetune.precision bfloat16, no with float32",
                found=f"{asked} with {precision}",
                fix="leave --mixed_precision away: the recipe decides",
            )
        # On CPUs accelerate itself forgets that FSDP was asked for.
        self._sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        version = os.environ.get("FSDP_VERSION", "1")
        if self._sharded and version != "2":
            raise _unsupported(f"FSDP version {version}")
        # Every process reads the weights whole: masks and grids are made from them before they are spread.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        self._accelerator = Accelerator(mixed_precision="no")
        kind = self._accelerator.distributed_type
        if kind not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
            DistributedType.FSDP,
        ):
            raise _unsupported(str(kind))
        self.device = self._accelerator.device
        self.index = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    def place(self, model: nn.Module, whole: nn.Module) -> None:
        if not self._sharded:
            super().place(model, whole)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in decoder_layers(model)[1]:
            fully_shard(layer, mesh=mesh)
        fully_shard(whole, mesh=mesh)
        whole.to(self.device)  # buffers, which are not spread

    def total(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, "sum") if self.count > 1 else values  # type: ignore[no-any-return]

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._sharded or self.count == 1:
            return
        # The same sub-network everywhere means the same gradients everywhere: none is missing on one process only.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        row = torch.cat([gradient.reshape(-1) for gradient in gradients])
        row = self._accelerator.reduce(row, "mean")
        for gradient, part in zip(gradients, row.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.reshape(gradient.shape))

    def gathered(self, parameter: Tensor) -> Tensor:
        return parameter.full_tensor().detach() if self._sharded else parameter.detach()  # type: ignore[attr-defined,no-any-return]


def _unsupported(found: str) -> UsageError:
    return UsageError(
        "this way to spread a model over processes is not supported",
        where="accelerate launch",
        expected="data parallel, or --use_fsdp --fsdp_version 2",
        found=found,
    )


def team_of(precision: str) -> Team:
    """The team of this run: launched processes where a launcher says there are some, else this process alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    return LaunchedTeam(precision) if launched else Team()
