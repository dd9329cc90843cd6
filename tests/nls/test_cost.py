"""The cost model against torch's own counters, on the whole tiny model and on what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from sparseport.checkpoints.elastic import Selection  # noqa: E402
from sparseport.checkpoints.folder import ModelFolder  # noqa: E402
from sparseport.errors import BadInput  # noqa: E402
from sparseport.merge.subnetwork import sub_network  # noqa: E402
from sparseport.nls.cost import (  # noqa: E402
    Architecture,
    Heads,
    architecture_of,
    cache_bytes,
    macs,
    model_bytes,
    nonzero_parameters,
    parameters,
    weight_bytes,
)
from sparseport.nls.elastic import ElasticLinear  # noqa: E402

LAYER = "model.layers.1"
SELECTION = Selection(
    widths={f"{LAYER}.mlp.gate_proj": 96, f"{LAYER}.mlp.up_proj": 96},
    heads={f"{LAYER}.self_attn": 1},
    removed=frozenset(["model.layers.0"]),
)


@pytest.fixture
def whole(tiny_base: Path) -> Architecture:
    with ModelFolder.open(tiny_base) as folder:
        return architecture_of(folder)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _cut(model: Any, whole: Architecture) -> Architecture:
    """The torch model loses what the selection leaves out; returns the shapes that the cost model thinks are left."""
    shapes = dict(whole.linears)
    sub = sub_network(SELECTION, shapes, model.config.to_dict())
    assert sub is not None
    with torch.no_grad():
        for name in shapes:
            linear = model.get_submodule(name)
            rows, columns = sub.shape(name, shapes[name])
            smaller = nn.Linear(columns, rows, bias=False)
            smaller.weight.copy_(linear.weight[:rows, :columns])
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, smaller)
    model.model.layers = nn.ModuleList([model.model.layers[number] for number in sub.blocks])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)
    return whole.cut(sub)


def _flops(model: Any, tokens: int, past: int = 0) -> int:
    """FLOPs of a forward as torch counts them, without the rotary angles (a product of vectors)."""
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    with torch.no_grad():
        cache = model(torch.zeros((1, past), dtype=torch.int64), use_cache=True).past_key_values if past else None
        with FlopCounterMode(display=False) as counter:
            model(ids, past_key_values=cache, use_cache=True)
    rotary = sum(counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {}).values())
    assert rotary > 0
    return int(counter.get_total_flops() - rotary)


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (17, 0), (1, 16), (3, 5)])
@pytest.mark.parametrize("smaller", [False, True], ids=["whole", "sub-network"])
@pytest.mark.parametrize("ranks", [False, True], ids=["merged", "branches"])
def test_macs_are_half_of_the_flops_that_torch_counts(
    tokens: int, past: int, smaller: bool, ranks: bool, model: Any, whole: Architecture
) -> None:
    shapes = _cut(model, whole) if smaller else whole
    if ranks:
        chosen = {name: 3 + index % 4 for index, name in enumerate(sorted(shapes.linears)) if "down" not in name}
        for name, rank in chosen.items():
            parent, _, leaf = name.rpartition(".")
            elastic = ElasticLinear(model.get_submodule(name), 8, 16.0)
            elastic.active_rank = rank
            setattr(model.get_submodule(parent), leaf, elastic)
        shapes = shapes.with_branches(chosen)
    counted = macs(shapes, tokens, past=past)
    assert 2 * counted.total == _flops(model, tokens, past)
    assert (counted.branches > 0) == ranks
    assert counted.total == counted.linears + counted.branches + counted.attention + counted.head


@pytest.mark.parametrize("smaller", [False, True], ids=["whole", "sub-network"])
def test_parameters_are_those_of_torch(smaller: bool, model: Any, whole: Architecture) -> None:
    shapes = _cut(model, whole) if smaller else whole
    assert parameters(shapes) == sum(parameter.numel() for parameter in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert {f"{name}.weight" for name in shapes.linears} | set(shapes.others) <= set(names)
    branches = shapes.with_branches({f"{LAYER if not smaller else 'model.layers.0'}.mlp.up_proj": 4})
    assert parameters(branches) - parameters(shapes) == 4 * (64 + (96 if smaller else 128))


def test_last_position_only(whole: Architecture) -> None:
    every, last = macs(whole, 10), macs(whole, 10, predicted=1)
    assert every.head == 10 * last.head == 10 * 256 * 64
    assert (every.linears, every.attention) == (last.linears, last.attention)


def test_quantised_and_sparse_checkpoints_have_the_same_shapes(
    whole: Architecture, tiny_int4: Path, tiny_sparse: Path
) -> None:
    for path in (tiny_int4, tiny_sparse):
        with ModelFolder.open(path) as folder:
            assert architecture_of(folder) == whole


def test_bytes_of_int4_are_those_of_the_file(whole: Architecture, tiny_int4: Path) -> None:
    from sparseport.checkpoints.detect import open_linears

    with ModelFolder.open(tiny_int4) as folder:
        stored = open_linears(folder)
        size = {2: "F16", 4: "I32"}
        for name, shape in whole.linears.items():
            found = 0
            for part in stored.parts(name):
                if not part.endswith("g_idx"):
                    array = folder.read(part)
                    assert array.dtype.itemsize in size
                    found += array.nbytes
            assert weight_bytes(shape, "int4", 32) == found


def test_bytes_by_form(whole: Architecture) -> None:
    shape = (6, 100)
    assert weight_bytes(shape, "fp32") == 2400 and weight_bytes(shape, "fp16") == 1200
    assert weight_bytes(shape, "int8") == 600 + 6 * 3 and weight_bytes(shape, "int8", symmetric=True) == 612
    # Two groups a row, the second one short; one group a row.
    assert weight_bytes(shape, "int4", 64) == 300 + 12 * 2 + 6
    assert weight_bytes(shape, "int4", -1, symmetric=True) == 300 + 12
    # A bit for each weight, and the values of half of them.
    assert weight_bytes(shape, "fp16", nonzero=300) == 75 + 600
    assert weight_bytes(shape, "int4", -1, symmetric=True, nonzero=301) == 75 + 151 + 12
    elements = sum(a * b for a, b in whole.linears.values())
    small = sum(whole.others.values())
    assert model_bytes(whole, "fp16") == 2 * parameters(whole)
    assert model_bytes(whole, "fp32", embedding="fp32") == 4 * (parameters(whole) - small) + 2 * small
    assert model_bytes(whole, "int4", group_size=32) == elements // 2 + (elements // 32) * 5 // 2 + 2 * (
        parameters(whole) - elements
    )
    assert model_bytes(whole.with_branches({f"{LAYER}.mlp.up_proj": 4}), "fp16") == model_bytes(whole, "fp16") + 1536
    assert cache_bytes(whole, 10) == 2 * 10 * 2 * 2 * (2 * 16)


def test_nonzero_weights(whole: Architecture) -> None:
    name = f"{LAYER}.mlp.up_proj"
    assert nonzero_parameters(whole, {name: 100}) == parameters(whole) - 128 * 64 + 100
    for wrong in ({name: 128 * 64 + 1}, {name: -1}, {"model.layers.9.mlp.up_proj": 1}):
        with pytest.raises(BadInput, match="non-zero"):
            nonzero_parameters(whole, wrong)


def test_a_tied_head_is_counted_once_and_computed() -> None:
    tied = Architecture({"a": (4, 8)}, {"b": Heads(2, 1, 4)}, (100, 8))
    apart = Architecture({"a": (4, 8)}, {"b": Heads(2, 1, 4)}, (100, 8), (100, 8))
    assert macs(tied, 3) == macs(apart, 3) and macs(tied, 3).head == 2400
    assert parameters(apart) - parameters(tied) == 800


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"tokens": 1, "past": -1}, {"tokens": 2, "predicted": 3}])
def test_impossible_counts_are_refused(wrong: dict[str, int], whole: Architecture) -> None:
    with pytest.raises(BadInput, match="tokens"):
        macs(whole, **wrong)
    with pytest.raises(BadInput, match="branch"):
        whole.with_branches({"nowhere": 1})
    with pytest.raises(BadInput, match="group size"):
        weight_bytes((4, 4), "int4", 0)


def test_lonas_table_1() -> None:
    """LLaMA-7B: the first row, 1.7 TFLOPs, from either reading; the second, 1.4 TFLOPs and 5.6B (5.66 here)."""
    names = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}

    def llama(width: int) -> Architecture:
        mlp = {"gate_proj": (width, 4096), "up_proj": (width, 4096), "down_proj": (4096, width)}
        linears = {f"l.{n}.{leaf}": shape for n in range(32) for leaf, shape in {**names, **mlp}.items()}
        return Architecture(linears, {f"l.{n}": Heads(32, 32, 128) for n in range(32)}, (32000, 4096), (32000, 4096))

    whole, heuristic = llama(11008), llama(8256)
    assert f"{parameters(whole) / 1e9:.1f} {parameters(heuristic) / 1e9:.1f}" == "6.7 5.7"
    assert f"{macs(whole, 256).total / 1e12:.1f}" == f"{2 * macs(whole, 128).total / 1e12:.1f}" == "1.7"
    assert f"{macs(heuristic, 256).total / 1e12:.1f}" == "1.4"
