"""What a draft would say at each token of an answer: against a model that is asked token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from nls.super_networks import cut_by_hand, folder_of, recipe_of, super_network  # noqa: E402
from sparseport.checkpoints.elastic import Selection, choose, open_search_space  # noqa: E402
from sparseport.errors import BadInput, UsageError  # noqa: E402
from sparseport.nls import measured_exports, sub_networks  # noqa: E402
from sparseport.nls.activation import activate  # noqa: E402
from sparseport.nls.drafting import agreements_of, agreements_torch  # noqa: E402
from sparseport.nls.evaluate import tokens_torch  # noqa: E402
from sparseport.nls.finetune import save_adapter  # noqa: E402
from sparseport.nls.record import Sample  # noqa: E402
from sparseport.nls.speculation import acceptance, best_length, replayed_speed_up  # noqa: E402
from sparseport.nls.sub_networks import SubNetworkEvaluator  # noqa: E402
from sparseport.recipe import SearchRecipe, make_recipe  # noqa: E402

PROMPTS = [[5, 9, 2], [40] * 7, [11], [60, 3, 8, 8, 20], *([number, number + 1] for number in range(20, 28))]


class Tokens:
    """As much of a tokenizer as generation looks at."""

    pad_token_id = 1

    def __init__(self, end: int | None) -> None:
        self.eos_token_id = end


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained super-adapter; the base gets a tokenizer, of which only the first 97 tokens are in the vocabulary."""
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    model = super_network(base, recipe_of("llama"))
    save_adapter(model, recipe_of("llama"), "base", out, [Sample(0, _sizes(model, "maximal"), 1.0)])
    for file in tiny_base.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    return out


def _space(adapter: Path) -> Any:
    return open_search_space(adapter / "search_space.json")


def _sizes(model: Any, choice: str) -> tuple[int, ...]:
    from sparseport.nls.space import search_space

    at = {"maximal": 0, "minimal": -1}[choice]
    return tuple(group.sizes[at] for group in search_space(model, recipe_of("llama")).groups)


def _asked_one_by_one(model: Any, prompt: list[int], answer: list[int]) -> list[bool]:
    found = []
    for place in range(1, len(answer)):
        logits = model(input_ids=torch.tensor([[*prompt, *answer[:place]]])).logits
        found.append(int(logits[0, -1].argmax()) == answer[place])
    return found


@torch.no_grad()
def test_agreements_are_those_of_a_model_asked_token_by_token(base: Path, adapter: Path) -> None:
    model, space = super_network(base, recipe_of("llama")), _space(adapter)
    answers = tokens_torch(model, Tokens(None), PROMPTS, max_new_tokens=12)
    assert [len(answer) for answer in answers] == [12] * len(PROMPTS)
    whole = agreements_torch(model, PROMPTS, answers)
    assert all(all(row) and len(row) == 11 for row in whole), "a network agrees with itself"
    chosen = choose(space, "heuristic")
    activate(model, space, chosen)
    found = agreements_torch(model, PROMPTS, answers)
    activate(model, space, Selection())
    small = cut_by_hand(model, "llama", chosen)
    assert found == [_asked_one_by_one(small, *pair) for pair in zip(PROMPTS, answers, strict=True)]
    assert 0 < acceptance(found) < 1, "a test that every draft passes would show nothing"

    class Reader:
        def reset(self) -> None:
            pass

        def read(self, tokens: list[int]) -> Any:
            return small(input_ids=torch.tensor([tokens])).logits[0].numpy()

    seen: list[int] = []
    assert agreements_of(Reader(), PROMPTS, answers, lambda: seen.append(1)) == found  # type: ignore[arg-type]
    assert len(seen) == len(PROMPTS)


def test_answers_end_with_their_end_token(base: Path) -> None:
    model = super_network(base, recipe_of("llama"))
    free = tokens_torch(model, Tokens(None), PROMPTS, max_new_tokens=12)
    end = free[0][4]
    found = tokens_torch(model, Tokens(end), PROMPTS, max_new_tokens=12)
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert found == cut and any(len(row) < 12 for row in found)


# --- the objectives -------------------------------------------------------------------------------------------------


