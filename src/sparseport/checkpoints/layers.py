"""Check the tensors of a checkpoint against what its config says about layers and attention heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from sparseport.checkpoints.leaves import WEIGHT_PARTS
from sparseport.errors import BadInput

_LAYER = re.compile(r"^(?P<stem>(?:.*\.)?(?:layers|h|blocks))\.(?P<index>\d+)\.(?P<rest>.+)$")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Names of a config's longest input, in the order that lm-evaluation-harness looks for them.
INPUT_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
# Where the language model's part of a config stands if the model does more than language.
_TEXT = "text_config"
# Python refuses to read a number of thousands of digits, and no model has that many layers.
DIGITS = 18


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of decoder layers by a config.json, under any of its names; None if it does not say."""
    inner = config.get(_TEXT)
    for place in (inner if isinstance(inner, dict) else {}, config):
        for key in LAYER_COUNTS:
            if type(place.get(key)) is int:
                return int(place[key])
    return None


def longest_stated(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model reads at most by its config.json, under any name of that; None if it does not say."""
    found = (config.get(name) for name in INPUT_LENGTHS)
    return next((int(length) for length in found if isinstance(length, int)), None)


def check_heads(config: dict[str, Any], where: str) -> None:
    """Check that attention heads divide evenly.

    Raises:
        BadInput: heads do not divide hidden_size (unless head_dim is given), or key/value heads do not divide heads.
    """
    hidden = config.get("hidden_size", config.get("n_embd"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    if hidden is None or heads is None:
        return
    kv_heads = config.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else kv_heads
    for key, value in (("hidden_size", hidden), ("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if type(value) is not int or value < 1:
            raise BadInput(f"{key} is no positive whole number", where=where, found=repr(value)[:40], code="E_CONFIG")
    if config.get("head_dim") is None and hidden % heads:
        raise BadInput(
            "num_attention_heads does not divide hidden_size",
            where=where,
            expected=f"a divisor of {hidden}",
            found=heads,
            code="E_CONFIG",
        )
    if heads % kv_heads:
        raise BadInput(
            "num_key_value_heads does not divide num_attention_heads",
            where=where,
            expected=f"a divisor of {heads}",
            found=kv_heads,
            code="E_CONFIG",
        )


def check_layer_tensors(names: Iterable[str], config: dict[str, Any], where: str) -> None:
    """Check that layers 0 .. num_hidden_layers - 1 are there, no others, and that each has the same parts.

    A part is a module's weight (in whichever form it is stored) or its bias; other buffers are not compared. Models
    with experts may differ from layer to layer, so for them only the layer numbers are checked.

    Raises:
        BadInput: names the first three missing or extra tensors.
    """
    layers: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if match := _LAYER.match(name):
            index = int(match["index"]) if len(match["index"]) <= DIGITS else 10**DIGITS
            parts = layers.setdefault(match["stem"], {}).setdefault(index, {})
            module, _, leaf = match["rest"].rpartition(".")
            if leaf in WEIGHT_PARTS or leaf == "bias":
                parts.setdefault(f"{module}.bias" if leaf == "bias" else f"{module}.weight", name)
    count = next((config[key] for key in LAYER_COUNTS if key in config), None)
    if type(count) is not int or count < 1:
        raise BadInput(
            "the number of layers is no positive whole number",
            where=f"{where}/config.json",
            expected=" or ".join(LAYER_COUNTS),
            found=repr(count)[:40],
            code="E_CONFIG",
        )
    if not layers:
        raise BadInput("no layer tensors found", where=where, expected=f"{count} layers", code="E_LAYERS")
    for stem, found in layers.items():
        extra = [name for i in sorted(found) if i >= count for name in found[i].values()]
        if extra:
            _refuse("tensors of layers beyond the config's number of layers", extra, count, len(found), where)
        every = {part for parts in found.values() for part in parts}
        mixed = any(".experts." in part for part in every)
        absent = (
            f"{stem}.{i}.{part}"
            for i in range(count)
            for part in sorted(every if i not in found else () if mixed else every - set(found[i]))
        )
        # The count comes from a file and may be enormous, so only the first few names are ever made.
        if missing := list(islice(absent, 4)):
            _refuse("layer tensors are missing", missing, count, len(found), where)


def _refuse(what: str, names: list[str], expected: int, found: int, where: str) -> None:
    more = " and more" if len(names) > 3 else ""
    raise BadInput(
        f"{what}: {', '.join(names[:3])}{more}",
        where=f"{where}, tensor {names[0]}",
        expected=f"{expected} layers",
        found=f"{found} layers",
        fix="download the folder again, or correct num_hidden_layers in config.json",
        code="E_LAYERS",
    )
