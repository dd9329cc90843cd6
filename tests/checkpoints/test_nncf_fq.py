"""NNCF checkpoints: read as NNCF loads them, never run, and refused where they say something else than NNCF writes."""

from __future__ import annotations

import copy
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from in_process import InProcess
from sparseport.checkpoints import pickles
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.nncf_fq import NncfCheckpoint, read_nls_ranks
from sparseport.errors import BadInput, Unsupported
from sparseport.offline import go_offline

torch = pytest.importorskip("torch")

LAYER, EMBEDDING = "model.layers.0.mlp.up_proj", "model.embed_tokens"
HOOK = "post_hooks.model:layers:0:mlp:up_proj:weight__0.0"
OUT, COLUMNS, GROUP, RANK = 8, 32, 16, 3


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pickles, "subprocess", InProcess)


# --- a checkpoint by hand --------------------------------------------------------------------------------------------


def spec(bits, mode, shape):
    return {
        "num_bits": bits,
        "mode": mode,
        "signedness_to_force": True,
        "narrow_range": False,
        "half_range": False,
        "scale_shape": shape,
        "logarithm_scale": False,
        "is_quantized_on_export": False,
    }


def by_hand(kind="AsymmetricLoraNLSQuantizer"):
    """One layer of 8 x 32 in two groups with an adapter of rank 3, and an embedding of 5 rows in INT8."""
    random = torch.Generator().manual_seed(0)
    groups = (OUT, COLUMNS // GROUP, 1)
    state = {
        f"{HOOK}._num_bits": torch.tensor([4], dtype=torch.int32),
        f"{HOOK}.enabled": torch.tensor([1], dtype=torch.int32),
        f"{HOOK}.lora_A": torch.randn(RANK, COLUMNS, generator=random).bfloat16(),
        f"{HOOK}.lora_B": torch.randn(OUT, RANK, generator=random).bfloat16(),
    }
    if kind.startswith("Asymmetric"):
        state[f"{HOOK}.input_low"] = -torch.rand(groups, generator=random)
        state[f"{HOOK}.input_range"] = 1 + torch.rand(groups, generator=random)
    else:
        state[f"{HOOK}.signed_tensor"] = torch.tensor([1], dtype=torch.int32)
        state[f"{HOOK}.scale"] = torch.randn(groups, generator=random)
    mode = kind.removesuffix("Quantizer").replace("Lora", "_lora").replace("NLS", "_nls").lower()
    adapter = {"lora_rank": RANK, "orig_weight_shape": torch.Size([OUT, COLUMNS]), "weight_shape": (OUT, 2, GROUP)}
    if "NLS" in kind:
        adapter["active_lora_rank"] = RANK
    embedding = "post_hooks.model:embed_tokens:weight__0.0"
    state[f"{embedding}._num_bits"] = torch.tensor([8], dtype=torch.int32)
    state[f"{embedding}.enabled"] = torch.tensor([1], dtype=torch.int32)
    state[f"{embedding}.input_low"] = -torch.rand(5, 1, generator=random)
    state[f"{embedding}.input_range"] = torch.rand(5, 1, generator=random)
    path = "nncf.torch.quantization.layers"
    return {
        "nncf_state_dict": state,
        "nncf_config": {
            "compression_state": [
                {
                    "hook_names_in_model": [HOOK],
                    "module_path": path,
                    "module_cls_name": kind,
                    "module_config": {"qspec": spec(4, mode, torch.Size(groups)), "lspec": adapter},
                },
                {
                    "hook_names_in_model": [embedding],
                    "module_path": path,
                    "module_cls_name": "AsymmetricQuantizer",
                    "module_config": spec(8, "asymmetric", (5, 1)),
                },
            ]
        },
    }


def opened(content, folder):
    torch.save(content, folder / "nncf_checkpoint.pth")
    return NncfCheckpoint.open(folder, allow_pickle=True)


@pytest.mark.parametrize("kind", ["AsymmetricLoraQuantizer", "SymmetricLoraNLSQuantizer"])
def test_values_are_read_exactly(quick, tmp_path, kind):
    content = by_hand(kind)
    state = content["nncf_state_dict"]
    with opened(content, tmp_path) as checkpoint:
        assert checkpoint.modules() == [EMBEDDING, LAYER]
        assert checkpoint.ranks() == {LAYER: RANK}
        assert checkpoint.elastic_ranks() == ({LAYER: RANK} if "NLS" in kind else {})
        assert checkpoint.shape(LAYER) == (OUT, COLUMNS) and checkpoint.shape(EMBEDDING) == (5, None)
        quantizer = checkpoint.quantizer(LAYER)
        assert (quantizer.bits, quantizer.group_size, quantizer.rank) == (4, GROUP, RANK)
        assert quantizer.symmetric == kind.startswith("Symmetric")
        assert quantizer.a.dtype == quantizer.b.dtype == ml_dtypes.bfloat16
        assert quantizer.a.tolist() == state[f"{HOOK}.lora_A"].tolist()
        assert quantizer.b.tolist() == state[f"{HOOK}.lora_B"].tolist()
        names = ["scale"] if quantizer.symmetric else ["input_low", "input_range"]
        assert list(quantizer.ranges) == names
        for name in names:
            array = getattr(quantizer, name)
            assert array.dtype == np.float32 and array.tolist() == state[f"{HOOK}.{name}"][:, :, 0].tolist()
        rows = checkpoint.quantizer(EMBEDDING)
        assert (rows.bits, rows.group_size, rows.rank, rows.a, rows.b) == (8, -1, 0, None, None)
        assert rows.input_low.tolist() == state["post_hooks.model:embed_tokens:weight__0.0.input_low"].tolist()
        checkpoint.release()
        assert checkpoint.quantizer(LAYER).a.tolist() == state[f"{HOOK}.lora_A"].tolist()
        with pytest.raises(BadInput, match="no quantiser for this module"):
            checkpoint.quantizer("lm_head")


def test_folder_layouts(quick, tmp_path):
    (tmp_path / "last").mkdir()
    opened(by_hand(), tmp_path / "last").close()
    (tmp_path / "result.json").write_text("{}")
    source = tmp_path / "last" / "nncf_checkpoint.pth"
    for path, files in (
        (tmp_path, ["nncf_checkpoint.pth", "result.json"]),
        (tmp_path / "last", ["nncf_checkpoint.pth", "result.json"]),
        (source, ["nncf_checkpoint.pth", "result.json"]),
    ):
        with NncfCheckpoint.open(path, allow_pickle=True) as checkpoint:
            assert checkpoint.source == source and checkpoint.modules() == [EMBEDDING, LAYER]
            assert list(checkpoint.sha256()) == files
        with pytest.raises(BadInput, match="--allow-pickle") as caught:
            NncfCheckpoint.open(path)
        assert caught.value.code == "E_PICKLE" and str(source) in str(caught.value)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copyfile(source, elsewhere / source.name)
    with NncfCheckpoint.open(elsewhere, allow_pickle=True) as checkpoint:
        assert checkpoint.result_json is None and list(checkpoint.sha256()) == ["nncf_checkpoint.pth"]
    for missing in (tmp_path / "none", tmp_path / "none.pth"):
        with pytest.raises(BadInput, match="E_MISSING"):
            NncfCheckpoint.open(missing, allow_pickle=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="NNCF checkpoint is missing"):
        NncfCheckpoint.open(tmp_path / "empty", allow_pickle=True)


def test_the_temporary_copy_goes_away(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opened(by_hand(), tmp_path):
        assert len(list(tmp_path.glob("sparseport-pickle-*"))) == 1
    assert not list(tmp_path.glob("sparseport-pickle-*"))
    with pytest.raises(BadInput):
        opened({"nncf_state_dict": {}, "nncf_config": {"compression_state": []}}, tmp_path)
    assert not list(tmp_path.glob("sparseport-pickle-*"))


def drop(name):
    return lambda c: c["nncf_state_dict"].pop(f"{HOOK}.{name}")


def put(name, value):
    return lambda c: c["nncf_state_dict"].update({f"{HOOK}.{name}": value})


def edit(part, key, value):
    return lambda c: c["nncf_config"]["compression_state"][0]["module_config"][part].update({key: value})


def command(key, value):
    return lambda c: c["nncf_config"]["compression_state"][0].update({key: value})


def both_bits(content):
    put("_num_bits", torch.tensor([3], dtype=torch.int32))(content)
    edit("qspec", "num_bits", 3)(content)


def activation(content):
    """A quantiser of an activation, as nncf.quantize inserts it."""
    name = "pre_hooks.model/layers/0/mlp/up_proj/linear/0__0.0"
    entry = copy.deepcopy(content["nncf_config"]["compression_state"][1])
    entry["hook_names_in_model"] = [name]
    content["nncf_config"]["compression_state"].append(entry)
    for part in ("_num_bits", "enabled", "input_low", "input_range"):
        key = f"post_hooks.model:embed_tokens:weight__0.0.{part}"
        content["nncf_state_dict"][f"{name}.{part}"] = content["nncf_state_dict"][key]


def embedding_range(*shape):
    """The embedding's range in another shape, in tensors and config alike."""

    def change(content):
        for part in ("input_low", "input_range"):
            content["nncf_state_dict"][f"post_hooks.model:embed_tokens:weight__0.0.{part}"] = torch.ones(shape)
        content["nncf_config"]["compression_state"][1]["module_config"]["scale_shape"] = shape

    return change


def awq(content):
    """The scale that NNCF's AWQ multiplies activations with where it cannot fold it into weights."""
    content["nncf_config"]["compression_state"].append(
        {
            "hook_names_in_model": ["pre_hooks.model/layers/0/mlp/down_proj/linear/0__0.0"],
            "module_path": "nncf.torch.quantization.layers",
            "module_cls_name": "SQMultiply",
            "module_config": {"scale_shape": [1, 1, COLUMNS]},
        }
    )
    content["nncf_state_dict"]["pre_hooks.model/layers/0/mlp/down_proj/linear/0__0.0._scale_value"] = torch.ones(4)


def second_hook(content):
    content["nncf_config"]["compression_state"].append(
        copy.deepcopy(content["nncf_config"]["compression_state"][0]) | {"hook_names_in_model": [HOOK[:-1] + "1"]}
    )


WRONG = {
    "lora_B missing": (drop("lora_B"), BadInput, r"lora_B; .*found no such tensor"),
    "range missing": (drop("input_range"), BadInput, r"input_range; .*found no such tensor"),
    "tensor too many": (put("scale", torch.ones(1)), BadInput, "a tensor too many"),
    "lora_A transposed": (put("lora_A", torch.ones(COLUMNS, RANK).bfloat16()), BadInput, "lora_A|lora_B"),
    "lora_B of another rank": (put("lora_B", torch.ones(OUT, 2).bfloat16()), BadInput, "hook .*, lora_B"),
    "lora_A flat": (put("lora_A", torch.ones(COLUMNS).bfloat16()), BadInput, "lora_A"),
    "lora_A of whole numbers": (put("lora_A", torch.ones(RANK, COLUMNS).int()), BadInput, "I32"),
    "empty adapter": (put("lora_A", torch.ones(0, COLUMNS).bfloat16()), BadInput, "not empty"),
    "ranges differ": (put("input_range", torch.ones(OUT, 4, 1)), BadInput, "input_range"),
    "range of other rows": (
        lambda c: [put(n, torch.ones(4, 2, 1))(c) for n in ("input_low", "input_range")],
        BadInput,
        "scale_shape",
    ),
    "one range per column": (embedding_range(1, 5), BadInput, r"\[out, 1\]"),
    "groups without adapter": (embedding_range(5, 2, 1), BadInput, r"\[out, 1\]"),
    "one range for all": (embedding_range(1), BadInput, r"\[out, 1\]"),
    "bits 3": (both_bits, Unsupported, "4 and 8 bits"),
    "bits differ": (edit("qspec", "num_bits", 8), BadInput, "num_bits"),
    "mode differs": (edit("qspec", "mode", "symmetric_lora"), BadInput, "mode"),
    "class differs": (command("module_cls_name", "AsymmetricLoraQuantizer"), BadInput, "mode"),
    "narrow range": (edit("qspec", "narrow_range", True), BadInput, "narrow_range"),
    "half range": (edit("qspec", "half_range", True), BadInput, "half_range"),
    "log scale": (edit("qspec", "logarithm_scale", True), BadInput, "logarithm_scale"),
    "switched off": (put("enabled", torch.tensor([0], dtype=torch.int32)), BadInput, "enabled"),
    "lora_rank differs": (edit("lspec", "lora_rank", 2), BadInput, "lora_rank"),
    "active rank below": (edit("lspec", "active_lora_rank", 2), BadInput, "active_lora_rank"),
    "weight of another shape": (edit("lspec", "orig_weight_shape", [OUT, 64]), BadInput, "orig_weight_shape"),
    "other groups": (edit("lspec", "weight_shape", [OUT, 4, 8]), BadInput, "weight_shape"),
    "no spec": (command("module_config", {"qspec": {}}), BadInput, "no spec"),
    "class unknown": (command("module_cls_name", "RBPruningMask"), Unsupported, "no quantiser of a weight"),
    "class as list": (command("module_cls_name", ["AsymmetricQuantizer"]), Unsupported, "no quantiser of a weight"),
    "class as mapping": (command("module_cls_name", {"name": "x"}), Unsupported, "no quantiser of a weight"),
    "no class": (command("module_cls_name", None), Unsupported, "no quantiser of a weight"),
    "class of another package": (command("module_path", "os"), Unsupported, "of 'os'"),
    "activation": (activation, Unsupported, "no quantiser of a weight"),
    "AWQ": (awq, Unsupported, "SQMultiply"),
    "second hook": (second_hook, Unsupported, "no quantiser of a weight"),
    "no names": (command("hook_names_in_model", []), BadInput, "names no hooks"),
    "twice": (command("hook_names_in_model", [HOOK, HOOK]), BadInput, "two quantisers"),
    "not in config": (lambda c: c["nncf_config"]["compression_state"].pop(0), Unsupported, "does not describe"),
    "no quantisers": (
        lambda c: [c["nncf_config"]["compression_state"].clear(), c["nncf_state_dict"].clear()],
        BadInput,
        "no quantisers",
    ),
    "more parts": (lambda c: c.update(epoch=3), Unsupported, "epoch"),
    "state is a list": (lambda c: c.update(nncf_state_dict=[]), BadInput, "no NNCF checkpoint"),
    "config missing": (lambda c: c.pop("nncf_config"), BadInput, "no NNCF checkpoint"),
    "more config": (lambda c: c["nncf_config"].update(algo=1), BadInput, "get_config"),
    "value is no tensor": (put("lora_A", 3), BadInput, "no tensor"),
}


@pytest.mark.parametrize(("change", "kind", "text"), WRONG.values(), ids=WRONG)
def test_contradictions_and_unknown_hooks_are_refused(quick, tmp_path, change, kind, text):
    content = by_hand()
    change(content)
    with pytest.raises(kind, match=text) as caught:
        opened(content, tmp_path)
    assert "nncf_checkpoint.pth" in str(caught.value.where)


def test_unsigned_symmetric_is_refused(quick, tmp_path):
    content = by_hand("SymmetricLoraQuantizer")
    put("signed_tensor", torch.tensor([0], dtype=torch.int32))(content)
    with pytest.raises(BadInput, match="signed_tensor"):
        opened(content, tmp_path)


@pytest.mark.parametrize("name", ["input_low", "input_range", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_and_infinity_are_refused(quick, tmp_path, name, value):
    content = by_hand()
    content["nncf_state_dict"][f"{HOOK}.{name}"][1, 1] = value
    with opened(content, tmp_path) as checkpoint, pytest.raises(BadInput, match=rf"{name} \(1, 1\)") as caught:
        checkpoint.quantizer(LAYER)
    assert caught.value.code == "E_FINITE"


def test_a_wider_adapter_is_read_if_bfloat16_holds_it(quick, tmp_path):
    content = by_hand()
    exact = content["nncf_state_dict"][f"{HOOK}.lora_A"]
    for name in ("lora_A", "lora_B"):
        put(name, content["nncf_state_dict"][f"{HOOK}.{name}"].float())(content)
    with opened(content, tmp_path) as checkpoint:
        read = checkpoint.quantizer(LAYER).a
        assert read.dtype == ml_dtypes.bfloat16 and read.tolist() == exact.tolist()
    put("lora_A", exact.float() + 1e-4)(content)
    with opened(content, tmp_path) as checkpoint, pytest.raises(Unsupported, match="round to bfloat16"):
        checkpoint.quantizer(LAYER)


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base_folder(tmp_path, save_folder, tiny_config):
    """A model whose only linear layer is the one of `by_hand`, with a tied head."""
    random = np.random.default_rng(0)
    tensors = {
        f"{EMBEDDING}.weight": random.normal(size=(5, 6)).astype(np.float16),
        f"{LAYER}.weight": random.normal(size=(OUT, COLUMNS)).astype(np.float16),
        "model.norm.weight": np.ones(6, np.float16),
    }

    def save(**changes):
        merged = {**tensors, **changes}
        return save_folder(tmp_path / "base", tiny_config, {k: v for k, v in merged.items() if v is not None})

    return tensors, save


def test_base_has_to_hold_the_weights(quick, tmp_path, base_folder):
    tensors, save = base_folder
    other = "model.layers.0.mlp.gate_proj.weight"
    with opened(by_hand(), tmp_path) as checkpoint:
        with ModelFolder.open(save(**{other: tensors[f"{LAYER}.weight"]})) as base:
            checkpoint.check_base(base)
            assert checkpoint.warnings == [
                "1 linear layers have no quantiser and stay as they are (model.layers.0.mlp.gate_proj, ...)"
            ]
        for name, value in (
            (f"{LAYER}.weight", np.zeros((OUT, 2 * COLUMNS), np.float16)),
            (f"{LAYER}.weight", None),
            (f"{EMBEDDING}.weight", np.zeros((6, 6), np.float16)),
        ):
            with ModelFolder.open(save(**{name: value})) as base:
                with pytest.raises(BadInput, match=name) as caught:
                    checkpoint.check_base(base)
                assert caught.value.code == "E_PAIRING"


def test_model_state_has_to_be_the_base(quick, tmp_path, base_folder):
    tensors, save = base_folder
    content = by_hand()
    content["model_state"] = {name: torch.from_numpy(array).clone() for name, array in tensors.items()}
    content["model_state"]["lm_head.weight"] = content["model_state"][f"{EMBEDDING}.weight"]  # tied: not in the base
    content["model_state"] |= {f"__nncf_hooks.{key}": value for key, value in content["nncf_state_dict"].items()}
    with opened(content, tmp_path) as checkpoint:
        with pytest.raises(ValueError, match="check_base first"):
            checkpoint.quantizer(LAYER)
        with ModelFolder.open(save()) as base:
            checkpoint.check_base(base)
        assert checkpoint.quantizer(LAYER).rank == RANK
    changed = {
        "model.norm.weight": torch.full((6,), 1.5),
        "lm_head.weight": torch.zeros(5, 6),
        "model.extra.weight": torch.zeros(6),
        f"__nncf_hooks.{HOOK}.enabled": torch.tensor([0], dtype=torch.int32),
    }
    for name, value in changed.items():
        other = {**content, "model_state": {**content["model_state"], name: value}}
        with opened(other, tmp_path) as checkpoint, ModelFolder.open(save()) as base:
            with pytest.raises(Unsupported, match="not those of the base") as caught:
                checkpoint.check_base(base)
            assert caught.value.code == "E_MODEL_STATE" and name in str(caught.value)
            with pytest.raises(ValueError, match="check_base first"):
                checkpoint.quantizer(LAYER)


# --- the choice of ranks ---------------------------------------------------------------------------------------------

TRAINED = {f"model.layers.{layer}.{name}": 32 for layer in (0, 1, 2) for name in ("self_attn.q_proj", "mlp.up_proj")}


def test_ranks_by_layer(tmp_path):
    path = tmp_path / "result.json"
    expected = {module: (24, 32, 16)[int(module.split(".")[2])] for module in TRAINED}
    result = {"finetuning_results": {"method": "NLS", "best_heuristic_rank_config": [24, 32, 16], "torch_result": {}}}
    for content in (result, [24, 32, 16]):
        path.write_text(json.dumps(content))
        assert read_nls_ranks(path, TRAINED) == expected


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"finetuning_results": {"method": "LoRA"}}, "no list of ranks"),
        ({"torch_result_before_compression": 1}, "no list of ranks"),
        ([24, "32", 16], "no list of ranks"),
        ([24, True, 16], "no list of ranks"),
        ([24, 32], "does not fit the model's layers"),
        ([24, 32, 16, 16], "does not fit the model's layers"),
        ([24, 33, 16], r"layer 1, .*expected 1\.\.32, found 33"),
        ([24, 0, 16], r"expected 1\.\.32, found 0"),
        ({"finetuning_results": {"best_heuristic_rank_config": [24, 48, 16]}}, "found 48"),
    ],
)
def test_wrong_ranks_are_refused(tmp_path, content, text):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=text) as caught:
        read_nls_ranks(path, TRAINED)
    assert caught.value.code == "E_ELASTIC" and str(path) in str(caught.value)


