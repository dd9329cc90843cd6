"""GGUF files that are damaged, hostile, or say something that a converted folder would not have."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_files import tensors_of, write_gguf
from sparseport.checkpoints.gguf import check_gguf, convert_gguf, describe_gguf, read_tokenizer
from sparseport.checkpoints.gguf_header import GgufFile
from sparseport.checkpoints.gguf_model import read_model
from sparseport.errors import BadInput, SparseportError, Unsupported

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

WAY_OUT = "start from the model's Hugging Face folder"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def test_a_sound_file_passes(tiny):
    check_gguf(tiny)


# --- what transformers passes over -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.bias", (32,)),
        ("blk.1.attn_v.bias", (16,)),
        ("rope_freqs.weight", (4,)),
        ("blk.0.attn_q_norm.weight", (8,)),
        ("blk.2.attn_norm.weight", (32,)),
        ("blk.0.ffn_gate_inp.weight", (2, 32)),
    ],
)
def test_a_tensor_that_would_be_lost_is_refused(tmp_path, name, shape):
    write_gguf(tmp_path / "tiny.gguf", tensors={name: np.ones(shape, np.float32)})
    with pytest.raises(Unsupported) as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert caught.value.found == f"1: {name}"
    assert WAY_OUT in str(caught.value)


def test_a_missing_tensor_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tensors={"blk.1.ffn_up.weight": None})
    with pytest.raises(BadInput, match=r"expected 1 more: blk\.1\.ffn_up\.weight"):
        check_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "blk.1.attn_k.weight", "blk.0.attn_norm.weight"])
def test_a_tensor_of_another_shape_is_refused(tmp_path, tiny, name):
    shape = GgufFile.open(tiny).tensors[name].shape
    other = shape[::-1] if len(shape) == 2 else (64,)
    write_gguf(tmp_path / "tiny.gguf", tensors={name: np.ones(other, np.float32)})
    with pytest.raises(BadInput, match=r"another shape.*" + name.replace(".", r"\.")):
        check_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "linear"),
        ("llama.rope.scaling.factor", 4.0),
        ("llama.rope.scaling.original_context_length", 32),
        ("llama.logit_scale", 2.0),
        ("llama.attention.sliding_window", 16),
        ("llama.attention.causal", False),
        ("llama.expert_count", 4),
    ],
)
def test_a_setting_that_would_be_lost_is_refused(tmp_path, key, value):
    write_gguf(tmp_path / "tiny.gguf", settings={key: value})
    with pytest.raises(Unsupported, match=r"would be lost") as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert str(caught.value.where).endswith(key) and caught.value.found == repr(value)
    assert WAY_OUT in str(caught.value)


def test_settings_that_say_nothing_are_not_in_the_way(tmp_path):
    neutral = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.attention.causal": True}
    others = {"quantize.imatrix.file": "x", "qwen2.block_count": 7, "general.license": "mit", "split.count": 1}
    write_gguf(tmp_path / "tiny.gguf", settings={**neutral, **others})
    check_gguf(tmp_path / "tiny.gguf")
    assert read_model(GgufFile.open(tmp_path / "tiny.gguf")).layers == 2


def test_settings_that_may_be_left_out_have_llama_cpp_s_defaults(tmp_path):
    left_out = ("attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count")
    write_gguf(tmp_path / "tiny.gguf", settings={f"llama.{key}": None for key in (*left_out, "vocab_size")})
    check_gguf(tmp_path / "tiny.gguf")
    model = read_model(GgufFile.open(tmp_path / "tiny.gguf"))
    assert (model.head_dim, model.theta, model.vocab) == (8, 10000.0, 265)
    write_gguf(tmp_path / "more.gguf", settings={"llama.attention.head_count_kv": None})
    assert read_model(GgufFile.open(tmp_path / "more.gguf")).kv_heads == 4


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (
            {"general.architecture": "gpt2"},
            "architecture is not carried.*expected llama, qwen2, qwen3, gemma3, found gpt2",
        ),
        ({"general.architecture": None}, "architecture is not carried"),
        ({"general.type": "adapter"}, "no model.*found adapter"),
        ({"split.count": 3}, "one part of a GGUF model.*llama-gguf-split"),
        ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count; expected 8 like the keys, and even, found 4"),
        ({"llama.attention.value_length": 16}, r"value_length; expected 8.*found 16"),
        ({"tokenizer.ggml.model": "rwkv"}, "found rwkv"),
        ({"tokenizer.ggml.add_space_prefix": True}, "space prefix"),
    ],
)
def test_other_kinds_of_files_are_refused(tmp_path, settings_, message):
    write_gguf(tmp_path / "tiny.gguf", settings=settings_)
    with pytest.raises(Unsupported, match=message):
        check_gguf(tmp_path / "tiny.gguf")


def test_a_block_type_that_cannot_be_dequantised_is_refused(tmp_path):
    values = np.ones((32, 64), np.int8)
    write_gguf(tmp_path / "i8.gguf", tensors={"blk.0.ffn_down.weight": values}, stored={"blk.0.ffn_down.weight": "I8"})
    with pytest.raises(Unsupported, match=r"cannot be dequantised; in .*ffn_down\.weight; found I8"):
        check_gguf(tmp_path / "i8.gguf")


# --- settings that cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.merges", [1, 2]),
        ("tokenizer.ggml.merges", "t h"),
        ("tokenizer.ggml.tokens", [1.5]),
        ("tokenizer.ggml.token_type", ["1"]),
        ("tokenizer.ggml.pre", 3),
        ("tokenizer.ggml.model", 2),
        ("tokenizer.ggml.bos_token_id", "1"),
        ("tokenizer.ggml.eos_token_id", 2.0),
        ("tokenizer.ggml.padding_token_id", [2]),
        ("tokenizer.ggml.unknown_token_id", True),
        ("tokenizer.ggml.add_bos_token", "no"),
        ("tokenizer.chat_template", 7),
        ("general.architecture", 1),
        ("general.type", 1),
        ("split.count", "2"),
        ("llama.context_length", "64"),
        ("llama.block_count", 2.0),
        ("llama.feed_forward_length", [64, 64]),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.embedding_length", "x" * 9000),
        ("llama.vocab_size", True),
        ("llama.attention.layer_norm_rms_epsilon", "1e-5"),
        ("llama.rope.freq_base", 10000),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(tmp_path, key, value):
    write_gguf(tmp_path / "tiny.gguf", settings={key: value})
    with pytest.raises(BadInput, match=r"wrong type") as caught:
        check_gguf(tmp_path / "tiny.gguf")
    assert str(caught.value.where).endswith(key) and len(str(caught.value)) < 1000
    assert caught.value.code == ("E_TOKENIZER" if key.startswith("tokenizer") else "E_GGUF")
    describe_gguf(tmp_path / "tiny.gguf")  # reports what is there


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 22),
        ("block_count", 2**31),
        ("block_count", None),
        ("embedding_length", None),
        ("feed_forward_length", 0),
        ("context_length", 0),
        ("context_length", 2**32 - 1),
        ("attention.head_count", 0),
        ("attention.head_count", 3),
        ("attention.head_count", None),
        ("attention.head_count_kv", 3),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", None),
        ("rope.freq_base", float("inf")),
        ("rope.freq_base", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(tmp_path, key, value):
    write_gguf(tmp_path / "tiny.gguf", settings={f"llama.{key}": value})
    with pytest.raises(BadInput, match="missing or impossible") as caught:
        check_gguf(tmp_path / "tiny.gguf")
    assert str(caught.value.where).endswith(f"llama.{key}")


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 264), ("block_count", 3), ("feed_forward_length", 32), ("embedding_length", 64)]
)
def test_settings_that_contradict_the_tensors_are_refused(tmp_path, key, value):
    left_out = {"llama.attention.key_length": 8} if key == "embedding_length" else {}
    write_gguf(tmp_path / "tiny.gguf", settings={f"llama.{key}": value, **left_out})
    with pytest.raises(BadInput) as caught:
        check_gguf(tmp_path / "tiny.gguf")
    assert caught.value.code == "E_TENSOR"


def test_more_tokens_than_embedding_rows_are_refused(tmp_path):
    rows = tensors_of(write_gguf(tmp_path / "tiny.gguf"))["token_embd.weight"][:200]
    fewer = {"token_embd.weight": rows, "output.weight": rows}
    write_gguf(tmp_path / "tiny.gguf", settings={"llama.vocab_size": 200}, tensors=fewer)
    with pytest.raises(BadInput, match=r"larger than the embedding; .*expected at most 200 tokens, found 265"):
        check_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges", "pre"])
def test_an_incomplete_tokenizer_is_refused(tmp_path, key):
    write_gguf(tmp_path / "short.gguf", settings={f"tokenizer.ggml.{key}": None})
    with pytest.raises(BadInput, match=rf"incomplete.*tokenizer\.ggml\.{key}"):
        read_tokenizer(tmp_path / "short.gguf")


# --- damaged headers -------------------------------------------------------------------------------------------------


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    stored = {"blk.0.ffn_down.weight": "Q4_1", "token_embd.weight": "Q8_0", "output.weight": "BF16"}
    write_gguf(tmp_path / "tiny.gguf", stored=stored, settings={"general.alignment": 64})
    ours, theirs = GgufFile.open(tmp_path / "tiny.gguf"), gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert ours.fields == {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert (own.kind, own.begin) == (tensor.tensor_type.name, tensor.data_offset)
        assert own.shape == tuple(tensor.shape.tolist()[::-1])
        rows = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(own.rows, own.row_bytes)
        assert np.array_equal(ours.read_rows(own, 0, own.rows), rows)
        assert np.array_equal(ours.read_rows(own, own.rows - 1, own.rows), rows[-1:])


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 200, 5000, -1])
def test_a_file_that_was_cut_is_refused_and_named(tiny, tmp_path, keep):
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"not a readable GGUF file; in .*cut\.gguf"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such GGUF file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_big_endian_file_is_refused(tmp_path):
    write_gguf(tmp_path / "big.gguf", big_endian=True)
    with pytest.raises(Unsupported, match="big-endian"):
        check_gguf(tmp_path / "big.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(fields: list[bytes] = [], tensors: list[bytes] = [], version: int = 3) -> bytes:  # noqa: B006
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields + tensors)
    return start + bytes(-len(start) % 32) + bytes(64)


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


BYTE = text("a") + struct.pack("<IB", 0, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "another kind of file"),
        (header(version=1), "version 1"),
        (header([BYTE, BYTE]), "a twice"),
        (header([text("a") + struct.pack("<IB", 7, 2)]), "neither 0 nor 1"),
        (header([text("a") + struct.pack("<IB", 13, 2)]), "value type 13"),
        (header([text("a") + struct.pack("<IIQ", 9, 0, 2**62)]), "ends inside its header"),
        (header([text("a") + struct.pack("<IIQ", 9, 8, 2**62)]), "ends inside its header"),
        (header([text("a") + struct.pack("<IQ", 8, 2**62)]), "ends inside its header"),
        (header([text("a") + struct.pack("<IQ", 8, 1) + b"\xff"]), "utf-8"),
        (header([text("general.alignment") + struct.pack("<II", 4, 24)]), "no power of two"),
        (header([text("general.alignment") + struct.pack("<II", 4, 0)]), "no power of two"),
        (header(tensors=[tensor("t", [16]), tensor("t", [16])]), "tensor t twice"),
        (header(tensors=[tensor("t", [])]), "with 0 dimensions"),
        (header(tensors=[tensor("t", [1] * 5)]), "with 5 dimensions"),
        (header(tensors=[tensor("t", [4, 0])]), "empty dimension"),
        (header(tensors=[tensor("t", [16], kind=8)]), "16 columns"),
        (header(tensors=[tensor("t", [16], offset=8)]), "offset 8"),
        (header(tensors=[tensor("t", [17])]), "before the end of tensor t"),
        (header(tensors=[tensor("t", [2**63, 2**63])]), "before the end of tensor t"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(64), "dimensions"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused_at_once(tmp_path, data, message):
    (tmp_path / "odd.gguf").write_bytes(data)
    with pytest.raises(BadInput, match="not a readable GGUF file") as caught:
        describe_gguf(tmp_path / "odd.gguf")
    assert message in str(caught.value.found) and caught.value.code == "E_GGUF"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header([text("a") + struct.pack("<IIQ", 9, 9, 1)]), "array of arrays"),
        (header(tensors=[tensor("t", [16], kind=999)]), "unknown GGUF block type; in .*tensor t; .*found type 999"),
    ],
)
def test_what_the_format_allows_and_nobody_reads_is_refused(tmp_path, data, message):
    (tmp_path / "odd.gguf").write_bytes(data)
    with pytest.raises(Unsupported, match=message):
        describe_gguf(tmp_path / "odd.gguf")


def test_the_smallest_sound_header_is_read(tmp_path):
    (tmp_path / "small.gguf").write_bytes(header([BYTE], [tensor("t", [4, 2, 2])]))
    file = GgufFile.open(tmp_path / "small.gguf")
    assert file.fields == {"a": 7}
    assert (file.tensors["t"].shape, file.tensors["t"].rows, file.tensors["t"].row_bytes) == ((2, 2, 4), 4, 16)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_the_header_is_refused_on_purpose_or_harmless(tiny, tmp_path, changes):
    data = bytearray(tiny.read_bytes())
    file = GgufFile.open(tiny)
    end = min(place.begin for place in file.tensors.values())
    for position, value in changes:
        data[int(position * (end - 1))] = value
    (tmp_path / "damaged.gguf").write_bytes(data)
    for read in (check_gguf, describe_gguf):
        try:
            read(tmp_path / "damaged.gguf")
        except SparseportError as error:
            assert error.exit_code in (3, 7)
