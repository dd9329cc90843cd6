"""LoRA adapters: reading, refusing what plain arithmetic does not cover, and what PEFT makes of our files."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_folders import A_NAME, B_NAME, UP, Q, branch, edit_config, edit_tensors, refused, small_adapter
from sparseport.checkpoints.peft import AdapterFolder, write_adapter
from sparseport.checkpoints.safetensors import SafeTensorsFile
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.merge.delta import scaled_delta
from sparseport.weights.linear import LowRankBranch


@pytest.fixture
def adapter(tmp_path) -> Path:
    return small_adapter(tmp_path / "adapter")


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


# --- PEFT itself ----------------------------------------------------------------------------------------------------


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
