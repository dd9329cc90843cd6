"""GGUF conversion: the weights and settings of the file, what rounding changes, and the proof of all that."""

from __future__ import annotations

import json
import stat
import struct

import numpy as np
import pytest

from e2e.in_process import in_process
from gguf_files import HEADS, SAMPLES, TEMPLATE, description, ids, rotary_order, spelled, write_gguf
from sparseport.checkpoints import gguf_proof
from sparseport.checkpoints.gguf import build_tokenizer, convert_gguf, convert_with_notes
from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.checkpoints.gguf_model import place_tensors, read_model
from sparseport.checkpoints.gguf_proof import interleaved_rows, prove
from sparseport.errors import BadInput, FidelityError, OutputExists, Unsupported
from sparseport.recipe import make_recipe
from sparseport.sources import open_sources

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
reference = pytest.importorskip("safetensors.numpy")

DOWN = "blk.0.ffn_down.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    model = write_gguf(root / "tiny.gguf")
    return model, convert_gguf(root / "tiny.gguf", root / "out")


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_converted_weights_are_those_of_the_file(tmp_path, kind, tied):
    model = write_gguf(tmp_path / "tiny.gguf", kind=kind, tied=tied)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float16
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), expected[name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_names_and_order_are_those_of_llama_cpp(tmp_path, kind):
    """The gguf package's own table of names, from Hugging Face to GGUF."""
    write_gguf(tmp_path / "tiny.gguf", kind=kind)
    file = GgufFile.open(tmp_path / "tiny.gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], 2)
    places = place_tensors(file, read_model(file))
    assert list(places) == [tensor.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors]
    for ours, place in places.items():
        module, _, leaf = place.name.rpartition(".")
        assert ours == f"{table.get_name(module)}.{leaf}"


def test_settings_are_those_that_transformers_reads(converted):
    """For a file without anything unusual; what transformers passes over is refused (test_gguf_refused)."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    _, folder = converted
    config = json.loads((folder / "config.json").read_text())
    theirs = load_gguf_checkpoint(folder.parent / "tiny.gguf")["config"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": theirs.pop("rope_theta")}
    for key in ("_model_name_or_path", "unk_token_id"):
        theirs.pop(key, None)
    assert {key: config.get(key) for key in theirs} == theirs
    assert (config["attention_bias"], config["mlp_bias"], config["hidden_act"]) == (False, False, "silu")


def test_converted_folder_holds_what_a_checkpoint_needs_and_nothing_of_the_machine(converted):
    _, folder = converted
    files = {file.name: file for file in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(files)
    config = json.loads(files["config.json"].read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"
    assert config["rms_norm_eps"] == float(np.float32(1e-5))
    assert not [key for key in config if key.startswith("_")]
    for file in files.values():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        if file.suffix == ".json":
            text = file.read_text()
            assert str(folder.parent) not in text and "not for the config" not in text
    generation = json.loads(files["generation_config.json"].read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)
    assert json.loads(files["tokenizer_config.json"].read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(file.name for file in folder.parent.iterdir()) == ["out", "tiny.gguf"]


def test_converted_tokenizer_survives_loading_and_saving_again(converted, tmp_path):
    _, folder = converted
    built = build_tokenizer(description())
    first = transformers.AutoTokenizer.from_pretrained(folder)
    first.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    second = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (first, second):
        for text in [*SAMPLES, "<|start|>hi 12<|end|>"]:
            assert ids(tokenizer, text) == ids(built, text)
            assert tokenizer.decode(ids(tokenizer, text)) == text
        assert tokenizer.chat_template == TEMPLATE
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|end|>")


def check_openvino(tokenizer):
    """The tokenizer and detokenizer graphs must agree with the Python tokenizer."""
    openvino_tokenizers = pytest.importorskip("openvino_tokenizers")
    import openvino

    encode, decode = (
        openvino.compile_model(graph, "CPU")
        for graph in openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    )
    for text in filter(None, SAMPLES):
        encoded = encode([text])["input_ids"]
        assert encoded[0].tolist() == ids(tokenizer, text)
        assert decode(encoded)["string_output"][0] == text


def test_converted_tokenizer_runs_in_openvino(converted):
    check_openvino(transformers.AutoTokenizer.from_pretrained(converted[1]))


def test_an_existing_output_is_kept(converted, tmp_path):
    _, folder = converted
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        convert_gguf(folder.parent / "tiny.gguf", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="unknown dtype"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out", dtype="int8")


# --- what rounding changes -------------------------------------------------------------------------------------------


def test_a_block_is_scale_times_codes_and_rounded_once(tmp_path):
    """Q8_0: a float16 scale and 32 signed bytes. 0.1 in float16 is 1638 / 2**14."""
    codes = np.arange(-60, 68, 2, dtype=np.int8).reshape(2, 32)
    row = b"".join(struct.pack("<e", 0.1) + part.tobytes() for part in codes)
    blocks = np.frombuffer(row * 32, np.uint8).reshape(32, len(row))
    write_gguf(tmp_path / "tiny.gguf", tensors={DOWN: blocks}, stored={DOWN: "Q8_0"})
    done = convert_with_notes(tmp_path / "tiny.gguf", tmp_path / "half")
    exact = np.tile(codes.reshape(-1).astype(np.float64) * 1638 / 2**14, (32, 1))
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(reference.load_file(done.folder / "model.safetensors")[name], exact.astype(np.float16))
    expected = int((exact.astype(np.float16) != exact).sum())
    assert 0 < expected < exact.size
    assert (done.rounding.values, done.rounding.rounded) == (35552, expected)
    assert done.notes == (
        f"tiny.gguf: {expected:,} of 35,552 values are rounded by float16, none becomes 0; "
        "--gguf-dtype float32 keeps every value",
    )
    wide = convert_with_notes(tmp_path / "tiny.gguf", tmp_path / "single", dtype="float32")
    assert np.array_equal(reference.load_file(wide.folder / "model.safetensors")[name], exact)
    assert (wide.rounding.rounded, wide.notes) == (0, ())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_values_are_counted_over_the_whole_file(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(gguf_proof, "_PIECE", 100)  # pieces of a few rows
    stored = {DOWN: "Q4_1", "token_embd.weight": "Q8_0", "blk.1.attn_q.weight": "Q4_0"}
    write_gguf(tmp_path / "tiny.gguf", stored=stored)
    done = convert_with_notes(tmp_path / "tiny.gguf", tmp_path / "out", dtype=dtype)
    expected = total = 0
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        expected += int((values.to(getattr(torch, dtype)).float() != values).sum())
        total += values.numel()
    assert expected > 1000
    assert (done.rounding.values, done.rounding.rounded) == (total, expected)


def test_a_value_that_becomes_zero_is_refused_with_the_way_out(tmp_path):
    norm = np.full(32, 2.0, np.float32)
    norm[3:5] = [1e-8, -2e-8]
    write_gguf(tmp_path / "tiny.gguf", tensors={"blk.1.ffn_norm.weight": norm})
    with pytest.raises(BadInput, match=r"2 weights that are not 0 become 0 in float16.*blk\.1\.ffn_norm") as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert caught.value.code == "E_RANGE" and "--gguf-dtype float32" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    kept = reference.load_file(folder / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    assert np.array_equal(kept, norm)


def test_weights_that_do_not_fit_the_dtype_are_refused_and_leave_nothing(tmp_path):
    write_gguf(tmp_path / "big.gguf", tensors={"output_norm.weight": np.full(32, 1e8, np.float32)})
    with pytest.raises(BadInput, match=r"32 weights are not finite in float16; in .*output_norm\.weight") as caught:
        convert_gguf(tmp_path / "big.gguf", tmp_path / "out")
    assert caught.value.code == "E_RANGE"
    assert [file.name for file in tmp_path.iterdir()] == ["big.gguf"]
    convert_gguf(tmp_path / "big.gguf", tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "config.json").is_file()


def test_nan_in_the_file_is_refused_in_every_dtype(tmp_path):
    write_gguf(tmp_path / "nan.gguf", tensors={"output_norm.weight": np.full(32, np.nan, np.float32)})
    with pytest.raises(BadInput, match=r"NaN or Inf; in .*output_norm") as caught:
        convert_gguf(tmp_path / "nan.gguf", tmp_path / "out", dtype="float32")
    assert caught.value.code == "E_NAN"


def test_the_notes_reach_the_user(tmp_path):
    settings = {"tokenizer.ggml.eot_token_id": 2, "general.sampling.temp": 0.5}
    write_gguf(tmp_path / "tiny.gguf", settings=settings, stored={DOWN: "Q4_1"})
    recipe = make_recipe({"base": tmp_path / "tiny.gguf", "output": tmp_path / "out"})
    with in_process(), open_sources(recipe) as sources:
        notes = sources.base.warnings
    assert len(notes) == 2
    assert "of 35,552 values are rounded by float16, none becomes 0" in notes[0]
    assert notes[1].endswith("are not carried: tokenizer.ggml.eot_token_id, general.sampling.temp")


# --- the proof -------------------------------------------------------------------------------------------------------


def test_query_rows_are_pairs_side_by_side_in_the_file():
    assert interleaved_rows(1, 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert interleaved_rows(2, 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    weight = np.arange(32 * 3).reshape(32, 3)
    assert np.array_equal(weight[interleaved_rows(HEADS, 32)], rotary_order(weight, HEADS))


def _swap(tensors):
    left, right = (f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))
    tensors[left], tensors[right] = tensors[right], tensors[left]


def _one_bit(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"].view(np.uint16)[63, 31] ^= 1


def _sign_of_zero(tensors):
    assert tensors["model.norm.weight"][5] == 0
    tensors["model.norm.weight"].view(np.uint16)[5] ^= 0x8000


def _not_unpermuted(tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = rotary_order(tensors[name], HEADS)


def _wider(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)


def _flat(tensors):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].reshape(16, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap, r"\d+ converted weights are not the file's.*blk\.0\.attn_norm\.weight"),
        (_one_bit, r"1 converted weights are not the file's.*blk\.1\.ffn_up\.weight"),
        (_sign_of_zero, r"1 converted weights are not the file's.*output_norm\.weight"),
        (_not_unpermuted, r"converted weights are not the file's.*blk\.1\.attn_q\.weight"),
        (_wider, r"another form.*output\.weight.*expected float16.*found float32"),
        (_flat, r"another form.*blk\.0\.attn_output\.weight.*found float16 \(16, 64\)"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"does not hold the tensors.*found model\.norm\.weight"),
        (lambda tensors: tensors.update(extra=np.zeros(2)), "does not hold the tensors.*found extra"),
    ],
)
def test_a_folder_that_is_not_the_file_is_refused(tmp_path, change, message):
    norm = np.ones(32, np.float32)
    norm[5] = 0
    write_gguf(tmp_path / "tiny.gguf", tensors={"output_norm.weight": norm})
    file = GgufFile.open(tmp_path / "tiny.gguf")
    places = place_tensors(file, read_model(file))
    folder = convert_gguf(file.path, tmp_path / "out")
    prove(file, places, folder, "float16")
    tensors = {name: values.copy() for name, values in reference.load_file(folder / "model.safetensors").items()}
    change(tensors)
    reference.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FidelityError, match=message):
        prove(file, places, folder, "float16")


def test_a_reader_that_leaves_the_rows_in_the_file_s_order_is_found_out(tmp_path, monkeypatch):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, TensorProcessor

    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(LlamaTensorProcessor, "process", TensorProcessor.process)
    with pytest.raises(FidelityError, match=r"attn_q\.weight"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_tensor_that_the_reader_passes_over_is_found_out(tmp_path, monkeypatch):
    """transformers would go on with random weights in its place."""
    from transformers import modeling_gguf_pytorch_utils as reader

    write_gguf(tmp_path / "tiny.gguf")
    names = reader.get_gguf_hf_weights_map
    monkeypatch.setattr(
        reader,
        "get_gguf_hf_weights_map",
        lambda *args, **kw: {k: v for k, v in names(*args, **kw).items() if k != "blk.1.ffn_up.weight"},
    )
    with pytest.raises(FidelityError, match=r"blk\.1\.ffn_up\.weight"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.mark.model
def test_a_real_model(demo_gguf, tmp_path):
    folder = convert_gguf(demo_gguf, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert spelled(tokenizer, "Hello 2024") == ["Hello", "Ġ", "2", "0", "2", "4"]
    check_openvino(tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
