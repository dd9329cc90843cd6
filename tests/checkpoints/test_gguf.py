"""GGUF conversion: a tiny model written with the format's own writer, and the tokenizer it describes."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import numpy as np
import pytest

from sparseport.checkpoints.gguf import GgufTokenizer, build_tokenizer, convert_gguf, read_tokenizer
from sparseport.errors import BadInput, OutputExists, Unsupported

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
SAMPLES = [
    "def f(x):\n\treturn x**2  # square\n\n",
    "12345 + 67,890.00 = 3.14e-5",
    "  two  spaces   three \n\n end ",
    "naïve 日本語 ñ é 🙂🚀👩‍👩‍👧",
    "don't we'll , . ! 's",
    "",
]


def byte_alphabet():
    """GPT-2's printable spelling of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(other))]


def description(**changes):
    merges = ["1 2", "Ġ t", "h e", "Ġt he", "r e"]
    tokens = ["<|none|>", "<|start|>", "<|end|>", "<tool>", *byte_alphabet(), *(m.replace(" ", "") for m in merges)]
    types = [3, 3, 3, 4] + [1] * (len(tokens) - 4)
    base = GgufTokenizer(
        tokens, types, merges, "smollm", bos_id=1, eos_id=2, pad_id=2, unk_id=0, chat_template=TEMPLATE, max_length=64
    )
    return replace(base, **changes)


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def spelled(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(ids(tokenizer, text))


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "gpt2"])
def test_text_survives_the_round_trip(text, pre):
    tokenizer = build_tokenizer(description(pre=pre))
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_merges_apply_in_order_and_nothing_is_put_before_the_text():
    tokenizer = build_tokenizer(description())
    assert spelled(tokenizer, "the the") == ["t", "he", "Ġthe"]


def test_smollm_splits_digits_and_gpt2_does_not():
    assert spelled(build_tokenizer(description(pre="smollm")), "12") == ["1", "2"]
    assert spelled(build_tokenizer(description(pre="gpt-2")), "12") == ["12"]


def test_control_and_user_tokens_are_one_token_each_and_only_control_is_special():
    tokenizer = build_tokenizer(description())
    encoded = ids(tokenizer, "<|start|>a<tool><|end|>")
    assert tokenizer.convert_ids_to_tokens(encoded) == ["<|start|>", "a", "<tool>", "<|end|>"]
    assert encoded[0] == 1 and encoded[-1] == 2
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "a<tool>"


def test_named_tokens_template_and_length():
    tokenizer = build_tokenizer(description())
    named = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")]
    assert named == [1, 2, 2, 0]
    assert tokenizer.model_max_length == 64
    assert len(tokenizer) == len(description().tokens)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|start|>hi<|end|>"


def test_bos_and_eos_are_added_only_when_the_file_asks():
    tokenizer = build_tokenizer(description(add_bos=True, add_eos=True))
    assert spelled(tokenizer, "a") == ["<|start|>", "a", "<|end|>"]
    assert spelled(build_tokenizer(description(add_bos=True)), "a") == ["<|start|>", "a"]
    assert spelled(build_tokenizer(description()), "a") == ["a"]


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones():
    with pytest.raises(Unsupported, match="expected smollm, gpt-2, gpt2, found llama-bpe"):
        build_tokenizer(description(pre="llama-bpe"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": ["a"]}, r"merges\[0\].*found a"),
        ({"merges": ["t h"]}, r"merges\[0\].*found t h"),
        ({"merges": ["x y z"]}, r"merges\[0\]"),
        ({"eos_id": 5000}, "eos_id.*found 5000"),
        ({"token_types": [1]}, "differ in number"),
        ({"tokens": ["a", "a"], "token_types": [1, 1], "merges": []}, "occurs twice"),
        ({"add_bos": True, "bos_id": None}, "add_bos is set"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        build_tokenizer(description(**changes), where="model.gguf")


def test_an_unknown_token_type_is_refused():
    types = [9, *description().token_types[1:]]
    with pytest.raises(Unsupported, match=r"unknown token type.*\[9\]"):
        build_tokenizer(description(token_types=types))


CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def rotary_order(weight, heads):
    """GGUF keeps the query and key rows of a Llama with the two rotary halves interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, *, tokenizer_model="gpt2", scale=1.0, drop=()):
    """Write a random Llama and return the model it holds."""
    torch.manual_seed(0)
    tokens = description()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokens.tokens), **CONFIG)).eval()
    model = model.half().float()  # what float16 can hold, so that the conversion is exact
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a name that is not for the config")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(len(tokens.tokens))
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.token_types)
    if "merges" not in drop:
        writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"] * np.float32(scale))
    writer.add_tensor("output.weight", state["lm_head.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(2):
        for short, long in NAMES.items():
            weight = state[f"model.layers.{layer}.{long}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(short)
            writer.add_tensor(f"blk.{layer}.{short}.weight", rotary_order(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    model = write_gguf(root / "tiny.gguf")
    return model, convert_gguf(root / "tiny.gguf", root / "out")


def test_converted_weights_are_those_of_the_file(converted):
    model, folder = converted
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float16
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), expected[name]), name


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
    assert config["rms_norm_eps"] == pytest.approx(1e-6)
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


def test_weights_that_do_not_fit_the_dtype_are_refused_and_leave_nothing(tmp_path):
    write_gguf(tmp_path / "big.gguf", scale=1e8)
    with pytest.raises(BadInput, match=r"not finite in float16; in .*embed_tokens\.weight"):
        convert_gguf(tmp_path / "big.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["big.gguf"]
    convert_gguf(tmp_path / "big.gguf", tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_sentencepiece_tokenizer_is_refused(tmp_path):
    write_gguf(tmp_path / "spm.gguf", tokenizer_model="llama")
    with pytest.raises(Unsupported, match="found llama"):
        convert_gguf(tmp_path / "spm.gguf", tmp_path / "out")


def test_a_missing_merge_list_is_refused(tmp_path):
    write_gguf(tmp_path / "short.gguf", drop=("merges",))
    with pytest.raises(BadInput, match=r"incomplete.*tokenizer\.ggml\.merges"):
        read_tokenizer(tmp_path / "short.gguf")


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 5000, -1])
def test_a_damaged_file_is_refused_and_named(converted, tmp_path, keep):
    whole = (converted[1].parent / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(BadInput, match=r"not a readable GGUF file; in .*cut\.gguf"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such GGUF file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="unknown dtype"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out", dtype="int8")


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
