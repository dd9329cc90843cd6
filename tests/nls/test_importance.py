"""Importance metrics: magnitude against a plain oracle, and functions of the user's, whose results are checked."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from super_networks import folder_of  # noqa: E402

from sparseport.checkpoints.folder import ModelFolder  # noqa: E402
from sparseport.errors import BadInput, UsageError  # noqa: E402
from sparseport.nls.importance import find_metric, importance  # noqa: E402
from sparseport.nls.linears import decoder_linears  # noqa: E402
from sparseport.nls.load import load_dense  # noqa: E402
from sparseport.nls.wanda import prune_mask, prune_model, wanda_mask  # noqa: E402

PATTERNS = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module of the user's."""
    (tmp_path / "my_metrics.py").write_text(
        textwrap.dedent("""
            import torch
            seen = []
            number = 3
            def wanda(weight, norms, module):
                seen.append((module, weight.dtype, norms.dtype))
                return weight.abs() * norms.sqrt()
            def early(weight, norms, module):  # of the first layer's weights only the last columns count
                return torch.arange(weight.shape[1]).expand_as(weight) * (1 if ".0." in module else -1)
            def vandal(weight, norms, module):
                weight.zero_(), norms.zero_()
                return weight
            def as_array(weight, norms, module):
                return abs(weight.numpy())
            def flat(weight, norms, module):
                return weight.abs().sum(dim=1)
            def hole(weight, norms, module):
                return weight.abs() / 0 if module.endswith("k_proj") else weight
            def broken(weight, norms, module):
                return weight @ norms[:3]
            def complex(weight, norms, module):
                return weight.to(torch.complex64)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_metrics", None)
    yield
    sys.modules.pop("my_metrics", None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama"))


BATCHES = [torch.arange(40).reshape(1, 40), torch.arange(30, 70).reshape(1, 40)]


@given(st.sampled_from(list(PATTERNS)), st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.5]))
def test_magnitude_keeps_the_largest_of_each_row_or_group(pattern: str, seed: int, sparsity: float) -> None:
    weight = np.random.default_rng(seed).normal(size=(5, 16)).astype(np.float32)
    norms = torch.from_numpy(np.random.default_rng(seed + 1).random(16).astype(np.float32))
    values = importance("magnitude", find_metric("magnitude"), torch.from_numpy(weight), norms, "w")
    share = 0.5 if PATTERNS[pattern] else sparsity
    mask = prune_mask(values, sparsity=share, pattern=pattern).numpy()
    block = PATTERNS[pattern][1] if PATTERNS[pattern] else 16
    for kept, size in zip(mask.reshape(-1, block), np.abs(weight).reshape(-1, block), strict=True):
        assert kept.sum() == block - int(block * share)
        assert size[kept].min() >= size[~kept].max()


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_magnitude_needs_no_calibration(base, pattern):
    model = load_dense(base)
    before = {name: linear.weight.detach().abs().numpy().copy() for name, linear in decoder_linears(model)}
    masks = prune_model(model, None, pattern=pattern, metric="magnitude")
    for name, mask in masks.items():
        want = prune_mask(torch.from_numpy(before[name]), pattern=pattern).numpy()
        assert np.array_equal(mask, want)
        assert not model.get_submodule(name).weight.detach().numpy()[~mask].any()
    with pytest.raises(BadInput, match="no calibration batches"):
        prune_model(load_dense(base), None, metric="wanda")


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_function_of_the_users_is_given_what_wanda_is_given(base, mine, pattern):
    ours = prune_model(load_dense(base), BATCHES, pattern=pattern)
    theirs = prune_model(load_dense(base), BATCHES, pattern=pattern, metric="my_metrics:wanda")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours) and list(ours) == list(theirs)
    seen = sys.modules["my_metrics"].seen
    assert [name for name, *_ in seen] == list(ours)
    assert {kinds for _, *kinds in map(tuple, seen) for kinds in [tuple(kinds)]} == {(torch.float32, torch.float32)}


def test_it_decides_what_is_pruned(base, mine):
    masks = prune_model(load_dense(base), BATCHES, metric="my_metrics:early")
    assert masks[QUERY][:, 32:].all() and not masks[QUERY][:, :32].any()
    other = masks[QUERY.replace(".0.", ".1.")]
    assert other[:, :32].all() and not other[:, 32:].any()
    arrays = prune_model(load_dense(base), BATCHES, metric="my_metrics:as_array")
    model = load_dense(base)
    want = prune_model(model, None, metric="magnitude")
    assert all(np.array_equal(arrays[name], want[name]) for name in want)


def test_it_cannot_change_the_model(base, mine):
    model = load_dense(base)
    masks = prune_model(model, BATCHES, metric="my_metrics:vandal")
    with ModelFolder.open(base) as folder:
        for name, mask in masks.items():
            stored = folder.read(f"{name}.weight")
            assert np.array_equal(model.get_submodule(name).weight.detach().numpy(), np.where(mask, stored, 0))


@pytest.mark.parametrize(
    ("function", "message", "found"),
    [
        ("flat", "wrong form", "(64,)"),
        ("hole", "NaN or Inf", None),
        ("broken", "failed", "RuntimeError"),
        ("complex", "wrong form", "complex64"),
    ],
)
def test_results_that_are_no_importance_are_refused(base, mine, function, message, found):
    with pytest.raises(BadInput, match=message) as caught:
        prune_model(load_dense(base), BATCHES, metric=f"my_metrics:{function}")
    assert "self_attn" in caught.value.where and (found is None or found in caught.value.found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparsegpt", "unknown importance metric"),
        ("my_metrics:", "unknown importance metric"),
        ("no_such_package.metrics:f", "cannot be imported"),
        ("my_metrics:gone", "cannot be imported"),
        ("my_metrics:number", "no function"),
    ],
)
def test_metrics_that_do_not_exist_are_refused_before_any_work(base, mine, name, message):
    model = load_dense(base)
    with pytest.raises(UsageError, match=message):
        prune_model(model, BATCHES, metric=name)
    with ModelFolder.open(base) as folder:
        assert np.array_equal(
            model.get_submodule(QUERY).weight.detach().numpy(), folder.read(f"{QUERY}.weight").astype(np.float32)
        )


def test_nothing_is_imported_unless_it_is_named(base, mine):
    prune_model(load_dense(base), BATCHES)
    assert "my_metrics" not in sys.modules


def test_wanda_is_the_metric_of_that_name():
    weight, norms = torch.randn(4, 16), torch.rand(16)
    values = importance("wanda", find_metric("wanda"), weight, norms, "w")
    assert torch.equal(prune_mask(values), wanda_mask(weight, norms))
