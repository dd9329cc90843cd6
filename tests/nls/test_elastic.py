"""Elastic layers: forward, straight-through gradients, ranks."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sparseport.errors import BadInput  # noqa: E402
from sparseport.nls.elastic import ElasticLinear, merged_weight  # noqa: E402
from sparseport.nls.quantize import quantize_rtn  # noqa: E402
from sparseport.weights.linear import QuantizedWeight  # noqa: E402
from sparseport.weights.rounding import dequantize  # noqa: E402

OUT, IN, RANK = 24, 64, 6


def _layer(method: str, dropout: float = 0.0) -> tuple[ElasticLinear, QuantizedWeight | None]:
    dice = np.random.default_rng(0)
    mask = dice.random((OUT, IN)) < 0.5
    weight = np.where(mask, dice.normal(size=(OUT, IN)), 0).astype(np.float32)
    base = torch.nn.Linear(IN, OUT, bias=True)
    base.bias.data = torch.from_numpy(dice.normal(size=OUT).astype(np.float32))
    base.weight.data = torch.from_numpy(weight if method != "lora" else dice.normal(size=(OUT, IN)).astype(np.float32))
    quantized = quantize_rtn(weight, mask, group_size=32) if method == "qa_sparse_peft" else None
    layer = ElasticLinear(
        base, RANK, 2.0 * RANK, mask=None if method == "lora" else mask, quantized=quantized, dropout=dropout
    )
    layer.b.data = torch.from_numpy((dice.normal(size=(OUT, RANK)) * 0.3).astype(np.float32))
    return layer, quantized


@pytest.mark.parametrize("method", ["lora", "sparse_peft", "qa_sparse_peft"])
@pytest.mark.parametrize("rank", [RANK, 3])
def test_forward_is_the_merged_layer(method: str, rank: int) -> None:
    layer, quantized = _layer(method)
    layer.active_rank = rank
    x = torch.randn(5, IN)
    delta = layer.scaling * (layer.b[:, :rank] @ layer.a[:rank])
    merged = layer.base.weight + (delta if layer.mask is None else delta * layer.mask)
    if quantized is not None:
        codes = layer.codes().numpy()
        merged = torch.from_numpy(dequantize(QuantizedWeight(codes, quantized.scales, quantized.zero_points, 32)))
        pruned = layer.mask.numpy() == 0
        assert np.array_equal(codes[pruned], np.repeat(quantized.zero_points, 32, axis=1)[pruned])
    expected = torch.nn.functional.linear(x, merged, layer.base.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_new_adapter_changes_nothing_but_rounding() -> None:
    layer, _ = _layer("sparse_peft")
    layer.b.data.zero_()
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), layer.base(x))


def test_scaling_does_not_follow_the_rank() -> None:
    layer, _ = _layer("sparse_peft")
    layer.active_rank = 2
    padded, _ = _layer("sparse_peft")
    with torch.no_grad():
        padded.a[2:] = 0
    x = torch.randn(3, IN)
    assert torch.allclose(layer(x), padded(x), atol=1e-6)


@pytest.mark.parametrize("method", ["sparse_peft", "qa_sparse_peft"])
def test_gradients_go_straight_through(method: str) -> None:
    """Against autograd on W + s (B A) M, with Q replaced by the identity in the backward pass only."""
    layer, _ = _layer(method)
    x = torch.randn(4, 7, IN, requires_grad=True)
    target = torch.randn(4, 7, OUT)
    (layer(x) * target).sum().backward()
    a, b = layer.a.detach().clone().requires_grad_(), layer.b.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    smooth = layer.base.weight + layer.scaling * (b @ a) * layer.mask
    hard = merged_weight(a.detach(), b.detach(), layer.base.weight, layer.mask, layer.scaling, layer.grid)
    weight = smooth + (hard - smooth).detach()
    (torch.nn.functional.linear(x2, weight, layer.base.bias) * target).sum().backward()
    for got, want in ((layer.a.grad, a.grad), (layer.b.grad, b.grad), (x.grad, x2.grad)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_inactive_ranks_get_no_gradient() -> None:
    layer, _ = _layer("qa_sparse_peft")
    layer.active_rank = 2
    layer(torch.randn(3, IN)).sum().backward()
    assert not layer.a.grad[2:].any() and not layer.b.grad[:, 2:].any()
    assert layer.a.grad[:2].any() and layer.b.grad[:, :2].any()


def test_pruned_weights_get_no_gradient_through_the_adapter() -> None:
    """An adapter that only touches pruned positions changes nothing and learns nothing."""
    layer, _ = _layer("sparse_peft")
    layer.mask.zero_()
    layer.base.weight.data.zero_()
    y = layer(torch.randn(3, IN))
    y.sum().backward()
    assert torch.equal(y, layer.base.bias.expand(3, -1)) and not layer.a.grad.any() and not layer.b.grad.any()


@pytest.mark.parametrize("method", ["lora", "sparse_peft", "qa_sparse_peft"])
@pytest.mark.parametrize(("rows", "columns"), [(OUT, 32), (16, IN), (8, 48)])
def test_a_cut_layer_is_the_leading_part_of_the_whole_one(method: str, rows: int, columns: int) -> None:
    """Columns of 48 go through a group of 32."""
    layer, _ = _layer(method)
    x = torch.randn(5, columns)
    whole = layer(torch.nn.functional.pad(x, (0, IN - columns)))
    layer.active_rows, layer.active_columns = rows, columns
    y = layer(x)
    assert y.shape == (5, rows) and torch.allclose(y, whole[:, :rows], atol=1e-5)
    y.sum().backward()
    assert not layer.a.grad[:, columns:].any() and not layer.b.grad[rows:].any()
    assert layer.a.grad[:, :columns].any() and layer.b.grad[:rows].any()


@pytest.mark.parametrize("method", ["lora", "sparse_peft", "qa_sparse_peft"])
def test_bfloat16_is_of_the_product_and_not_of_the_merge(method: str) -> None:
    layer, _ = _layer(method)
    x = torch.randn(5, IN)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), exact, rtol=0.05, atol=0.1)
    if layer.mask is not None:
        merged = merged_weight(layer.a, layer.b, layer.base.weight, layer.mask, layer.scaling, layer.grid)
        want = x.bfloat16() @ merged.detach().bfloat16().T + layer.base.bias.bfloat16()
        assert torch.equal(y, want)
    y.float().square().sum().backward()
    assert layer.a.grad.dtype == torch.float32 and torch.isfinite(layer.a.grad).all()


def test_quantization_aware_needs_a_mask() -> None:
    _, quantized = _layer("qa_sparse_peft")
    with pytest.raises(BadInput, match="mask"):
        ElasticLinear(torch.nn.Linear(IN, OUT), 4, 8.0, quantized=quantized)
