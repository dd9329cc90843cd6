"""Model folders: config, index, shards, ties and layers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.errors import BadInput, SparseportError, Unsupported


@pytest.fixture
def tiny(tmp_path, save_folder, tiny_config, tiny_tensors) -> Path:
    return save_folder(tmp_path / "model", tiny_config, tiny_tensors)


@pytest.fixture
def sharded(tmp_path, tiny_config, tiny_tensors) -> Path:
    """The tiny model in two shards with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config))
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, array in tiny_tensors.items():
        parts[f"model-0000{2 if '.layers.1.' in name else 1}-of-00002.safetensors"][name] = array
    for shard, tensors in parts.items():
        write_safetensors(folder / shard, [spec_of(name, array) for name, array in tensors.items()])
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tiny_tensors.values())},
        "weight_map": {name: shard for shard, tensors in parts.items() for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def refused(folder: Path, kind: type[SparseportError] = BadInput, **options) -> SparseportError:
    with pytest.raises(kind) as caught:
        ModelFolder.open(folder, **options)
    assert str(folder) in str(caught.value)
    return caught.value


def test_single_file(tiny, tiny_tensors):
    with ModelFolder.open(tiny) as folder:
        assert set(folder.names()) == set(tiny_tensors)
        assert len(folder.linear_names()) == 14
        assert folder.linear_names()[:2] == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"]
        assert folder.embedding_name == "model.embed_tokens"
        assert folder.tied_head is True and folder.head_name is None
        assert folder.warnings == []
        folder.check_layers()
        assert all(np.array_equal(folder.read(name), array) for name, array in tiny_tensors.items())
        assert folder.info("model.norm.weight").shape == (64,)
        assert folder.has("model.norm.weight") and not folder.has("model.norm.bias")
        with pytest.raises(BadInput, match=r"tensor model\.norm\.bias"):
            folder.read("model.norm.bias")


def test_input_files_and_their_digests(tiny):
    (tiny / "tokenizer.json").write_text("{}")
    (tiny / "README.md").write_text("words")
    with ModelFolder.open(tiny) as folder:
        assert [path.name for path in folder.input_files()] == ["config.json", "model.safetensors", "tokenizer.json"]
        want = {n: hashlib.sha256((tiny / n).read_bytes()).hexdigest() for n in ("config.json", "model.safetensors")}
        assert {n: d for n, d in folder.sha256().items() if n in want} == want


def test_shards(sharded, tiny_tensors):
    with ModelFolder.open(sharded) as folder:
        assert folder.warnings == []
        assert all(np.array_equal(folder.read(name), array) for name, array in tiny_tensors.items())
        assert [path.name for path in folder.input_files()] == [
            "config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        folder.check_layers()


def test_missing_shard_is_named_with_its_first_tensor(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    error = refused(sharded)
    assert "model-00002-of-00002.safetensors" in str(error) and "model.layers.1." in str(error)


def test_tensor_mapped_to_the_wrong_shard(sharded):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_index(sharded, lambda index: index["weight_map"].update({name: "model-00002-of-00002.safetensors"}))
    error = refused(sharded)
    assert error.code == "E_INDEX" and "model.layers.0.mlp.up_proj.weight" in str(error)


def test_tensor_that_the_index_does_not_name(sharded):
    edit_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    error = refused(sharded)
    assert error.code == "E_INDEX" and "model.norm.weight" in str(error) and "--ignore-extra" in str(error)
    with ModelFolder.open(sharded, ignore_extra=True) as folder:
        assert not folder.has("model.norm.weight")
        assert any("model.norm.weight" in warning for warning in folder.warnings)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "C:\\x", "\\\\srv\\x", "", 5, None])
def test_index_that_leaves_the_folder(sharded, name):
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    assert refused(sharded).code == "E_PATH"


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_a_map(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert refused(sharded).code == "E_INDEX"


def test_shard_that_is_a_link_out_of_the_folder(sharded, tmp_path):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert refused(sharded).code == "E_PATH"


def test_hard_linked_shard_is_read(sharded, tmp_path):
    """Unlike a symbolic link, a hard link points nowhere: it is the file itself, and whoever could make it could have
    copied the bytes. Caches and `cp -l` make them, so refusing them would refuse whole model stores, and inputs are
    only ever read.
    """
    shard = sharded / "model-00002-of-00002.safetensors"
    os.link(shard, tmp_path / "elsewhere")
    with ModelFolder.open(sharded) as folder:
        assert folder.read("model.layers.1.mlp.up_proj.weight").any()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_shard_that_is_no_file(sharded, make):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    make(shard)
    assert refused(sharded).code == "E_PATH"


def test_wrong_total_size_is_a_warning(sharded):
    edit_index(sharded, lambda index: index["metadata"].update(total_size=1))
    with ModelFolder.open(sharded) as folder:
        assert len(folder.warnings) == 1 and "total_size is 1" in folder.warnings[0]


def test_damaged_shard_is_named(sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    error = refused(sharded)
    assert error.code == "E_ST_TRUNC" and shard.name in str(error)


CONFIGS = {
    "missing": None,
    "empty": b"",
    "empty object": b"{}",
    "array": b"[]",
    "duplicate keys": b'{"a":1,"a":2}',
    "NaN": b'{"a":NaN}',
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config(tiny, case):
    (tiny / "config.json").unlink()
    if CONFIGS[case] is not None:
        (tiny / "config.json").write_bytes(CONFIGS[case])
    assert "config.json" in str(refused(tiny))


@pytest.mark.parametrize("nest", [False, True])
def test_auto_map_is_refused_and_nothing_is_imported(tiny, tiny_config, tmp_path, nest):
    canary = tmp_path / "canary"
    (tiny / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    remote = {"auto_map": {"AutoModel": "modeling_x.Model"}}
    (tiny / "config.json").write_text(json.dumps({**tiny_config, **({"text_config": remote} if nest else remote)}))
    assert refused(tiny, Unsupported).code == "E_REMOTE_CODE"
    assert not canary.exists()


def test_private_keys_do_not_reach_the_config(tiny, tiny_config):
    private = {"_attn_implementation_internal": "evil/kernel", "_name_or_path": "a", "text_config": {"_x": 1, "y": 2}}
    (tiny / "config.json").write_text(json.dumps({**tiny_config, **private}))
    with ModelFolder.open(tiny) as folder:
        assert folder.config == {**tiny_config, "text_config": {"y": 2}}
        assert [w for w in folder.warnings if "_attn_implementation_internal" in w]
        assert not [w for w in folder.warnings if "_name_or_path" in w]


def test_pickles_beside_safetensors_are_mentioned(tiny):
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tiny / "optimizer.pt").write_bytes(b"\x80\x02}q\x00.")
    with ModelFolder.open(tiny) as folder:
        assert folder.warnings == ["pytorch_model.bin is not used: safetensors files are present"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_only_pickles(tiny, name):
    (tiny / "model.safetensors").rename(tiny / name)
    error = refused(tiny)
    assert error.code == "E_PICKLE" and "safetensors" in str(error) and "--allow-pickle" in str(error)


@pytest.mark.slow
def test_allowed_pickle_is_read_without_running_it(tiny, tiny_tensors, tmp_path):
    torch = pytest.importorskip("torch")
    (tiny / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tiny_tensors.items()}, tiny / "pytorch_model.bin")
    with ModelFolder.open(tiny, allow_pickle=True) as folder:
        assert all(np.array_equal(folder.read(name), array) for name, array in tiny_tensors.items())
        assert [path.name for path in folder.input_files()] == ["config.json", "pytorch_model.bin"]
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    torch.save({"x": Attack()}, tiny / "pytorch_model.bin")
    assert refused(tiny, allow_pickle=True).code == "E_PICKLE"
    assert not canary.exists()


def test_single_file_wins_over_an_index(sharded, tiny, tiny_tensors):
    (sharded / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with ModelFolder.open(sharded) as folder:
        assert folder.warnings == ["model.safetensors.index.json is not used: model.safetensors is present"]
        assert set(folder.names()) == set(tiny_tensors)


def test_no_weights(tiny):
    refused(tiny / "nothing")
    refused(tiny / "config.json")
    for name in ("model-00001-of-00002.safetensors", "x-1-of-10.safetensors", "adapter_model.safetensors"):
        (next(tiny.glob("*.safetensors"))).rename(tiny / name)
        error = refused(tiny)
        assert name in str(error) and error.code == "E_MISSING"
    (tiny / name).unlink()
    assert "no safetensors file" in str(refused(tiny))


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "model-00001-of-00001.safetensors"])
def test_the_only_file_may_have_any_name(tiny, tiny_tensors, name):
    (tiny / "model.safetensors").rename(tiny / name)
    with ModelFolder.open(tiny) as folder:
        assert len(folder.warnings) == 1 and name in folder.warnings[0]
        assert set(folder.names()) == set(tiny_tensors) and name in folder.sha256()
    (tiny / "pytorch_model.bin").write_bytes(b"")
    error = refused(tiny)  # which of the two is the model?
    assert error.code == "E_PICKLE" and f"rename {name}" in error.fix
    (tiny / "pytorch_model.bin").unlink()
    (tiny / "other.safetensors").write_bytes((tiny / name).read_bytes())
    assert refused(tiny).code == "E_MISSING"


def test_a_link_of_that_name_stays_in_the_folder(tiny, tmp_path):
    (tiny / "model.safetensors").rename(tmp_path / "elsewhere")
    (tiny / "only.safetensors").symlink_to(tmp_path / "elsewhere")
    assert refused(tiny).code == "E_PATH"


def reopened(tiny, save_folder, config, tensors) -> ModelFolder:
    return ModelFolder.open(save_folder(tiny, config, tensors))


def test_head_saved_twice_and_equal_is_tied(tiny, save_folder, tiny_config, tiny_tensors):
    tiny_tensors["lm_head.weight"] = tiny_tensors["model.embed_tokens.weight"].copy()
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder:
        assert folder.tied_head is True
        assert "lm_head" not in folder.linear_names()


@pytest.mark.parametrize("change", ["value", "shape", "dtype"])
def test_declared_tied_but_different(tiny, save_folder, tiny_config, tiny_tensors, change):
    head = tiny_tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    tiny_tensors["lm_head.weight"] = {"value": head, "shape": head[:16], "dtype": head.astype(np.float32)}[change]
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder:
        with pytest.raises(BadInput, match=r"tensor lm_head\.weight") as caught:
            _ = folder.tied_head
        assert caught.value.code == "E_TIED"


@pytest.mark.parametrize("declared", [False, None])
def test_untied_but_missing(tiny, save_folder, tiny_config, tiny_tensors, declared):
    tiny_config.pop("tie_word_embeddings") if declared is None else tiny_config.update(tie_word_embeddings=declared)
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder, pytest.raises(BadInput, match="lm_head"):
        _ = folder.tied_head


def test_untied_head_is_a_linear_layer(tiny, save_folder, tiny_config, tiny_tensors):
    tiny_config["tie_word_embeddings"] = False
    tiny_tensors["lm_head.weight"] = tiny_tensors["model.embed_tokens.weight"].copy()
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder:
        assert folder.tied_head is False
        assert "lm_head" in folder.linear_names()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 5),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("num_attention_heads", "4"),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", None),
        ("hidden_size", 0),
    ],
)
def test_impossible_heads_and_layers(tiny, save_folder, tiny_config, tiny_tensors, key, value):
    with reopened(tiny, save_folder, {**tiny_config, key: value}, tiny_tensors) as folder:
        with pytest.raises(BadInput) as caught:
            folder.check_layers()
        assert caught.value.code == "E_CONFIG" and "config.json" in str(caught.value)


