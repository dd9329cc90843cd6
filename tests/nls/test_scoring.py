"""Log-likelihoods and what is concluded from them, against lm-evaluation-harness and against plain forwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sparseport.errors import BadInput, UsageError  # noqa: E402
from sparseport.nls.engines import Group, Score, TorchEngine, longest_input, score_of  # noqa: E402
from sparseport.nls.scoring import (  # noqa: E402
    Outcome,
    agreement,
    check_metric,
    digest_of,
    mcnemar,
    mean,
    score_choices,
    stderr,
)
from sparseport.nls.tasks import MultipleChoice, Task  # noqa: E402
from sparseport.nls.tasks.answers import judge  # noqa: E402
from sparseport.search_recipe import SearchRecipe  # noqa: E402

ITEMS = [
    MultipleChoice("Question: what is wet?\nAnswer:", ("water", "a dry stone", "sand", "dust"), 0),
    MultipleChoice("Question: which of these is the longest word of all of them?\nAnswer:", ("a", "bb", "ccc"), 2),
    MultipleChoice("Ice ", ("melts", "sings", "né", "is a kind of fish that lives in trees"), 0),
    MultipleChoice("", ("nothing before", "it"), 1),
    MultipleChoice("x", ("y", "zz"), 0, delimiter=""),
    MultipleChoice("The same twice", ("same", "same", "other"), 1),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(tiny_base: Path, request: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, attn_implementation=request.param
    ).eval()


def _harness(model: Any, tokenizer: Any, items: list[MultipleChoice], **options: Any) -> list[list[tuple[float, bool]]]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, **options)
    requests = [
        Instance("loglikelihood", {}, (item.context, continuation), 0)
        for item in items
        for continuation in item.continuations
    ]
    found = iter(harness.loglikelihood(requests, disable_tqdm=True))
    return [[next(found) for _ in item.choices] for item in items]


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_log_likelihoods_are_those_of_the_harness(model: Any, tokenizer: Any, batch: int) -> None:
    """Batches mix contexts of very different lengths, one of them a single token."""
    wanted = _harness(model, tokenizer, ITEMS)
    outcome = score_choices(TorchEngine(model, batch), tokenizer, ITEMS)
    for ours, theirs in zip(outcome.loglikelihoods, wanted, strict=True):
        assert ours == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert outcome.truncated == 0


def test_accuracies_are_those_of_the_harness(model: Any, tokenizer: Any) -> None:
    """Its multiple-choice task is given our items and the log-likelihoods that its own model class computes."""
    scores = _harness(model, tokenizer, ITEMS)
    from lm_eval.api.metrics import mean as their_mean
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.api.task import ConfigurableTask

    class Task(ConfigurableTask):
        OUTPUT_TYPE = "multiple_choice"

        def __init__(self) -> None:
            self._metric_fn_list = {"acc": None, "acc_norm": None}
            self.multiple_input = self.multiple_target = 0
            self._config = type("Config", (), {"process_results": None})()

        config = property(lambda self: self._config)

        def doc_to_choice(self, doc: MultipleChoice) -> list[str]:  # type: ignore[override]
            return list(doc.choices)

        def doc_to_target(self, doc: MultipleChoice) -> int:  # type: ignore[override]
            return doc.gold

    theirs = [Task().process_results(item, found) for item, found in zip(ITEMS, scores, strict=True)]
    outcome = score_choices(TorchEngine(model), tokenizer, ITEMS)
    for metric in ("acc", "acc_norm"):
        column = [float(row[metric]) for row in theirs]
        assert [float(right) for right in outcome.right[metric]] == column
        assert outcome.metrics()[metric] == pytest.approx({"value": their_mean(column), "stderr": mean_stderr(column)})
    assert outcome.right["acc"] != outcome.right["acc_norm"], "the two metrics are told apart by these items"


def test_long_prompts_lose_their_beginning_as_in_the_harness(model: Any, tokenizer: Any) -> None:
    items = [MultipleChoice("abc" * 200 + ".", ("short", "quite a bit longer than that"), 0), ITEMS[0]]
    engine = TorchEngine(model)
    engine.max_length = 64
    outcome = score_choices(engine, tokenizer, items)
    assert outcome.truncated == 2
    wanted = _harness(model, tokenizer, items, max_length=64)
    for ours, theirs in zip(outcome.loglikelihoods, wanted, strict=True):
        assert ours == pytest.approx([value for value, _ in theirs], abs=1e-4)
    engine.max_length = 20
    with pytest.raises(BadInput, match="longer than what the model reads"):
        score_choices(engine, tokenizer, items)


def test_scores_are_those_of_plain_forwards(model: Any) -> None:
    random = np.random.default_rng(0)
    groups = [
        Group(
            tuple(random.integers(0, 256, length).tolist()),
            tuple(tuple(random.integers(0, 256, n).tolist()) for n in sizes),
        )
        for length, sizes in ((7, (3, 1)), (1, (2, 5)), (30, (4,)), (12, (1, 1, 1)))
    ]
    scored = TorchEngine(model, batch=3).score(groups)
    for group, scores in zip(groups, scored, strict=True):
        for tokens, score in zip(group.continuations, scores, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*group.context, *tokens]])).logits[0, len(group.context) - 1 : -1]
            plain = score_of(logits.numpy(), tokens)
            assert score.loglikelihood == pytest.approx(plain.loglikelihood, abs=1e-4)
            assert score.greedy == plain.greedy


def test_a_model_in_training_is_measured_without_dropout(tiny_base: Path, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attention_dropout=0.5)
    quiet = score_choices(TorchEngine(model.eval()), tokenizer, ITEMS)
    assert score_choices(TorchEngine(model.train()), tokenizer, ITEMS).loglikelihoods == quiet.loglikelihoods
    assert model.training


def test_a_greedy_continuation_is_called_so() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32))
    assert score_of(logits, [0, 2]) == Score(pytest.approx(math.log(0.4), abs=1e-6), True)
    assert score_of(logits, [1, 2]) == Score(pytest.approx(math.log(0.24), abs=1e-6), False)


def test_the_first_of_equals_is_taken(model: Any, tokenizer: Any) -> None:
    outcome = score_choices(TorchEngine(model), tokenizer, [ITEMS[5]])
    assert outcome.loglikelihoods[0][0] == outcome.loglikelihoods[0][1]
    assert outcome.predictions["acc"] in [(0,), (2,)]


def test_acc_norm_counts_characters_and_not_bytes(tokenizer: Any) -> None:
    """Of equally likely choices the longest wins: five letters against four, which are eight bytes."""
    outcome = score_choices(_Fixed(-10.0), tokenizer, [MultipleChoice("x", ("éééé", "abcde"), 1)])
    assert outcome.predictions == {"acc": (0,), "acc_norm": (1,)}


class _Fixed:
    """An engine that gives each continuation the same score."""

    max_length, settings = 100, {}  # type: ignore[var-annotated]

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, groups: Any, on_group: Any = None) -> list[list[Score]]:
        return [[Score(self.value, False)] * len(group.continuations) for group in groups]


def test_not_finite_and_no_items_are_refused(tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="E_NAN"):
        score_choices(_Fixed(float("nan")), tokenizer, ITEMS)
    with pytest.raises(BadInput, match="no items"):
        score_choices(_Fixed(0.0), tokenizer, [])


def _outcome(right: list[bool], values: list[tuple[float, ...]], items: str = "x") -> Outcome:
    return Outcome({"acc": tuple(map(int, right))}, {"acc": tuple(right)}, items, tuple(values))


def test_agreement_counts_each_direction() -> None:
    first = _outcome([True, True, True, False, False], [(0.0, 1.0)] * 5)
    second = _outcome([True, False, False, True, False], [(0.0, 1.0)] * 4 + [(0.5, -1.0)])
    assert agreement(first, second, "acc") == {
        "items": 5,
        "same": 0.4,
        "lost": 2,
        "gained": 1,
        "p_value": 1.0,
        "max_loglikelihood_difference": 2.0,
    }
    with pytest.raises(BadInput, match="different items"):
        agreement(first, _outcome([True], [], items="y"), "acc")
    assert digest_of(ITEMS) != digest_of(ITEMS[:-1]) != digest_of([*ITEMS[:-2], ITEMS[-1]])


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_binomial_test(lost: int, gained: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    expected = scipy.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_standard_error(right: list[bool]) -> None:
    values = np.array(right, float)
    assert mean(right) == pytest.approx(values.mean())
    assert stderr(right) == pytest.approx(values.std(ddof=1) / len(values) ** 0.5, abs=1e-12)


def test_standard_error_of_one_item_is_unknown() -> None:
    assert stderr([True]) is None


def test_longest_input_by_the_names_that_configs_use() -> None:
    assert longest_input({"max_position_embeddings": 512, "n_ctx": 7}) == 512
    assert longest_input({"n_ctx": 7}) == 7
    assert longest_input({}) == 2048


def _task(rule: Any) -> Task:
    if rule == "choices":
        return Task("mine", (), (), (), choices={"test": tuple(ITEMS)})
    return Task("mine", (), (), (), rule=rule)


@pytest.mark.parametrize(
    ("rule", "counts", "others"),
    [
        ("choices", "acc_norm", {"acc"}),
        ("exact", "exact_match", set()),
        ("number", "number_match", set()),
        ("gsm8k", "strict_match", {"flexible_extract"}),
    ],
)
def test_the_metric_of_a_search(rule: Any, counts: str, others: set[str]) -> None:
    """The first of a rule counts for written answers, acc_norm for choices; what a task does not have is refused."""
    task = _task(rule)
    assert check_metric(task, SearchRecipe()) == counts
    every = {"acc", "acc_norm", "exact_match", "number_match", "strict_match", "flexible_extract", "f1"}
    for name in every:
        if name in {counts, *others}:
            assert check_metric(task, SearchRecipe(metric=name)) == name
        else:
            with pytest.raises(UsageError, match=f"(?s)no such metric.*{counts}.*{name}"):
                check_metric(task, SearchRecipe(metric=name))


def test_metrics_of_a_search_are_those_that_are_measured(model: Any, tokenizer: Any) -> None:
    found = score_choices(TorchEngine(model), tokenizer, ITEMS[:1]).right
    assert {check_metric(_task("choices"), SearchRecipe(metric=name)) for name in found} == set(found)
    rules: tuple[Any, ...] = ("exact", "number", "gsm8k")
    for rule in rules:
        assert check_metric(_task(rule), SearchRecipe()) == next(iter(judge(rule, ["1"], ["1"])))
