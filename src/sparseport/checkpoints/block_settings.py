"""Settings of a config.json that speak of decoder blocks: lists with an entry for each, and rules by a block's number.

A sub-network that leaves blocks out numbers the others anew. Lists with an entry per block are cut; a rule by number
would make another model of it, and so would a list that nobody knows: both are refused. The names are those of
transformers 5.5, whose classes fill in defaults that a config.json does not say: `require_same_blocks` looks at those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseport.checkpoints.layers import LAYER_COUNTS
from sparseport.errors import Unsupported

# Lists with one entry for each block.
_PER_BLOCK = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "activation_sparsity_pattern",
    "intermediate_size",
)
# Lists that do not describe blocks one by one, whatever their length.
_OTHER_LISTS = (
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "bad_words_ids", "forced_decoder_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "languages"),
    *("mlp_multipliers", "ssm_multipliers", "time_step_limit"),
)
# Settings by which a model computes from a block's number what the block does -> list that says it for each, if any.
_BY_NUMBER = {
    **dict.fromkeys(("sliding_window", "sliding_window_pattern", "_sliding_window_pattern"), "layer_types"),
    **dict.fromkeys(("max_window_layers", "full_attention_interval", "full_attn_idxs"), "layer_types"),
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "first_k_dense_replace": "mlp_layer_types",
    **dict.fromkeys(("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"), None),
    **dict.fromkeys(("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"), None),
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "mlp_only_layers", "moe_layers"), None),
    **dict.fromkeys(("num_dense_layers", "num_kv_shared_layers", "hybrid_layer_ids", "hybrid_override_pattern"), None),
    **dict.fromkeys(("attention_types", "block_types", "cross_attention_layers"), None),
    "scale_attn_by_inverse_layer_idx": None,
}
# Of these, the ones that choose every n-th block: with 1 all blocks are alike.
_EVERY_NTH = ("_pattern", "_interval", "_period", "_step", "_every_n_layers")
# Model types whose attention window is the same in every block.
_SAME_WINDOW = ("ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2")
# Model types that compute with a block's number itself, whatever their settings are.
_NUMBERED = ("diffllama",)


def layer_count_entry(config: Mapping[str, Any]) -> tuple[str, int]:
    """The key that holds the number of decoder blocks, and that number.

    Raises:
        Unsupported: there is no such key.
    """
    key = next((name for name in LAYER_COUNTS if isinstance(config.get(name), int)), None)
    if key is None:
        raise Unsupported("config.json has no number of layers", expected=" or ".join(LAYER_COUNTS), code="E_WIDTH")
    return key, int(config[key])


def cut_lists(config: Mapping[str, Any], blocks: tuple[int, ...]) -> dict[str, list[Any]]:
    """The lists of a config with one entry per block, for the blocks that are kept.

    Raises:
        Unsupported: a block's number decides what it computes, or a list may or may not speak of blocks.
    """
    _, total = layer_count_entry(config)
    require_blocks_alike(config)
    found = {}
    for name, value in config.items():
        if not isinstance(value, list) or name in _OTHER_LISTS or name in _BY_NUMBER:
            continue
        if name not in _PER_BLOCK and len(value) == total:
            raise Unsupported(
                "blocks cannot be left out: a list is as long as the model is deep, and unknown",
                where=f"config.json, {name}",
                expected=f"one of {', '.join(_PER_BLOCK)}",
                found=f"{len(value)} entries",
                fix="remove the list, if the architecture does not read it",
                code="E_WIDTH",
            )
        if name in _PER_BLOCK and len(value) != total:
            raise Unsupported(
                "blocks cannot be left out: a list has not one entry for each",
                where=f"config.json, {name}",
                expected=total,
                found=len(value),
                fix="restore the config.json that belongs to the weights",
                code="E_WIDTH",
            )
        if name in _PER_BLOCK:
            found[name] = [value[number] for number in blocks]
    return found


def require_blocks_alike(config: Mapping[str, Any]) -> None:
    """Refuse to renumber blocks whose number decides what they compute, unless a list in the config says it.

    Raises:
        Unsupported: names the settings, and the lists that would say it.
    """
    _, total = layer_count_entry(config)
    lists = {name for name in _PER_BLOCK if isinstance(config.get(name), list) and len(config[name]) == total}
    wrong = {
        name: instead
        for name, instead in _BY_NUMBER.items()
        if instead not in lists and not _harmless(name, config.get(name), config)
    }
    if config.get("model_type") in _NUMBERED:
        wrong[f"model_type {config['model_type']}"] = None
    if wrong:
        fixes = sorted({instead for instead in wrong.values() if instead is not None})
        raise Unsupported(
            "blocks cannot be left out: a setting makes what a block computes depend on its number",
            where="config.json",
            found=", ".join(wrong),
            fix="keep all blocks in the sub-network"
            if None in wrong.values()
            else f"give config.json a list `{'` and a list `'.join(fixes)}` with one entry per block",
            code="E_WIDTH",
        )


def require_same_blocks(whole: Mapping[str, Any], cut: Mapping[str, Any], blocks: tuple[int, ...]) -> None:
    """Refuse a cut after which a model type's own defaults make another block of one that is kept.

    Args:
        whole: settings of the whole model, with the defaults of its class filled in.
        cut: those of the sub-network, filled in likewise.
        blocks: numbers that the kept blocks have in the whole model.

    Raises:
        Unsupported: names the list that config.json has to have.
    """
    require_blocks_alike(whole)
    _, total = layer_count_entry(whole)
    for name in _PER_BLOCK:
        value = whole.get(name)
        if not isinstance(value, list) or len(value) != total:
            continue
        expected = [value[number] for number in blocks]
        if cut.get(name) != expected:
            raise Unsupported(
                "blocks cannot be left out: the model's class would make others of those that stay",
                where=f"config.json, {name}",
                expected=_short(expected),
                found=_short(cut.get(name)),
                fix=f"give config.json a list `{name}` with one entry per block",
                code="E_WIDTH",
            )


def _harmless(name: str, value: object, config: Mapping[str, Any]) -> bool:
    """Whether a setting leaves all blocks alike."""
    if not value or (type(value) is int and value == 1 and name.endswith(_EVERY_NTH)):
        return True
    if name in ("sliding_window", "max_window_layers") and config.get("use_sliding_window") is False:
        return True
    return name == "sliding_window" and config.get("model_type") in _SAME_WINDOW


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
