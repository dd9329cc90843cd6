"""Multiple choice by log-likelihood, with the conventions of lm-evaluation-harness 0.4.

`acc` takes the choice whose continuation is the likeliest as a whole, `acc_norm` the one whose log-likelihood divided
by the number of characters of the choice (without the delimiter) is the greatest. Of equal ones the first is taken.
A prompt that is too long loses its beginning. The standard error is that of a mean of independent items.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparseport.errors import BadInput, UsageError
from sparseport.nls.encoding import encode_pair
from sparseport.nls.engines import Engine, Group
from sparseport.nls.tasks import MultipleChoice, Task
from sparseport.nls.tasks.answers import judge
from sparseport.search_recipe import SearchRecipe

# Of choices; the last one counts.
_OF_CHOICES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Outcome:
    """What came out of a run, item by item.

    predictions     metric -> what was answered: an index, or a text
    right           metric -> whether that was right
    items           SHA-256 of the items, so that only runs of the same items are compared
    loglikelihoods  those of all choices, in nats; empty if answers are written
    truncated       prompts that lost their beginning
    """

    predictions: Mapping[str, tuple[int | str, ...]]
    right: Mapping[str, tuple[bool, ...]]
    items: str
    loglikelihoods: tuple[tuple[float, ...], ...] = ()
    truncated: int = 0

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Metric -> `value`, the share that is right, and `stderr`."""
        return {name: {"value": mean(right), "stderr": stderr(right)} for name, right in self.right.items()}


def check_metric(task: Task, search: SearchRecipe) -> str:
    """The metric that a search takes for the accuracy: the recipe's, or else the one that counts for the task.

    That is `acc_norm` for choices and the first metric of the rule for written answers (see `judge`).

    Raises:
        UsageError: the task has no such metric.
    """
    names = _OF_CHOICES if task.by_choice else tuple(judge(task.rule, [], []))
    metric = search.metric or names[-1 if task.by_choice else 0]
    if metric not in names:
        raise UsageError(
            "the task has no such metric",
            where=f"search.metric, task {task.name}",
            expected=" or ".join(names),
            found=metric,
        )
    return metric


def score_choices(
    engine: Engine, tokenizer: Any, items: Sequence[MultipleChoice], on_item: Callable[[], None] = lambda: None
) -> Outcome:
    """Answer items by choosing.

    Args:
        engine: what runs the model.
        tokenizer: the model's, of transformers.
        items: one or more.
        on_item: called about once per item.

    Raises:
        BadInput: no items, a continuation that is longer than the model's input, or a log-likelihood that is not
            finite.
    """
    if not items:
        raise BadInput("there are no items to answer")
    encoded = [_encode(tokenizer, item, engine.max_length) for item in items]
    groups = [group for one in encoded for group in one.groups]
    scores = iter(engine.score(groups, on_item))
    loglikelihoods = []
    for item, one in zip(items, encoded, strict=True):
        values = [0.0] * len(item.choices)
        for members in one.members:
            for index, score in zip(members, next(scores), strict=True):
                values[index] = score.loglikelihood
        if not all(map(math.isfinite, values)):
            raise BadInput("a log-likelihood is not finite", where=repr(item.context), found=values, code="E_NAN")
        loglikelihoods.append(tuple(values))
    predictions = {
        "acc": tuple(_largest(values) for values in loglikelihoods),
        "acc_norm": tuple(
            _largest([value / len(choice) for value, choice in zip(values, item.choices, strict=True)])
            for values, item in zip(loglikelihoods, items, strict=True)
        ),
    }
    return Outcome(
        predictions,
        {
            name: tuple(choice == item.gold for choice, item in zip(chosen, items, strict=True))
            for name, chosen in predictions.items()
        },
        digest_of(items),
        tuple(loglikelihoods),
        sum(one.truncated for one in encoded),
    )


@dataclass(frozen=True)
class _Encoded:
    """An item's choices by the context that they share (one, unless a long prompt loses more before a long choice)."""

    groups: list[Group]
    members: list[list[int]]
    truncated: int


def _encode(tokenizer: Any, item: MultipleChoice, max_length: int) -> _Encoded:
    by_context: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    truncated = 0
    for index, continuation in enumerate(item.continuations):
        context, tokens = encode_pair(tokenizer, item.context, continuation)
        if len(tokens) > max_length:
            raise BadInput(
                "a continuation is longer than what the model reads",
                where=repr(item.context),
                expected=f"at most {max_length} tokens",
                found=len(tokens),
            )
        # The last token is predicted and never read, so one more than the model reads fits.
        too_many = max(0, len(context) + len(tokens) - (max_length + 1))
        truncated += bool(too_many)
        by_context.setdefault(tuple(context[too_many:]), []).append((index, tuple(tokens)))
    groups = [Group(context, tuple(tokens for _, tokens in rows)) for context, rows in by_context.items()]
    return _Encoded(groups, [[index for index, _ in rows] for rows in by_context.values()], truncated)


def _largest(values: Sequence[float]) -> int:
    return int(np.argmax(values))


def mean(right: Sequence[bool]) -> float:
    """Share that is right, 0..1."""
    return sum(right) / len(right)


def stderr(right: Sequence[bool]) -> float | None:
    """Standard error of the share: the sample's standard deviation (n - 1) by the root of n; None for one item."""
    if len(right) < 2:
        return None
    share = mean(right)
    return math.sqrt(sum((value - share) ** 2 for value in right) / (len(right) - 1) / len(right))


def digest_of(items: Sequence[Any]) -> str:
    """SHA-256 of items (dataclasses of texts and numbers), in their order."""
    return hashlib.sha256(json.dumps([vars(item) for item in items]).encode("utf-8")).hexdigest()


def agreement(first: Outcome, second: Outcome, metric: str) -> dict[str, Any]:
    """How two runs of the same items compare, item by item.

    Returns:
        `items`; `same`, the share of equal predictions; `lost` and `gained`, items that only the first or only the
        second has right; `p_value`, McNemar's exact test of the two being equally likely; and
        `max_loglikelihood_difference`, the largest |difference| in nats, None if nothing was scored.

    Raises:
        BadInput: the runs are not of the same items.
    """
    if first.items != second.items:
        raise BadInput("two runs of different items cannot be compared", expected=first.items, found=second.items)
    answers = list(zip(first.predictions[metric], second.predictions[metric], strict=True))
    verdicts = list(zip(first.right[metric], second.right[metric], strict=True))
    lost, gained = verdicts.count((True, False)), verdicts.count((False, True))
    differences = [
        abs(a - b)
        for one, other in zip(first.loglikelihoods, second.loglikelihoods, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return {
        "items": len(answers),
        "same": mean([a == b for a, b in answers]),
        "lost": lost,
        "gained": gained,
        "p_value": mcnemar(lost, gained),
        "max_loglikelihood_difference": max(differences, default=None),
    }


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test: of `lost + gained` changes, each way is as likely as the other."""
    total = lost + gained
    tail = sum(math.comb(total, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**total))
