"""Round-to-nearest and masked GPTQ: pruned weights stay on the zero-point, and GPTQ earns its cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseport.errors import BadInput, UsageError
from sparseport.nls.linears import decoder_linears
from sparseport.nls.quantize import HessianSum, quantize_gptq, quantize_model, quantize_rtn
from sparseport.nls.wanda import prune_model
from sparseport.weights.rounding import dequantize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@st.composite
def problems(draw):
    """A weight, a mask, calibration inputs and a grid."""
    group = draw(st.sampled_from([1, 2, 4, 8, 12]))
    rows, cols = draw(st.integers(1, 9)), group * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    values = (rng.standard_normal((rows, cols)) * scale).astype(np.float32)
    mask = rng.random((rows, cols)) >= draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    inputs = rng.standard_normal((draw(st.integers(1, 60)), cols)).astype(np.float32)
    if draw(st.booleans()):
        inputs[:, rng.random(cols) < 0.3] = 0  # inputs that calibration never uses
    return values, mask, hessian_of(inputs), group, draw(st.booleans())


def hessian_of(inputs):
    hessian = HessianSum()
    hessian.add(torch.from_numpy(inputs))
    return hessian.value()


def correlated(rng, samples, cols):
    """Inputs that share a few strong directions, as activations do."""
    common = rng.standard_normal((samples, 4)) @ rng.standard_normal((4, cols))
    return (common + 0.3 * rng.standard_normal((samples, cols))).astype(np.float32)


def zeros(weight):
    return weight.codes == np.repeat(weight.zero_points, weight.group_size, axis=1)


def output_error(weight, values, inputs):
    return float(np.square(inputs.astype(np.float64) @ (dequantize(weight) - values).T).sum())


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_every_pruned_weight_is_on_its_zero_point(problem):
    values, mask, hessian, group, symmetric = problem
    options = {"group_size": group, "symmetric": symmetric}
    for weight in (
        quantize_rtn(values, mask, **options),
        quantize_gptq(values, mask, hessian, **options),
        quantize_gptq(values, mask, hessian, block=3, **options),
    ):
        assert zeros(weight)[~mask].all()
        assert not dequantize(weight)[~mask].any()
        assert weight.mask is mask
        assert (weight.group_size, weight.groups) == (group, values.shape[1] // group)
        assert (weight.codes.dtype, weight.scales.dtype, weight.zero_points.dtype) == (np.uint8, np.float16, np.uint8)
        if symmetric:
            assert (weight.zero_points == 8).all()


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_round_to_nearest_is_within_half_a_step_inside_the_grid(problem):
    values, mask, _, group, _ = problem
    weight = quantize_rtn(values, mask, group_size=group, scale_dtype=np.float32)
    step = np.repeat(weight.scales, group, axis=1)
    error = np.abs(dequantize(weight) - np.where(mask, values, 0))
    inside = (weight.codes > 0) & (weight.codes < 15)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    # Rounding the zero-point moves the ends of the grid by up to half a step.
    assert (error <= 1.001 * step).all()


@given(problem=problems(), factor=st.sampled_from([1.0, 0.25, 7.0]))
@settings(max_examples=40, deadline=None)
def test_gptq_without_correlation_is_round_to_nearest(problem, factor):
    values, mask, _, group, symmetric = problem
    hessian = np.eye(values.shape[1], dtype=np.float32) * np.float32(factor)
    plain = quantize_rtn(values, mask, group_size=group, symmetric=symmetric)
    gptq = quantize_gptq(values, mask, hessian, group_size=group, symmetric=symmetric)
    np.testing.assert_array_equal(gptq.codes, plain.codes)
    np.testing.assert_array_equal(gptq.scales, plain.scales)
    np.testing.assert_array_equal(gptq.zero_points, plain.zero_points)


@given(problem=problems(), block=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_block_size_does_not_change_the_error_that_gptq_reaches(problem, block):
    values, mask, hessian, group, symmetric = problem
    one = quantize_gptq(values, mask, hessian, group_size=group, symmetric=symmetric)
    other = quantize_gptq(values, mask, hessian, group_size=group, symmetric=symmetric, block=block)

    def loss(weight):
        error = (dequantize(weight) - np.where(mask, values, 0)).astype(np.float64)
        return np.einsum("oi,ij,oj->", error, hessian, error)

    # Another order of float32 sums may flip a code on a rounding edge; nothing more.
    flipped = (one.codes != other.codes).mean()
    assert flipped <= 0.02 or loss(other) == pytest.approx(loss(one), rel=0.2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 64, -1])
@pytest.mark.parametrize("pruned", [0.0, 0.5])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(symmetric, group, pruned):
    rng = np.random.default_rng(7)
    inputs = correlated(rng, 400, 128)
    mask = rng.random((48, 128)) >= pruned
    values = (rng.standard_normal((48, 128)) * mask).astype(np.float32)
    options = {"group_size": group, "symmetric": symmetric}
    plain = output_error(quantize_rtn(values, mask, **options), values, inputs)
    gptq = output_error(quantize_gptq(values, mask, hessian_of(inputs), **options), values, inputs)
    assert gptq < 0.8 * plain


def test_gptq_is_the_textbook_update_on_a_small_layer():
    """Against the plain form: the inverse Hessian of the columns still open, column by column, in float64."""
    rng = np.random.default_rng(3)
    inputs = correlated(rng, 200, 12)
    hessian = hessian_of(inputs)
    mask = rng.random((5, 12)) >= 0.4
    values = (rng.standard_normal((5, 12)) * mask).astype(np.float32)
    weight = quantize_gptq(values, mask, hessian, group_size=12, damp=0.01, scale_dtype=np.float32)

    damped = hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(12)
    open_weights = values.astype(np.float64)
    scale, zero = weight.scales[:, 0].astype(np.float64), weight.zero_points[:, 0].astype(np.float64)
    expected = np.empty(values.shape, np.uint8)
    for j in range(12):
        inverse = np.linalg.inv(damped[j:, j:])
        code = np.clip(np.rint(open_weights[:, j] / scale) + zero, 0, 15)
        error = (open_weights[:, j] - scale * (code - zero)) / inverse[0, 0]
        open_weights[:, j:] -= np.outer(error, inverse[0]) * mask[:, j:]
        expected[:, j] = code
    np.testing.assert_array_equal(weight.codes, expected)


@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_inputs_never_seen_are_rounded_to_nearest(damp):
    rng = np.random.default_rng(0)
    inputs = correlated(rng, 100, 16)
    inputs[:, 8:] = 0
    values = rng.standard_normal((6, 16)).astype(np.float32)
    gptq = quantize_gptq(values, None, hessian_of(inputs), group_size=8, damp=damp)
    plain = quantize_rtn(values, None, group_size=8)
    np.testing.assert_array_equal(gptq.codes[:, 8:], plain.codes[:, 8:])
    np.testing.assert_array_equal(gptq.scales[:, 1:], plain.scales[:, 1:])
    assert (gptq.codes[:, :8] != plain.codes[:, :8]).any()
    assert gptq.mask is None


def test_inputs_of_the_functions_are_not_changed():
    rng = np.random.default_rng(0)
    values, mask = rng.standard_normal((4, 8)).astype(np.float32), rng.random((4, 8)) > 0.5
    hessian = hessian_of(correlated(rng, 50, 8))
    copies = values.copy(), mask.copy(), hessian.copy()
    quantize_gptq(values, mask, hessian, group_size=4)
    quantize_rtn(values, mask, group_size=4)
    for array, copy in zip((values, mask, hessian), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_hessian_sum_is_twice_the_mean_outer_product():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 5, 3)).astype(np.float32)
    hessian = HessianSum()
    for sample in inputs:
        hessian.add(torch.from_numpy(sample[None]))
    flat = inputs.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(hessian.value(), 2 / 10 * flat.T @ flat, rtol=1e-5)
    with pytest.raises(BadInput, match="no calibration token"):
        HessianSum().value("layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "E_GROUP"),
        ({"group_size": 0}, "E_GROUP"),
        ({"mask": np.ones((2, 4), bool)}, "E_MASK"),
        ({"values": np.full((2, 8), np.nan, np.float32)}, "E_NAN"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given_ = {"values": np.ones((2, 8), np.float32), "mask": None, "group_size": 4, **change}
    values, mask = given_.pop("values"), given_.pop("mask")
    with pytest.raises(BadInput, match=message):
        quantize_rtn(values, mask, **given_)
    with pytest.raises(BadInput, match=message):
        quantize_gptq(values, mask, np.eye(8, dtype=np.float32), **given_)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.eye(4), "does not fit"),
        (np.full((8, 8), np.nan), "NaN or Inf"),
        (4 * np.eye(8) - 2 * np.ones((8, 8)), "positive definite"),
    ],
)
def test_a_bad_hessian_is_refused(hessian, message):
    with pytest.raises(BadInput, match=message):
        quantize_gptq(np.ones((2, 8), np.float32), None, hessian.astype(np.float32), group_size=4)


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (1, 24), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_model_gives_every_decoder_linear_and_leaves_the_model_alone(method):
    model = tiny_llama()
    masks = prune_model(model, tokens(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, results = [], {}
    run = quantize_model(model, masks, method, tokens(4), group_size=16, on_progress=lambda *e: seen.append(e))
    for name, weight in run:
        results[name] = weight
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    names = [name for name, _ in decoder_linears(model)]
    assert list(results) == names
    assert seen == [(name, i + 1, len(names)) for i, name in enumerate(names)]
    for name, weight in results.items():
        assert zeros(weight)[~masks[name]].all()
        np.testing.assert_array_equal(weight.mask, masks[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_round_to_nearest_of_a_model_is_that_of_its_weights():
    model = tiny_llama()
    masks = prune_model(model, tokens(1))
    for name, weight in quantize_model(model, masks, "rtn", group_size=16, symmetric=True):
        values = model.get_submodule(name).weight.detach().numpy()
        alone = quantize_rtn(values, masks[name], group_size=16, symmetric=True)
        np.testing.assert_array_equal(weight.codes, alone.codes)


def test_gptq_measures_a_layer_behind_the_quantised_layers_before_it():
    model, batches = tiny_llama(), tokens(4)
    masks = prune_model(model, batches)
    results = dict(quantize_model(model, masks, "gptq", batches, group_size=16))
    name = "model.layers.1.self_attn.q_proj"

    def second_layer_codes(first_layer_quantized):
        copy = tiny_llama()
        copy.load_state_dict(model.state_dict())
        if first_layer_quantized:
            for other, weight in results.items():
                if other.startswith("model.layers.0."):
                    copy.get_submodule(other).weight.data = torch.from_numpy(dequantize(weight))
        hessian = HessianSum()
        copy.get_submodule(name).register_forward_hook(lambda _m, args, _o: hessian.add(args[0]))
        with torch.no_grad():
            for batch in batches:
                copy(batch)
        values = copy.get_submodule(name).weight.detach().numpy()
        return quantize_gptq(values, masks[name], hessian.value(), group_size=16).codes

    np.testing.assert_array_equal(results[name].codes, second_layer_codes(True))
    assert (results[name].codes != second_layer_codes(False)).any()


def test_an_abandoned_run_leaves_the_model_alone():
    model = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = quantize_model(model, None, "gptq", tokens(1), group_size=16)
    next(run)
    run.close()
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_of_another_model_are_refused():
    model = tiny_llama()
    masks = prune_model(model, tokens(1))
    with pytest.raises(BadInput, match="weights are not zero where the mask says pruned"):
        list(quantize_model(tiny_llama(), masks, "rtn", group_size=16))
    masks.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(BadInput, match=r"no mask for this layer; in model\.layers\.1\.mlp\.up_proj"):
        list(quantize_model(model, masks, "rtn", group_size=16))


def test_unusable_requests_are_refused_at_once():
    with pytest.raises(UsageError, match="unknown quantisation method"):
        quantize_model(tiny_llama(), None, "awq")
    with pytest.raises(UsageError, match="needs calibration batches"):
        quantize_model(tiny_llama(), None, "gptq")