def test_missing_and_extra_layers(tiny, save_folder, tiny_config, tiny_tensors):
    for count, named in ((3, "model.layers.2."), (10**12, "model.layers.2."), (1, "model.layers.1.")):
        with reopened(tiny, save_folder, {**tiny_config, "num_hidden_layers": count}, tiny_tensors) as folder:
            with pytest.raises(BadInput) as caught:
                folder.check_layers()
            assert caught.value.code == "E_LAYERS"
            assert str(caught.value).split(" and ")[0].count(named) == 3


def test_missing_layer_tensor(tiny, save_folder, tiny_config, tiny_tensors):
    del tiny_tensors["model.layers.1.self_attn.k_proj.weight"]
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder:
        with pytest.raises(BadInput, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
            folder.check_layers()


def test_layer_ten_comes_after_layer_two(tiny, save_folder, tiny_config):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": np.zeros((8, 8), np.float16) for i in (10, 2, 0)}
    with reopened(tiny, save_folder, tiny_config, tensors) as folder:
        assert [name.split(".")[2] for name in folder.names()] == ["0", "2", "10"]


@pytest.mark.parametrize("digits", [19, 5000])
def test_number_of_thousands_of_digits_in_a_name(tiny, save_folder, tiny_config, tiny_tensors, digits):
    """Python itself refuses to read such a number."""
    tiny_tensors[f"model.layers.{'9' * digits}.mlp.up_proj.weight"] = np.zeros((8, 8), np.float16)
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder:
        assert folder.names()[-1] == "model.norm.weight"
        with pytest.raises(BadInput, match="beyond the config's number of layers") as caught:
            folder.check_layers()
        assert caught.value.code == "E_LAYERS"


def test_folder_without_layers_or_embedding(tiny, save_folder, tiny_config):
    with reopened(tiny, save_folder, tiny_config, {"lm_head.weight": np.zeros((2, 2), np.float16)}) as folder:
        with pytest.raises(BadInput, match="no layer tensors"):
            folder.check_layers()
        with pytest.raises(BadInput, match="no token embedding"):
            _ = folder.embedding_name


def test_experts_may_differ_from_layer_to_layer(tiny, save_folder, tiny_config, tiny_tensors):
    tiny_tensors["model.layers.1.mlp.experts.0.up_proj.weight"] = np.zeros((8, 64), np.float16)
    with reopened(tiny, save_folder, tiny_config, tiny_tensors) as folder:
        folder.check_layers()


@pytest.mark.shared
def test_bfloat16_embedding(shared_dir):
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    with ModelFolder.open(shared_dir / "checkpoints" / "gptq-v1-asym-g64-autoround") as folder:
        embedding = folder.read("model.embed_tokens.weight")
        assert embedding.dtype.name == "bfloat16" and embedding.shape == (1024, 576)
        assert np.isfinite(embedding.astype(np.float32)).all()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gptq-v1-asym-g64-autoround", "compressed-tensors-pack-asym-g64"])
def test_third_party_folders(shared_dir, name):
    with ModelFolder.open(shared_dir / "checkpoints" / name) as folder:
        folder.check_layers()
        assert len(folder.linear_names()) == 14
        assert folder.tied_head is True
