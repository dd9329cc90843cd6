"""Whatever a JSON file of a checkpoint says, readers either take it or refuse it with an error of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseport.checkpoints.elastic import choose_ranks, read_search_space
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.gptq import gptq_config_dict, gptq_tensors, read_gptq_linear, read_quantization_config
from sparseport.checkpoints.peft import AdapterFolder, write_adapter
from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.errors import SparseportError
from sparseport.weights.linear import LowRankBranch, QuantizedWeight
from sparseport.weights.packing import ZeroPointStorage

MODULE = "model.layers.0.self_attn.q_proj"
TARGET = f"base_model.model.{MODULE}.lora_A"

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([4, 8, -1, "gptq", "gptq_v2", "q_proj", "none", TARGET, "../x", 10**300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A GPTQ folder, a sharded folder and an adapter, whose JSON files the tests overwrite."""
    root = tmp_path_factory.mktemp("hostile")
    layer = QuantizedWeight(
        np.full((64, 64), 8, np.uint8), np.ones((64, 2), np.float16), np.full((64, 2), 8, np.uint8), 32
    )
    tensors = gptq_tensors(MODULE, layer, ZeroPointStorage.V1)
    tensors["model.embed_tokens.weight"] = np.ones((8, 64), np.float16)
    specs = [spec_of(name, array) for name, array in tensors.items()]
    for folder, weights in (("gptq", "model.safetensors"), ("sharded", "shard")):
        (root / folder).mkdir()
        write_safetensors(root / folder / weights, specs)
    (root / "sharded" / "config.json").write_text('{"model_type": "llama"}')
    branch = LowRankBranch(np.ones((8, 64), np.float32), np.ones((64, 8), np.float32), 2.0)
    write_adapter(root / "adapter", {MODULE: branch}, r=8, alpha=16, target_modules=["q_proj"], base_model_name="x")
    return root


def only_ours(path: Path, value: object, use) -> None:
    path.write_text(json.dumps(value))
    try:
        use()
    except SparseportError as error:
        assert str(path.parent) in str(error)
        assert "\x1b" not in str(error)


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(
        [
            "r",
            "lora_alpha",
            "target_modules",
            "bias",
            "peft_type",
            "use_dora",
            "rank_pattern",
            "init_lora_weights",
            "sparse_adapter",
            "base_model_name_or_path",
            "x",
        ]
    ),
    value=values,
)
def test_adapter_config(key, value, scratch):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], key: value}

    def use():
        with AdapterFolder.open(scratch / "adapter") as adapter:
            assert adapter.branch(MODULE).scaling == adapter.alpha / adapter.r

    only_ours(scratch / "adapter" / "adapter_config.json", config, use)


@settings(max_examples=150, deadline=None)
@given(value=values, path=st.sampled_from(["whole", "weight_map", "entry", "metadata", "total_size"]))
def test_index(path, value, scratch):
    names = [f"{MODULE}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")] + ["model.embed_tokens.weight"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "shard")}
    if path == "entry":
        index["weight_map"][names[0]] = value
    elif path == "total_size":
        index["metadata"]["total_size"] = value
    else:
        index[path] = value
    index = value if path == "whole" else index
    only_ours(
        scratch / "sharded" / "model.safetensors.index.json",
        index,
        lambda: ModelFolder.open(scratch / "sharded").close(),
    )


@settings(max_examples=250, deadline=None)
@given(
    key=st.sampled_from(
        [
            "bits",
            "group_size",
            "sym",
            "desc_act",
            "checkpoint_format",
            "format",
            "quant_method",
            "dynamic",
            "pack_dtype",
            "x",
            "quantization_config",
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "tie_word_embeddings",
            "text_config",
            "model_type",
            "head_dim",
        ]
    ),
    value=values,
)
def test_model_config(key, value, scratch):
    quantization = gptq_config_dict(group_size=32, sym=True, storage=ZeroPointStorage.V1)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "quantization_config": quantization,
    }
    (quantization if key in quantization or key in ("format", "dynamic", "pack_dtype", "x") else config)[key] = value

    def use():
        with ModelFolder.open(scratch / "gptq") as folder:
            folder.check_layers()
            assert folder.linear_names() == [MODULE]
            layer = read_gptq_linear(folder, MODULE, read_quantization_config(folder))
            assert (layer.codes == 8).all() and (layer.zero_points == 8).all()

    only_ours(scratch / "gptq" / "config.json", config, use)


@settings(max_examples=150, deadline=None)
@given(value=values, place=st.sampled_from(["whole", "entry", "target", "search_space"]))
def test_search_space(place, value, scratch):
    entry = {"target": [TARGET], "search_space": [8, 4]}
    if place in entry:
        entry[place] = value
    whole = value if place == "whole" else [value] if place == "entry" else [entry]
    path = scratch / "elastic_adapter_config.json"
    only_ours(path, whole, lambda: choose_ranks(read_search_space(path), "heuristic"))


@settings(max_examples=150, deadline=None)
@given(value=values, place=st.sampled_from(["whole", "entry", "target", "active_rank_value"]))
def test_custom_ranks(place, value, scratch):
    entry = {"target": [TARGET], "active_rank_value": 4}
    if place in entry:
        entry[place] = value
    whole = value if place == "whole" else [value] if place == "entry" else [entry]
    path = scratch / "custom.json"
    space = scratch / "space.json"
    space.write_text(json.dumps([{"target": [TARGET], "search_space": [8, 4]}]))
    only_ours(path, whole, lambda: choose_ranks(read_search_space(space), path))
