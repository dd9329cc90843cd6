"""Judging written answers: the whole text, the number at its end, or GSM8K as lm-evaluation-harness judges it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparseport.nls.tasks import AnswerRule

# A number as it stands in a text: sign, digits with commas between thousands, decimals.
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
# How far a number may be from the right one (LLM-Adapters' evaluation of word problems).
_CLOSE = 1e-3

# lm-evaluation-harness 0.4, task gsm8k (version 3): its filters strict-match and flexible-extract, and what its
# exact_match ignores.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
_NOTHING = "[invalid]"


def judge(rule: AnswerRule, answers: Sequence[str], wanted: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """Which answers are right, by each metric of the rule; the first metric is the one that counts.

    exact   `exact_match`: the same text
    number  `number_match`: the last number is within 1e-3 of the last number that is wanted
    gsm8k   `strict_match`: the number after `####`; `flexible_extract`: the last thing that looks like a number
    """
    pairs = list(zip(answers, wanted, strict=True))
    if rule == "exact":
        return {"exact_match": tuple(a == b for a, b in pairs)}
    if rule == "number":
        return {"number_match": tuple(same_number(last_number(a), last_number(b)) for a, b in pairs)}
    return {
        "strict_match": tuple(_bare(strict(a)) == _bare(b) for a, b in pairs),
        "flexible_extract": tuple(_bare(flexible(a)) == _bare(b) for a, b in pairs),
    }


def last_number(text: str) -> float | None:
    """The last number in a text; None if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(a: float | None, b: float | None) -> bool:
    """Whether two numbers are as good as equal; what is no number equals nothing."""
    return a is not None and b is not None and abs(a - b) <= _CLOSE


def strict(text: str) -> str:
    """The number after the first `####`, as text, or `[invalid]`."""
    found = _STRICT.findall(text)
    return found[0].strip() if found else _NOTHING


def flexible(text: str) -> str:
    """The last thing that looks like a number or an amount, as text, or `[invalid]`."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else _NOTHING


def cut(text: str, stop: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it, without white space around it."""
    ends = [position for position in map(text.find, stop) if position >= 0]
    return text[: min(ends, default=len(text))].strip()


def _bare(text: str) -> str:
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
