"""Sub-networks as vectors: named ones, neighbours, random ones, and what is refused with the allowed values."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import GROUPS, SIZES, everything

from sparseport.checkpoints.elastic import ElasticGroup, SearchSpace, choose
from sparseport.errors import BadInput
from sparseport.nls.search.candidates import (
    check_candidate,
    from_indices,
    heuristic,
    label_of,
    maximal,
    minimal,
    named_candidates,
    neighbours,
    number_of_candidates,
    random_candidates,
    sizes_of,
    space_digest,
    to_indices,
)

spaces = st.lists(
    st.lists(st.integers(0, 64), min_size=1, max_size=5, unique=True).map(lambda s: tuple(sorted(s, reverse=True))),
    min_size=1,
    max_size=6,
)


def test_named_candidates():
    assert maximal(SIZES) == (32, 32, 64, 1) and minimal(SIZES) == (16, 16, 16, 0)
    assert heuristic(SIZES) == (24, 24, 48, 1)  # index (n - 1) // 2: 1, 1, 1, 0
    assert list(named_candidates(SIZES)) == ["minimal", "heuristic", "maximal"]


@pytest.mark.parametrize("name", ["maximal", "heuristic", "minimal"])
def test_the_names_mean_what_they_mean_in_an_export(name):
    groups = [group for group in GROUPS if group.kind == "rank"]
    chosen = choose(SearchSpace(tuple(groups)), name).ranks
    candidate = named_candidates(sizes_of(groups))[name]
    assert [chosen[group.targets[0]] for group in groups] == list(candidate)


@given(spaces)
def test_neighbours_are_exactly_the_candidates_one_step_away(space):
    candidate = heuristic(space)
    near = neighbours(candidate, space)
    assert len(set(near)) == len(near) and candidate not in near
    home = to_indices(candidate, space)
    for other in near:
        steps = [abs(a - b) for a, b in zip(home, to_indices(other, space), strict=True)]
        assert sorted(steps) == [0] * (len(space) - 1) + [1]
    expected = sum((index > 0) + (index < len(group) - 1) for index, group in zip(home, space, strict=True))
    assert len(near) == expected


@given(spaces, st.randoms(use_true_random=False))
def test_indices_and_sizes_are_each_others_inverse(space, dice):
    indices = tuple(dice.randrange(len(group)) for group in space)
    assert to_indices(from_indices(indices, space), space) == indices


@given(spaces, st.integers(0, 40), st.integers(0, 2**32))
def test_random_candidates_are_distinct_of_the_space_and_repeat_by_seed(space, number, seed):
    without = [heuristic(space)]
    found = random_candidates(space, number, random.Random(seed), without)
    assert len(found) == min(number, number_of_candidates(space) - 1)
    assert len({*found, *without}) == len(found) + 1
    assert all(size in group for candidate in found for size, group in zip(candidate, space, strict=True))
    assert found == random_candidates(space, number, random.Random(seed), without)


def test_random_candidates_reach_all_of_the_space():
    assert sorted(random_candidates(SIZES, 1000, random.Random(0))) == sorted(everything())
    assert number_of_candidates(SIZES) == len(everything()) == 72


def test_a_candidate_of_the_space_comes_back_as_a_tuple():
    assert check_candidate([24, 16, 48, 0], GROUPS, "here") == (24, 16, 48, 0)


@pytest.mark.parametrize(
    ("values", "where", "expected"),
    [
        ([24, 16, 48], "here", "4 whole numbers"),
        ("maximal", "here", "4 whole numbers"),
        ([24, 16, 40, 0], "here, group 2 (layers.0.mlp)", "one of [64, 48, 32, 16]"),
        ([24, 16, 48, True], "here, group 3 (layers.1)", "one of [1, 0]"),
        ([24.0, 16, 48, 0], "here, group 0 (layers.0.q_proj)", "one of [32, 24, 16]"),
    ],
)
def test_a_candidate_outside_the_space_is_refused_with_the_allowed_values(values, where, expected):
    with pytest.raises(BadInput) as raised:
        check_candidate(values, GROUPS, "here")
    assert (raised.value.where, raised.value.expected, raised.value.code) == (where, expected, "E_ELASTIC")


@pytest.mark.parametrize("sizes", [(), (16, 32), (32, 32), (32, -1), (32, 16.0), (True, False)])
def test_a_damaged_group_is_refused(sizes):
    with pytest.raises(BadInput, match=r"group 1 \(b\)"):
        sizes_of([ElasticGroup(("a",), (2, 1)), ElasticGroup(("b",), sizes)])
    with pytest.raises(BadInput, match="no groups"):
        sizes_of([])


def test_the_digest_covers_everything_that_a_group_says():
    canonical = '[{"kind":"rank","sizes":[2,1],"targets":["a"]}]'
    group = ElasticGroup(("a",), (2, 1))
    assert space_digest([group]) == hashlib.sha256(canonical.encode()).hexdigest()
    others = [
        [dataclasses.replace(group, targets=("b",))],
        [dataclasses.replace(group, sizes=(3, 1))],
        [dataclasses.replace(group, kind="width")],
        [group, group],
    ]
    assert len({space_digest(groups) for groups in [[group], *others]}) == 5


def test_labels_of_long_candidates_stay_short():
    assert label_of((3, 2)) == "sub-network [3, 2]"
    assert label_of(tuple(range(200))).endswith("7, ..., 193, 194, 195, 196, 197, 198, 199] of 200 groups")


def test_the_package_imports_without_any_framework():
    code = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(("torch", "pymoo", "matplotlib", "ray", "openvino", "transformers", "nncf")))
import sparseport.nls.search as package
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
