"""LoRA adapters: reading, refusing what plain arithmetic does not cover, and what PEFT makes of our files."""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import AdapterFolder, write_adapter
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, FidelityError, SparseportError, Unsupported
from sparseport.merge.delta import scaled_delta
from sparseport.weights.linear import LowRankBranch

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
A_NAME, B_NAME = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def branch(out=64, columns=64, rank=8, scaling=2.0) -> LowRankBranch:
    random = np.random.default_rng(out + columns)
    a, b = random.normal(size=(rank, columns)), random.normal(size=(out, rank))
    return LowRankBranch(a.astype(np.float32), b.astype(np.float32), scaling)


@pytest.fixture
def adapter(tmp_path) -> Path:
    write_adapter(
        tmp_path / "adapter",
        {Q: branch(), UP: branch(128, 64, 4)},
        r=8,
        alpha=16,
        target_modules=["q_proj", "up_proj"],
        base_model_name="../../etc/passwd",
        sparse_adapter=True,
        quantization_aware=True,
        dropout=0.1,
    )
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    with SafeTensorsFile.open(path) as file:
        tensors = {name: np.array(file.read(name)) for name in file.names()}
    edit(tensors)
    write_safetensors(path, [spec_of(name, array) for name, array in tensors.items()])


def refused(folder: Path, kind: type[SparseportError] = BadInput) -> str:
    with pytest.raises(kind) as caught:
        AdapterFolder.open(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_round_trip(adapter):
    with AdapterFolder.open(adapter) as folder:
        assert (folder.r, folder.alpha, folder.scaling) == (8, 16.0, 2.0)
        assert folder.sparse_adapter is True and folder.quantization_aware is True
        assert folder.target_modules == ("q_proj", "up_proj")
        assert folder.base_model_name == "../../etc/passwd"
        assert folder.modules() == [Q, UP]
        assert folder.ranks() == {Q: 8, UP: 4}
        assert folder.shape(UP) == (128, 64)
        got = folder.branch(UP)
        # The scaling is alpha / r of the super-adapter, although this module has rank 4.
        assert got.scaling == 2.0 and got.rank == 4
        assert np.array_equal(got.a, branch(128, 64, 4).a) and got.a.dtype == np.float32
        assert np.array_equal(got.b, branch(128, 64, 4).b)
        assert folder.no_op() is False
        assert [path.name for path in folder.input_files()] == ["adapter_config.json", "adapter_model.safetensors"]
        assert set(folder.sha256()) == {"adapter_config.json", "adapter_model.safetensors"}
        with pytest.raises(BadInput, match="no such module"):
            folder.branch("model.layers.9.self_attn.q_proj")


def test_search_space_beside_the_adapter(adapter):
    def opened():
        with AdapterFolder.open(adapter) as folder:
            return folder.search_space_file(), [path.name for path in folder.input_files()][2:], folder.warnings

    assert opened() == (None, [], [])
    (adapter / "nncf_config.json").write_text("{}")
    assert opened() == (adapter / "nncf_config.json", ["nncf_config.json"], [])
    (adapter / "elastic_adapter_config.json").write_text("[]")
    path, names, warnings = opened()
    assert path == adapter / "elastic_adapter_config.json" and names == [path.name]
    assert warnings == ["nncf_config.json is not used: elastic_adapter_config.json is present"]


def test_same_input_gives_the_same_bytes(adapter, tmp_path):
    with AdapterFolder.open(adapter) as folder:
        write_adapter(
            tmp_path / "again",
            {m: folder.branch(m) for m in reversed(folder.modules())},
            r=8,
            alpha=16.0,
            target_modules=["up_proj", "q_proj"],
            base_model_name="../../etc/passwd",
            sparse_adapter=True,
            quantization_aware=True,
            dropout=0.1,
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_default_segment_is_tolerated(adapter):
    edit_tensors(adapter, lambda t: t.update({A_NAME.replace("lora_A", "lora_A.default"): t.pop(A_NAME)}))
    with AdapterFolder.open(adapter) as folder:
        assert np.array_equal(folder.branch(Q).a, branch().a)


REFUSED_OPTIONS = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "fan_in_fan_out": True,
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "use_qalora": True,
    "init_lora_weights": "pissa",
    "loftq_config": {"bits": 4},
    "megatron_config": {"a": 1},
    "use_bdlora": {"x": 1},
    "invented_option": 3,
    "peft_type": "LOHA",
    "alora_invocation_tokens": [1],
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_option_that_changes_the_arithmetic_is_refused_by_name(adapter, option):
    edit_config(adapter, **{option: REFUSED_OPTIONS[option]})
    assert option in refused(adapter, Unsupported)


UNSET = [
    "invented_option",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "modules_to_save",
    "peft_version",
]


@pytest.mark.parametrize("option", UNSET)
@pytest.mark.parametrize("empty", [None, False, "", [], {}])
def test_unset_options_are_fine(adapter, option, empty):
    edit_config(adapter, **{option: empty})
    with AdapterFolder.open(adapter) as folder:
        assert folder.scaling_of(Q) == folder.scaling_of(UP) == folder.scaling == 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 10**400),
        ("r", 8.0),
        ("r", True),
        ("r", ...),
        ("lora_alpha", 0),
        ("lora_alpha", -1),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", ...),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 8.0}),
        ("rank_pattern", {"q_proj": True}),
        ("rank_pattern", {"q_proj": None}),
        ("alpha_pattern", "q_proj"),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "16"}),
        ("alpha_pattern", {"q_proj": 1e9}),
        ("sparse_adapter", "yes"),
        ("quantization_aware", 1),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", ["k_proj"]),
    ],
)
def test_bad_settings(adapter, key, value):
    edit_config(adapter, **{key: value})
    refused(adapter)


