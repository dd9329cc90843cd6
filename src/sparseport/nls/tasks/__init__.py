"""Fine-tuning tasks: a prompt, the answer it wants, and three splits that share no sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sparseport.errors import BadInput


@dataclass(frozen=True)
class Example:
    """One item: what the user writes, and the exact answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task's splits. `validation` is for choosing, `test` only for the figure that is reported."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def load_task(name: str) -> Task:
    """A task that ships with the package, or one from a JSONL file.

    The file has one object a line: `prompt`, `answer`, and `split` (train, validation or test).

    Raises:
        BadInput: no such task, or a line of the file is not of that form.
    """
    if name == "home-commands":
        from sparseport.nls.tasks.home_commands import home_commands

        return home_commands()
    path = Path(name)
    if not path.is_file():
        raise BadInput("no such task", where=name, expected="home-commands, or a JSONL file")
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            splits[item["split"]].append(Example(str(item["prompt"]), str(item["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                "not a task item",
                where=f"{path}, line {number}",
                found=repr(error),
                expected="prompt, answer and split (train, validation or test)",
            ) from error
    for split, items in splits.items():
        if not items:
            raise BadInput("a split of the task is empty", where=path, found=split)
    return Task(path.stem, *(tuple(splits[split]) for split in ("train", "validation", "test")))
