"""A conversation with a model, independent of the runtime that computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from sparseport.errors import BadInput

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

OnText = Callable[[str], bool]
"""Gets each piece of an answer as it comes; returns whether the answer is to go on."""

Finish = Literal["end", "length", "stopped"]
"""Why an answer ended: an end token, the limit of tokens, or because somebody stopped it."""


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen.

    max_tokens   tokens of an answer at most
    temperature  None: always the likeliest token; else a positive number that logits are divided by
    seed         of the random numbers; used with a temperature only
    """

    max_tokens: int = 512
    temperature: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    text           what the model wrote
    prompt_tokens  tokens that it was given
    tokens         tokens that it wrote, an end token among them
    first_token    seconds until the first of them
    per_second     tokens a second after the first; None for answers of one token
    finish         why it ended
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_token: float
    per_second: float | None
    finish: Finish

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; seconds to milliseconds, rates to a tenth."""
        rate = self.per_second
        return asdict(self) | {
            "first_token": float(f"{self.first_token:.3f}"),
            "per_second": None if rate is None else float(f"{rate:.1f}"),
        }


class Engine(Protocol):
    """A model in its runtime.

    has_template  whether its tokenizer has a chat template
    """

    has_template: bool

    def fill_template(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, up to where the assistant's next answer begins."""

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Token ids of a text; `special_tokens` lets the tokenizer add those that it begins a text with."""

    def generate(self, tokens: list[int], sampling: Sampling, on_text: OnText) -> Answer:
        """Go on from `tokens`; `on_text` gets the text piece by piece."""

    def reset(self) -> None:
        """Begin anew, random numbers included: the same conversation gives the same answers again."""


@dataclass
class Conversation:
    """What was said so far; every question is asked with all of it.

    engine    the model
    sampling  how answers are chosen
    system    instruction before the first question, or None
    plain     no chat template: each text is continued as it stands, by itself
    context   tokens that the model reads at most, or None
    """

    engine: Engine
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    plain: bool = False
    context: int | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plain = self.plain or not self.engine.has_template
        if self.plain and self.system is not None:
            raise BadInput(
                "a system text needs a chat template, and there is none",
                where="--system",
                fix="leave it out, or put its words before the prompt",
                code="E_TEMPLATE",
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.engine.reset()

    def ask(self, text: str, on_text: OnText) -> Answer:
        """The answer to a text. What was asked and answered, or answered in part, belongs to the conversation then.

        Raises:
            BadInput: E_TEXT, it was no UTF-8 text when it was typed; E_CONTEXT, the conversation is longer than the
                model reads; E_TEMPLATE, the chat template refuses it. Nothing was said then.
        """
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise BadInput("the prompt is no UTF-8 text", where="prompt", found=ascii(text)[:80], code="E_TEXT")
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.engine.encode(text if self.plain else self._filled(messages), special_tokens=self.plain)
        sampling = self._within(len(tokens))
        answer = self.engine.generate(tokens, sampling, on_text)
        if not self.plain:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _filled(self, messages: list[Message]) -> str:
        try:
            return self.engine.fill_template(messages)
        except Exception as error:  # templates are programs of the model's author and fail as they like
            raise BadInput(
                "the chat template cannot be filled in",
                where="chat template",
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                fix="leave --system out if the template has no such role, or give --plain to go without the template",
                code="E_TEMPLATE",
            ) from error

    def _within(self, tokens: int) -> Sampling:
        """The sampling, with no more new tokens than there is room for."""
        if not tokens:
            raise BadInput("the prompt has no tokens", where="prompt", code="E_CONTEXT")
        if self.context is None:
            return self.sampling
        room = self.context - tokens
        if room < 1:
            raise BadInput(
                "the conversation is longer than the model reads",
                where="prompt",
                expected=f"fewer than {self.context} tokens",
                found=tokens,
                fix="ask a shorter question; /reset begins a new conversation",
                code="E_CONTEXT",
            )
        most = min(self.sampling.max_tokens, room)
        return Sampling(most, self.sampling.temperature, self.sampling.seed)
