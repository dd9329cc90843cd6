"""config.json of a sub-network: what it says, what is restored from it, what is refused."""

from __future__ import annotations

import pytest

from sparseport.checkpoints.block_settings import require_same_blocks
from sparseport.checkpoints.sub_config import cut_config, in_whole_model, kept_blocks, smaller_shapes, whole_config
from sparseport.errors import BadInput, Unsupported

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "eos_token_id": [1, 2, 3],
    "layer_types": ["a", "b", "c"],
}


def shapes(widths: dict[int, int]) -> dict[str, tuple[int, int]]:
    found = {}
    for number, width in widths.items():
        found[f"model.layers.{number}.mlp.up_proj"] = (width, 64)
        found[f"model.layers.{number}.mlp.down_proj"] = (64, width)
        found[f"model.layers.{number}.self_attn.q_proj"] = (64, 64)
    return found


def test_different_widths_stand_under_a_key_of_our_own():
    config = cut_config(CONFIG, (0, 2), shapes({0: 128, 1: 128}), shapes({0: 128, 1: 96}))
    assert config == {
        **CONFIG,
        "num_hidden_layers": 2,
        "layer_types": ["a", "c"],
        "sparseport": {
            "blocks": [0, 2],
            "shapes": {"model.layers.1.mlp.up_proj": [96, 64], "model.layers.1.mlp.down_proj": [64, 96]},
            "whole": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
        },
    }
    assert whole_config(config) == CONFIG
    assert smaller_shapes(config)["model.layers.1.mlp.up_proj"] == (96, 64) and kept_blocks(config) == (0, 2)
    assert (
        in_whole_model("model.layers.1.mlp.up_proj.weight", kept_blocks(config)) == "model.layers.2.mlp.up_proj.weight"
    )


def test_one_width_for_all_is_an_ordinary_config():
    config = cut_config(CONFIG, (0, 1, 2), shapes(dict.fromkeys(range(3), 128)), shapes(dict.fromkeys(range(3), 96)))
    assert config["intermediate_size"] == 96 and config["sparseport"]["shapes"] == {}
    assert whole_config(config) == CONFIG


def test_an_ordinary_config_is_its_own_whole():
    assert whole_config(CONFIG) == CONFIG and smaller_shapes(CONFIG) == {} and kept_blocks(CONFIG) is None


WINDOW = "layer_types"


