"""Ranks and alphas of single modules: followed as PEFT follows them; slow expressions are refused."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_folders import A_NAME, UP, Q, edit_config, refused, small_adapter
from sparseport.checkpoints.peft import AdapterFolder
from sparseport.errors import BadInput, SparseportError, Unsupported
from sparseport.merge.delta import scaled_delta


@pytest.fixture
def adapter(tmp_path) -> Path:
    return small_adapter(tmp_path / "adapter")


def test_rank_and_alpha_of_one_module(adapter):
    """A sub-adapter of rank 4 whose module has an r of its own, 6, keeps alpha / 6."""
    edit_config(adapter, rank_pattern={"up_proj": 6}, alpha_pattern={"model.layers.0.self_attn.q_proj": 4.5})
    with AdapterFolder.open(adapter) as folder:
        assert (folder.r, folder.scaling) == (8, 2.0)
        assert folder.scaling_of(Q) == folder.branch(Q).scaling == 4.5 / 8
        assert folder.scaling_of(UP) == folder.branch(UP).scaling == 16 / 6
        with pytest.raises(BadInput, match="no such module"):
            folder.scaling_of("model.layers.9.self_attn.q_proj")
    edit_config(adapter, use_rslora=True)
    with AdapterFolder.open(adapter) as folder:
        assert (folder.scaling, folder.use_rslora) == (16 / math.sqrt(8), True)
        assert folder.scaling_of(Q) == 4.5 / math.sqrt(8) and folder.scaling_of(UP) == 16 / math.sqrt(6)


@pytest.mark.parametrize(
    ("pattern", "alphas"),
    [
        ({"q_proj": 1}, (1, 16)),
        ({"up_proj": 1, "q_proj": 2}, (2, 1)),
        ({"layers.0.self_attn.q_proj": 1}, (1, 16)),
        ({"^model.layers.0.self_attn.q_proj": 1}, (1, 16)),
        ({"^model.layers.0.self_attn.q_proj$": 1}, (1, 16)),
        ({"(q|up)_proj": 1}, (1, 1)),
        ({"q_proj|up_proj": 1}, (1, 1)),
        ({"q_proj": 1, ".*_proj": 2}, (1, 2)),
        ({".*_proj": 2, "q_proj": 1}, (2, 2)),
        ({r"layers\.\d+\.mlp\.up_proj": 1}, (16, 1)),
        ({r"layers.[1-9][0-9]?.mlp.*": 1}, (16, 1)),
        ({r"model.layers.0.self_attn.(?:k|q)_proj": 1}, (1, 16)),
    ],
)
def test_first_key_that_matches_wins(adapter, pattern, alphas):
    edit_config(adapter, alpha_pattern=pattern)
    with AdapterFolder.open(adapter) as folder:
        assert (folder.scaling_of(Q), folder.scaling_of(UP)) == (alphas[0] / 8, alphas[1] / 8)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["k_proj", "proj", "_proj", "layers.1.self_attn.q_proj", "^q_proj", f"base_model.{Q}"])
def test_key_that_matches_no_module(adapter, option, key):
    edit_config(adapter, **{option: {"q_proj": 8, key: 8}})
    message = refused(adapter)
    assert option in message and key in message


def test_tensor_of_higher_rank_than_its_pattern(adapter):
    edit_config(adapter, rank_pattern={"q_proj": 7})
    message = refused(adapter)
    assert "rank_pattern" in message and A_NAME in message and "at most 7" in message
    # The pattern raises the limit as well: r = 2 does not count for modules that it names.
    edit_config(adapter, r=2, rank_pattern={"q_proj": 8, "up_proj": 4})
    with AdapterFolder.open(adapter) as folder:
        assert folder.scaling_of(Q) == 2.0 and folder.scaling_of(UP) == 4.0


UNSAFE = [
    "(a+)+q_proj", "(.*)*", "(a|aa)+$", "((q))_proj", "q_proj(", "q_proj)", ")q_proj(", "q_{1,3}proj", "q_proj*?", "*",
    "(?=q)_proj", "(?P<x>q)_proj", r"(q)\1_proj", r"q\x5fproj", "[^q]_proj", "q[", "[9-0]", "q^proj", "q$proj", "q pro",
    "(?i)Q_PROJ", "q_proj\n", "", "a" * 2000, "ü_proj", r"\Aq_proj", "[a--z]", "[[a]q]_proj",
    "(.|.|.|.)" * 21, ".?" * 60 + "q_proj", ".*" * 12 + "q_proj", ".+" * 12, "(a|b)|" * 30 + "q_proj",
]  # fmt: skip


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", UNSAFE)
def test_expression_that_could_take_for_ever(adapter, option, key):
    edit_config(adapter, **{option: {key: 8}})
    started = time.monotonic()
    message = refused(adapter, Unsupported)
    assert time.monotonic() - started < 5
    assert option in message and "E_ADAPTER_OPTION" in message


def test_many_expressions_are_refused_before_they_take_for_ever(adapter):
    with AdapterFolder.open(adapter) as folder:
        names = folder.modules()
    edit_config(adapter, alpha_pattern=dict.fromkeys(names, 8))
    AdapterFolder.open(adapter).close()
    edit_config(adapter, alpha_pattern={f".*.*(proj|x{i})": 8 for i in range(100)})
    AdapterFolder.open(adapter).close()
    edit_config(adapter, alpha_pattern={f".*.*(proj|x{i})": 8 for i in range(20_000)})
    started = time.monotonic()
    assert "quick to match" in refused(adapter, Unsupported)
    assert time.monotonic() - started < 30


ITEMS = st.sampled_from(
    ["q", "k", "_proj", ".", r"\.", "layers", "0", r"\d", "[0-9]", "[kq]", "(q|k)", "(?:mlp|x)", "|"]
)
KEYS = st.builds(
    lambda start, items, end: start + "".join(items) + end,
    st.sampled_from(["", "^"]),
    st.lists(st.tuples(ITEMS, st.sampled_from(["", "", "*", "+", "?"])).map("".join), min_size=1, max_size=5),
    st.sampled_from(["", "$"]),
) | st.sampled_from(["q_proj", "layers.0.q_proj", "layers.1.*", ".*"])
NAMES = st.lists(
    st.builds(".".join, st.lists(st.sampled_from(["layers", "0", "1", "10", "mlp", "q_proj", "k_proj"]), min_size=1)),
    min_size=1,
    max_size=4,
    unique=True,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True), names=NAMES)
def test_keys_match_as_in_peft(keys, names):
    peft = pytest.importorskip("peft.utils.other")
    from sparseport.checkpoints.peft_options import ranks_by_module

    config = {"r": 1, "rank_pattern": {key: 10 + i for i, key in enumerate(keys)}}
    try:
        found = ranks_by_module(config, names, "x")
    except SparseportError as error:
        if isinstance(error, BadInput):
            assert any(all(peft.get_pattern_key([key], name) == name for name in names) for key in keys)
        return
    assert found == {name: config["rank_pattern"].get(peft.get_pattern_key(keys, name), 1) for name in names}


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"^layers.0.attn.q_proj": 5, r"layers\.\d\.mlp\.(up|down)_proj": 9}},
    "both": {"rank_pattern": {"(q|k)_proj": 2, "q_proj": 5}, "alpha_pattern": {".*_proj": 3, "q_proj": 11}},
    "all": {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"layers.1.*": 7}, "use_rslora": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS)
def test_update_is_that_of_peft(case, tmp_path):
    """A model adapted, saved and read back: the same scaling exactly, the same update up to float32 summation."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    def block() -> torch.nn.Module:
        attention = {name: torch.nn.Linear(16, 16, bias=False) for name in ("q_proj", "k_proj")}
        mlp = {"up_proj": torch.nn.Linear(16, 24, bias=False), "down_proj": torch.nn.Linear(24, 16, bias=False)}
        return torch.nn.ModuleDict({"attn": torch.nn.ModuleDict(attention), "mlp": torch.nn.ModuleDict(mlp)})

    torch.manual_seed(0)
    base = torch.nn.Module()
    base.layers = torch.nn.ModuleList([block(), block()])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"], **SETTINGS[case]
    )
    model = peft.get_peft_model(base, config)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    with AdapterFolder.open(tmp_path) as adapter:
        assert adapter.modules() == sorted(layers) and len(layers) == 8
        for name, layer in layers.items():
            assert adapter.scaling_of(name) == layer.scaling["default"]
            assert adapter.ranks()[name] == layer.r["default"]
            want = layer.get_delta_weight("default").detach().numpy()
            assert np.allclose(scaled_delta(adapter.branch(name)), want, rtol=1e-5, atol=1e-6)
    varied = len({layer.scaling["default"] for layer in layers.values()}) > 1
    assert varied == any("pattern" in key for key in SETTINGS[case])
