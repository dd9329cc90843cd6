"""Sub-networks on both targets: smaller layers, fewer heads, fewer blocks, equal to the masked whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialects import quantised_llama
from e2e.both import export_to_both
from e2e.cut_models import COMMON, LAYER_TYPES, MIXED, MLP, MODELS, make_model, mask, space
from e2e.in_process import in_process
from sparseport.checkpoints.elastic import ElasticGroup, save_search_space
from sparseport.errors import BadInput, Unsupported
from sparseport.pipeline import export, plan
from sparseport.recipe import make_recipe
from sparseport.targets.read_back import open_reader
from sparseport.verify.folder import verify
from sparseport.verify.runs import OPENVINO_FULL_PRECISION, onnx_logits, openvino_logits
from sparseport.weights.rounding import dequantize

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime_genai")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_both_targets_compute_the_masked_model(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = make_model(base, *MODELS[name])
    fields = {"base": base, **space(tmp_path, MIXED), "output": tmp_path / "out", "tokenizer": False}
    with in_process():
        result = export(make_recipe({**fields, "target": ["openvino", "onnx"]}))
    tokens = [int(n) for n in np.random.default_rng(0).integers(1, 256, 112)]
    with torch.no_grad():
        expected = mask(model, MIXED)(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    for one in result.exports:
        assert np.abs(_logits(one, tokens) - expected).max() < 1e-4
        config = json.loads((one.folder / "config.json").read_text(encoding="utf-8"))
        assert config["num_hidden_layers"] == 3 and config["sparseport"]["blocks"] == [0, 1, 3]
        if "layer_types" in config:
            whole = LAYER_TYPES if name == "gemma3" else ["full_attention"] * 4
            assert config["layer_types"] == [*whole[:2], whole[3]]
        linears = one.certificate.linears
        assert linears["model.layers.1.mlp.gate_proj"]["shape"] == [64, 64]
        assert linears["model.layers.1.mlp.gate_proj"]["whole_shape"] == [128, 64]
        assert linears["model.layers.2.self_attn.q_proj"]["from"] == "model.layers.3.self_attn.q_proj"
        assert verify(one.folder).differences == []


def test_another_tree_of_layers(tmp_path: Path) -> None:
    """Phi: fc1 and fc2 for the MLP, `dense` behind the heads, biases everywhere, one norm for both."""
    config = {**COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.PhiForCausalLM(transformers.PhiConfig(**config))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.dim() == 1:
                    parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * torch.randn_like(parameter))
    made.half().save_pretrained(tmp_path / "base")
    model = transformers.PhiForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    groups = [
        ElasticGroup(("model.layers.0.mlp.fc1",), (128, 96), "width"),
        ElasticGroup(("model.layers.2.self_attn",), (4, 3), "heads"),
        ElasticGroup(("model.layers.1",), (1, 0), "block"),
    ]
    fields = {"search_space": save_search_space(tmp_path, groups), "sub_adapter": "minimal", "tokenizer": False}
    with in_process():
        result = export(make_recipe({"base": tmp_path / "base", "output": tmp_path / "out", **fields}))

    def cut(columns: int) -> Any:
        def hook(_module: Any, inputs: Any) -> Any:
            masked = inputs[0].clone()
            masked[..., columns:] = 0
            return (masked,)

        return hook

    blocks = model.model.layers
    blocks[0].mlp.fc2.register_forward_pre_hook(cut(96))
    blocks[2].self_attn.dense.register_forward_pre_hook(cut(48))
    blocks[1].forward = lambda hidden, *_, **__: hidden
    tokens = list(range(1, 65))
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert np.abs(_logits(result.exports[0], tokens) - expected).max() < 1e-4
    assert result.certificate.linears["model.layers.1.self_attn.q_proj"]["shape"] == [48, 64]


def _logits(one: Any, tokens: list[int]) -> Any:
    if one.target == "onnx":
        return onnx_logits(one.folder, tokens)
    import openvino as ov

    model = ov.Core().read_model(one.folder / "openvino_model.xml")
    return openvino_logits(model, tokens, OPENVINO_FULL_PRECISION)


def test_qdq_folders_have_sub_networks_too(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", *MODELS["llama with biases"])
    fields = {"base": tmp_path / "base", **space(tmp_path, MIXED), "output": tmp_path / "out", "tokenizer": False}
    with in_process():
        result = export(make_recipe({**fields, "target": ["onnx"], "onnx": {"format": "qdq"}}))
    tokens = list(range(1, 65))
    with torch.no_grad():
        expected = mask(model, MIXED)(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert np.abs(onnx_logits(result.folder, tokens) - expected).max() < 1e-4


def test_int4_codes_of_a_sub_network_are_those_of_the_whole(tiny_qa_inputs: dict[str, Any], tmp_path: Path) -> None:
    """Width 80 cuts through a group of 32; codes, zero-points and scales are those of the whole model's export."""
    groups = [
        ElasticGroup(tuple(f"model.layers.{n}.mlp.{leaf}" for leaf in MLP), (128, 80, 64), "width") for n in range(2)
    ]
    groups += [
        ElasticGroup(tuple(f"model.layers.{n}.self_attn.{leaf}_proj" for leaf in "qkv"), (8, 6, 4)) for n in range(2)
    ]
    file = save_search_space(tmp_path, groups)
    whole_file, small_file = tmp_path / "whole.json", tmp_path / "small.json"
    whole_file.write_text("[128, 128, 6, 6]", encoding="utf-8")
    small_file.write_text("[80, 64, 6, 6]", encoding="utf-8")
    inputs = {**tiny_qa_inputs, "search_space": file}
    inputs.pop("sub_adapter")
    with in_process():
        whole = export_to_both(tmp_path / "w", **inputs, sub_adapter=str(whole_file))
        small = export_to_both(tmp_path / "s", **inputs, sub_adapter=str(small_file))
    read = [
        {item.name: item.weight for item in open_reader("openvino", one.folder).weights(_shapes(one.certificate))}
        for one in (whole, small)
    ]
    cut = 0
    for module, facts in small.certificate.linears.items():
        rows, columns = facts["shape"]
        a, b = (dequantize(found.get(module) or found[f"{module}.weight"]) for found in read)
        assert np.array_equal(a[:rows, :columns], b), module
        cut += a.shape != b.shape
    assert cut == 6
    down = small.certificate.linears["model.layers.0.mlp.down_proj"]
    assert down["group_size"] == 16 and down["shape"] == [64, 80] and down["whole_shape"] == [64, 128]


