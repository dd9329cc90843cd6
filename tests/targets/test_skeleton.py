"""The IR skeleton: every tensor has its place, small tensors are exact, and the graph computes the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseport.checkpoints.safetensors import spec_of, write_safetensors
from sparseport.child import Child
from sparseport.errors import BadInput, FidelityError, Unsupported
from sparseport.targets.openvino import skeleton as module
from sparseport.targets.openvino.stamp_graph import Graph, Zeros

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.openvino")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(LLAMA | changes), "utf-8")
        return path

    return write


def real_model(config: Path, dtype: Any = None) -> Any:
    """The same architecture in transformers, with random weights everywhere, norms and biases too."""
    torch.manual_seed(0)
    settings = json.loads(config.read_text("utf-8"))
    settings.pop("quantization_config", None)
    loaded = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half() * 0.3 + (parameter.ndim < 2))
    return model.to(dtype or torch.float32)


def small_of(model: Any) -> Callable[[str], np.ndarray]:
    return lambda name: model.get_parameter(name).detach().numpy()


def filled(skeleton: Any, model: Any) -> Any:
    """The skeleton with the model's f16 matrices put in place of its placeholders."""
    import openvino as ov

    graph = ov.Core().read_model(skeleton.xml)
    by_name = {op.get_friendly_name(): op for op in graph.get_ops()}
    for name, constant in skeleton.constants.items():
        values = model.get_parameter(name).detach()
        if values.ndim == 2:
            replacement = ov.op.Constant(values.half().numpy())
            for target in list(by_name[constant].output(0).get_target_inputs()):
                target.replace_source_output(replacement.output(0))
    return graph


