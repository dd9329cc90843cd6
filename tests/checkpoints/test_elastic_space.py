"""The search space of an elastic adapter, and the ranks chosen from it."""

from __future__ import annotations

import json

import pytest

from sparseport.checkpoints.elastic import ElasticGroup, choose_ranks, read_search_space, write_search_space
from sparseport.errors import BadInput, UsageError

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"
GROUPS = [ElasticGroup((Q, K), (32, 28, 24, 20)), ElasticGroup((UP,), (16, 12, 8))]


def target(module: str) -> str:
    return f"base_model.model.{module}.lora_A"


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_file_of_sqft(tmp_path):
    path = write(
        tmp_path / "elastic_adapter_config.json",
        [
            {"target": [target(Q), target(K)], "search_space": [32, 28, 24, 20]},
            {"target": [target(UP) + ".default"], "search_space": [16, 12, 8]},
        ],
    )
    assert read_search_space(path) == GROUPS


def test_written_form_is_literal(tmp_path):
    path = tmp_path / "x.json"
    write_search_space(path, GROUPS)
    assert json.loads(path.read_text()) == [
        {"target": [target(Q), target(K)], "search_space": [32, 28, 24, 20]},
        {"target": [target(UP)], "search_space": [16, 12, 8]},
    ]
    assert read_search_space(path) == GROUPS


@pytest.mark.parametrize(
    ("choice", "first", "second"),
    [
        ("maximal", 32, 16),
        ("heuristic", 28, 12),
        ("minimal", 20, 8),
    ],
)
def test_named_choices(choice, first, second):
    assert choose_ranks(GROUPS, choice) == {Q: first, K: first, UP: second}
    assert choose_ranks(GROUPS, choice, trained={Q: 32, K: 32, UP: 16}) == {Q: first, K: first, UP: second}


def test_heuristic_of_two_ranks_is_the_larger():
    assert choose_ranks([ElasticGroup((Q,), (32, 28))], "heuristic") == {Q: 32}


def test_custom_choice(tmp_path):
    path = write(
        tmp_path / "custom.json",
        [
            {"target": [target(UP)], "active_rank_value": 8},
            {"target": [target(K), target(Q)], "active_rank_value": 24},
        ],
    )
    assert choose_ranks(GROUPS, path) == {Q: 24, K: 24, UP: 8}


CUSTOM = {
    "rank outside the space": ([([Q, K], 25), ([UP], 8)], "[32, 28, 24, 20]"),
    "rank of another group": ([([Q, K], 32), ([UP], 32)], "[16, 12, 8]"),
    "rank as text": ([([Q, K], "32"), ([UP], 8)], "[32, 28, 24, 20]"),
    "rank as bool": ([([Q, K], True), ([UP], 8)], "[32, 28, 24, 20]"),
    "unknown module": ([([Q, K, "model.layers.9.x"], 32), ([UP], 8)], "model.layers.9.x"),
    "module left out": ([([Q], 32), ([UP], 8)], K),
    "module twice": ([([Q, K, Q], 32), ([UP], 8)], Q),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_bad_custom_choice(case, tmp_path):
    entries, text = CUSTOM[case]
    path = write(
        tmp_path / "custom.json",
        [{"target": [target(m) for m in modules], "active_rank_value": rank} for modules, rank in entries],
    )
    with pytest.raises(BadInput) as caught:
        choose_ranks(GROUPS, path)
    assert text in str(caught.value) and str(path) in str(caught.value)


def test_choice_against_the_adapter():
    with pytest.raises(BadInput, match=r"one of \[24, 20\]") as caught:
        choose_ranks(GROUPS, "maximal", trained={Q: 32, K: 24, UP: 16})
    assert K in str(caught.value)
    with pytest.raises(BadInput, match=UP):
        choose_ranks(GROUPS, "minimal", trained={Q: 32, K: 32})
    with pytest.raises(UsageError, match="maximal, heuristic, minimal"):
        choose_ranks(GROUPS, "median")


SPACES = {
    "object": {"target": [], "search_space": []},
    "empty": [],
    "list of numbers": [1],
    "no target": [{"search_space": [8]}],
    "empty target": [{"target": [], "search_space": [8]}],
    "target of numbers": [{"target": [1], "search_space": [8]}],
    "no space": [{"target": [target(Q)]}],
    "empty space": [{"target": [target(Q)], "search_space": []}],
    "rank 0": [{"target": [target(Q)], "search_space": [8, 0]}],
    "rank as text": [{"target": [target(Q)], "search_space": ["8"]}],
    "smallest first": [{"target": [target(Q)], "search_space": [8, 16]}],
    "rank twice": [{"target": [target(Q)], "search_space": [8, 8]}],
    "other prefix": [{"target": [f"{Q}.lora_A"], "search_space": [8]}],
    "other suffix": [{"target": [f"base_model.model.{Q}.lora_B"], "search_space": [8]}],
    "module in two groups": [{"target": [target(Q)], "search_space": [8]}] * 2,
}


@pytest.mark.parametrize("case", SPACES)
def test_bad_search_space(case, tmp_path):
    path = write(tmp_path / "elastic_adapter_config.json", SPACES[case])
    with pytest.raises(BadInput) as caught:
        read_search_space(path)
    assert str(path) in str(caught.value)
