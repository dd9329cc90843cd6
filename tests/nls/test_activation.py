"""An activated super-network computes what the model cut by hand computes, and what zeros in place of the cuts give."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from super_networks import KINDS, LAYERS, cut_by_hand, folder_of, recipe_of, super_network  # noqa: E402

from sparseport.checkpoints.elastic import Selection, choose, select  # noqa: E402
from sparseport.errors import BadInput, Unsupported  # noqa: E402
from sparseport.nls.activation import activate  # noqa: E402
from sparseport.nls.elastic import ElasticLinear, ElasticWidthLinear, elastic_layers  # noqa: E402
from sparseport.nls.load import load_for_training  # noqa: E402
from sparseport.nls.space import search_space  # noqa: E402

IDS = torch.tensor([[5, 17, 2, 60, 33, 8, 91, 4], [70, 3, 3, 12, 50, 21, 9, 40]])

# The first row is shorter: a mask that is all ones would be left out.
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Architecture -> (super-network, its search space)."""
    made = {}
    for kind in KINDS:
        model = super_network(folder_of(kind, tmp_path_factory.mktemp(kind)), recipe_of(kind))
        made[kind] = (model, search_space(model, recipe_of(kind)))
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def drawn(space: Any, seed: int) -> Selection:
    dice = random.Random(seed)
    return select(space, [dice.choice(group.sizes) for group in space.groups])


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("choice", ["maximal", "heuristic", "minimal", 0, 1, 2])
def test_an_activated_sub_network_is_the_model_cut_by_hand(networks, kind, choice):
    model, space = networks[kind]
    selection = choose(space, choice) if isinstance(choice, str) else drawn(space, choice)
    activate(model, space, selection)
    got = logits(model)
    assert torch.allclose(got, logits(cut_by_hand(model, kind, selection)), atol=2e-5)
    activate(model, space, Selection())
    if choice != "maximal":
        assert not torch.allclose(got, logits(model), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_cuts_are_the_same_as_zeros_in_the_whole_model(networks, kind, tmp_path):
    """Channels and heads: rows that feed nothing. Blocks: outputs that add nothing."""
    model, space = networks[kind]
    selection = choose(space, "minimal")
    activate(model, space, selection)
    want = logits(model)
    activate(model, space, Selection(ranks=selection.ranks))
    facts, zeroed = KINDS[kind], []

    def zero(name: str, columns: slice) -> None:
        part = model.get_submodule(name)
        tensors = [part.base.weight, part.a] if isinstance(part, ElasticLinear) else [part.weight]
        for tensor in tensors:
            zeroed.append((tensor, tensor.detach().clone()))
            tensor.data[:, columns] = 0
        bias = (part.base if isinstance(part, ElasticLinear) else part).bias
        if bias is not None and columns == slice(None):
            zeroed.append((bias, bias.detach().clone()))
            bias.data.zero_()

    for number in range(LAYERS):
        block = f"{facts['path']}.{number}"
        gone = block in selection.removed
        width = selection.widths[f"{block}.{facts['mlp'][0]}"]
        heads = selection.heads[f"{block}.self_attn"] * (2 if kind == "llama" else 1)
        zero(f"{block}.{facts['taker']}", slice(None) if gone else slice(width, None))
        zero(f"{block}.{facts['output']}", slice(None) if gone else slice(heads * 16, None))
    got = logits(model)
    for tensor, before in zeroed:
        tensor.data.copy_(before)
    activate(model, space, Selection())
    assert torch.allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_generation_with_cache_is_that_of_the_smaller_model(networks, kind):
    """With the first block gone: the cache must not take its empty entry for the number of tokens seen."""
    model, space = networks[kind]
    selection = drawn(space, 4)
    selection = Selection(selection.ranks, selection.widths, selection.heads, frozenset({f"{KINDS[kind]['path']}.0"}))
    activate(model, space, selection)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": PADDED}
    got = model.generate(IDS, **options)
    small = cut_by_hand(model, kind, selection)
    assert torch.equal(got, small.generate(IDS, **options))
    assert torch.equal(got, small.generate(IDS, use_cache=False, **options))
    activate(model, space, Selection())


def test_sliding_windows_keep_their_entries_of_the_cache(tmp_path):
    """Blocks of two kinds of attention: an entry of the cache belongs to a kind."""
    import transformers

    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, layer_types=kinds, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = recipe_of("llama", elastic_blocks=[0, 1], widths=[], heads=[])
    model = super_network(tmp_path, recipe)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    space = search_space(model, recipe)
    whole = model.generate(IDS, **options)
    for removed in ({0}, {1}, {0, 1}):
        activate(model, space, Selection(removed=frozenset(f"model.layers.{i}" for i in removed)))
        cached = model.generate(IDS, **options)
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
        assert not torch.equal(cached, whole)
    activate(model, space, Selection())
    assert torch.equal(model.generate(IDS, **options), whole)
    with pytest.raises(BadInput, match="sliding_attention"):
        search_space(model, recipe_of("llama", elastic_blocks=[0, 2], widths=[], heads=[]))


def test_work_that_is_cut_away_is_not_done(networks):
    """Shapes that reach the layers are the small ones, and the weights stay one piece of memory."""
    model, space = networks["llama"]
    activate(model, space, choose(space, "minimal"))
    seen: dict[str, tuple[int, int]] = {}
    handles = [
        part.register_forward_hook(
            lambda _part, args, output, name=name: seen.update({name: (output.shape[-1], args[0].shape[-1])})
        )
        for name, part in model.named_modules()
        if isinstance(part, ElasticLinear | ElasticWidthLinear)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    assert {name for name in seen if ".0." in name or ".2." in name} == set()
    assert seen["model.layers.1.mlp.up_proj"] == (64, 64) and seen["model.layers.1.mlp.down_proj"] == (64, 64)
    assert seen["model.layers.3.self_attn.q_proj"] == (32, 64) and seen["model.layers.3.self_attn.o_proj"] == (64, 32)
    assert seen["model.layers.3.self_attn.k_proj"] == (16, 64)
    activate(model, space, Selection())


def test_layers_that_nothing_cuts_stay_plain(tmp_path):
    recipe = recipe_of("llama", heads=[], elastic_blocks=[])
    model = super_network(folder_of("llama", tmp_path), recipe)
    kinds = {name: type(part).__name__ for name, part in model.named_modules()}
    assert kinds["model.layers.0.self_attn.o_proj"] == "Linear"
    assert kinds["model.layers.0.mlp.gate_proj"] == "ElasticWidthLinear"
    space = search_space(model, recipe)
    with pytest.raises(BadInput, match="not elastic"):
        activate(model, space, Selection(heads={"model.layers.0.self_attn": 1}))
    with pytest.raises(BadInput, match="no adapter"):
        activate(model, space, Selection(ranks={"model.layers.0.self_attn.k_proj": 4}))


def test_gradients_reach_active_parts_only(networks):
    model, space = networks["llama"]
    activate(model, space, choose(space, "minimal"))
    model(IDS, use_cache=False).logits.square().mean().backward()
    layers = dict(elastic_layers(model))
    up = layers["model.layers.1.mlp.up_proj"]
    assert up.b.grad[:64].any() and not up.b.grad[64:].any()
    query = layers["model.layers.1.self_attn.q_proj"]
    assert query.a.grad[:4].any() and not query.a.grad[4:].any() and not query.b.grad[32:].any()
    assert layers["model.layers.0.mlp.up_proj"].b.grad is None
    model.zero_grad(set_to_none=True)
    activate(model, space, Selection())


def test_architectures_whose_forward_needs_whole_heads_are_refused(tmp_path):
    """OLMo 2 has a norm over all heads together."""
    import transformers

    config = transformers.Olmo2Config(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="cut layers"):
        load_for_training(tmp_path, recipe_of("llama", elastic_blocks=[]))
    load_for_training(tmp_path, recipe_of("llama", elastic_blocks=[], heads=[]))


def test_sizes_outside_the_space_are_refused(networks):
    model, space = networks["llama"]
    sizes = [group.sizes[0] for group in space.groups]
    with pytest.raises(BadInput, match="rank is not in the search space"):
        activate(model, space, [7, *sizes[1:]])
    with pytest.raises(BadInput, match="one number per group"):
        activate(model, space, sizes[1:])
    whole = logits(model)
    activate(model, space, sizes)
    assert torch.equal(logits(model), whole)
