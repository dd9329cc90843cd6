"""Targets of config groups: what they match, which one wins, and patterns that are refused."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseport.checkpoints.module_targets import Targets, compiled
from sparseport.errors import BadInput, Unsupported

MODULES = [
    "lm_head",
    "model.lm_head",
    "model.norm",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.11.self_attn.o_proj",
    "model.layers.11.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.x.mlp.up_proj",
    "model.language_model.layers.3.mlp.up_proj.extra",
    "model.layers.7.mlp.experts.12.down_proj",
    "",
]
REAL = [
    r".*lm_head",
    r"lm_head$",
    r".*layers\.\d+\.mlp\.(gate|up)_proj.*",
    r".*layers\.\d+\.self_attn\.(?:q|k|v)_proj$",
    r"^model\.layers\.[0-9]+\.mlp\.down_proj$",
    r"model\.layers\.(0|7|11)\..*",
    r".*\.mlp\..*_proj",
    r"model.layers.0.self_attn.q_proj",
    r".*self_attn.*|.*lm_head.*",
    r".*\.experts\.\d+\.(gate|up|down)_proj$",
    r"model\.layers\.[^.]+\.mlp\.(up|down)_proj",
    r".*[qk]v?_proj",
    r"(model\.)(layers\.\d{2}\.)(self_attn|mlp)",
    r".*(self_attn|mlp(\.experts\.\d+|))\.(o|down)_proj",
    r"model\.(norm|lm_head)|(lm_head)",
]


def first_match(module, groups):
    return Targets(groups, class_name="Linear").of(module)


def names(target, module):
    return first_match(module, [([target], True)]) is True


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_configs_match_as_in_python(pattern):
    results = [compiled(pattern).match(module) for module in MODULES]
    assert results == [re.match(pattern, module) is not None for module in MODULES]
    assert True in results and False in results


def test_a_name_and_a_pattern_and_a_class():
    assert names("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj")
    assert not names("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.x")
    assert not names("model.layers.0", "model.layers.0.self_attn.q_proj")
    assert not names(".*q_proj", "model.layers.0.self_attn.q_proj")  # a pattern only after re:
    assert names("re:.*q_proj", "model.layers.0.self_attn.q_proj")
    assert names("re:model", "model.layers.0.self_attn.q_proj")  # from the start, not to the end
    assert not names("re:layers", "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("groups", "value"),
    [
        ([(["Linear"], 1)], 1),
        ([(["Conv1D"], 1)], None),
        ([(["Linear"], 1), (["re:.*q_proj"], 2)], 2),
        ([(["Linear"], 1), (["m.q_proj"], 2), (["re:.*q_proj"], 3)], 2),
        ([(["Linear"], 1), (["re:.*q_proj"], 2), (["m.q_proj"], 3)], 3),
        ([(["re:m.*", "Linear"], 1), (["re:.*q_proj"], 2)], 2),  # `.*q_proj` comes before `m.*` in the alphabet
        ([(["re:.*q_proj"], 1), (["re:.*q_proj"], 2)], 2),
        ([(["Linear", "re:.*v_proj"], 1), (["Linear"], 2)], 2),
        ([(["re:.*v_proj"], 1)], None),
        ([], None),
    ],
)
def test_the_more_specific_target_wins(groups, value):
    assert first_match("m.q_proj", groups) == value


def test_a_name_wins_wherever_it_stands_in_the_alphabet():
    groups = [(["re:.*q_proj"], 1), (["transformer.q_proj"], 2), (["Linear"], 3)]
    assert first_match("transformer.q_proj", groups) == 2
    assert first_match("model.q_proj", groups) == 1
    assert first_match("model.v_proj", groups) == 3


@pytest.mark.parametrize(
    "pattern",
    [
        "ab?c",
        "ab*c",
        "ab+c",
        "ab{2}c",
        "ab{0}c",
        "ab$",
        "^ab",
        "a^b",
        "a$b",
        "(a|ab)(c|bc)$",
        "(|a)b",
        "a.c",
        "a[^b]c",
        ".*$",
    ],
)
def test_every_construct_by_itself(pattern):
    names = ["ac", "abc", "abbc", "abbbc", "ab", "ab\n", "ab\nc", "a\nc", "b", "xab", "", "\n"]
    assert [compiled(pattern).match(n) for n in names] == [re.match(pattern, n) is not None for n in names]


HOSTILE = [
    r"(a+)+$",
    r"(a*)*b",
    r"((a+)+)+",
    r"(a|aa)+$",
    r"(?:a+){20}",
    r"(x)?",
    r"(?=a)b",
    r"(?!a)b",
    r"(?<=a)b",
    r"(?P<n>a)(?P=n)",
    r"(?i)a",
    r"(?#c)a",
    r"(a)\1",
    r"a**",
    r"a+?",
    r"a{2}{3}",
    r"a{1,200}",
    r"a{2,}",
    r"\x41",
    r"\Aa",
    r"\ba",
    r"\u0041",
    "\N{GREEK SMALL LETTER ALPHA}",
    r"[z-a]",
    r"[a",
    r"[]",
    r"[^]a[b]",
    r"[a[b]",
    r"[a--b]",
    r"[\xzz]",
    r"(a",
    r"a)",
    r")(",
    r"a\\",
    "a\\",
    "*a",
    "a b",
    "a\nb",
    "",
    "(" * 9 + "a" + ")" * 9,
    "(" * 5000,
    "a" * 10_000,
    "(a+)+" * 2000,
    "." * 301,
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda p: p[:12].encode("unicode_escape").decode() or "empty")
def test_everything_else_is_refused_at_once(pattern):
    start = time.perf_counter()
    with pytest.raises(Unsupported) as caught:
        compiled(pattern, "config.json")
    assert time.perf_counter() - start < 0.05
    assert caught.value.code == "E_PATTERN" and caught.value.fix and caught.value.where == "config.json"
    assert len(str(caught.value)) < 600 and repr(pattern)[:80] in caught.value.found


SLOW_IN_PYTHON = [
    "a?" * 60 + "a" * 60 + "c",
    "(ab|ab)" * 40 + "c",
    "(a|a|aa)" * 30 + "c",
    ".*" * 100 + "c",
    ".*a" * 80 + "c",
    "[a-z]+" * 40 + r"\d",
    "a{999}" * 50,
    "((((((((a|a)|a)|a)|a)|a)|a)|a)|a)" * 8 + "c",
    "(|)" * 90 + "c",
]


@pytest.mark.parametrize("pattern", SLOW_IN_PYTHON, ids=lambda p: p[:12])
def test_patterns_that_keep_other_engines_busy(pattern):
    start = time.perf_counter()
    assert not compiled(pattern).match("ab" * 149 + "d")
    assert not compiled(pattern).match("a" * 299 + "b")
    assert time.perf_counter() - start < 0.5


_ONE = st.sampled_from(["a", "b", "1", "_", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", r"[a-c\d]", r"[\w.]", "-", ":"])
_REPEATED = st.builds(str.__add__, _ONE, st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{0}", "{3}"]))
_SEQUENCE = st.lists(_REPEATED | st.sampled_from(["^", "$"]), min_size=1, max_size=5).map("".join)


def _group(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    alternatives = st.lists(inner | st.just(""), min_size=1, max_size=3).map("|".join)
    group = st.builds("{}{})".format, st.sampled_from(["(", "(?:"]), alternatives)
    return st.lists(group | _SEQUENCE, min_size=1, max_size=3).map("".join)


_PATTERNS = st.recursive(_SEQUENCE, _group, max_leaves=4) | st.lists(_SEQUENCE, min_size=2, max_size=3).map("|".join)


@settings(max_examples=400)
@given(_PATTERNS, st.text("ab1_.-:\n", max_size=8))
def test_any_accepted_pattern_matches_as_in_python(pattern, name):
    assert compiled(pattern).match(name) == (re.match(pattern, name) is not None)


@settings(max_examples=300)
@given(st.text("ab.*+?|()[]^${}\\d12,:-", max_size=14), st.text("ab1.\n", max_size=6))
def test_any_text_is_refused_or_matches_as_in_python(pattern, name):
    try:
        found = compiled(pattern)
    except Unsupported as error:
        assert error.code == "E_PATTERN"
    else:
        assert found.match(name) == (re.match(pattern, name) is not None)


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_accepted_is_quick_on_a_long_name(data):
    pieces = st.lists(_PATTERNS | st.sampled_from(SLOW_IN_PYTHON), min_size=1, max_size=12)
    pattern = "".join(data.draw(pieces))[:300]
    name = data.draw(st.sampled_from(["a" * 300, "ab" * 150, "a.1_" * 75, "a" * 299 + "!"]))
    start = time.perf_counter()
    with contextlib.suppress(Unsupported):
        compiled(pattern).match(name)
    assert time.perf_counter() - start < 1


def test_a_name_of_any_length_is_compared_but_not_searched():
    long = "model." + "x" * 300
    assert names(long, long)
    assert first_match(long, [([long], 1)]) == 1
    assert first_match(long, [(["Linear"], 1)]) == 1
    with pytest.raises(Unsupported, match="too long") as caught:
        names("re:.*", long)
    assert caught.value.code == "E_PATTERN" and caught.value.fix and len(str(caught.value)) < 400
    assert first_match(long, [([long, "re:.*"], 1)]) == 1


# --- many targets ----------------------------------------------------------------------------------------------------


def test_targets_are_sorted_once_and_answers_are_kept(monkeypatch):
    """Thousands of targets took a minute when each layer sorted them anew."""
    tried = []
    monkeypatch.setattr("sparseport.checkpoints.module_targets._ends", lambda *given: tried.append(given) or 0)
    layers = [f"model.layers.{number}.mlp.up_proj" for number in range(8000)]
    targets = Targets(
        [(layers, 1), ([f"re:.*{number}" for number in range(1000)], 2), (["Linear"], 3)], class_name="Linear"
    )
    start = time.perf_counter()
    assert {targets.of(layer) for layer in layers} == {1} and tried == []
    assert time.perf_counter() - start < 0.5
    assert targets.of("other") == targets.of("other") == 3
    assert len(tried) == 1000


@pytest.mark.parametrize(
    ("groups", "what"),
    [
        ([([str(n) for n in range(10_001)], 1)], "targets"),
        ([(["Linear"] * 6000, 1), (["Linear"] * 6000, 2)], "targets"),
        ([([f"re:a{n}" for n in range(1001)], 1)], "patterns"),
        ([([f"re:a{n}" for n in range(501)], 1), ([f"re:b{n}" for n in range(501)], 1)], "patterns"),
    ],
)
def test_too_many_targets(groups, what):
    with pytest.raises(BadInput, match=f"too many {what}") as caught:
        Targets(groups, class_name="Linear", where="config.json")
    assert caught.value.code == "E_LIMIT" and caught.value.fix and caught.value.where == "config.json"


def test_a_thousand_hostile_patterns_on_a_long_name():
    patterns = [f"re:{'.*a' * 90}{number}" for number in range(1000)]
    targets = Targets([(patterns, 1)], class_name="Linear")
    start = time.perf_counter()
    assert targets.of("ab" * 149) is None
    assert time.perf_counter() - start < 5
