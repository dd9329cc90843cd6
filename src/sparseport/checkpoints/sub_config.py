"""The config.json of a sub-network: what no Hugging Face config can say stands under a key of our own.

    "sparseport": {"blocks": [0, 2, 3], "shapes": {"model.layers.1.mlp.gate_proj": [1024, 576], ...}, "whole": {...}}

    blocks  numbers that the kept decoder blocks have in the whole model
    shapes  [out, in] of every linear layer that is smaller than the rest of config.json says
    whole   what other keys of config.json were in the whole model; null for a key that it did not have

A sub-network that keeps all channels of the blocks that are left, or the same number in each, is an ordinary model of
its architecture, and any loader reads its config.json; the key then only tells where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.checkpoints.block_settings import cut_lists, layer_count_entry
from sparseport.checkpoints.layers import LAYER_COUNTS
from sparseport.errors import BadInput

KEY = "sparseport"

Shapes = Mapping[str, tuple[int, int]]


def cut_config(config: Mapping[str, Any], blocks: tuple[int, ...], before: Shapes, after: Shapes) -> dict[str, Any]:
    """The config.json of a sub-network.

    Args:
        config: that of the whole model.
        blocks: numbers of the kept blocks.
        before: [out, in] in the whole model of every linear layer that is left, by its name in the sub-network.
        after: the same layers' shapes in the sub-network.

    Raises:
        Unsupported: the config has no number of layers; see also `cut_lists`.
    """
    key, total = layer_count_entry(config)
    changed: dict[str, Any] = {}
    if len(blocks) < total:
        changed = {key: len(blocks), **cut_lists(config, blocks)}
    shapes = {name: shape for name, shape in after.items() if shape != before[name]}
    width = _one_width(config, before, after)
    if width is not None:
        changed["intermediate_size"] = width
        shapes = {name: shape for name, shape in shapes.items() if config["intermediate_size"] not in before[name]}
    whole = {name: config.get(name) for name in changed}
    own = {"blocks": list(blocks), "shapes": {name: list(shape) for name, shape in shapes.items()}, "whole": whole}
    return {**config, **changed, KEY: own}


def smaller_shapes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, tuple[int, int]]:
    """[out, in] of the linear layers that are smaller than the model type's own; empty for an ordinary model.

    Raises:
        BadInput: the key is there, but not of the form that `cut_config` writes.
    """
    own = _own(config, where)
    return {} if own is None else {name: (shape[0], shape[1]) for name, shape in own["shapes"].items()}


def kept_blocks(config: Mapping[str, Any], where: str = "config.json") -> tuple[int, ...] | None:
    """Numbers of the kept blocks in the whole model, or None for an ordinary model.

    Raises:
        BadInput: see `smaller_shapes`.
    """
    own = _own(config, where)
    return None if own is None else tuple(own["blocks"])


def whole_config(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The config.json of the whole model that a sub-network was cut from; of an ordinary model its own.

    Raises:
        BadInput: see `smaller_shapes`.
    """
    own = _own(config, where)
    if own is None:
        return dict(config)
    restored = {**config, **own["whole"]}
    del restored[KEY]
    return {name: value for name, value in restored.items() if value is not None or name not in own["whole"]}


def block_of(name: str) -> int | None:
    """Number of the decoder block that a module or tensor belongs to: the first number in its name, or None."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def in_whole_model(name: str, blocks: tuple[int, ...] | None) -> str:
    """Name in the whole model of a module or tensor of a sub-network that kept these blocks."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if blocks and part.isdecimal():
            parts[position] = str(blocks[int(part)])
            break
    return ".".join(parts)


def _own(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    own = config.get(KEY)
    if own is None:
        return None
    count = next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), None)
    fine = isinstance(own, dict) and set(own) == {"blocks", "shapes", "whole"} and isinstance(own["whole"], dict)
    fine = fine and _numbers(own["blocks"], 0) and own["blocks"] == sorted(set(own["blocks"]))
    fine = fine and isinstance(own["shapes"], dict) and len(own["blocks"]) == count
    if not fine or not all(_numbers(shape, 1) and len(shape) == 2 for shape in own["shapes"].values()):
        raise BadInput(
            f"the key {KEY!r} of config.json is not that of a sub-network",
            where=where,
            expected="blocks, shapes and whole",
            found=repr(own)[:120],
            fix="export the model again",
            code="E_CONFIG",
        )
    assert isinstance(own, dict)
    return own


def _numbers(value: object, lowest: int) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and n >= lowest for n in value)


def _one_width(config: Mapping[str, Any], before: Shapes, after: Shapes) -> int | None:
    """The channels of every block's MLP, if they are cut, and to the same number everywhere."""
    whole = config.get("intermediate_size")
    if not isinstance(whole, int) or whole == config.get("hidden_size"):
        return None
    widths = {
        after[name][side] for name, shape in before.items() for side in (0, 1) if shape[side] == whole and "mlp" in name
    }
    elsewhere = any(whole in shape for name, shape in before.items() if "mlp" not in name)
    return None if len(widths) != 1 or widths == {whole} or elsewhere else widths.pop()
