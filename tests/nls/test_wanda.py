"""Wanda against a plain-loop oracle, and pruning of whole models."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseport.errors import BadInput, Unsupported, UsageError
from sparseport.nls.calibration import LayerCall, calibration_batches, propagate, trace_layers
from sparseport.nls.linears import decoder_layers, decoder_linears
from sparseport.nls.wanda import InputNorms, prune_model, wanda_mask
from sparseport.weights.mask import keeps_n_m

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_llama(**changes):
    torch.manual_seed(0)
    options = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **changes})).eval()


def tiny_opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    return transformers.OPTForCausalLM(config).eval()


def tiny_neox():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)
    return transformers.GPTNeoXForCausalLM(config).eval()


def tokens(count, length=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SMALL["vocab_size"], (1, length), generator=generator) for _ in range(count)]


def oracle(weight, norms, pruned, block):
    """Which weights stay, one block of one row at a time."""
    keep = np.ones(weight.shape, bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            metric = [
                (abs(weight[row, c]) * np.sqrt(norms[c]), c) for c in range(start, min(start + block, weight.shape[1]))
            ]
            for _, column in sorted(metric)[:pruned]:
                keep[row, column] = False
    return keep


@st.composite
def layers(draw, multiple=1):
    rows = draw(st.integers(1, 6))
    cols = draw(st.integers(1, 5)) * multiple
    # A coarse lattice, so that equal metrics happen often.
    weight = draw(st.lists(st.integers(-4, 4), min_size=rows * cols, max_size=rows * cols))
    norms = draw(st.lists(st.sampled_from([0.0, 1.0, 4.0, 9.0]), min_size=cols, max_size=cols))
    return np.array(weight, np.float32).reshape(rows, cols), np.array(norms, np.float32)


@given(layer=layers(multiple=3), ratio=st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_unstructured_is_the_oracle_with_the_exact_count_per_row(layer, ratio):
    weight, norms = layer
    mask = wanda_mask(torch.from_numpy(weight), torch.from_numpy(norms), sparsity=ratio).numpy()
    pruned = int(weight.shape[1] * ratio)
    assert ((~mask).sum(axis=1) == pruned).all()
    np.testing.assert_array_equal(mask, oracle(weight, norms, pruned, weight.shape[1]))


@given(layer=layers(multiple=8), pattern=st.sampled_from(list(PATTERNS)))
@settings(max_examples=60, deadline=None)
def test_n_m_is_the_oracle_with_n_zeros_in_every_block(layer, pattern):
    weight, norms = layer
    n, m = PATTERNS[pattern]
    mask = wanda_mask(torch.from_numpy(weight), torch.from_numpy(norms), pattern=pattern).numpy()
    assert keeps_n_m(mask, n, m)
    assert (mask.reshape(-1, m).sum(axis=1) == m - n).all()
    np.testing.assert_array_equal(mask, oracle(weight, norms, n, m))


def test_input_norm_decides_between_equal_weights():
    mask = wanda_mask(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([4.0, 1.0, 9.0, 2.0]))
    assert mask.tolist() == [[True, False, True, False]]


def test_weight_and_norm_multiply_with_the_square_root():
    # 3 * sqrt(4) = 6 beats 1 * sqrt(25) = 5; without the root 25 would win.
    assert wanda_mask(torch.tensor([[3.0, 1.0]]), torch.tensor([4.0, 25.0])).tolist() == [[True, False]]


@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_input_norms_are_the_mean_over_samples_of_sums_over_tokens(sizes):
    rng = np.random.default_rng(len(sizes))
    batches = [rng.standard_normal((samples, length, 7)).astype(np.float32) for samples, length in sizes]
    norms = InputNorms()
    for batch in batches:
        norms.add(torch.from_numpy(batch))
    sums = [(sample.astype(np.float64) ** 2).sum(axis=0) for batch in batches for sample in batch]
    assert norms.samples == len(sums)
    np.testing.assert_allclose(norms.squared.numpy(), np.mean(sums, axis=0), rtol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    norms = InputNorms()
    norms.add(torch.full((1, 4, 2), 300.0, dtype=torch.float16))
    assert norms.squared.tolist() == [360000.0, 360000.0]


@pytest.mark.parametrize(
    ("model", "per_layer", "prefix"),
    [(tiny_llama, 7, "model.layers"), (tiny_opt, 6, "model.decoder.layers"), (tiny_neox, 4, "gpt_neox.layers")],
)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_prune_model_touches_every_decoder_linear_and_nothing_else(model, per_layer, prefix, pattern):
    model = model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in decoder_linears(model)]
    assert len(names) == 2 * per_layer
    assert all(name.startswith(f"{prefix}.") for name in names)
    seen = []

    masks = prune_model(model, tokens(2), pattern=pattern, on_progress=lambda *event: seen.append(event))

    assert list(masks) == names
    assert seen == [(name, i + 1, len(names)) for i, name in enumerate(names)]
    pruned = {f"{name}.weight" for name in names}
    for key, tensor in model.state_dict().items():
        if key not in pruned:
            assert torch.equal(tensor, before[key]), key
            continue
        mask = masks[key.removesuffix(".weight")]
        assert ((~mask).sum(axis=1) == mask.shape[1] // 2).all()
        assert mask.any()
        values, old = tensor.numpy(), before[key].numpy()
        np.testing.assert_array_equal(values[mask], old[mask])
        assert not values[~mask].any()
        assert not np.signbit(values[~mask]).any()
        if pattern in PATTERNS:
            assert keeps_n_m(mask, *PATTERNS[pattern])


def test_a_layer_is_measured_on_what_the_pruned_layers_before_it_put_out():
    model, dense = tiny_llama(), tiny_llama()
    batches = tokens(2)
    masks = prune_model(model, batches, sparsity=0.7)

    # Measure the second layer in the pruned model and, for contrast, in the dense one.
    def second_layer_mask(measured):
        norms = InputNorms()
        linear = measured.model.layers[1].self_attn.q_proj
        handle = linear.register_forward_hook(lambda _m, args, _o: norms.add(args[0]))
        with torch.no_grad():
            for batch in batches:
                measured(batch)
        handle.remove()
        weight = dense.model.layers[1].self_attn.q_proj.weight
        return wanda_mask(weight, norms.squared, sparsity=0.7).numpy()

    name = "model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(masks[name], second_layer_mask(model))
    assert (masks[name] != second_layer_mask(dense)).any()


@pytest.mark.parametrize("model", [tiny_llama, tiny_opt, tiny_neox])
def test_going_layer_by_layer_is_the_model_itself(model):
    model = model()
    batch = tokens(1)
    _, stack = decoder_layers(model)
    outputs = []

    def keep(_module, _args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = stack[-1].register_forward_hook(keep)
    trace = trace_layers(model, batch)
    assert not outputs, "the trace stops before the last layer runs"
    with torch.no_grad():
        model(batch[0])
    handle.remove()
    hidden = trace.hidden
    for layer, calls in zip(stack, trace.calls, strict=True):
        assert all(isinstance(call, LayerCall) for call in calls)
        hidden = propagate(layer, hidden, calls)
    torch.testing.assert_close(hidden[0], outputs[0], rtol=0, atol=0)


def test_prune_model_leaves_no_hook_and_the_mode_as_it_was():
    model = tiny_llama(attention_dropout=0.5).train()
    prune_model(model, tokens(1))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_same_inputs_give_the_same_masks():
    first, second = (prune_model(tiny_llama(), tokens(2)) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_blocks_that_do_not_fit_are_refused_before_anything_changes():
    model = tiny_llama(intermediate_size=44)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Unsupported, match=r"mlp\.down_proj.*multiple of 8, found 44"):
        prune_model(model, tokens(1), pattern="4:8")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "1:4"}, "unknown sparsity pattern"),
        ({"sparsity": 1.0}, "outside the possible range"),
        ({"sparsity": math.nan}, "outside the possible range"),
        ({"pattern": "2:4", "sparsity": 0.6}, "fixed sparsity"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        prune_model(tiny_llama(), tokens(1), **options)


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(BadInput, match="NaN or Inf"):
        wanda_mask(torch.ones(2, 2), torch.tensor([1.0, math.inf]))


def test_norms_of_another_layer_are_refused():
    with pytest.raises(BadInput, match=r"expected \(3,\), found \(2,\)"):
        wanda_mask(torch.ones(2, 3), torch.ones(2))


def test_no_batches_are_refused():
    with pytest.raises(BadInput, match="no calibration batches"):
        prune_model(tiny_llama(), [])


def test_a_model_without_linear_layers_is_refused():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    with pytest.raises(Unsupported, match="without linear layers"):
        prune_model(transformers.GPT2LMHeadModel(config), tokens(1, 8))


def test_a_model_with_two_candidate_stacks_is_refused():
    model = tiny_llama()
    model.vision_layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    with pytest.raises(Unsupported, match=r"model\.layers.*vision_layers"):
        decoder_layers(model)


def test_a_list_inside_the_stack_does_not_confuse_it():
    model = tiny_llama()
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    assert decoder_layers(model)[0] == "model.layers"


class Letters:
    """A tokenizer that gives one id per letter."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": [ord(c) for c in text]}


def test_calibration_batches_are_windows_over_the_shuffled_texts():
    texts = ["abc", "", "defg", "hi"]
    batches = calibration_batches(Letters(), texts, samples=3, sequence_length=4, seed=5)
    assert [tuple(batch.shape) for batch in batches] == [(1, 4)] * 3
    assert all(batch.dtype == torch.int64 for batch in batches)
    stream = "".join(chr(i) if i else "|" for batch in batches for i in batch[0].tolist())
    # 9 letters and 3 document ends are exactly the 12 tokens asked for.
    assert sorted(stream.split("|")[:-1]) == ["abc", "defg", "hi"]


def test_calibration_batches_follow_the_seed():
    texts = [chr(97 + i) * 3 for i in range(20)]

    def draw(seed):
        return torch.cat(calibration_batches(Letters(), texts, samples=4, sequence_length=5, seed=seed)).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_too_little_calibration_text_is_refused():
    with pytest.raises(BadInput, match=r"expected 8 tokens \(2 x 4\), found 6"):
        calibration_batches(Letters(), ["abc", "d"], samples=2, sequence_length=4, seed=0)
    with pytest.raises(UsageError):
        calibration_batches(Letters(), ["abc"], samples=0, sequence_length=4, seed=0)