@pytest.fixture
def setup(base: Path, adapter: Path, tmp_path: Path) -> SubNetworkEvaluator:
    task = tmp_path / "task.jsonl"
    splits = ["train", "test", *["validation"] * 3]
    lines = [{"prompt": f"{n}!", "answer": " x", "split": split, "form": "text"} for n, split in enumerate(splits)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = recipe_of("llama", task=str(task))
    export = make_recipe(
        {
            "base": base,
            "adapter": adapter,
            "output": tmp_path / "out",
            "draft": "searched",
            "draft_compress": {"mode": "int8_sym"},
        }
    )
    search = SearchRecipe.model_validate(
        {"objectives": ["speculation", "latency"], "answer_tokens": 6, "assistant_tokens": 2, "tokens": 8}
    )
    return SubNetworkEvaluator(base, None, adapter, recipe, search, export)


def test_the_predicted_speed_up_comes_of_agreement_and_measured_costs(
    setup: SubNetworkEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []
    asked: list[Any] = []

    def measure(folders: list[Path], **options: Any) -> dict[str, Any]:
        asked.append((folders, options))
        return {"folders": [{}, {"decode_ms": {"8": {"median": 5.0, "ratio": 0.25}}}]}

    def measure_costs(main: Path, drafts: list[Path], **options: Any) -> dict[str, Any]:
        asked.append((main, drafts, options))
        return {"step_ms": {"1": {"ratio": 1.0}, "2": {"ratio": 1.5}, "3": {"ratio": 1.75}}}

    monkeypatch.setattr("sparseport.pipeline.export", exported.append)
    monkeypatch.setattr(sub_networks, "measure_latency", measure)
    monkeypatch.setattr(measured_exports, "measure_draft_costs", measure_costs)
    evaluator = setup()
    whole, small = (_sizes(evaluator._model, name) for name in ("maximal", "minimal"))
    found = {sizes: evaluator(sizes) for sizes in (whole, small)}
    main, *drafts = exported
    assert main.sub_adapter == "maximal" and main.compress.mode == "none" and main.draft is None
    assert [recipe.compress.mode for recipe in drafts] == ["int8_sym"] * 2 and not any(one.draft for one in drafts)
    assert asked[0] == (main.output, [], {"longest": 2, "prompt": 8, "threads": 0})
    assert [folders for folders, _ in asked[1:]] == [[main.output, recipe.output] for recipe in drafts]
    # A draft that is always right: 5 tokens after the first, 2 drafted at once.
    right = [[True] * 5] * 3
    assert found[whole] == {"speculation": best_length(right, 0.25, [1.5, 1.75])[1], "latency": 0.005}
    assert found[whole]["speculation"] == replayed_speed_up(right, 2, 0.25, 1.75)
    assert found[small]["speculation"] < found[whole]["speculation"]
    rest = replace(setup, search=setup.search.model_copy(update={"objectives": ("acceptance",)}))()
    assert rest(whole) == {"acceptance": 1.0} and rest(small)["acceptance"] < 1.0
    assert exported == [main, *drafts], "an acceptance alone needs no export"


def test_the_main_network_can_be_a_sub_network_too(
    setup: SubNetworkEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.export is not None
    search = setup.search.model_copy(update={"objectives": ("acceptance",)})
    minimal = replace(setup, search=search, export=setup.export.model_copy(update={"sub_adapter": "minimal"}))
    evaluator = minimal()
    small = _sizes(evaluator._model, "minimal")
    assert evaluator(small) == {"acceptance": 1.0} and evaluator(_sizes(evaluator._model, "maximal")) != {
        "acceptance": 1.0
    }
    assert minimal.digest() != replace(setup, search=search).digest()
    (tmp_path / "sizes.json").write_text(json.dumps(list(small)), encoding="utf-8")
    named = replace(minimal, export=setup.export.model_copy(update={"sub_adapter": str(tmp_path / "sizes.json")}))
    assert named.digest() == minimal.digest(), "the same network under another name"
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1, 2]", encoding="utf-8")

    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sub_networks, "load_for_training", refuse)
    with pytest.raises(BadInput):
        replace(minimal, export=setup.export.model_copy(update={"sub_adapter": str(wrong)}))()
    with pytest.raises(UsageError, match="needs an export recipe"):
        replace(setup, export=None)()


def test_a_digest_follows_how_drafts_are_measured(setup: SubNetworkEvaluator) -> None:
    assert setup.export is not None
    seen = {setup.digest()}
    for update in ({"answer_tokens": 7}, {"assistant_tokens": 3}, {"objectives": ("acceptance",)}):
        seen.add(replace(setup, search=setup.search.model_copy(update=update)).digest())
    for export in ({"sub_adapter": "minimal"}, {"draft_compress": setup.export.compress}):
        seen.add(replace(setup, export=setup.export.model_copy(update=export)).digest())
    assert len(seen) == 6
