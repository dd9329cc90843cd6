"""A sub-network that is cut out of a model: what the inputs must be like for it, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np

from sparseport.checkpoints.layers import layer_count
from sparseport.child import Child
from sparseport.merge.subnetwork import act_order_refusal
from sparseport.sources import Sources


def require_cuttable(sources: Sources) -> None:
    """Refuse, from headers, config and small tensors, what the export of a sub-network would refuse on its way.

    Raises:
        Unsupported: a block's number decides what it computes, or a tensor runs over all heads of a cut layer.
    """
    if sources.cut is not None:
        sources.written_config()
        sources.small_tensors()


def require_columns(module: str, sources: Sources) -> None:
    """Refuse a layer that loses columns and has them in act-order; its group indices are read.

    Raises:
        Unsupported: names the layer.
    """
    if sources.cut is not None and module in sources.cut.columns and sources.linears.act_order(module):
        raise act_order_refusal(module)


def require_same_class(sources: Sources) -> list[str]:
    """Refuse a sub-network whose blocks the model's class would make others of; transformers is asked, in a child.

    Returns:
        A note if transformers is not there to be asked, which an export would refuse anyway.

    Raises:
        Unsupported: names the list that config.json has to have.
    """
    if sources.cut is None or len(sources.cut.blocks) == layer_count(sources.base.config):
        return []
    if find_spec("transformers") is None:
        return ["transformers is not installed: what its class makes of the blocks that stay was not looked at"]
    blocks = list(sources.cut.blocks)
    request = {"whole": sources.base.config, "cut": sources.written_config(), "blocks": blocks}
    with Child("sparseport.targets.block_defaults", request) as child:
        child.result()
    return []


def cut_weights(sources: Sources, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Weights of linear layers, the head apart: in the whole model, and in the sub-network.

    shapes  module of the whole model -> [out, in] of what is written, for layers that are
    """
    head = sources.base.head_name
    whole = {name: sources.format_of(name).shape for name in sources.base.linear_names() if name != head}
    kept = [shape for name, shape in shapes.items() if name in whole]
    return sum(int(np.prod(shape)) for shape in whole.values()), sum(int(np.prod(shape)) for shape in kept)


def cut_notes(sources: Sources, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """A sentence on what the chosen sub-network leaves out; `shapes` as for `cut_weights`."""
    if sources.cut is None:
        return []
    before, after = cut_weights(sources, shapes)
    total = layer_count(sources.base.config)
    parts = [] if len(sources.cut.blocks) == total else [f"{len(sources.cut.blocks)} of {total} blocks"]
    parts += [f"{len(sources.cut.rows)} layers with fewer rows"] if sources.cut.rows else []
    share = f"{after:,} of {before:,} weights of linear layers ({after / before:.1%})"
    return [f"the sub-network has {', '.join(parts)}: {share}"]
