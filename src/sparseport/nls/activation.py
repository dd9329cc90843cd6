"""Make a torch super-network compute what one of its sub-networks computes; no weight is copied or changed.

What stays of which layer is `merge.subnetwork`'s answer, the same that the exporter cuts by. Ranks and widths become
views of the weights, so that work that is cut away is not done; a removed block passes its input on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseport.checkpoints.elastic import SearchSpace, Selection, choose, select
from sparseport.errors import BadInput, Unsupported
from sparseport.merge.subnetwork import SubNetwork, sub_network
from sparseport.nls.elastic import ElasticLinear, ElasticWidthLinear, linear_shapes
from sparseport.nls.linears import decoder_layers
from sparseport.targets.empty_model import set_heads


def activate(model: nn.Module, space: SearchSpace, chosen: Sequence[int] | Selection) -> None:
    """Switch a super-network to one of its sub-networks; what is not named is whole.

    Args:
        model: from `load_for_training`, or prepared by `make_elastic`.
        space: its search space, in whose order a list of sizes is.
        chosen: a size for each group, or a selection; `Selection()` is the whole model.

    Raises:
        BadInput: a size that was not trained, or a layer that is not elastic in this model.
        Unsupported: the architecture cannot be cut so.
    """
    selection = chosen if isinstance(chosen, Selection) else select(space, chosen)
    shapes = linear_shapes(model)
    prefix, layers = decoder_layers(model)
    whole = SubNetwork(prefix, tuple(range(len(layers))))
    cut = sub_network(selection, shapes, model.config.to_dict()) or whole
    parts = dict(model.named_modules())
    _check(selection, cut, parts)
    for name, (rows, columns) in shapes.items():
        part = parts[name]
        if isinstance(part, ElasticLinear | ElasticWidthLinear):
            part.active_rows, part.active_columns = cut.shape(name, (rows, columns))
        if isinstance(part, ElasticLinear):
            part.active_rank = selection.ranks.get(name, part.rank)
    _set_heads(parts, cut)
    _set_blocks(model.config, layers, cut)


def make_elastic(model: nn.Module, space: SearchSpace) -> None:
    """Put layers whose width can change in place of plain ones that some sub-network cuts; weights are shared."""
    smallest = replace(choose(space, "minimal"), removed=frozenset())  # of every block, the removable ones too
    cut = sub_network(smallest, linear_shapes(model), model.config.to_dict())
    for name in [] if cut is None else sorted({*cut.columns, *cut.rows}):
        part = model.get_submodule(name)
        if not isinstance(part, ElasticLinear | ElasticWidthLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ElasticWidthLinear(part))


@torch.no_grad()
def require_runnable(model: nn.Module, space: SearchSpace) -> None:
    """Run the smallest sub-network over one token, so that what an architecture cannot do shows before training.

    Raises:
        Unsupported: its forward pass does not take cut layers, or its blocks return more than hidden states.
    """
    _, layers = decoder_layers(model)
    returned: list[object] = []
    handle = layers[0].register_forward_hook(lambda _module, _args, output: returned.append(output))
    token = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    try:
        model(token, use_cache=False)
        if any(group.kind == "block" for group in space.groups) and not isinstance(returned[0], Tensor):
            raise Unsupported(
                "blocks of this architecture cannot be left out: they return more than hidden states",
                where=type(layers[0]).__name__,
                fix="leave elastic_blocks away",
                code="E_WIDTH",
            )
        activate(model, space, choose(space, "minimal"))
        model(token, use_cache=False)
    except RuntimeError as error:
        raise Unsupported(
            "the architecture's forward pass does not take cut layers",
            where=type(model).__name__,
            found=str(error).splitlines()[0][:120],
            fix="leave heads or widths away",
            code="E_WIDTH",
        ) from error
    finally:
        handle.remove()
        activate(model, space, Selection())


def _check(selection: Selection, cut: SubNetwork, parts: dict[str, nn.Module]) -> None:
    for name in selection.ranks:
        if not isinstance(parts.get(name), ElasticLinear):
            raise BadInput("no adapter on this module", where=name, fix="use the model's own search space")
    for name in {*cut.rows, *cut.columns}:
        if not isinstance(parts.get(name), ElasticLinear | ElasticWidthLinear):
            raise BadInput(
                "this layer's width is not elastic", where=name, fix="use the model's own search space", code="E_WIDTH"
            )


def _set_heads(parts: dict[str, nn.Module], cut: SubNetwork) -> None:
    """Tell attention modules that keep a number of heads how many are left; the shared ratio stays."""
    for name, part in parts.items():
        own = vars(part)
        if name in cut.heads:
            had = set_heads(part, cut.rows[f"{name}.q_proj"] // cut.sizes[name], cut.heads[name])
            own.setdefault("_whole_heads", had)
        else:
            own.update(own.get("_whole_heads", {}))


def _set_blocks(config: Any, layers: nn.ModuleList, cut: SubNetwork) -> None:
    """Let removed blocks pass on their input, and close the gaps that they leave in the key-value cache.

    The cache takes the first block's entry for the number of tokens seen so far, so an entry that is never written
    must not come first. Kept blocks take the first entries of their own kind of attention.
    """
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    entries = {kind: [number for number, own in enumerate(kinds) if own == kind] for kind in set(kinds)}
    for number, layer in enumerate(layers):
        if number not in cut.blocks:
            layer.forward = _pass_on
            continue
        if vars(layer).get("forward") is _pass_on:
            del layer.forward
        entry = entries[kinds[number]].pop(0)
        for part in layer.modules():
            if type(vars(part).get("layer_idx")) is int:
                part.layer_idx = entry


def _pass_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """The forward of a block that is left out."""
    return hidden_states
