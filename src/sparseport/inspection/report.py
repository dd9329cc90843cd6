"""What an inspection says, and how it writes a command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Step = Callable[[], None]
WITH_EMBEDDING = "with the embedding"
EXPORT = ("sparseport", "export", "--target", "openvino")


class Placeholder(str):
    """A word of a command that the user has to replace; every other word is quoted where a shell would act on it."""


@dataclass(frozen=True)
class Reading:
    """How the user wants a checkpoint to be read; fields of `Recipe`."""

    allow_pickle: bool
    gptq_zeros: str | None
    ignore_extra: bool

    @property
    def words(self) -> list[str]:
        """The options as words of a command."""
        return [
            *(["--allow-pickle"] if self.allow_pickle else []),
            *(["--gptq-zeros", self.gptq_zeros] if self.gptq_zeros else []),
            *(["--ignore-extra"] if self.ignore_extra else []),
        ]


@dataclass(frozen=True)
class LayerReport:
    """One linear layer as it lies in the checkpoint, and as it would leave.

    format       how it is stored (`int4 g64 asym`)
    scales       dtype of the scales, or of the values
    zero_points  smallest and largest zero-point, or None
    act_order    whether columns lie in another order than the inputs
    zeros        weights that are exactly zero
    pruned       weights that the checkpoint itself says are pruned, or None where it says nothing
    pattern      2:4 or 4:8 where the zeros keep it, else empty
    stored       format in the output (`u4 g64`)
    refused      why it cannot be exported, or None
    """

    module: str
    shape: tuple[int, int]
    format: str
    scales: str
    zero_points: tuple[int, int] | None
    act_order: bool
    zeros: int
    pruned: int | None
    pattern: str
    stored: str
    refused: str | None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class Inspection:
    """What was found.

    kind      base, adapter, export or gguf
    title     one line: what this is
    writer    tool and version as the files tell, or empty
    facts     short label -> value, in the order to print
    layers    linear layers of a base
    keeps     what an export carries exactly
    loses     what it does not, or cannot
    next      commands to run, quoted for a POSIX shell; a placeholder such as BASE stands for what is not known
    warnings  what looks odd, or was given for nothing
    """

    kind: str
    title: str
    writer: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    keeps: list[str] = field(default_factory=list)
    loses: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**vars(self), "layers": [vars(layer) for layer in self.layers]}


def word(path: Path) -> str:
    """A path as a word of a command; one that starts with a dash would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def as_command(words: list[str]) -> str:
    """A line for a POSIX shell; placeholders stay as they are, for the user to see and replace."""
    return " ".join(word if isinstance(word, Placeholder) else shlex.quote(word) for word in words)


def output_for(path: Path) -> str:
    """Name of a folder to export to, beside what is exported to it."""
    return word(Path(f"{path.resolve().stem if path.is_file() else path.resolve().name or 'model'}-openvino"))
