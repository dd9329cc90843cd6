"""Questions and answers on a terminal: what a model writes is shown as it comes, and cannot do more than be shown."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparseport.chat.conversation import Answer, Conversation
from sparseport.errors import SparseportError

# Joiners that scripts and emoji are written with; they only change how their neighbours look.
_JOINERS = "\u200c\u200d"
PROMPT = "> "
COMMANDS = {
    "/reset": "begin a new conversation",
    "/exit": "leave (Ctrl-D does the same)",
    "/help": "show this; Ctrl-C stops an answer",
}


def harmless(text: str) -> str:
    """Text for a terminal: line breaks, tabs and spaces of all kinds stay, other control characters become escapes.

    Character by character, so that a text may come in pieces. Controls that turn the direction of writing are escaped
    as well: they can make a line look like another.
    """
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in f"\n\t{_JOINERS}" or unicodedata.category(character) == "Zs"


def show(text: str) -> None:
    """Write a piece of text to standard output at once; what its encoding does not have becomes an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(harmless(text).encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """While the block runs, Ctrl-C is only noted: yields a function that says whether to go on. A second one raises.

    Outside the main thread Python allows no handlers, and Ctrl-C does what it did.
    """
    presses = 0

    def press(signum: int, frame: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: True
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses == 0
    finally:
        signal.signal(signal.SIGINT, before)


def answer(conversation: Conversation, text: str, stream: bool) -> Answer:
    """Ask, and with `stream` show the answer as it comes; Ctrl-C ends it early.

    Raises:
        BadInput: see `Conversation.ask`.
    """
    with stoppable() as goes_on:

        def on_text(piece: str) -> bool:
            if stream:
                show(piece)
            return goes_on()

        found = conversation.ask(text, on_text)
    if stream:
        show("\n")
    return found


def talk(
    conversation: Conversation,
    report: Callable[[str, Answer], None],
    refuse: Callable[[SparseportError], None],
    stream: bool = True,
) -> None:
    """Ask for questions until Ctrl-D or /exit.

    Args:
        conversation: goes on with every question.
        report: called after each answer, with the question.
        refuse: called with the error of a question that cannot be asked; the next one may be.
        stream: show answers as they come, and a prompt on standard output.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and arrow keys

    while True:
        try:
            text = _line(stream).strip()
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("\nCtrl-D or /exit leaves")
            continue
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            _say("a new conversation begins")
        elif text.startswith("/") and text.isascii() and text[1:].isalpha():
            _say("\n".join(f"{name}  {meaning}" for name, meaning in COMMANDS.items()))
        elif text:
            try:
                found = answer(conversation, text, stream)
            except SparseportError as error:
                refuse(error)
                continue
            report(text, found)


def _line(on_output: bool) -> str:
    if on_output and sys.stdout.isatty():
        return input(PROMPT)  # through readline, which has to know the prompt to edit the line
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
