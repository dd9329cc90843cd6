"""What training computes is what the merge computes, up to sums that land on a rounding edge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparseport.errors import BadInput
from sparseport.merge.dense import merge_sparse_peft
from sparseport.merge.qa_sparse_peft import merge_qa_sparse_peft
from sparseport.nls.quantize import quantize_rtn
from sparseport.weights.linear import DenseWeight, LowRankBranch
from sparseport.weights.mask import mask_of

torch = pytest.importorskip("torch")
elastic = pytest.importorskip("sparseport.nls.elastic")

OUT, COLUMNS, RANK, GROUP = 96, 128, 8, 32


def layer(seed, symmetric=False):
    random = np.random.default_rng(seed)
    values = (random.normal(size=(OUT, COLUMNS)) * (random.random((OUT, COLUMNS)) < 0.5) * 0.1).astype(np.float16)
    sparse = DenseWeight(values, mask_of(values))
    return sparse, quantize_rtn(values, sparse.mask, group_size=GROUP, symmetric=symmetric), random


def torch_codes(sparse, grid, branch):
    a, b, base, mask = (
        torch.from_numpy(x.astype(np.float32)) for x in (branch.a, branch.b, sparse.values, sparse.mask)
    )
    merged = elastic.merged_weight(a, b, base, mask, branch.scaling, None)
    return elastic.Grid.of(grid).codes(merged).reshape(OUT, COLUMNS).numpy().astype(np.uint8)


def at_an_edge(sparse, grid, branch):
    """Codes whose exact sum lies within float32 rounding of the middle between two grid points."""
    product = branch.b.astype(np.float64) @ branch.a.astype(np.float64)
    merged = np.where(sparse.mask, sparse.values + branch.scaling * product, 0.0)
    scales = np.repeat(grid.scales.astype(np.float64), GROUP, axis=1)
    offsets = np.repeat((grid.zero_points.astype(np.float16) * grid.scales).astype(np.float64), GROUP, axis=1)
    steps = (merged + offsets) / scales
    return np.abs(steps - np.floor(steps) - 0.5) < 1e-4


def test_random_layers_differ_at_rounding_edges_only_and_hardly_ever():
    different = total = 0
    for seed in range(12):
        sparse, grid, random = layer(seed, symmetric=seed % 2 == 1)
        a = (random.normal(size=(RANK, COLUMNS)) / COLUMNS**0.5).astype(np.float32)
        b = (random.normal(size=(OUT, RANK)) * 0.1).astype(np.float32)
        branch = LowRankBranch(a, b, 2.0).at_rank((8, 6, 4)[seed % 3])
        merged = merge_qa_sparse_peft(sparse, grid, branch, "layer").codes
        assert (merged != grid.codes).mean() > 0.1  # the adapter does something
        differ = merged != torch_codes(sparse, grid, branch)
        assert not (differ & ~at_an_edge(sparse, grid, branch)).any()
        different += int(differ.sum())
        total += differ.size
    assert different < total / 10_000


@pytest.mark.parametrize("seed", range(6))
def test_adapters_with_exact_products_give_the_same_codes(seed):
    sparse, grid, random = layer(seed, symmetric=seed % 2 == 1)
    a = random.integers(-4, 5, (RANK, COLUMNS)).astype(np.float32)
    b = random.choice([0.0, 2.0**-4, -(2.0**-5), 2.0**-6], (OUT, RANK)).astype(np.float32)
    branch = LowRankBranch(a, b, 0.5).at_rank((8, 6, 4)[seed % 3])
    merged = merge_qa_sparse_peft(sparse, grid, branch, "layer").codes
    assert (merged != grid.codes).mean() > 0.1
    assert np.array_equal(merged, torch_codes(sparse, grid, branch))
    snapped = elastic.merged_weight(
        *(torch.from_numpy(x.astype(np.float32)) for x in (branch.a, branch.b, sparse.values, sparse.mask)),
        branch.scaling,
        elastic.Grid.of(grid),
    ).numpy()
    scales, points = (np.repeat(x.astype(np.float32), GROUP, axis=1) for x in (grid.scales, grid.zero_points))
    assert np.array_equal(snapped, (merged - points) * scales)
    dense = elastic.merged_weight(
        *(torch.from_numpy(x.astype(np.float32)) for x in (branch.a, branch.b, sparse.values, sparse.mask)),
        branch.scaling,
        None,
    ).numpy()
    assert np.array_equal(dense.astype(np.float16), merge_sparse_peft(sparse, branch, "layer").values)


def test_the_training_forward_refuses_act_order():
    _, grid, _ = layer(0)
    with pytest.raises(BadInput, match="act-order"):
        elastic.Grid.of(replace(grid, input_order=np.arange(COLUMNS, dtype=np.int32)))
