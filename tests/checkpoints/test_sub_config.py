"""config.json of a sub-network: what it says, what is restored from it, what is refused."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": 64},
        {"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 64},
        {"sliding_window_pattern": 6},
        {"no_rope_layer_interval": 4},
    ],
)
def test_blocks_whose_number_matters_are_not_renumbered(settings):
    config = {**CONFIG, **settings, "model_type": "qwen2"}
    kept = shapes({0: 128, 1: 128})
    assert cut_config(config, (0, 2), kept, kept)["layer_types"] == ["a", "c"]
    del config["layer_types"]
    with pytest.raises(Unsupported, match="layer_types"):
        cut_config(config, (0, 2), kept, kept)
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
