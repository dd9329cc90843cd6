"""Search spaces of Shears, LoNAS and early SQFT, and the relaxed JSON that they are written in."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseport.checkpoints.elastic import ElasticGroup, SearchSpace, Selection, choose, open_search_space
from sparseport.checkpoints.json_files import parse_json, read_json
from sparseport.checkpoints.loose_json import strict_text
from sparseport.checkpoints.nncf_space import MAX_NODES
from sparseport.errors import BadInput, SparseportError, Unsupported

LLAMA = "PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]/"


def llama(layer: object, module: str, tail: str = "ModuleDict[lora_A]/NNCFLinear[default]") -> str:
    """The node of a module such as `self_attn.q_proj` in a Llama of transformers 4.31."""
    block, name = module.split(".")
    return f"{LLAMA}LlamaDecoderLayer[{layer}]/Llama{block.title()}[{block}]/Linear[{name}]/{tail}/linear_0"


def every(module: str, tail: str = "ModuleDict[lora_A]/NNCFLinear[default]") -> str:
    return "{re}" + llama("{*}", module, tail)


def config(groups: object, widths: object, section: str = "bootstrapNAS", **width: object) -> dict:
    width = {"overwrite_groups": groups, "overwrite_groups_widths": widths, **width}
    return {"input_info": [{"sample_size": [1, 8]}], section: {"training": {"elasticity": {"width": width}}}}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def space_of(tmp_path):
    def read(value, layers=None) -> SearchSpace:
        return open_search_space(write(tmp_path / "nncf.json", value), layers=layers)

    return read


# --- the systems --------------------------------------------------------------------------------------------------

SHEARS = """{
    "bootstrapNAS": { "training": { // comment of a line
        "algorithm": "progressive_shrinking", /* and
        of two */
        "schedule": {"list_stage_descriptions": [{"train_dims": ["width"], "width_indicator": 5, "epochs": -1}]},
        "elasticity": {
            "available_elasticity_dims": ["width"],
            "width": {
                "overwrite_groups": [
                    ["{re}Peft/LoraModel[base_model]/MPTForCausalLM[model]/MPTModel[transformer]/ModuleList[blocks]\
/MPTBlock[{*}]/Attention[attn]/Linear[q_proj]/ModuleDict[lora_A]/NNCFLinear[default]/linear_0",
                     "{re}Peft/LoraModel[base_model]/MPTForCausalLM[model]/MPTModel[transformer]/ModuleList[blocks]\
/MPTBlock[{*}]/Attention[attn]/Linear[out_proj]/ModuleDict[lora_A]/NNCFLinear[default]/linear_0",],
                    ["{re}Peft/LoraModel[base_model]/MPTForCausalLM[model]/MPTModel[transformer]/ModuleList[blocks]\
/MPTBlock[{*}]/MPTMLP[ffn]/Linear[up_proj]/ModuleDict[lora_A]/NNCFLinear[default]/linear_0"]
                ],
                "overwrite_groups_widths": [ [32, 24, 16], [16, 8], ]
            }
        }
    }}
}
"""


def test_shears_template_of_mpt(space_of):
    """All layers of the first group come before the first layer of the second."""
    assert space_of(SHEARS, layers=2).groups == (
        ElasticGroup(("transformer.blocks.0.attn.q_proj", "transformer.blocks.0.attn.out_proj"), (32, 24, 16)),
        ElasticGroup(("transformer.blocks.1.attn.q_proj", "transformer.blocks.1.attn.out_proj"), (32, 24, 16)),
        ElasticGroup(("transformer.blocks.0.ffn.up_proj",), (16, 8)),
        ElasticGroup(("transformer.blocks.1.ffn.up_proj",), (16, 8)),
    )


def test_template_needs_the_number_of_layers(space_of):
    with pytest.raises(BadInput, match="num_hidden_layers") as caught:
        space_of(SHEARS)
    assert caught.value.code == "E_ELASTIC" and caught.value.fix


@pytest.mark.parametrize("layers", [0, -1, True, 2.0, "2"])
def test_number_of_layers_that_is_none(layers, space_of):
    with pytest.raises(BadInput, match="number of layers"):
        space_of(SHEARS, layers=layers)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.booleans(), st.integers(1, 3), st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True)),
        min_size=1,
        max_size=4,
    ),
    layers=st.integers(1, 12),
)
def test_flattened_order(groups, layers, tmp_path_factory):
    """Against a second expansion: text is replaced first, and the names are read off the result."""
    nodes, sizes, flat = [], [], []
    for number, (template, members, widths) in enumerate(groups):
        widths = sorted(widths, reverse=True)
        group = [(every if template else lambda m: llama(0, m))(f"mlp.p{number}_{i}") for i in range(members)]
        nodes.append(group)
        sizes.append(widths)
        for layer in range(layers if template else 1):
            text = [node.replace("{re}", "").replace("{*}", str(layer)) for node in group]
            names = [".".join(re.findall(r"\[(.*?)\]", node, re.S)) for node in text]
            flat.append(
                (tuple(n.removeprefix("base_model.model.").removesuffix(".lora_A.default") for n in names), widths)
            )
    path = write(tmp_path_factory.mktemp("flat") / "nncf.json", config(nodes, sizes))
    assert [(g.targets, list(g.sizes)) for g in open_search_space(path, layers=layers).groups] == flat


@pytest.mark.parametrize("section", ["SQFT", "bootstrapNAS"])
@pytest.mark.parametrize(
    "classes", ["LlamaAttention/Linear", "LlamaSdpaAttention/SQFTQuantAwareLinear", "Phi3.A_1/QuantLinear"]
)
def test_class_names_do_not_count(section, classes, space_of):
    attention, linear = classes.split("/")
    nodes = [
        f"{LLAMA}{attention}Layer[7]/{attention}[self_attn]/{linear}[q_proj]/A[lora_A]/{linear}[default]/linear_{n}"
        for n in (0, 12)
    ]
    for node in nodes:
        space = space_of(config([[node]], [[32, 28, 24]], section))
        assert space.groups == (ElasticGroup(("model.layers.7.self_attn.q_proj",), (32, 28, 24), "rank"),)


def test_lonas_llama_has_ranks_and_widths(space_of):
    lora_b, own = "ModuleDict[lora_B]/NNCFLinear[default]", "NNCFUserSelfLinear[self_linear]"
    mlp = [llama(0, f"mlp.{name}", tail) for name in ("gate_proj", "up_proj") for tail in (own, lora_b)]
    ranks = [llama(0, f"mlp.{name}") for name in ("gate_proj", "up_proj")]
    space = space_of(
        config([[llama(0, "self_attn.q_proj")], mlp, ranks], [[32, 28], [11008, 9632, 8256, 6880, 5504], [32, 28]])
    )
    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    query = "model.layers.0.self_attn.q_proj"
    assert space.groups == (
        ElasticGroup((query,), (32, 28), "rank"),
        ElasticGroup((gate, up), (11008, 9632, 8256, 6880, 5504), "width"),
        ElasticGroup((gate, up), (32, 28), "rank"),
    )
    both = {gate: 32, up: 32, query: 32}
    assert choose(space, "heuristic", trained=both) == Selection(both, {gate: 8256, up: 8256})
    assert choose(space, "minimal").widths == {gate: 5504, up: 5504}


def test_newer_peft_calls_the_inner_layer_base_layer(space_of):
    nodes = [llama(0, "mlp.up_proj", tail) for tail in ("Linear[base_layer]", "D[lora_B]/NNCFLinear[default]")]
    (group,) = space_of(config([nodes], [[128, 96]])).groups
    assert group == ElasticGroup(("model.layers.0.mlp.up_proj",), (128, 96), "width")


def test_lonas_bert_has_layers_without_adapter(space_of):
    """K has no adapter in that recipe: its node is the layer itself. The intermediate widths are any numbers."""
    root = "PeftModelForSequenceClassification/LoraModel[base_model]/BertForSequenceClassification[model]"
    layer = f"{root}/BertModel[bert]/BertEncoder[encoder]/ModuleList[layer]/BertLayer[0]"
    own = f"{layer}/BertAttention[attention]/BertSelfAttention[self]"
    rows, update = "NNCFUserSelfLinear[self_linear]/linear_0", "ModuleDict[lora_B]/NNCFLinear[default]/linear_0"
    nodes = [f"{own}/Linear[query]/{rows}", f"{own}/Linear[query]/{update}", f"{own}/NNCFLinear[key]/linear_0"]
    ranks = [f"{own}/Linear[query]/ModuleDict[lora_A]/NNCFLinear[default]/linear_0"]
    dense = [f"{layer}/BertIntermediate[intermediate]/NNCFLinear[dense]/linear_0"]
    value = config([nodes, ranks, dense], [[768, 384], [8, 4, 2], [3072, 2634, 216]], add_dynamic_inputs=["x"])
    query, key = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
    inner = "bert.encoder.layer.0.intermediate.dense"
    assert space_of(value).groups == (
        ElasticGroup((query, key), (768, 384), "width"),
        ElasticGroup((query,), (8, 4, 2), "rank"),
        ElasticGroup((inner,), (3072, 2634, 216), "width"),
    )
    assert choose(space_of(value), "heuristic") == Selection({query: 4}, {query: 768, key: 768, inner: 2634})


def test_lonas_bloom_with_trailing_commas(space_of):
    root = "Peft/LoraModel[base_model]/BloomForCausalLM[model]/BloomModel[transformer]/ModuleList[h]/BloomBlock[3]"
    node = f"{root}/BloomAttention[self_attention]/Linear[query_key_value]/ModuleDict[lora_A]/NNCFLinear[default]"
    text = json.dumps(config([[f"{node}/linear_0"]], [[32, 28]])).replace('linear_0"]]', 'linear_0",],\n]')
    with pytest.raises(ValueError):
        json.loads(text)
    assert space_of(text).groups == (
        ElasticGroup(("transformer.h.3.self_attention.query_key_value",), (32, 28), "rank"),
    )


def test_todays_sqft_goes_through_the_same_door(tmp_path):
    path = tmp_path / "elastic_adapter_config.json"
    write(path, [{"target": ["base_model.model.model.layers.0.mlp.up_proj.lora_A"], "search_space": [8, 4]}])
    assert open_search_space(path).groups == (ElasticGroup(("model.layers.0.mlp.up_proj",), (8, 4)),)
    path.write_text(path.read_text().replace("[8, 4]", "[8, 4,]"))
    with pytest.raises(BadInput, match="not valid JSON"):
        open_search_space(path)


# --- what is refused ----------------------------------------------------------------------------------------------

UP, GATE = "mlp.up_proj", "mlp.gate_proj"
OWN, LORA_B = "NNCFUserSelfLinear[self_linear]", "ModuleDict[lora_B]/NNCFLinear[default]"
ONE = llama(0, UP)
BAD = {
    "empty object": ({}, "no search space"),
    "other config": ({"compression": {}}, "no search space"),
    "two sections": ({**config([[ONE]], [[8]]), **config([[ONE]], [[8]], "SQFT")}, "no search space"),
    "no training": ({"SQFT": {}}, "SQFT.training is missing"),
    "section is a list": ({"SQFT": [1]}, "SQFT.training is missing"),
    "no width": ({"SQFT": {"training": {"elasticity": {}}}}, "SQFT.training.elasticity.width is missing"),
    "groups found by NNCF": ({"SQFT": {"training": {"elasticity": {"width": {}}}}}, "overwrite_groups"),
    "no groups": (config([], []), "overwrite_groups"),
    "no widths": (config([[ONE]], None), "overwrite_groups_widths"),
    "more widths than groups": (config([[ONE]], [[8], [8]]), "different lengths"),
    "more groups than widths": (config([[ONE], [llama(1, UP)]], [[8]]), "different lengths"),
    "group is text": (config([ONE], [[8]]), "list of node names"),
    "group is empty": (config([[]], [[8]]), "list of node names"),
    "node is a number": (config([[ONE, 7]], [[8]]), "list of node names"),
    "width is a number": (config([[ONE]], [8]), "no list of ranks"),
    "width is empty": (config([[ONE]], [[]]), "no list of ranks"),
    "rank 0": (config([[ONE]], [[8, 0]]), "no list of ranks"),
    "rank is true": (config([[ONE]], [[8, True]]), "no list of ranks"),
    "rank is 8.0": (config([[ONE]], [[8.0]]), "no list of ranks"),
    "smallest first": (config([[ONE]], [[8, 16]]), "largest"),
    "rank twice": (config([[ONE]], [[8, 8]]), "largest"),
    "placeholder": (config([[ONE]], [[-1]]), "--search_space"),
    "node twice": (config([[ONE, ONE]], [[8]]), "node twice"),
    "module in two groups": (config([[ONE], [ONE]], [[8], [8]]), "more than one group"),
    "module in two width groups": (
        config([[llama(0, UP, OWN), llama(0, UP, LORA_B)]] * 2, [[8], [8]]),
        "more than one group",
    ),
    "ranks and widths": (config([[ONE, llama(0, GATE, OWN), llama(0, GATE, LORA_B)]], [[8]]), "mixes ranks"),
    "rank and width of one module": (config([[ONE, llama(0, UP, OWN), llama(0, UP, LORA_B)]], [[8]]), "mixes ranks"),
    "base without lora_B": (config([[llama(0, UP, OWN)]], [[8]]), "only a part"),
    "lora_B without base": (config([[llama(0, UP, LORA_B)]], [[8]]), "only a part"),
    "{*} without {re}": (config([[llama("{*}", UP)]], [[8]]), "{*} without {re}"),
    "{re} without {*}": (config([["{re}" + ONE]], [[8]]), "needs {*} once"),
    "{*} twice": (config([["{re}" + llama("{*}", UP).replace("[model]", "[{*}]")]], [[8]]), "needs {*} once"),
    "{*} in a class": (config([["{re}" + ONE.replace("Linear[", "{*}[")]], [[8]]), "needs {*} once"),
    "template beside one layer": (config([[every(UP), llama(0, GATE)]], [[8]]), "and some do not"),
    "{re} in the middle": (config([[ONE.replace("Llama", "{re}Llama")]], [[8]]), "unknown node"),
    "no operation": (config([[ONE.removesuffix("/linear_0")]], [[8]]), "unknown node"),
    "another operation": (config([[ONE.replace("linear_0", "conv2d_0")]], [[8]]), "unknown node"),
    "open bracket": (config([[ONE.replace("[0]", "[0")]], [[8]]), "unknown node"),
    "nested brackets": (config([[ONE.replace("[0]", "[[0]]")]], [[8]]), "unknown node"),
    "dots in brackets": (config([[ONE.replace("[0]", "[0.1]")]], [[8]]), "unknown node"),
    "path out of the folder": (config([[ONE.replace("[0]", "[../x]")]], [[8]]), "unknown node"),
    "line end in the name": (config([[ONE + "\n"]], [[8]]), "unknown node"),
    "no PEFT model": (config([[ONE.replace("LoraModel[base_model]/", "")]], [[8]]), "not part of a LoRA model"),
    "adapter of another name": (config([[ONE.replace("[default]", "[other]")]], [[8]]), "not part of a LoRA model"),
    "lora_A alone": (config([[ONE.replace("/NNCFLinear[default]", "")]], [[8]]), "not part of a LoRA model"),
    "lora_C": (config([[ONE.replace("lora_A", "lora_C")]], [[8]]), "not part of a LoRA model"),
    "an embedding's update": (config([[ONE.replace("lora_A", "lora_embedding_A")]], [[8]]), "not part of a LoRA model"),
    "self_linear inside": (config([[ONE.replace("[mlp]", "[self_linear]")]], [[8]]), "not part of a LoRA model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_space(case, space_of, tmp_path):
    value, text = BAD[case]
    with pytest.raises(BadInput) as caught:
        space_of(value, layers=2)
    message = str(caught.value)
    assert text in message and str(tmp_path / "nncf.json") in message
    assert caught.value.code == "E_ELASTIC" and caught.value.fix


def test_other_dimensions_and_reordered_rows(space_of):
    value = config([[ONE]], [[8, 4]])
    value["bootstrapNAS"]["training"]["elasticity"]["available_elasticity_dims"] = ["width", "depth"]
    with pytest.raises(Unsupported, match="depth") as caught:
        space_of(value)
    assert caught.value.code == "E_ELASTIC" and caught.value.fix
    for tail, widths, kind in (
        ((OWN, LORA_B), [128, 64], Unsupported),
        (("ModuleDict[lora_A]/L[default]",), [8], None),
    ):
        value = config([[llama(0, UP, part) for part in tail]], [widths])
        value["bootstrapNAS"]["training"]["schedule"] = {
            "list_stage_descriptions": [{"train_dims": ["width"]}, {"reorg_weights": True}]
        }
        if kind is None:  # ranks are re-ordered in the adapter's own tensors, which are saved
            assert space_of(value).groups[0].kind == "rank"
            continue
        with pytest.raises(kind, match="reorg_weights"):
            space_of(value)
        value["bootstrapNAS"]["training"]["schedule"]["list_stage_descriptions"][1]["reorg_weights"] = False
        assert space_of(value).groups[0].kind == "width"


@pytest.mark.parametrize("layers", [MAX_NODES // 2 + 1, 10**30])
def test_expansion_is_limited(layers, space_of):
    started = time.monotonic()
    with pytest.raises(BadInput, match="too large"):
        space_of(config([[every(UP), every(GATE)]], [[8]]), layers=layers)
    assert time.monotonic() - started < 2


def test_expansion_is_limited_over_all_groups(space_of):
    groups = [[every(f"mlp.p{i}")] for i in range(3)]
    assert len(space_of(config(groups[:2], [[8]] * 2), layers=1000).groups) == 2000
    with pytest.raises(BadInput, match="too large"):
        space_of(config(groups, [[8]] * 3), layers=MAX_NODES // 2)


@pytest.mark.parametrize("depth", [30, 100, 100_000])
def test_deep_nesting(depth, space_of):
    text = json.dumps(config("GROUPS", [[8]])).replace('"GROUPS"', "[" * depth + "]" * depth)
    with pytest.raises(BadInput, match="nested too deeply"):
        space_of(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text(max_size=6)
    | st.sampled_from([ONE, every(UP), "{re}", "{*}", "[]", llama(0, UP, OWN), llama(0, UP, LORA_B), 10**300, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    value=VALUES,
    place=st.sampled_from(
        ["whole", "SQFT", "training", "elasticity", "schedule", "width", "groups", "widths", "group"]
    ),
)
def test_whatever_the_file_says(value, place, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    whole = config([[ONE], [every(GATE)]], [[8, 4], [8]], "SQFT")
    inner = whole["SQFT"]["training"]
    if place == "whole":
        whole = value
    elif place == "SQFT":
        whole[place] = value
    elif place in ("elasticity", "schedule"):
        inner[place] = value
    elif place == "training":
        whole["SQFT"]["training"] = value
    elif place == "width":
        inner["elasticity"]["width"] = value
    else:
        width = inner["elasticity"]["width"]
        if place == "group":
            width["overwrite_groups"][0] = value
        else:
            width["overwrite_groups" + ("_widths" if place == "widths" else "")] = value
    path.write_text(json.dumps(whole))
    try:
        for group in open_search_space(path, layers=2).groups:
            assert group.targets and group.sizes and group.kind in ("rank", "width")
    except SparseportError as error:
        assert str(path) in str(error)


# --- the relaxed JSON ---------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.sampled_from('ab/*"\\,]}{[:\n\t #ü'), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
NOISE = st.sampled_from(["", "", " ", "\n", "\r\n", "// x\n", '// "],/*\n', "/**/", '/* , ] \n // " */', "/* * / */"])


@st.composite
def relaxed(draw):
    """(a value, its text with comments and trailing commas)"""

    def text(value) -> str:
        if isinstance(value, list):
            return brackets("[]", [text(item) for item in value])
        if isinstance(value, dict):
            return brackets("{}", [f"{json.dumps(k)}{draw(NOISE)}:{text(v)}" for k, v in value.items()])
        return draw(NOISE) + json.dumps(value, ensure_ascii=draw(st.booleans())) + draw(NOISE)

    def brackets(pair: str, items: list[str]) -> str:
        last = "," if items and draw(st.booleans()) else ""
        return draw(NOISE) + pair[0] + draw(NOISE) + ",".join(items) + last + draw(NOISE) + pair[1] + draw(NOISE)

    value = draw(PLAIN)
    return value, text(value)


@settings(max_examples=300, deadline=None)
@given(relaxed())
def test_relaxed_text_means_the_same(pair):
    value, text = pair
    assert parse_json(text.encode(), where="x", what="x", loose=True) == value
    mended = strict_text(text)
    # Line and column stay: only what was taken out differs, and it became spaces.
    assert len(mended) == len(text)
    assert all(a == b or (b == " " and a not in "\r\n") for a, b in zip(text, mended, strict=True))


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_strict_text_is_left_alone(value):
    for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        assert strict_text(text) == text


REFUSED = [
    "[,]", "{,}", "[1,,]", "[1,,2]", '{"a":,}', '{"a",}', "[1],", ",", "", "[1 2]", '["a]', "[1 /* x ]", "# x\n[1]",
    "[1] // x\n 2", "['a']", "[NaN]", "[Infinity]", "[1e999,]", '{"a": 1, "a": 2,}', "[1/2]", "1/**/2", "{a: 1}",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_no_more_than_comments_and_trailing_commas(text, tmp_path):
    with pytest.raises(BadInput) as caught:
        read_json(write(tmp_path / "x.json", text), allow_list=True, loose=True)
    assert str(tmp_path / "x.json") in str(caught.value)


def test_messages_point_into_the_file():
    with pytest.raises(BadInput, match=r"line 3 column 4"):
        parse_json(b"// one\n[/* two\n*/ nonsense]", where="x", what="x", loose=True)


def test_strict_reading_stays_strict(tmp_path):
    for text in ("[1,]", "[1] // x", "/**/[1]"):
        with pytest.raises(BadInput):
            read_json(write(tmp_path / "x.json", text), allow_list=True)


@pytest.mark.parametrize("text", ['"' + '\\"' * 200_000, "/*" * 200_000, '[""' + ',""' * 200_000, "[" + "," * 400_000])
def test_hostile_text_takes_linear_time(text):
    started = time.monotonic()
    with pytest.raises(BadInput):
        parse_json(text.encode(), where="x", what="x", loose=True)
    assert time.monotonic() - started < 5
