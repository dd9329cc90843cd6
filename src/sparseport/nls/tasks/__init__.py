"""Tasks: items to train on, to choose by and to report on, in three splits that share no question.

A task is answered either by writing (a prompt and the answer it wants) or by choosing (a context and continuations, of
which the model has to find one the likeliest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparseport.errors import BadInput, UsageError

Form = Literal["chat", "text", "continuation"]
"""How an item becomes tokens: through the chat template; as plain text that ends after the answer; or as plain text
that may go on after it, which is what is scored in multiple choice."""
Split = Literal["train", "validation", "test"]
AnswerRule = Literal["exact", "number", "gsm8k"]
"""How a written answer is judged; see `sparseport.nls.tasks.answers`."""

# Split of a task file -> why items of it are left out; the later ones keep what they ask.
_LATER = {"test": "", "validation": "the test asks the same", "train": "validation or test asks the same"}


@dataclass(frozen=True)
class Example:
    """One item: what the user writes, the exact answer, and how the two become tokens."""

    prompt: str
    answer: str
    form: Form = "chat"


@dataclass(frozen=True)
class MultipleChoice:
    """One item to choose in.

    context  text before the choice
    choices  the choices alone; each is scored as `delimiter` + choice, and `acc_norm` counts its own characters only
    gold     index of the right one
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    delimiter: str = " "

    @property
    def continuations(self) -> tuple[str, ...]:
        """What is scored after the context, one per choice."""
        return tuple(self.delimiter + choice for choice in self.choices)

    def as_example(self) -> Example:
        """Context and right continuation, the same text that is scored, to train on."""
        return Example(self.context, self.continuations[self.gold], "continuation")


@dataclass(frozen=True)
class Task:
    """A task's splits. `validation` is for choosing, `test` only for the figure that is reported.

    choices         split -> items to choose in, in the order of the split's examples; empty if answers are written
    rule            how a written answer is judged
    max_new_tokens  tokens that an answer may have
    stop            texts at which an answer ends
    left_out        items of the files that are in no split: reason -> how many
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    choices: Mapping[str, tuple[MultipleChoice, ...]] = field(default_factory=dict)
    rule: AnswerRule = "exact"
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def by_choice(self) -> bool:
        """Whether the task is answered by choosing."""
        return bool(self.choices)

    def examples(self, split: Split) -> tuple[Example, ...]:
        """The examples of a split.

        Raises:
            UsageError: the task has none there.
        """
        found: tuple[Example, ...] = getattr(self, split)
        if not found:
            raise UsageError(f"the task has no items in its split {split}", where=self.name)
        return found


def load_task(name: str, data: Path | str | None = None) -> Task:
    """A task that ships with the package, one made from a folder of data sets, or one from a JSONL file.

    A task file has one object a line: `prompt`, `answer`, `split` (train, validation or test), and optionally `form`
    (chat, text or continuation). Items of validation whose question test asks too, and items of train that
    either asks, are left out and counted, as those of data sets are.

    Args:
        name: `home-commands`; one of `DATA_TASKS`; or the path of a task file.
        data: folder of the data sets, with `mc/*.jsonl` and `math/*.jsonl`; needed by, and only by, `DATA_TASKS`.

    Returns:
        The task with its three splits.

    Raises:
        BadInput: no such task, or a line of a file is not of its form.
        UsageError: a folder is missing, or given to a task that takes none.
    """
    from sparseport.nls.tasks.choosing import CHOOSING, choosing_task
    from sparseport.nls.tasks.word_problems import WORD_PROBLEMS, word_problems

    if name in CHOOSING or name in WORD_PROBLEMS:
        if data is None:
            raise UsageError(
                "the task needs its data set", where=name, fix="give --data DIR, or `data` beside `task` in a recipe"
            )
        folder = Path(data)
        return choosing_task(name, folder) if name in CHOOSING else word_problems(name, folder)
    if data is not None:
        raise UsageError("only tasks of data sets take a data folder", where=name, found=data, expected=_known())
    if name == "home-commands":
        from sparseport.nls.tasks.home_commands import home_commands

        return home_commands()
    path = Path(name)
    if not path.is_file():
        raise BadInput("no such task", where=name, expected=f"home-commands, {_known()}, or a JSONL file")
    return _from_file(path)


def _known() -> str:
    from sparseport.nls.tasks.choosing import CHOOSING
    from sparseport.nls.tasks.word_problems import WORD_PROBLEMS

    return ", ".join([*CHOOSING, *WORD_PROBLEMS])


def _from_file(path: Path) -> Task:
    from sparseport.nls.tasks.data_sets import question_key, read_lines

    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for line in read_lines(path, "prompt, answer and split (train, validation or test)"):
        form: Any = line.one_of("form", ("chat", "text", "continuation"), default="chat")
        prompt, answer = line.text("prompt", numbers=True), line.text("answer", numbers=True)
        splits[line.one_of("split", tuple(splits))].append(Example(prompt, answer, form))
    left_out: dict[str, int] = {}
    asked: set[bytes] = set()
    for split, reason in _LATER.items():
        items = splits[split]
        if not items:
            raise BadInput("a split of the task is empty", where=path, found=split)
        splits[split] = [item for item in items if question_key(item.prompt) not in asked]
        if not splits[split]:
            raise BadInput(
                f"every question of {split} is asked in a split that is for measuring",
                where=path,
                fix="give each question to one split only",
            )
        if dropped := len(items) - len(splits[split]):
            left_out[reason] = dropped
        asked |= {question_key(item.prompt) for item in items}
    return Task(
        path.stem, tuple(splits["train"]), tuple(splits["validation"]), tuple(splits["test"]), left_out=left_out
    )
