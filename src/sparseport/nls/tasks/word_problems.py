"""Mathematical word problems, answered by writing, judged by the number at the end.

The data set's folder has `math/*.jsonl`: GSM8K as published (`question`, `answer` with `#### n` at its end), MAWPS
(`question`, `answer` a number) and LLM-Adapters' files (`instruction`, `output` a rationale, `answer` a number).
Prompts are plain text, as lm-evaluation-harness asks gsm8k, but with no examples before the question (0-shot).

LLM-Adapters' training file `math_data` holds most of the test questions of GSM8K, SVAMP and others. A task drops those
that its own test asks; what is trained on `svamp` or `math-data` is therefore no fair entry in any other task's test.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sparseport.nls.tasks import AnswerRule, Example, Task
from sparseport.nls.tasks.answers import last_number, same_number
from sparseport.nls.tasks.data_sets import Line, read_lines, split_off_validation


@dataclass(frozen=True)
class _Source:
    """Files under `math`, how an answer is judged, and how long it may be (in tokens)."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    rule: AnswerRule = "number"
    max_new_tokens: int = 256


WORD_PROBLEMS = {
    "gsm8k": _Source(("gsm8k.train",), ("gsm8k.test",), "gsm8k"),
    "mawps": _Source(("mawps.train", "mawps.valid"), ("mawps.test",), max_new_tokens=32),
    "svamp": _Source(("math_data",), ("svamp.test",)),
    "math-data": _Source(("math_data",), ("gsm8k.test", "mawps.test", "svamp.test")),
}
"""Task name -> its files. `math-data` is LLM-Adapters' training mixture, with three tests that ask for numbers."""

_EXPECTED = "question and answer, or instruction, output and answer"
_STOP = ("Question:",)
_NO_NUMBER, _CONTRADICTION = "the answer is no number", "the rationale ends in another number"


def word_problems(name: str, data: Path) -> Task:
    """A word-problem task from a data set's folder; `validation` is taken out of the training files.

    Rows whose answer is no number (AQuA's letters) and rows whose rationale ends in another number than the answer
    (they would train what the test marks as wrong) are left out of training, and counted. A test keeps all its rows.

    Raises:
        BadInput: a file is missing, a line is not of its form, or a test asks for something that is no number.
    """
    source = WORD_PROBLEMS[name]
    left_out: Counter[str] = Counter()
    pool: list[Example] = []
    for line in _lines(data, source.train):
        found = _training_item(line)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            pool.append(found)
    test = [_test_item(line) for line in _lines(data, source.test)]
    train, validation, dropped = split_off_validation(pool, test, lambda item: item.prompt)
    return Task(
        name,
        tuple(train),
        tuple(validation),
        tuple(test),
        rule=source.rule,
        max_new_tokens=source.max_new_tokens,
        stop=_STOP,
        left_out={"the test asks the same": dropped, **left_out},
    )


def _lines(data: Path, names: tuple[str, ...]) -> list[Line]:
    return [line for name in names for line in read_lines(data / "math" / f"{name}.jsonl", _EXPECTED)]


def _training_item(line: Line) -> Example | str:
    """The item, or why there is none."""
    answer = _answer(line)
    if answer is None:
        return _NO_NUMBER
    if not same_number(last_number(answer), _number(line)):
        return _CONTRADICTION
    return Example(_prompt(line), f" {answer}", "text")


def _test_item(line: Line) -> Example:
    """Only the number of a rationale is judged, and some rationales of the test files are wrong: without them."""
    number = _number(line)
    if number is None:
        raise line.wrong(line.fields.get("answer"))
    answer = line.text("answer") if "####" in str(line.fields.get("answer")) else _plain(number)
    return Example(_prompt(line), f" {answer}", "text")


def _prompt(line: Line) -> str:
    return f"Question: {line.text('question', 'instruction').strip()}\nAnswer:"


def _answer(line: Line) -> str | None:
    """What a model is to write; None if there is no number to end in."""
    number = _number(line)
    if number is None:
        return None
    if "output" in line.fields:
        rationale = line.text("output").strip().removeprefix("A:").removeprefix("Rationale:").strip()
        return rationale or _plain(number)
    given = line.fields["answer"]
    return given if isinstance(given, str) and "####" in given else _plain(number)


def _number(line: Line) -> float | None:
    """The right number, None if the answer is something else."""
    given = line.fields.get("answer")
    if isinstance(given, str):
        marked = given.rpartition("####")[2] if "####" in given else given
        try:
            value = float(marked.replace(",", "").strip())
        except ValueError:
            return None
    elif isinstance(given, int | float) and not isinstance(given, bool):
        value = float(given)
    else:
        raise line.wrong(given)
    return value if math.isfinite(value) else None


def _plain(number: float) -> str:
    return str(int(number)) if number.is_integer() else str(number)
