"""A model that says what it is told to, piece by piece; run as a script, a conversation with it on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from sparseport.chat.conversation import Answer, Conversation, Message, OnText, Sampling
from sparseport.chat.terminal import talk


class FakeEngine:
    """Answers with `said`; a token is a character."""

    def __init__(self, *said: str, has_template: bool = True, pause: float = 0.0) -> None:
        self.has_template = has_template
        self.asked: list[list[int]] = []
        self.sampling: list[Sampling] = []
        self.resets = 0
        self._said, self._pause = said, pause

    def fill_template(self, messages: Sequence[Message]) -> str:
        if any(message["role"] == "system" and "refuse" in message["content"] for message in messages):
            raise RuntimeError("System role not\nsupported")
        return "".join(f"<{message['role'][0]}>{message['content']}" for message in messages) + "<a>"

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        return [*([1] if special_tokens else []), *map(ord, text)]

    def generate(self, tokens: list[int], sampling: Sampling, on_text: OnText) -> Answer:
        self.asked.append(tokens)
        self.sampling.append(sampling)
        written = []
        for piece in self._said[: sampling.max_tokens]:
            time.sleep(self._pause)
            written.append(piece)
            if not on_text(piece):
                return Answer("".join(written), len(tokens), len(written), 0.25, 4.0, "stopped")
        finish = "length" if len(written) < len(self._said) else "end"
        return Answer("".join(written), len(tokens), len(written), 0.25, 4.0 if len(written) > 1 else None, finish)

    def reset(self) -> None:
        self.resets += 1

    def prompts(self) -> list[str]:
        return ["".join(map(chr, tokens)) for tokens in self.asked]


if __name__ == "__main__":
    conversation = Conversation(FakeEngine(*(f"word{number} " for number in range(200)), pause=0.05))
    talk(conversation, lambda text, answer: print(f"[{answer.finish}]", file=sys.stderr), print)
    print("left", file=sys.stderr)