def test_ranks_need_layers_and_elastic_adapters(tmp_path):
    path = tmp_path / "ranks.json"
    path.write_text("[8]")
    with pytest.raises(BadInput, match="in none"):
        read_nls_ranks(path, {"lm_head": 8})
    with pytest.raises(BadInput, match="does not fit"):
        read_nls_ranks(path, {"model.layers.1.mlp.up_proj": 8})  # layer 0 is missing
    with pytest.raises(BadInput, match="one rank only"):
        read_nls_ranks(path, {})


# --- a checkpoint that NNCF wrote ------------------------------------------------------------------------------------


def test_a_real_checkpoint_is_read_as_nncf_loads_it(tmp_path, tiny_base):
    """Saved as in NNCF's examples, with its enumerations, and read in a process that never loads NNCF."""
    go_offline()
    transformers = pytest.importorskip("transformers")
    nncf = pytest.importorskip("nncf")
    from nncf.torch.function_hook.wrapper import get_hook_storage

    ids = torch.arange(4)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=32,
        compression_format=nncf.CompressionFormat.FQ_LORA_NLS,
        dataset=nncf.Dataset([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]),
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=8),
    )
    storage = get_hook_storage(model)
    content = {"nncf_state_dict": storage.state_dict(), "nncf_config": nncf.torch.get_config(model)}
    torch.save(content, tmp_path / "nncf_checkpoint.pth")
    with NncfCheckpoint.open(tmp_path, allow_pickle=True) as checkpoint, ModelFolder.open(tiny_base) as base:
        checkpoint.check_base(base)
        assert checkpoint.warnings == []
        assert set(checkpoint.modules()) == {*base.linear_names(), base.embedding_name}
        assert set(checkpoint.elastic_ranks()) == set(base.linear_names()) - {"lm_head"}
        assert set(checkpoint.ranks().values()) == {8}
        for name, hook in storage.named_hooks():
            module = name.split(".")[1].split("__")[0].replace(":", ".").removesuffix(".weight")
            quantizer = checkpoint.quantizer(module)
            assert quantizer.bits == hook.num_bits
            if hook.num_bits == 4:
                assert quantizer.scale.tolist() == hook.scale[:, :, 0].tolist()
                assert quantizer.a.tolist() == hook.lora_A.tolist() and quantizer.b.tolist() == hook.lora_B.tolist()
            else:
                assert quantizer.input_low.tolist() == hook.input_low.tolist()
                assert quantizer.input_range.tolist() == hook.input_range.tolist()
