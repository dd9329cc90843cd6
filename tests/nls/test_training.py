"""The training loop: what is sampled and recorded, microbatches, memory savers, precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoTokenizer  # noqa: E402

from sparseport.checkpoints.elastic import choose, open_search_space  # noqa: E402
from sparseport.errors import BadInput, UsageError  # noqa: E402
from sparseport.nls import finetune  # noqa: E402
from sparseport.nls.activation import activate  # noqa: E402
from sparseport.nls.elastic import elastic_layers  # noqa: E402
from sparseport.nls.finetune import batch_loss, make_batch, save_adapter, train  # noqa: E402
from sparseport.nls.load import load_for_training  # noqa: E402
from sparseport.nls.record import FILE_NAME, Sample  # noqa: E402
from sparseport.nls.reference import code_differences, load_merged  # noqa: E402
from sparseport.nls.search.candidates import space_digest  # noqa: E402
from sparseport.nls.search.heuristics import read_training_record  # noqa: E402
from sparseport.nls.space import search_space  # noqa: E402
from sparseport.nls.tasks import Example, Task  # noqa: E402
from sparseport.recipe import FinetuneRecipe, make_recipe  # noqa: E402

ITEMS = tuple(Example(f"say {word}", word) for word in ("ab", "cd", "ef", "gh", "abab", "cdcd", "efef", "ghgh"))
TASK = Task("words", ITEMS, ITEMS[:2], ITEMS[2:])


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
    return tokenizer


def recipe(**changes: object) -> FinetuneRecipe:
    fields = {
        "method": "lonas",
        "search_space": [8, 6, 4],
        "widths": [1.0, 0.75, 0.5],
        "heads": [2, 1],
        "elastic_blocks": [1],
        "alpha": 16,
        "learning_rate": 3e-3,
        "steps": 12,
        "batch_size": 4,
        "warmup_steps": 2,
        "dropout": 0.0,
        **changes,
    }
    return FinetuneRecipe.model_validate(fields)


def adapters(model: Any) -> dict[str, np.ndarray]:
    return {f"{n}.{p}": getattr(layer, p).detach().numpy() for n, layer in elastic_layers(model) for p in "ab"}


def run(base: Path, tokenizer: Any, wanted: FinetuneRecipe) -> tuple[Any, list[Sample]]:
    model = load_for_training(base, wanted)
    return model, train(model, tokenizer, TASK, wanted, lambda *_: None)


def test_every_dimension_is_sampled_and_recorded(tiny_base, tokenizer, tmp_path, monkeypatch):
    active: list[tuple[int, ...]] = []
    plain = finetune.activate
    monkeypatch.setattr(
        finetune, "activate", lambda model, space, chosen: (active.append(chosen), plain(model, space, chosen))[1]
    )
    wanted = recipe(steps=24)
    model, samples = run(tiny_base, tokenizer, wanted)
    space = search_space(model, wanted)
    assert [sample.sizes for sample in samples] == active[:-1]  # the last one is the whole model, after training
    assert all(len(sample.sizes) == len(space.groups) for sample in samples)
    for number, group in enumerate(space.groups):
        assert {sample.sizes[number] for sample in samples} == set(group.sizes), group
    losses = [sample.loss for sample in samples]
    assert np.isfinite(losses).all() and np.mean(losses[-6:]) < np.mean(losses[:6])

    save_adapter(model, wanted, "tiny", tmp_path, samples)
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"space_sha256": space_digest(space.groups)}
    assert lines[1:] == [{"step": s.step, "sizes": list(s.sizes), "loss": s.loss} for s in samples]
    assert [line["step"] for line in lines[1:]] == list(range(24))
    groups = open_search_space(tmp_path / "search_space.json").groups
    assert [read.candidate for read in read_training_record(tmp_path / FILE_NAME, groups)] == active[:-1]


def test_blocks_are_left_out_at_their_own_rate(tiny_base, tokenizer):
    for rate in (0.1, 0.9):
        _, samples = run(tiny_base, tokenizer, recipe(steps=60, removal_rate=rate, batch_size=1))
        left_out = [sample.sizes[-1] == 0 for sample in samples]
        assert abs(np.mean(left_out) - rate) < 0.12
        heads = [sample.sizes[-2] for sample in samples]
        assert 0.3 < heads.count(1) / len(heads) < 0.7


def test_microbatches_have_sub_networks_of_their_own(tiny_base, tokenizer):
    _, samples = run(tiny_base, tokenizer, recipe(microbatches=2, steps=6))
    assert [sample.step for sample in samples] == list(range(12))
    assert any(a.sizes != b.sizes for a, b in zip(samples[::2], samples[1::2], strict=True))


@pytest.mark.parametrize("changes", [{"microbatches": 2}, {"gradient_checkpointing": True}])
def test_savers_of_memory_change_nothing(tiny_base, tokenizer, changes):
    plain = {"method": "lora", "nls": False, "widths": [], "heads": [], "elastic_blocks": [], "steps": 4}
    want, _ = run(tiny_base, tokenizer, recipe(**plain))
    got, _ = run(tiny_base, tokenizer, recipe(**plain, **changes))
    for name, value in adapters(want).items():
        assert np.allclose(adapters(got)[name], value, atol=2e-5), name
    assert any(value.any() for name, value in adapters(want).items() if name.endswith(".b"))


def test_without_nls_the_whole_model_is_trained(tiny_base, tokenizer, tmp_path):
    wanted = recipe(method="lora", nls=False, widths=[], heads=[], elastic_blocks=[])
    model, samples = run(tiny_base, tokenizer, wanted)
    assert {sample.sizes for sample in samples} == {()}
    assert all(layer.b.detach().numpy()[:, 7].any() for _, layer in elastic_layers(model))
    save_adapter(model, wanted, "tiny", tmp_path, samples)
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("method", ["lonas", "qa_sparse_peft"])
def test_bfloat16_trains(method, tiny_base, tiny_sparse, tiny_int4, tokenizer):
    wanted = recipe(method=method, precision="bfloat16", steps=20, elastic_blocks=[])
    qa = method == "qa_sparse_peft"
    model = load_for_training(tiny_sparse if qa else tiny_base, wanted, tiny_int4 if qa else None)
    samples = train(model, tokenizer, TASK, wanted, lambda *_: None)
    losses = [sample.loss for sample in samples]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert {value.dtype for value in adapters(model).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("choice", ["heuristic", "minimal"])
@pytest.mark.parametrize("method", ["lonas", "sparse_peft", "qa_sparse_peft"])
def test_a_sub_network_is_exported_as_it_was_trained(
    method, choice, tiny_base, tiny_sparse, tiny_int4, tokenizer, tmp_path
):
    """Ranks, widths, heads and blocks: the exporter's smaller model has the loss of the activated super-network."""
    wanted = recipe(method=method, steps=10, target_modules="all-linear")
    qa = method == "qa_sparse_peft"
    base = tiny_base if method == "lonas" else tiny_sparse
    model = load_for_training(base, wanted, tiny_int4 if qa else None)
    samples = train(model, tokenizer, TASK, wanted, lambda *_: None)
    save_adapter(model, wanted, "tiny", tmp_path / "adapter", samples)
    export = make_recipe(
        {
            **({"base": tiny_int4, "sparse_base": tiny_sparse} if qa else {"base": base}),
            "adapter": tmp_path / "adapter",
            "output": tmp_path / "out",
            "sub_adapter": choice,
        }
    )
    space = search_space(model, wanted)
    batch = make_batch(tokenizer, list(ITEMS))
    with torch.no_grad():
        whole = float(batch_loss(model, batch))
        activate(model, space, choose(space, choice))
        loss = float(batch_loss(model, batch))
        merged = load_merged(export)
        assert float(batch_loss(merged, batch)) == pytest.approx(loss, rel=2e-3)
    assert abs(loss - whole) > 0.01
    assert len(merged.model.layers) == (1 if choice == "minimal" else 2)
    compared = code_differences(export, wanted)
    assert (compared["codes"] > 0) == qa and compared["different"] <= compared["codes"] / 1_000


def test_a_loss_that_is_not_finite_stops_the_run(tiny_base, tokenizer):
    with pytest.raises(BadInput, match="not finite") as caught:
        run(tiny_base, tokenizer, recipe(learning_rate=1e30, steps=20))
    assert caught.value.code == "E_NAN" and "learning_rate" in caught.value.fix


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny_base, tokenizer):
    class Three(finetune.Team):
        count = 3

    wanted = recipe(batch_size=4, microbatches=2)
    with pytest.raises(UsageError, match="fewer items than there are processes"):
        train(load_for_training(tiny_base, wanted), tokenizer, TASK, wanted, lambda *_: None, Three())
