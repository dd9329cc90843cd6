"""The files around the IR: what is copied, what is left out, and a tokenizer that belongs to its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sparseport.errors import BadInput
from sparseport.targets.model_files import copy_tokenizer_files, write_config, write_generation_config
from sparseport.targets.openvino.tokenizer import convert_tokenizer_folder
from sparseport.targets.tokenizer_files import check_ids

HOME = "/home/alice/models"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def put(base: Path, name: str, data: object) -> bytes:
    """Write a JSON file in a form that no writer of ours has, so that a rewritten file shows."""
    text = json.dumps(data, indent=7, separators=(" ,", " : ")).encode()
    (base / name).write_bytes(text)
    return text


def everything(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))


def test_a_source_full_of_paths_leaks_nothing(base, out):
    kept = {
        "model_max_length": 2048,
        "chat_template": "{% for m in messages %}/{{ m }}{% endfor %}",
        "eos_token": "</s>",
    }
    put(
        base,
        "tokenizer_config.json",
        {
            "name_or_path": f"{HOME}/mine",
            **kept,
            "special_tokens_map_file": f"{HOME}/cache/special_tokens_map.json",
            "tokenizer_file": "C:\\Users\\alice\\tokenizer.json",
            "vocab_file": "../alice/vocab.json",
            "merges_file": "~alice/merges.txt",
            "auto_map": {"AutoTokenizer": ["alice.Tokenizer", None]},
            "processor": {"_name_or_path": f"{HOME}/other", "size": [{"tokenizer_file": f"{HOME}/x"}, 3]},
        },
    )
    put(base, "special_tokens_map.json", {"pad_token": "<pad>", "_name_or_path": "./alice"})
    put(base, "config.json", {"model_type": "llama", "_name_or_path": f"{HOME}/mine"})
    put(base, "generation_config.json", {"eos_token_id": 0, "_from_model_config": True, "_name_or_path": HOME})
    write_config(json.loads((base / "config.json").read_text()), out)
    write_generation_config(base, {}, out)
    assert copy_tokenizer_files(base, out) == ["tokenizer_config.json", "special_tokens_map.json"]
    assert "alice" not in everything(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config == {**kept, "processor": {"size": [{}, 3]}}
    assert list(config) == [*kept, "processor"]  # the order of keys is the source's
    assert json.loads((out / "special_tokens_map.json").read_text()) == {"pad_token": "<pad>"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        {"name_or_path": "", "tokenizer_file": None, "special_tokens_map_file": None},
        {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"},
        {"chat_template": f"{HOME}/is/no/path/here", "extra_special_tokens": {"a": "</think>"}},
    ],
)
def test_without_paths_files_are_copied_byte_for_byte(base, out, fields):
    texts = {name: put(base, name, fields) for name in ("tokenizer_config.json", "special_tokens_map.json")}
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja"):
        texts[name] = f'{{"{name}": 1}}\r\n'.encode()
        (base / name).write_bytes(texts[name])
    assert sorted(copy_tokenizer_files(base, out)) == sorted(texts)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == texts


@pytest.mark.parametrize("key", ["name_or_path", "_name_or_path"])
@pytest.mark.parametrize("value", [f"{HOME}/x", "/x", "x/y/z", "../x", "./x", "~/x", "~", "x/", "C:\\x", "C:x", "a\\b"])
def test_a_path_is_told_from_a_hub_name(base, out, key, value):
    put(base, "tokenizer_config.json", {key: value, "other": value})
    copy_tokenizer_files(base, out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"other": value}


def test_a_broken_tokenizer_config_is_named(base, out):
    (base / "tokenizer_config.json").write_text('{"eos_token": "a", "eos_token": "b"}')
    with pytest.raises(BadInput, match=r"tokenizer_config\.json") as caught:
        copy_tokenizer_files(base, out)
    assert caught.value.exit_code == 3 and caught.value.code == "E_JSON"


def test_a_tokenizer_file_that_leads_out_of_the_folder_is_refused(base, out, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput):
        copy_tokenizer_files(base, out)
    assert list(out.iterdir()) == []


def test_the_largest_id_decides():
    check_ids({"a": 0, "b": 7}, 8, "here")
    check_ids({"a": 0, "b": 7}, 900, "here")
    with pytest.raises(BadInput) as caught:
        check_ids({"a": 0, "<pad>": 9, "b": 8}, 8, "here")
    error = caught.value
    assert error.code == "E_TOKENIZER" and error.exit_code == 3 and error.where == "here"
    assert "2 tokens" in error.what and error.expected.startswith("ids below 8,")
    assert error.found == "'<pad>' with id 9" and "--no-tokenizer" in error.fix


def with_vocab_size(tiny_base: Path, folder: Path, size: int) -> Path:
    folder.mkdir()
    for path in tiny_base.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    return folder


def test_a_tokenizer_of_another_model_is_refused(tiny_base, tmp_path, out):
    """The tiny tokenizer has the ids 0 to 255."""
    pytest.importorskip("openvino_tokenizers")
    source = with_vocab_size(tiny_base, tmp_path / "small", 255)
    for vocab_size in (None, 255):
        with pytest.raises(BadInput, match="id 255") as caught:
            convert_tokenizer_folder(source if vocab_size is None else tiny_base, out, vocab_size)
        assert caught.value.code == "E_TOKENIZER"
    assert list(out.iterdir()) == []


def test_an_added_token_beyond_the_embedding_is_refused(tiny_base, tmp_path, out):
    """A padding token added for fine-tuning, while the embedding was not resized: the most frequent case."""
    pytest.importorskip("openvino_tokenizers")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    source = with_vocab_size(tiny_base, tmp_path / "added", 256)
    tokenizer.save_pretrained(source)
    with pytest.raises(BadInput, match="'<padding>' with id 256") as caught:
        convert_tokenizer_folder(source, out)
    assert caught.value.exit_code == 3


def test_a_tokenizer_that_fills_the_vocabulary_is_converted(tiny_base, out):
    pytest.importorskip("openvino_tokenizers")
    convert_tokenizer_folder(tiny_base, out)
    names = {f"openvino_{kind}.{suffix}" for kind in ("tokenizer", "detokenizer") for suffix in ("xml", "bin")}
    assert {path.name for path in out.iterdir()} == names


def test_the_tokenizers_class_is_one_that_older_transformers_know(tiny_base: Path, tmp_path: Path) -> None:
    """transformers 5 saves `TokenizersBackend`, which version 4 (and with it optimum-onnx) refuses."""
    import json

    from transformers import AutoTokenizer

    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    copy_tokenizer_files(tmp_path / "base", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert one("abc Xyz")["input_ids"] == two("abc Xyz")["input_ids"]
