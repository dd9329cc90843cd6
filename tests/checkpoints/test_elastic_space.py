"""The search space of an elastic adapter, and the sub-adapter chosen from it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseport.checkpoints.elastic import (
    ElasticGroup,
    SearchSpace,
    Selection,
    choose,
    choose_ranks,
    open_search_space,
    read_search_space,
    save_search_space,
    select,
    write_search_space,
)
from sparseport.errors import BadInput, UsageError

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"
GROUPS = [ElasticGroup((Q, K), (32, 28, 24, 20)), ElasticGroup((UP,), (16, 12, 8))]
# LoNAS: the rank of the update and the width of the layer are two groups.
WIDE = SearchSpace((*GROUPS, ElasticGroup((UP,), (11008, 9632, 8256, 6880, 5504), "width")))


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
    assert open_search_space(path) == SearchSpace(tuple(GROUPS))


def test_widths_cannot_be_written_as_ranks(tmp_path):
    with pytest.raises(UsageError, match="widths"):
        write_search_space(tmp_path / "x.json", WIDE.groups)
    assert not (tmp_path / "x.json").exists()


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


@pytest.mark.parametrize(
    ("choice", "width", "ranks"),
    [("maximal", 11008, (32, 16)), ("heuristic", 8256, (28, 12)), ("minimal", 5504, (20, 8))],
)
def test_named_choices_of_ranks_and_widths(choice, width, ranks):
    first, second = ranks
    # The adapter's ranks say nothing about widths: 16 is no bound for them.
    assert choose(WIDE, choice, trained={Q: 32, K: 32, UP: 16, "another": 4}) == Selection(
        ranks={Q: first, K: first, UP: second}, widths={UP: width}
    )


@given(picks=st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_list_of_numbers_names_groups_in_order(picks, tmp_path_factory):
    sizes = [group.sizes[pick % len(group.sizes)] for group, pick in zip(WIDE.groups, picks, strict=True)]
    path = write(tmp_path_factory.getbasetemp() / "numbers.json", sizes)
    chosen = Selection(ranks={Q: sizes[0], K: sizes[0], UP: sizes[1]}, widths={UP: sizes[2]})
    assert choose(WIDE, path) == chosen
    assert choose_ranks(GROUPS, write(path, sizes[:2])) == chosen.ranks


NUMBERS = {
    "too few": ([32, 16], "3 numbers"),
    "too many": ([32, 16, 11008, 8], "3 numbers"),
    "rank of no group": ([30, 16, 11008], "one of [32, 28, 24, 20]"),
    "rank between two": ([32, 14, 11008], "one of [16, 12, 8]"),
    "width of no group": ([32, 16, 10000], "one of [11008, 9632, 8256, 6880, 5504]"),
    "order of another space": ([11008, 32, 16], "one of [32, 28, 24, 20]"),
    "a bool among them": ([32, 16, True], "one number per group"),
    "a float among them": ([32, 16, 11008.0], "one number per group"),
    "empty": ([], "one number per group"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_bad_list_of_numbers(case, tmp_path):
    sizes, text = NUMBERS[case]
    path = write(tmp_path / "numbers.json", sizes)
    with pytest.raises(BadInput) as caught:
        choose(WIDE, path)
    assert text in str(caught.value) and str(path) in str(caught.value) and caught.value.code == "E_ELASTIC"


def test_ranks_alone_do_not_choose_widths(tmp_path):
    path = write(
        tmp_path / "custom.json",
        [{"target": [target(Q), target(K)], "active_rank_value": 24}, {"target": [target(UP)], "active_rank_value": 8}],
    )
    assert choose(SearchSpace(tuple(GROUPS)), path) == Selection({Q: 24, K: 24, UP: 8}, {})
    with pytest.raises(BadInput, match="3 whole numbers") as caught:
        choose(WIDE, path)
    assert caught.value.fix


def test_choice_against_the_adapter():
    with pytest.raises(BadInput, match=r"one of \[24, 20\]") as caught:
        choose_ranks(GROUPS, "maximal", trained={Q: 32, K: 25, UP: 16})
    assert K in str(caught.value) and "search space" in caught.value.fix
    with pytest.raises(BadInput, match="at most 4") as caught:
        choose(WIDE, "maximal", trained={Q: 32, K: 32, UP: 4})
    assert "search space" in caught.value.fix
    with pytest.raises(BadInput, match=UP):
        choose_ranks(GROUPS, "minimal", trained={Q: 32, K: 32})
    with pytest.raises(UsageError, match="maximal, heuristic, minimal"):
        choose_ranks(GROUPS, "median")


def test_all_of_an_extracted_sub_adapter(tmp_path):
    """Its tensors have lower ranks, and the super-adapter's search space may still lie beside them."""
    trained = {Q: 20, K: 20, UP: 12}
    assert choose(WIDE, "maximal", trained=trained) == Selection(trained, {UP: 11008})
    # A group may have been split by hand, and only some groups shrunk.
    for ranks in ({Q: 28, K: 24, UP: 16}, {Q: 32, K: 32, UP: 8}):
        assert choose_ranks(GROUPS, "maximal", trained=ranks) == ranks
    # Tensors larger than the space are cut to it, as ever.
    assert choose_ranks(GROUPS, "maximal", trained={Q: 64, K: 64, UP: 64}) == {Q: 32, K: 32, UP: 16}
    # Another choice would mean other ranks than it says.
    for choice in ("heuristic", write(tmp_path / "ranks.json", [28, 12])):
        with pytest.raises(BadInput, match="above the trained one") as caught:
            choose_ranks(GROUPS, choice, trained=trained)
        assert "--sub-adapter maximal" in caught.value.fix and caught.value.found == "28"
    assert choose_ranks(GROUPS, "minimal", trained=trained) == {Q: 20, K: 20, UP: 8}


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