def _shapes(certificate: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(facts["shape"]) for name, facts in {**certificate.linears, **certificate.tensors}.items()}


@pytest.mark.usefixtures("light_steps")
@pytest.mark.parametrize("sizes", [MIXED, [128, 2, 1] * 3 + [128, 2, 0]], ids=["mixed", "blocks only"])
def test_generation_engines_write_the_masked_models_tokens(sizes: list[int], tiny_base: Path, tmp_path: Path) -> None:
    """OpenVINO GenAI and onnxruntime-genai with another number of heads in every cache."""
    import onnxruntime_genai
    import openvino_genai

    model = make_model(tmp_path / "base", "LlamaConfig", "LlamaForCausalLM", {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((tiny_base / name).read_bytes())
    result = export(
        make_recipe(
            {
                "base": tmp_path / "base",
                **space(tmp_path, sizes),
                "target": ["openvino", "onnx"],
                "output": tmp_path / "out",
                "embedding": "fp32",
            }
        )
    )
    prompt = list(range(40, 60))
    masked = mask(model, sizes)
    wanted = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            wanted.append(int(masked(torch.tensor([wanted]), use_cache=False).logits[0, -1].argmax()))
    pipeline = openvino_genai.LLMPipeline(
        str(tmp_path / "out" / "openvino"), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32"
    )
    settings = openvino_genai.GenerationConfig(max_new_tokens=12, do_sample=False, ignore_eos=True)
    import openvino as ov

    ids = ov.Tensor(np.array([prompt], np.int64))
    assert list(pipeline.generate(ids, settings).tokens[0]) == wanted[len(prompt) :]
    loaded = onnxruntime_genai.Model(str(tmp_path / "out" / "onnx"))
    parameters = onnxruntime_genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(wanted), min_length=len(wanted), do_sample=False)
    generator = onnxruntime_genai.Generator(loaded, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == wanted
    assert len(result.exports) == 2


def test_a_sub_network_that_is_an_ordinary_model_loads_as_one(tmp_path: Path) -> None:
    """The same width everywhere and whole blocks left out: config.json says it all, and any loader builds it."""
    make_model(tmp_path / "base", "LlamaConfig", "LlamaForCausalLM", {})
    sizes = [96, 2, 1] * 3 + [96, 2, 0]
    with in_process():
        result = export(
            make_recipe(
                {
                    "base": tmp_path / "base",
                    **space(tmp_path, sizes),
                    "output": tmp_path / "out",
                    "tokenizer": False,
                }
            )
        )
    config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert config["intermediate_size"] == 96 and config["num_hidden_layers"] == 3
    assert config["sparseport"]["shapes"] == {}
    assert config["sparseport"]["whole"] == {"intermediate_size": 128, "num_hidden_layers": 4}
    built = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
    shapes = {name.removesuffix(".weight"): list(p.shape) for name, p in built.named_parameters()}
    assert all(shapes[name] == facts["shape"] for name, facts in result.certificate.linears.items())


@pytest.mark.parametrize(
    ("name", "extra", "drop", "said_by"),
    [
        ("Gemma2", {"head_dim": 16}, ("layer_types", "sliding_window"), "layer_types"),
        ("SmolLM3", {}, ("no_rope_layers", "no_rope_layer_interval"), "no_rope_layers"),
    ],
)
def test_defaults_of_the_class_are_looked_at(
    name: str, extra: dict[str, Any], drop: tuple[str, ...], said_by: str, tmp_path: Path
) -> None:
    """config.json says nothing of windows and angles, and the class gives them to blocks by their numbers."""
    make_model(tmp_path / "base", f"{name}Config", f"{name}ForCausalLM", extra)
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({key: config[key] for key in config if key not in drop}), encoding="utf-8")
    without = lambda *gone: [size for n in range(4) for size in (128, 2, int(n not in gone))]  # noqa: E731
    fields = {"base": tmp_path / "base", "output": tmp_path / "out", "tokenizer": False, "target": ["onnx"]}
    recipe = make_recipe({**fields, **space(tmp_path, without(1))})
    with in_process(), pytest.raises(Unsupported, match="would make others") as caught:
        export(recipe)
    assert caught.value.where == f"config.json, {said_by}" and not (tmp_path / "out").exists()
    # The last block takes no other's place.
    with in_process():
        problem = plan(make_recipe({**fields, **space(tmp_path, without(3))})).problem
    assert problem is None
    file.write_text(json.dumps(config), encoding="utf-8")
    with in_process():
        assert plan(recipe).problem is None


def test_the_plan_refuses_what_the_export_would(tmp_path: Path) -> None:
    """A dry run says it: a block that has a number, a norm over all heads, columns in act-order."""
    make_model(tmp_path / "base", *MODELS["gemma3"])
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("layer_types")
    file.write_text(json.dumps(config), encoding="utf-8")
    fields = {"output": tmp_path / "out", "tokenizer": False}
    with in_process():
        problem = plan(make_recipe({**fields, "base": tmp_path / "base", **space(tmp_path, MIXED)})).problem
    assert isinstance(problem, Unsupported) and "depend on its number" in problem.what
    make_model(tmp_path / "olmo", "Olmo2Config", "Olmo2ForCausalLM", {})
    problem = plan(make_recipe({**fields, "base": tmp_path / "olmo", **space(tmp_path, [128, 1, 1] * 4)})).problem
    assert isinstance(problem, Unsupported) and "runs over all of them" in problem.what


@pytest.mark.parametrize("dialect", ["gptq-act-order", "ct-pack-group-order", "gptq-v1"])
def test_act_order_columns_are_refused_layer_by_layer(dialect: str, tiny_sparse: Path, tmp_path: Path) -> None:
    quantised_llama(tiny_sparse, tmp_path / "base", dialect)
    groups = [ElasticGroup(tuple(f"model.layers.1.mlp.{leaf}" for leaf in MLP), (128, 64), "width")]
    fields = {"search_space": save_search_space(tmp_path, groups), "sub_adapter": "minimal", "tokenizer": False}
    found = plan(make_recipe({**fields, "base": tmp_path / "base", "output": tmp_path / "out"}))
    refused = [] if dialect == "gptq-v1" else ["model.layers.1.mlp.down_proj"]
    assert [layer.module for layer in found.refusals] == refused
    assert all("act-order" in str(layer.refused) for layer in found.refusals)


def test_the_logit_check_needs_memory_for_the_whole_model(tmp_path: Path) -> None:
    """Torch holds the whole model, with zeros; only what the runtime holds is smaller."""
    big = {"intermediate_size": 16384, "hidden_size": 512, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**{**COMMON, **big})
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "base")
    groups = [ElasticGroup(tuple(f"model.layers.{n}.mlp.{leaf}" for leaf in MLP), (16384, 64), "width") for n in (0, 1)]
    fields: dict[str, Any] = {"search_space": save_search_space(tmp_path, groups), "tokenizer": False}
    fields |= {"base": tmp_path / "base", "output": tmp_path / "out"}
    whole = plan(make_recipe({**fields, "sub_adapter": "maximal"})).numerics_memory_mib
    small = plan(make_recipe({**fields, "sub_adapter": "minimal"})).numerics_memory_mib
    gone = 2 * 3 * 512 * (16384 - 64)
    assert abs((whole - small) - gone * 4.5 / 2**20) <= 1


def test_what_cannot_be_cut_is_refused_before_any_work(tmp_path: Path, tiny_adapter_sparse: Path) -> None:
    make_model(tmp_path / "base", *MODELS["gemma3"])
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    fields = {"base": tmp_path / "base", "output": tmp_path / "out", "tokenizer": False}
    config.pop("layer_types")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Unsupported, match="layer_types"):
        export(make_recipe({**fields, **space(tmp_path, MIXED)}))
    with pytest.raises(BadInput, match=r"one of \[128, 96, 64\]"):
        export(make_recipe({**fields, **space(tmp_path, [100, *MIXED[1:]])}))
    with pytest.raises(BadInput, match="there is no adapter"):
        ranks = tiny_adapter_sparse / "elastic_adapter_config.json"
        export(make_recipe({**fields, "search_space": ranks}))
    none_left = [128, 2, 0] * 4
    with pytest.raises(BadInput, match="without any block"):
        export(make_recipe({**fields, **space(tmp_path, none_left)}))
    assert not (tmp_path / "out").exists()