@pytest.mark.parametrize(
    ("settings", "said_by"),
    [
        ({"sliding_window": 64}, WINDOW),
        ({"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 64}, WINDOW),
        ({"sliding_window_pattern": 6}, WINDOW),
        ({"global_attn_every_n_layers": 3}, WINDOW),
        ({"no_rope_layer_interval": 4}, "no_rope_layers"),
        ({"first_k_dense_replace": 1}, "mlp_layer_types"),
        ({"sliding_window": 64, "no_rope_layer_interval": 4, "layer_types": ["a", "b", "c"]}, "no_rope_layers"),
    ],
)
def test_blocks_whose_number_matters_are_not_renumbered(settings, said_by):
    """Only the list that says the same thing for each block will do, whatever other lists there are."""
    config = {**CONFIG, **settings, "model_type": "qwen2", said_by: ["a", "b", "c"]}
    kept = shapes({0: 128, 1: 128})
    assert cut_config(config, (0, 2), kept, kept)[said_by] == ["a", "c"]
    del config[said_by]
    with pytest.raises(Unsupported, match="depend on its number") as caught:
        cut_config(config, (0, 2), kept, kept)
    assert f"`{said_by}`" in caught.value.fix
    whole = shapes(dict.fromkeys(range(3), 128))
    assert cut_config(config, (0, 1, 2), whole, shapes({0: 64, 1: 128, 2: 128}))["num_hidden_layers"] == 3


def test_the_same_window_everywhere_is_no_obstacle():
    config = {**CONFIG, "model_type": "mistral", "sliding_window": 64}
    del config["layer_types"]
    kept = shapes({0: 128})
    assert cut_config(config, (1,), kept, kept)["num_hidden_layers"] == 1
    off = {**config, "model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2}
    assert cut_config(off, (1,), kept, kept)["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"mlp_only_layers": [1]},
        {"moe_layers": [0, 1, 2]},
        {"attn_layer_period": 8},
        {"scale_attn_by_inverse_layer_idx": True},
        {"num_kv_shared_layers": 2},
        {"model_type": "diffllama"},
    ],
)
def test_what_no_list_can_say_keeps_all_blocks(settings):
    kept = shapes({0: 128, 1: 128})
    with pytest.raises(Unsupported, match=next(iter(settings))) as caught:
        cut_config({**CONFIG, **settings}, (0, 2), kept, kept)
    assert "keep all blocks" in caught.value.fix


@pytest.mark.parametrize(
    "settings",
    [{"mlp_only_layers": []}, {"decoder_sparse_step": 1}, {"num_kv_shared_layers": 0}, {"no_rope_layer_interval": 1}],
)
def test_settings_under_which_all_blocks_are_alike(settings):
    kept = shapes({0: 128, 1: 128})
    assert cut_config({**CONFIG, **settings}, (0, 2), kept, kept)["num_hidden_layers"] == 2


def test_only_known_lists_are_cut():
    """A list of token ids that is as long as the model is deep stays; one that nobody knows is refused by its name."""
    kept = shapes({0: 128, 1: 128})
    known = {**CONFIG, "suppress_tokens": [4, 5, 6], "mlp_layer_types": ["x", "y", "z"], "unknown": [1, 2]}
    found = cut_config(known, (0, 2), kept, kept)
    assert found["suppress_tokens"] == [4, 5, 6] and found["unknown"] == [1, 2] and found["eos_token_id"] == [1, 2, 3]
    assert found["mlp_layer_types"] == ["x", "z"]
    assert found["sparseport"]["whole"].keys() == {"num_hidden_layers", "layer_types", "mlp_layer_types"}
    with pytest.raises(Unsupported, match=r"config\.json, strange"):
        cut_config({**CONFIG, "strange": [1, 2, 3]}, (0, 2), kept, kept)
    with pytest.raises(Unsupported, match=r"config\.json, layer_types"):
        cut_config({**CONFIG, "layer_types": ["a", "b"]}, (0, 2), kept, kept)
    whole = shapes(dict.fromkeys(range(3), 128))
    assert cut_config({**CONFIG, "strange": [1, 2, 3]}, (0, 1, 2), whole, whole)["strange"] == [1, 2, 3]


def test_defaults_of_a_class_are_held_against_each_other():
    """What a class fills in for three blocks out of four has to be what it fills in for these three among the four."""
    whole = {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": ["s", "f", "s", "f"]}
    require_same_blocks(whole, {"num_hidden_layers": 3, "layer_types": ["s", "f", "s"]}, (0, 1, 2))
    with pytest.raises(Unsupported, match=r"\['s', 'f', 'f'\]") as caught:
        require_same_blocks(whole, {"num_hidden_layers": 3, "layer_types": ["s", "f", "s"]}, (0, 1, 3))
    assert "`layer_types`" in caught.value.fix
    with pytest.raises(Unsupported, match="sliding_window"):
        require_same_blocks({**whole, "layer_types": None}, {"num_hidden_layers": 3}, (0, 1, 2))


@pytest.mark.parametrize(
    "own",
    [
        [],
        {"blocks": [0, 1]},
        {"blocks": [0, 1], "shapes": {}, "whole": {}, "more": 1},
        {"blocks": [1, 0, 2], "shapes": {}, "whole": {}},
        {"blocks": [0, 1], "shapes": {}, "whole": {}},
        {"blocks": [0, 1, 2], "shapes": {"x": [1]}, "whole": {}},
        {"blocks": [0, 1, 2], "shapes": {"x": [1, "2"]}, "whole": {}},
    ],
)
def test_a_damaged_key_is_refused(own):
    with pytest.raises(BadInput, match="sub-network"):
        smaller_shapes({**CONFIG, "sparseport": own})