OWN = [
    ElasticGroup((Q, K), (32, 16)),
    ElasticGroup((UP,), (1536, 1024), "width"),
    ElasticGroup(("model.layers.0.self_attn",), (3, 2, 1), "heads"),
    ElasticGroup(("model.layers.1",), (1, 0), "block"),
]


def test_a_space_of_our_own_is_written_and_read_again(tmp_path):
    file = save_search_space(tmp_path, OWN)
    assert file.name == "search_space.json"
    assert json.loads(file.read_text()) == {
        "sparseport_search_space": 1,
        "groups": [
            {"kind": "rank", "targets": [Q, K], "sizes": [32, 16]},
            {"kind": "width", "targets": [UP], "sizes": [1536, 1024]},
            {"kind": "heads", "targets": ["model.layers.0.self_attn"], "sizes": [3, 2, 1]},
            {"kind": "block", "targets": ["model.layers.1"], "sizes": [1, 0]},
        ],
    }
    assert open_search_space(file) == SearchSpace(tuple(OWN))
    assert save_search_space(tmp_path, GROUPS).name == "elastic_adapter_config.json"


def test_sizes_of_every_kind_become_a_selection():
    space = SearchSpace(tuple(OWN))
    whole = select(space, [32, 1536, 3, 1])
    assert whole == Selection({Q: 32, K: 32}, {UP: 1536}, {"model.layers.0.self_attn": 3}) and not whole.removed
    small = select(space, [16, 1024, 1, 0])
    assert small == choose(space, "minimal")
    assert small.heads == {"model.layers.0.self_attn": 1} and small.removed == {"model.layers.1"} and not small.whole
    # The median of two sizes is the first: blocks stay, as a two-value space of ranks keeps its maximum.
    assert choose(space, "heuristic").removed == frozenset()
    with pytest.raises(BadInput, match=r"one of \[1, 0\]"):
        select(space, [16, 1024, 1, 2])
    with pytest.raises(BadInput, match="4 numbers"):
        select(space, [16])


@pytest.mark.parametrize(
    "change",
    [
        {"sparseport_search_space": 2},
        {"groups": []},
        {"groups": [{"kind": "depth", "targets": ["a"], "sizes": [1, 0]}]},
        {"groups": [{"kind": "block", "targets": ["a"], "sizes": [2, 1]}]},
        {"groups": [{"kind": "heads", "targets": ["a"], "sizes": [1, 2]}]},
        {"groups": [{"kind": "width", "targets": [], "sizes": [2]}]},
        {"groups": [{"kind": "width", "targets": ["a"], "sizes": [2], "more": 1}]},
        {
            "groups": [
                {"kind": "width", "targets": ["a"], "sizes": [2]},
                {"kind": "width", "targets": ["a"], "sizes": [2]},
            ]
        },
        {"more": 1},
    ],
)
def test_damaged_spaces_of_our_own_are_refused(tmp_path, change):
    file = write(tmp_path / "search_space.json", {"sparseport_search_space": 1, "groups": [], **change})
    with pytest.raises(BadInput) as caught:
        open_search_space(file)
    assert caught.value.code == "E_ELASTIC"
