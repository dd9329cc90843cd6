"""Multiple choice as lm-evaluation-harness asks it: a context, and each choice scored as what may follow.

The data set's folder has `mc/NAME.train.jsonl` and `mc/NAME.test.jsonl`, one object a line: `question`, `choices` and
`gold`, the index of the right one. Contexts are those of lm-evaluation-harness 0.4 (tasks arc, openbookqa, piqa, siqa),
with nothing before the question (0-shot).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparseport.nls.tasks import Example, MultipleChoice, Task
from sparseport.nls.tasks.data_sets import Line, read_lines, split_off_validation


@dataclass(frozen=True)
class _Source:
    """file: name under `mc`; context: with {q} for the question; trained: whether there is a training file."""

    file: str
    context: str
    trained: bool = True


_ARC = "Question: {q}\nAnswer:"
CHOOSING = {
    "arc-easy": _Source("arc_easy", _ARC),
    "arc-challenge": _Source("arc_challenge", _ARC),
    "openbookqa": _Source("openbookqa", "{q}"),
    "piqa": _Source("piqa", _ARC, trained=False),
    "siqa": _Source("siqa", "Q: {q}\nA:", trained=False),
}
"""Task name -> where its items are and how they are asked; piqa and siqa have a test split only."""


def choosing_task(name: str, data: Path) -> Task:
    """A multiple-choice task from a data set's folder; `validation` is taken out of the training file.

    Raises:
        BadInput: a file is missing, or a line is not of its form.
    """
    source = CHOOSING[name]
    test = _items(data / "mc" / f"{source.file}.test.jsonl", source)
    pool = _items(data / "mc" / f"{source.file}.train.jsonl", source) if source.trained else []
    train, validation, dropped = split_off_validation(pool, test, lambda item: item.context)
    return Task(
        name,
        _examples(train),
        _examples(validation),
        _examples(test),
        choices={"train": tuple(train), "validation": tuple(validation), "test": tuple(test)},
        left_out={"the test asks the same": dropped},
    )


def _examples(items: list[MultipleChoice]) -> tuple[Example, ...]:
    return tuple(item.as_example() for item in items)


def _items(path: Path, source: _Source) -> list[MultipleChoice]:
    lines = read_lines(path, "question, choices (two texts or more) and gold (index of the right one)")
    return [_item(line, source) for line in lines]


def _item(line: Line, source: _Source) -> MultipleChoice:
    question, choices, gold = line.text("question"), line.fields.get("choices"), line.fields.get("gold")
    if not question.strip():
        raise line.wrong(question)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise line.wrong(choices)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise line.wrong({"gold": gold})
    return MultipleChoice(source.context.replace("{q}", question), tuple(choices), gold)
