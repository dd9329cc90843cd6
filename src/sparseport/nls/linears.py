"""Where the linear layers of a causal language model are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparseport.errors import Unsupported

if TYPE_CHECKING:
    from torch import nn


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the stack of decoder layers: the `ModuleList` whose length is `config.num_hidden_layers`.

    A list inside another match (the experts of a layer, say) does not count.

    Returns:
        The module path (`model.layers`, `model.decoder.layers`, `gpt_neox.layers`) and the list.

    Raises:
        Unsupported: there is no such list, or more than one.
    """
    from torch import nn

    count = getattr(model.config, "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not _inside(name, found):
            found.append((name, module))
    if len(found) != 1:
        raise Unsupported(
            "cannot tell the decoder layers of this model",
            where=type(model).__name__,
            expected=f"one module list of {count} layers",
            found=[name for name, _ in found] or "none",
            fix="use a decoder-only model such as Llama, Mistral, Qwen2, OPT or GPT-NeoX",
        )
    return found[0]


def layer_linears(layer: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The `nn.Linear` modules of one decoder layer by full module name, in the order of the module tree.

    Raises:
        Unsupported: the layer has none (GPT-2 keeps its projections as transposed `Conv1D`).
    """
    from torch import nn

    found = {f"{prefix}.{name}": module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise Unsupported(
            "a decoder layer without linear layers",
            where=prefix,
            expected="torch.nn.Linear modules",
            found=sorted({type(m).__name__ for m in layer.modules()}),
        )
    return found


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every `nn.Linear` inside the decoder layers, layer by layer; embeddings and head are not among them."""
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        yield from layer_linears(layer, f"{prefix}.{index}").items()


def leaf(name: str) -> str:
    """The last part of a module's name, by which recipes know it."""
    return name.rpartition(".")[2]


def _inside(name: str, found: list[tuple[str, nn.ModuleList]]) -> bool:
    return any(name.startswith(f"{outer}.") for outer, _ in found)