VARIANTS = {
    "llama tied": {},
    "llama untied with biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama with its cache turned off": {"use_cache": False},
    "llama with scaled rotary frequencies": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen2, stamped": {"model_type": "qwen2", "num_hidden_layers": 5},
    "qwen3": {"model_type": "qwen3"},
    "gpt_neox, with layer norms and another tree of modules": {"model_type": "gpt_neox", "tie_word_embeddings": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_filled_skeleton_computes_the_model(changes: dict[str, Any], config_file: Any, tmp_path: Path) -> None:
    config = config_file(**changes)
    model = real_model(config)
    skeleton = module.build_skeleton(config, tmp_path / "ir", small_tensors=small_of(model))
    assert set(skeleton.constants) == {name for name, _ in model.named_parameters()}
    assert skeleton.stamped == (skeleton.traced_layers < model.config.num_hidden_layers)

    import openvino as ov

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(filled(skeleton, model), "CPU", exact)
    request = compiled.create_infer_request()
    ids = torch.randint(0, LLAMA["vocab_size"], (1, 12))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    for begin, end in ((0, 9), (9, 12)):
        request.infer(
            {
                "input_ids": ids[:, begin:end].numpy(),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(begin, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        np.testing.assert_allclose(request.get_tensor("logits").data, expected[:, begin:end], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_small_tensors_are_in_the_file_bit_for_bit(dtype: str, config_file: Any, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    config = config_file(attention_bias=True)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = {
        name: np.random.default_rng(list(name.encode())).normal(1, 9, tuple(p.shape)).astype(stored)
        for name, p in real_model(config).named_parameters()
        if p.ndim < 2
    }
    assert len(values) == 2 * (2 + 4) + 1
    skeleton = module.build_skeleton(config, tmp_path / "ir", small_tensors=values.__getitem__)
    graph = Graph.read(Path(skeleton.xml))
    nodes = {node.name: node for node in graph.constants()}
    for name, tensor in values.items():
        node = nodes[skeleton.constants[name]]
        element_type = "f16" if dtype == "float16" and name.endswith("bias") else "f32"
        assert node.data["element_type"] == element_type
        assert graph.payload(node) == tensor.astype(np.float16 if element_type == "f16" else np.float32).tobytes()
    for name in set(skeleton.constants) - set(values):
        payload = graph.payload(nodes[skeleton.constants[name]])
        assert isinstance(payload, bytes) and not any(payload)


@pytest.mark.slow
def test_same_input_gives_the_same_bytes_and_nothing_else(config_file: Any, tmp_path: Path) -> None:
    config = config_file(num_hidden_layers=4)
    model = real_model(config)
    folders = [tmp_path / name for name in ("first", "second/deeper")]
    for folder in folders:
        module.build_skeleton(config, folder, small_tensors=small_of(model))
        assert sorted(path.name for path in folder.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    for name in ("openvino_model.bin", "openvino_model.xml"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        for private in (str(tmp_path), str(Path.cwd()), str(Path.home())):
            assert private == "/" or private.encode() not in first


@pytest.mark.slow
def test_a_quantised_checkpoint_has_the_graph_of_its_dense_model(config_file: Any, tmp_path: Path) -> None:
    model = real_model(config_file())
    plain = module.build_skeleton(config_file(), tmp_path / "plain", small_tensors=small_of(model))
    config = config_file(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8})
    quantised = module.build_skeleton(config, tmp_path / "quantised", small_tensors=small_of(model))
    assert Path(plain.xml).read_bytes() == Path(quantised.xml).read_bytes()


@pytest.mark.slow
def test_read_back_finds_a_changed_bit(config_file: Any, tmp_path: Path) -> None:
    config = config_file()
    model = real_model(config)
    skeleton = module.build_skeleton(config, tmp_path / "ir", small_tensors=small_of(model))
    graph = Graph.read(Path(skeleton.xml))
    nodes = {node.name: node for node in graph.constants()}
    carriers = {
        name: module.Carrier(nodes[constant], tuple(model.get_parameter(name).shape))
        for name, constant in skeleton.constants.items()
    }
    small = {name: small_of(model)(name) for name, carrier in carriers.items() if carrier.is_small}
    module._check_written(Path(skeleton.xml), carriers, small, {"model.embed_tokens.weight"})
    offset = int(carriers["model.norm.weight"].node.data["offset"])
    with Path(skeleton.bin).open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(FidelityError, match=r"model\.norm\.weight"):
        module._check_written(Path(skeleton.xml), carriers, small, set())


def test_a_tensor_that_tracing_hides_is_named(config_file: Any, tmp_path: Path) -> None:
    # The experts of a mixture are 3-D parameters outside any linear layer; their values are not placeholders.
    config = config_file(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.mlp"):
        module.build_skeleton(config, tmp_path / "ir", small_tensors=small_of(real_model(config)))


@pytest.mark.parametrize("element_type", ["f32", "f16"])
def test_a_norm_folded_to_one_plus_weight_gets_one_plus_the_real_weight(element_type: str, tmp_path: Path) -> None:
    dtype = np.dtype({"f32": np.float32, "f16": np.float16}[element_type])
    name, real = "norm.weight", np.array([0.25, -0.5, 3], np.float32)
    markers = module._markers({name: real})
    (tmp_path / "in.xml").write_text(
        f'<net><layers><layer id="0" name="Constant_7" type="Const"><data element_type="{element_type}" shape="1, 3" '
        f'offset="0" size="{3 * dtype.itemsize}"/></layer></layers><edges/></net>'
    )
    (tmp_path / "in.bin").write_bytes((1 + markers[name]).astype(dtype).tobytes())
    graph = Graph.read(tmp_path / "in.xml")
    carriers = module._locate_small(markers, graph)
    module._place(graph, name, carriers[name], real)
    assert graph.payload(graph.nodes[0]) == np.array([1.25, 0.5, 4], dtype).tobytes()
    if element_type == "f16":
        with pytest.raises(Unsupported, match="does not fit"):
            module._place(graph, name, carriers[name], np.array([1e-4, 1, 1], np.float32))
    (tmp_path / "in.bin").write_bytes(bytes(3 * dtype.itemsize))
    with pytest.raises(Unsupported, match=r"not found.*norm\.weight"):
        module._locate_small(markers, Graph.read(tmp_path / "in.xml"))


def test_bad_inputs_are_named(config_file: Any, tmp_path: Path) -> None:
    def build(config: Path, small: Callable[[str], np.ndarray]) -> None:
        module.build_skeleton(config, tmp_path / "ir", small_tensors=small)

    with pytest.raises(BadInput, match=r"missing\.json"):
        build(tmp_path / "missing.json", np.ones)
    with pytest.raises(Unsupported, match="no_such_model"):
        build(config_file(model_type="no_such_model"), np.ones)
    with pytest.raises(BadInput, match=r"input_layernorm\.weight.*\(32,\).*\(31,\)"):
        build(config_file(), lambda name: np.ones(31, np.float32))
    with pytest.raises(BadInput, match="int64"):
        build(config_file(), lambda name: np.ones(32, np.int64))
    assert not (tmp_path / "ir").exists()


def test_zeros_are_holes_that_read_as_zeros(tmp_path: Path) -> None:
    (tmp_path / "in.xml").write_text(
        '<net><layers><layer id="0" name="c" type="Const"><data element_type="f16" shape="3" offset="0" size="6"/>'
        '</layer><layer id="1" name="d" type="Const"><data element_type="f16" shape="1" offset="2" size="2"/></layer>'
        "</layers><edges/></net>"
    )
    (tmp_path / "in.bin").write_bytes(b"abcdef")
    graph = Graph.read(tmp_path / "in.xml")
    first, second = graph.nodes
    graph.set_payload(first, Zeros(6))
    with pytest.raises(ValueError, match="6 bytes, not 5"):
        graph.set_payload(first, b"12345")
    graph.write(tmp_path / "out.xml")
    assert (first.data["offset"], second.data["offset"]) == ("0", "64")
    assert (tmp_path / "out.bin").read_bytes() == bytes(64) + b"cd"
    assert Graph.read(tmp_path / "out.xml").payload(graph.nodes[1]) == b"cd"


@pytest.mark.slow
def test_frontend_process_builds_the_graph(config_file: Any, tmp_path: Path) -> None:
    """The child that an export starts: the skeleton's fields as its answer, our own errors as errors."""
    config = config_file(num_hidden_layers=4)
    model = real_model(config, torch.bfloat16)
    small = {name: p.detach().float().numpy() for name, p in model.named_parameters() if p.ndim < 2}
    write_safetensors(tmp_path / "small.safetensors", [spec_of(name, values) for name, values in small.items()])
    request = {"config": str(config), "output": str(tmp_path / "ir"), "tokenizer": None}
    with Child(
        "sparseport.targets.openvino.frontend", {**request, "small_tensors": str(tmp_path / "small.safetensors")}
    ) as run:
        fields = run.result()
    assert fields["stamped"] is True and fields["traced_layers"] == 3
    assert set(fields["constants"]) == {name for name, _ in model.named_parameters()}
    assert Path(fields["xml"]).is_file() and Path(fields["bin"]).is_file()
    del small["model.norm.weight"]
    write_safetensors(tmp_path / "fewer.safetensors", [spec_of(name, values) for name, values in small.items()])
    with (
        Child(
            "sparseport.targets.openvino.frontend", {**request, "small_tensors": str(tmp_path / "fewer.safetensors")}
        ) as run,
        pytest.raises(BadInput, match=r"model\.norm\.weight"),
    ):
        run.result()
