"""LoRA adapters: reading, refusing what plain arithmetic does not cover, and what PEFT makes of our files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.peft import AdapterFolder, write_adapter
from sparseport.checkpoints.safetensors import SafeTensorsFile, spec_of, write_safetensors
from sparseport.errors import BadInput, FidelityError, SparseportError, Unsupported
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
    "use_rslora": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
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


@pytest.mark.parametrize("option", ["invented_option", "use_dora", "rank_pattern", "modules_to_save", "peft_version"])
@pytest.mark.parametrize("empty", [None, False, "", [], {}])
def test_unset_options_are_fine(adapter, option, empty):
    edit_config(adapter, **{option: empty})
    AdapterFolder.open(adapter).close()


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
    with AdapterFolder.open(shared_dir / "checkpoints" / "peft-lora-r8-smollm2") as adapter:
        assert (adapter.r, adapter.alpha, adapter.scaling) == (8, 16.0, 2.0)
        assert len(adapter.modules()) == 150 and set(adapter.ranks().values()) == {8}
        assert adapter.modules()[0] == "model.layers.0.mlp.down_proj"
        assert adapter.shape("model.layers.0.mlp.down_proj") == (576, 1536)
        assert not adapter.sparse_adapter and not adapter.quantization_aware
        assert all(adapter.branch(module).a.dtype == np.float32 for module in adapter.modules())


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
