"""Fine-tuning a tiny model: the loss falls, the frozen stays frozen, and the exporter reads what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoTokenizer  # noqa: E402

from sparseport.checkpoints.elastic import FILE_NAME, read_search_space  # noqa: E402
from sparseport.checkpoints.peft import AdapterFolder  # noqa: E402
from sparseport.errors import BadInput  # noqa: E402
from sparseport.nls.elastic import elastic_layers  # noqa: E402
from sparseport.nls.encoding import prompt_ids  # noqa: E402
from sparseport.nls.finetune import (  # noqa: E402
    batch_loss,
    make_batch,
    save_adapter,
    train,
)
from sparseport.nls.load import load_for_training, load_int4  # noqa: E402
from sparseport.nls.reference import code_differences, load_merged  # noqa: E402
from sparseport.nls.space import search_space  # noqa: E402
from sparseport.nls.tasks import Example, Task  # noqa: E402
from sparseport.plan import make_plan  # noqa: E402
from sparseport.recipe import FinetuneRecipe, make_recipe  # noqa: E402
from sparseport.sources import open_sources  # noqa: E402

ITEMS = tuple(Example(f"say {word}", word) for word in ("ab", "cd", "ef", "gh", "abab", "cdcd", "efef", "ghgh"))
TASK = Task("words", ITEMS, ITEMS[:2], ITEMS[2:])
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


@pytest.fixture
def tokenizer(tiny_base: Path):  # type: ignore[no-untyped-def]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _recipe(method: str, **changes: object) -> FinetuneRecipe:
    fields = {
        "method": method,
        "search_space": (8, 6, 4),
        "alpha": 16,
        "learning_rate": 3e-3,
        "steps": 30,
        "batch_size": 4,
        "warmup_steps": 2,
        "dropout": 0.0,
        **changes,
    }
    return FinetuneRecipe.model_validate(fields)


def test_packed_batch_gives_the_loss_of_separate_rows(tiny_base: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    total = count = 0.0
    for item in ITEMS[:5]:
        prompt = prompt_ids(tokenizer, item.prompt)
        answer = [*tokenizer(item.answer)["input_ids"], tokenizer.eos_token_id]
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        total += float(model(input_ids=ids, labels=labels).loss) * len(answer)
        count += len(answer)
    batch = make_batch(tokenizer, list(ITEMS[:5]))
    rows = sum(len(prompt_ids(tokenizer, item.prompt)) for item in ITEMS[:5])
    assert batch.ids.shape[1] < rows
    assert float(batch_loss(model, batch)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "sparse_peft", "qa_sparse_peft"])
def test_loss_falls_and_files_are_read_by_the_exporter(
    method: str,
    tiny_base: Path,
    tiny_sparse: Path,
    tiny_int4: Path,
    tokenizer,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    recipe = _recipe(method)
    qa = method == "qa_sparse_peft"
    base = tiny_base if method == "lora" else tiny_sparse
    model = load_for_training(base, recipe, tiny_int4 if qa else None)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    losses = [sample.loss for sample in train(model, tokenizer, TASK, recipe, lambda *_: None)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    for name, value in model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    save_adapter(model, recipe, "tiny", tmp_path / "adapter")
    with AdapterFolder.open(tmp_path / "adapter") as adapter:
        assert adapter.scaling == 2.0
        assert (adapter.sparse_adapter, adapter.quantization_aware) == (method != "lora", qa)
        assert sorted(adapter.modules()) == sorted(name for name, _ in elastic_layers(model))
    groups = read_search_space(tmp_path / "adapter" / FILE_NAME)
    assert tuple(groups) == search_space(model, recipe).groups and len(groups) == 2 and groups[0].sizes == (8, 6, 4)
    fields = {"base": tiny_int4, "sparse_base": tiny_sparse} if qa else {"base": base}
    export = make_recipe(
        {**fields, "adapter": tmp_path / "adapter", "output": tmp_path / "out", "sub_adapter": "heuristic"}
    )
    with open_sources(export) as sources:
        assert {layer.rule for layer in make_plan(export, sources).layers} == {method, "carry"}
    compared = code_differences(export, recipe)
    assert (compared["codes"] > 0) == qa
    assert compared["different"] <= compared["codes"] / 10_000
    # The merged model is the trained one: same loss on the sub-adapter that was merged.
    from sparseport.checkpoints.elastic import SearchSpace, choose
    from sparseport.nls.activation import activate

    space = SearchSpace(tuple(groups))
    activate(model, space, choose(space, "heuristic"))
    batch = make_batch(tokenizer, list(ITEMS))
    with torch.no_grad():
        assert float(batch_loss(model, batch)) == pytest.approx(float(batch_loss(load_merged(export), batch)), rel=2e-3)


def test_training_is_repeatable(tiny_sparse: Path, tiny_int4: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    recipe = _recipe("qa_sparse_peft", steps=4)
    runs = [
        train(load_for_training(tiny_sparse, recipe, tiny_int4), tokenizer, TASK, recipe, lambda *_: None)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_all_sub_adapters_are_trained(tiny_sparse: Path, tiny_int4: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    recipe = _recipe("qa_sparse_peft", steps=12)
    model = load_for_training(tiny_sparse, recipe, tiny_int4)
    seen: dict[str, set[int]] = {}

    def note(*_: object) -> None:
        for name, layer in elastic_layers(model):
            seen.setdefault(name, set()).add(layer.active_rank)

    train(model, tokenizer, TASK, recipe, note)
    assert seen["model.layers.0.self_attn.q_proj"] == {8, 6, 4}
    assert seen["model.layers.0.mlp.up_proj"] == {8}


def test_unknown_modules_and_missing_base_are_refused(tiny_sparse: Path, tiny_int4: Path) -> None:
    with pytest.raises(BadInput, match="target modules"):
        load_for_training(tiny_sparse, _recipe("sparse_peft", target_modules=("query",)), None)
    with pytest.raises(BadInput, match="INT4 base"):
        load_for_training(tiny_sparse, _recipe("qa_sparse_peft"), None)


def test_dequantised_base_is_what_the_reader_says(tiny_int4: Path, tiny_sparse: Path) -> None:
    from sparseport.checkpoints.folder import ModelFolder
    from sparseport.checkpoints.gptq import read_gptq_linear, read_quantization_config
    from sparseport.weights.rounding import dequantize

    model = load_int4(tiny_int4)
    with ModelFolder.open(tiny_int4) as folder:
        config = read_quantization_config(folder)
        name = "model.layers.1.mlp.down_proj"
        want = dequantize(read_gptq_linear(folder, name, config))
    assert np.array_equal(model.get_submodule(name).weight.detach().numpy(), want)
