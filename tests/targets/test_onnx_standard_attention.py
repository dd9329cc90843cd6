"""GroupQueryAttention in standard operators: the outputs and caches of ONNX Runtime's kernel, with and without padding.

The rewritten model is run by ONNX Runtime, by the reference implementation of the standard, and by OpenVINO.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contrib_models import (
    Run,
    attend,
    attention_model,
    each_runtime,
    model_with_an_if,
    onnx,
    ort,
    random_tokens,
    rewritten,
    rotary_tables,
    row,
    saved,
)

Runtime = Callable[[Path], Run]

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {"scale": 0.3},
    "scale left out": {},
    "q, k, v apart": {"packed": False, "rotary": 8},
    "every head its own key": {"heads": 3, "kv_heads": 3, "rotary": 8},
    "one key head": {"heads": 4, "kv_heads": 1, "rotary": 8, "packed": False},
    "rotary": {"rotary": 8},
    "rotary, neighbours": {"rotary": 8, "rotary_interleaved": 1},
    "rotary, half of the head": {"rotary": 8, "size": 32},
    "rotary, half of the head, neighbours": {"rotary": 8, "size": 32, "rotary_interleaved": 1, "packed": False},
    "window": {"rotary": 8, "local_window_size": 3},
    "softcap": {"softcap": 0.7, "scale": 0.5},
    "window and softcap": {"rotary": 8, "softcap": 0.7, "local_window_size": 2, "packed": False},
    "unknown width of the cache": {"rotary": 8, "past_width": False},
}


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6)


@each_runtime
@pytest.mark.parametrize("case", sorted(ATTENTION))
def test_attention_of_one_sequence(case: str, runtime: Runtime, tmp_path: Path) -> None:
    """A prompt, one token, several tokens with a cache, one token; outputs and caches."""
    model = attention_model(**ATTENTION[case])
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((6, 1, 4, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for old, new in zip(wanted, attend(runtime(path), model, tokens), strict=True):
        for name, values in old.items():
            same(new[name], values)


@each_runtime
@pytest.mark.parametrize("case", ["rotary", "window and softcap", "plain"])
def test_right_padding_is_as_in_onnx_runtime(case: str, runtime: Runtime, tmp_path: Path) -> None:
    """Prompts of 6, 3 and 1 tokens, then one token at a time; ONNX Runtime packs its cache, the new graph does not."""
    model = attention_model(**ATTENTION[case])
    prompt = [[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5]
    tokens = [random_tokens(model, prompt, 0), *(random_tokens(model, np.ones((3, 1)), seed) for seed in (1, 2, 3))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for (_, real), old, new in zip(tokens, wanted, attend(runtime(path), model, tokens), strict=True):
        seen = real.astype(bool)
        same(new["y.0"][seen], old["y.0"][seen])
        assert np.isfinite(new["y.0"]).all()


@each_runtime
@pytest.mark.parametrize("case", ["rotary", "window", "softcap"])
def test_any_padding_is_as_without(case: str, runtime: Runtime, tmp_path: Path) -> None:
    """Left, right and inner padding, several tokens with a cache: each row as ONNX Runtime computes it alone."""
    model = attention_model(**ATTENTION[case])
    chunks = [
        [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]],
        [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1]],
        [[1], [1], [1], [1]],
    ]
    tokens = [random_tokens(model, real, seed) for seed, real in enumerate(chunks)]
    old = ort(saved(model, tmp_path / "old.onnx"))
    path = saved(rewritten(model), tmp_path / "new.onnx")
    found = attend(runtime(path), model, tokens)
    for index in range(4):
        alone = attend(old, model, row(tokens, index))
        for (_, real), one, many in zip(tokens, alone, found, strict=True):
            same(many["y.0"][index][real[index].astype(bool)], one["y.0"][0])


@each_runtime
def test_a_cache_that_ends_at_the_window_becomes_a_whole_one(runtime: Runtime, tmp_path: Path) -> None:
    """ONNX Runtime keeps four tokens and evicts the others; the new graph keeps all and hides them."""
    model = attention_model(rotary=8, local_window_size=4, sliding_window_cache=1)
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((6, 1, 1, 3, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens, capacity=4)
    new = rewritten(model)
    lengths = [v.type.tensor_type.shape.dim[2].dim_param for v in [*new.graph.input[2:], *new.graph.output[:2]]]
    assert lengths == ["past_sequence_length"] * 2 + ["total_sequence_length"] * 2
    path = saved(new, tmp_path / "new.onnx")
    found = attend(runtime(path), model, tokens)
    assert found[-1]["present.0.key"].shape[2] == 12
    for one, other in zip(wanted, found, strict=True):
        same(other["y.0"], one["y.0"])


def test_what_layers_share_is_made_once(tmp_path: Path) -> None:
    model = attention_model(layers=3, rotary=8)
    new = rewritten(model)
    kinds = [n.op_type for n in new.graph.node]
    assert kinds.count("MatMul") == 6  # two for each layer
    once = ("CumSum", "Slice", "LessOrEqual", "Where", "Tile")
    assert [kinds.count(kind) for kind in once] == [1, 1, 1, 2, 1] and kinds.count("Neg") == 1
    assert not {"ReduceSum", "Sub", "Constant"} & set(kinds)  # seqlens_k is not needed any more
    assert {t.name for t in model.graph.initializer} - {t.name for t in new.graph.initializer} == {"index"}
    read = {name for n in new.graph.node for name in n.input}
    assert {t.name for t in new.graph.initializer} <= read
    tokens = [random_tokens(model, np.ones((1, 5)), 0), random_tokens(model, np.ones((1, 1)), 1)]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    found = attend(ort(saved(new, tmp_path / "new.onnx")), model, tokens)
    for old, now in zip(wanted, found, strict=True):
        same(now["y.2"], old["y.2"])


def test_layers_that_differ_share_nothing_wrong(tmp_path: Path) -> None:
    """Layers with tables of their own, a window of their own, and pairs of another kind."""
    model = attention_model(layers=4, rotary=8)
    others = model.graph.node[-3:]
    others[0].input[7:9] = ["cos_local", "sin_local"]
    others[1].attribute.append(onnx.helper.make_attribute("rotary_interleaved", 1))
    others[2].attribute.append(onnx.helper.make_attribute("local_window_size", 2))
    for name in ("cos", "sin"):
        values = rotary_tables(8)[f"{name}_cache"][::-1].copy()
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}_local"))
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((5, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    found = attend(ort(saved(rewritten(model), tmp_path / "new.onnx")), model, tokens)
    for old, new in zip(wanted, found, strict=True):
        for layer in range(4):
            same(new[f"y.{layer}"], old[f"y.{layer}"])
            assert layer == 0 or not np.allclose(old["y.0"], old[f"y.{layer}"], atol=1e-3)


@each_runtime
def test_tables_that_an_if_chooses(runtime: Runtime, tmp_path: Path) -> None:
    model = model_with_an_if()
    tokens = [random_tokens(model, np.ones((1, count)), seed) for seed, count in enumerate((5, 1, 1, 1))]
    wanted = attend(ort(saved(model, tmp_path / "old.onnx")), model, tokens)
    path = saved(rewritten(model), tmp_path / "new.onnx")
    for old, new in zip(wanted, attend(runtime(path), model, tokens), strict=True):
        same(new["y.0"], old["y.0"])