def test_flags_default_to_false_and_pattern_targets_are_kept(adapter):
    edit_config(adapter, sparse_adapter=..., quantization_aware=..., target_modules=".*(q|up)_proj")
    with AdapterFolder.open(adapter) as folder:
        assert not folder.sparse_adapter and not folder.quantization_aware
        assert folder.target_modules == (".*(q|up)_proj",)


DAMAGE = {
    "no tensors": (lambda t: t.clear(), BadInput, "no tensors"),
    "only A": (lambda t: t.pop(B_NAME), BadInput, "no lora_B"),
    "only B": (lambda t: t.pop(A_NAME), BadInput, "no lora_A"),
    "rank mismatch": (lambda t: t.update({A_NAME: t[A_NAME][:4]}), BadInput, "different ranks"),
    "rank above r": (
        lambda t: t.update({A_NAME: np.ones((9, 64), np.float32), B_NAME: np.ones((64, 9), np.float32)}),
        BadInput,
        "above the config's r",
    ),
    "rank 0": (
        lambda t: t.update({A_NAME: np.ones((0, 64), np.float32), B_NAME: np.ones((64, 0), np.float32)}),
        BadInput,
        "not empty",
    ),
    "integers": (lambda t: t.update({A_NAME: t[A_NAME].astype(np.int32)}), BadInput, "wrong dtype"),
    "one axis": (lambda t: t.update({A_NAME: t[A_NAME].reshape(-1)}), BadInput, "wrong dtype or shape"),
    "another prefix": (lambda t: t.update({A_NAME[11:]: t.pop(A_NAME)}), BadInput, "prefix"),
    "twice": (lambda t: t.update({A_NAME.replace("lora_A", "lora_A.default"): t[A_NAME]}), BadInput, "two tensors"),
    "DoRA vector": (
        lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(64, np.float32)}),
        Unsupported,
        "lora_magnitude_vector",
    ),
    "saved module": (
        lambda t: t.update({"base_model.model.lm_head.weight": np.ones((2, 2), np.float32)}),
        Unsupported,
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors(adapter, case):
    edit, kind, text = DAMAGE[case]
    edit_tensors(adapter, edit)
    message = refused(adapter, kind)
    assert text in message and "adapter_model.safetensors" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_values_that_are_not_finite(adapter, value, dtype):
    def edit(tensors):
        tensors[B_NAME] = tensors[B_NAME].astype(dtype)
        tensors[B_NAME][3, 2] = value

    edit_tensors(adapter, edit)
    with AdapterFolder.open(adapter) as folder:
        folder.branch(UP)
        with pytest.raises(BadInput) as caught:
            folder.branch(Q)
    assert B_NAME in str(caught.value) and "(3, 2)" in str(caught.value) and str(adapter) in str(caught.value)


def test_no_op_and_large_ranks_are_noted(tmp_path):
    small = LowRankBranch(np.ones((8, 4), np.float32), np.zeros((64, 8), np.float32), 1.0)
    write_adapter(tmp_path, {Q: small}, r=8, alpha=8, target_modules=["q_proj"], base_model_name="")
    with AdapterFolder.open(tmp_path) as folder:
        assert folder.no_op() is True
        assert len(folder.warnings) == 1 and Q in folder.warnings[0]


def test_what_cannot_be_written(tmp_path):
    for branches, r in (({}, 8), ({Q: branch()}, 4), ({Q: branch(scaling=1.0)}, 8)):
        with pytest.raises(FidelityError):
            write_adapter(tmp_path / "x", branches, r=r, alpha=2 * r, target_modules=["q_proj"], base_model_name="")
    assert not (tmp_path / "x").exists()


def test_pickles(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with AdapterFolder.open(adapter) as folder:
        assert folder.warnings == ["adapter_model.bin is not used: adapter_model.safetensors is present"]
    (adapter / "adapter_model.safetensors").unlink()
    assert "E_PICKLE" in refused(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "E_MISSING" in refused(adapter)


@pytest.mark.slow
def test_allowed_pickle(adapter):
    torch = pytest.importorskip("torch")
    with AdapterFolder.open(adapter) as folder:
        want = {module: folder.branch(module) for module in folder.modules()}
        tensors = {
            f"base_model.model.{m}.lora_{s}.weight": torch.tensor(getattr(b, s.lower()))
            for m, b in want.items()
            for s in "AB"
        }
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with AdapterFolder.open(adapter, allow_pickle=True) as folder:
        assert all(
            np.array_equal(folder.branch(m).a, b.a) and np.array_equal(folder.branch(m).b, b.b) for m, b in want.items()
        )
        assert [path.name for path in folder.input_files()] == ["adapter_config.json", "adapter_model.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code(adapter, tmp_path, zipped):
    torch = pytest.importorskip("torch")
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    tensors = {A_NAME: torch.zeros(8, 64), B_NAME: Evil()}
    target = adapter / "adapter_model.bin"
    torch.save(tensors, target, _use_new_zipfile_serialization=zipped)
    (adapter / "adapter_model.safetensors").unlink()
    for allowed in (False, True):
        with pytest.raises(BadInput) as caught:
            AdapterFolder.open(adapter, allow_pickle=allowed)
        assert caught.value.code == "E_PICKLE" and str(target) in str(caught.value) and caught.value.fix
        assert not canary.exists()
    # The file is a working trap: a reader that trusts it runs it.
    torch.load(target, weights_only=False)
    assert canary.is_dir()
    canary.rmdir()
    target.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput):
        AdapterFolder.open(adapter, allow_pickle=True)
    assert not canary.exists()


# --- sub-adapters -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.tuples(st.sampled_from([16, 24, 32]), st.sampled_from([16, 24, 32])),
    dtype=st.sampled_from([np.float16, np.float32]),
    alpha=st.sampled_from([64, 48, 1]),
    rslora=st.booleans(),
)
def test_extracted_sub_adapter_is_the_padded_super_adapter(seed, ranks, dtype, alpha, rslora, tmp_path_factory):
    """Tensors of rank 24 beside tensors of rank 32, r = 32 in the config: the bits of the update are those of the
    super-adapter with zeros in the ranks that were cut off."""
    random = np.random.default_rng(seed)
    shapes, cut, padded = {Q: (48, 64), UP: (96, 64)}, {}, {}
    for (module, (rows, columns)), rank in zip(shapes.items(), ranks, strict=True):
        a, b = random.normal(size=(32, columns)).astype(dtype), random.normal(size=(rows, 32)).astype(dtype)
        cut[module] = LowRankBranch(a[:rank].copy(), b[:, :rank].copy(), alpha / 32)
        a[rank:], b[:, rank:] = 0, 0
        padded[module] = LowRankBranch(a, b, alpha / 32)
    folders = [tmp_path_factory.mktemp("sub") / name for name in ("cut", "padded")]
    for folder, branches in zip(folders, (cut, padded), strict=True):
        write_adapter(folder, branches, r=32, alpha=alpha, target_modules=["q_proj", "up_proj"], base_model_name="tiny")
        edit_config(folder, use_rslora=rslora)
    with AdapterFolder.open(folders[0]) as sub, AdapterFolder.open(folders[1]) as whole:
        assert sub.ranks() == dict(zip((Q, UP), ranks, strict=True)) and whole.ranks() == {Q: 32, UP: 32}
        for module in (Q, UP):
            assert sub.branch(module).scaling == (alpha / math.sqrt(32) if rslora else alpha / 32)
            left, right = scaled_delta(sub.branch(module)), scaled_delta(whole.branch(module))
            assert left.tobytes() == right.tobytes() and left.any()


# --- settings of one module ---------------------------------------------------------------------------------------


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


# --- pairing with a base ------------------------------------------------------------------------------------------


@pytest.fixture
def full_adapter(tmp_path) -> Path:
    """An adapter for every module that its config targets in the tiny model."""
    write_adapter(
        tmp_path / "full",
        {f"model.layers.{i}.self_attn.q_proj": branch() for i in range(2)},
        r=8,
        alpha=16,
        target_modules=["q_proj"],
        base_model_name="tiny",
    )
    return tmp_path / "full"


def test_base_that_fits(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors):
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        adapter.check_base(folder)


@pytest.mark.parametrize("case", ["missing module", "other shape", "forgotten layer"])
def test_base_that_does_not_fit(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors, case):
    name = "model.layers.1.self_attn.q_proj"
    if case == "missing module":
        del tiny_tensors[f"{name}.weight"]
    elif case == "other shape":
        tiny_tensors[f"{name}.weight"] = tiny_tensors[f"{name}.weight"][:, :32].copy()
    else:
        edit_tensors(full_adapter, lambda t: [t.pop(f"base_model.model.{name}.lora_{s}.weight") for s in "AB"])
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        with pytest.raises(BadInput) as caught:
            adapter.check_base(folder)
    assert name in str(caught.value) and str(full_adapter) in str(caught.value)


def test_layers_left_out_on_purpose(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors):
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    edit_tensors(full_adapter, lambda t: [t.pop(f"{name}.lora_{s}.weight") for s in "AB"])
    edit_config(full_adapter, layers_to_transform=[0])
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        adapter.check_base(folder)


@pytest.mark.parametrize(("shape", "fits"), [((8, 64), True), ((8, 128), False), ((16, 64), False), ((512,), None)])
def test_quantised_base(full_adapter, tmp_path, save_folder, tiny_config, tiny_tensors, shape, fits):
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        del tiny_tensors[f"{name}.weight"]
        tiny_tensors[f"{name}.qweight"] = np.zeros(shape, np.int32)
    base = save_folder(tmp_path / "base", tiny_config, tiny_tensors)
    with AdapterFolder.open(full_adapter) as adapter, ModelFolder.open(base) as folder:
        if fits is False:
            with pytest.raises(BadInput, match="shape"):
                adapter.check_base(folder)
        else:
            # A qweight with one axis is left to the GPTQ reader, which refuses it by name.
            adapter.check_base(folder)


@pytest.mark.shared
def test_adapter_written_by_peft(shared_dir):
    folder = shared_dir / "checkpoints" / "peft-lora-r8-smollm2"
    with SafeTensorsFile.open(folder / "adapter_model.safetensors") as file:
        names = file.names()
    # SmolLM2-135M: 30 layers, hidden 576, 9 heads over 3 of size 64, MLP 1536.
    shapes = {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
    with AdapterFolder.open(folder) as adapter:
        assert (adapter.r, adapter.alpha, adapter.scaling) == (8, 16.0, 2.0)
        assert not adapter.sparse_adapter and not adapter.quantization_aware and not adapter.use_rslora
        assert adapter.modules()[0] == "model.layers.0.mlp.down_proj"
        assert len(adapter.modules()) * 2 == len(names)
        assert {m: adapter.shape(m) for m in adapter.modules()} == {
            f"model.layers.{layer}.{module}": shape for layer in range(30) for module, shape in shapes.items()
        }
        assert set(adapter.ranks().values()) == {8}
        for module in adapter.modules():
            branch_ = adapter.branch(module)
            assert branch_.scaling == adapter.scaling_of(module) == 2.0 and branch_.rank == 8
            assert branch_.a.dtype == branch_.b.dtype == np.float32


@pytest.mark.slow
def test_peft_loads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.q_proj(x)

        def prepare_inputs_for_generation(self):
            raise AssertionError("PEFT only looks it up")

    torch.manual_seed(0)
    base, x = Tiny(), torch.randn(3, 64)
    plain = base(x).detach()
    update = branch()
    write_adapter(
        tmp_path,
        {"q_proj": update},
        r=8,
        alpha=16,
        target_modules=["q_proj"],
        base_model_name="tiny",
        sparse_adapter=True,
    )
    with pytest.warns(UserWarning):
        model = peft.PeftModel.from_pretrained(base, tmp_path)
    want = plain + 2.0 * x @ torch.tensor(update.a).T @ torch.tensor(update.b).T
    assert torch.allclose(model.base_model.model(x), want, atol=1e-3)
