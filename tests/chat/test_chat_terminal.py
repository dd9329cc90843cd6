"""Conversations with a model that is told what to say: what it gets, what is shown, and what stops it."""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.fake_engine import FakeEngine
from sparseport.chat import engines, terminal
from sparseport.chat.conversation import Answer, Conversation, Sampling
from sparseport.chat.terminal import harmless, stoppable, talk
from sparseport.cli import main
from sparseport.errors import BadInput, SparseportError
from sparseport.verbs import chat

# --- what a conversation gives the model ------------------------------------------------------------------------------


def test_every_question_is_asked_with_all_that_was_said() -> None:
    engine = FakeEngine("fi", "ne")
    conversation = Conversation(engine, system="be brief")
    conversation.ask("How are you?", lambda piece: True)
    conversation.ask("And now?", lambda piece: True)
    assert engine.prompts() == [
        "<s>be brief<u>How are you?<a>",
        "<s>be brief<u>How are you?<a>fine<u>And now?<a>",
    ]
    conversation.reset()
    conversation.ask("Who?", lambda piece: True)
    assert engine.prompts()[2] == "<s>be brief<u>Who?<a>" and engine.resets == 2


def test_without_a_template_each_text_is_continued_by_itself() -> None:
    engine = FakeEngine("x", has_template=False)
    conversation = Conversation(engine)
    conversation.ask("The fox", lambda piece: True)
    conversation.ask("The dog", lambda piece: True)
    assert conversation.plain and engine.prompts() == ["\x01The fox", "\x01The dog"]
    chosen = Conversation(FakeEngine("x"), plain=True)
    chosen.ask("The fox", lambda piece: True)
    assert chosen.engine.prompts() == ["\x01The fox"]  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="needs a chat template"):
        Conversation(engine, system="be brief")


def test_a_stopped_answer_belongs_to_the_conversation() -> None:
    engine = FakeEngine("one ", "two ", "three ")
    conversation = Conversation(engine)
    answer = conversation.ask("Count", lambda piece: piece != "two ")
    assert answer.text == "one two " and answer.finish == "stopped"
    conversation.ask("On", lambda piece: True)
    assert engine.prompts()[1] == "<u>Count<a>one two <u>On<a>"


def test_a_conversation_that_is_too_long_is_refused_and_forgotten() -> None:
    engine = FakeEngine(*"abcdef")
    conversation = Conversation(engine, Sampling(max_tokens=4, temperature=0.5, seed=3), context=20)
    conversation.ask("12345678901", lambda piece: True)  # 17 tokens with the roles: 3 are left
    assert engine.sampling == [Sampling(3, 0.5, 3)]
    with pytest.raises(BadInput) as caught:
        conversation.ask("4", lambda piece: True)
    assert caught.value.code == "E_CONTEXT" and len(engine.asked) == 1
    conversation.reset()
    conversation.ask("1", lambda piece: True)
    assert engine.sampling[1].max_tokens == 4


def test_bytes_that_are_no_text() -> None:
    """How Python hands on what was typed in another encoding."""
    engine = FakeEngine("x")
    conversation = Conversation(engine)
    with pytest.raises(BadInput) as caught:
        conversation.ask(b"caf\xe9".decode("utf-8", "surrogateescape"), lambda piece: True)
    assert caught.value.code == "E_TEXT" and engine.asked == []
    conversation.ask("café 😀", lambda piece: True)


def test_a_template_that_refuses() -> None:
    conversation = Conversation(FakeEngine("x"), system="refuse")
    with pytest.raises(BadInput) as caught:
        conversation.ask("Hello", lambda piece: True)
    assert caught.value.code == "E_TEMPLATE" and "System role not supported" in str(caught.value)
    assert conversation.messages == [{"role": "system", "content": "refuse"}]


# --- what a terminal gets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("naïve 北京 😀 \u00a0!\u202f?", "naïve 北京 😀 \u00a0!\u202f?"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten\x08\x7f\x00\x9b", "over\\rwritten\\x08\\x7f\\x00\\x9b"),
        ("\u202egnihton\u2066\u2028", "\\u202egnihton\\u2066\\u2028"),
        ("\ud800[bold]x[/bold]", "\\ud800[bold]x[/bold]"),
    ],
)
def test_what_is_shown_is_harmless(text: str, shown: str) -> None:
    assert harmless(text) == shown


@given(st.text(), st.integers(0, 20))
def test_pieces_are_shown_like_the_whole(text: str, at: int) -> None:
    assert harmless(text[:at]) + harmless(text[at:]) == harmless(text)
    assert not {*harmless(text)} & {*map(chr, [*range(9), *range(11, 32), *range(127, 160)])}


def test_an_output_of_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show("naïve")
    assert raw.getvalue() == b"na\\xefve"


# --- the loop --------------------------------------------------------------------------------------------------------


def said(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What is typed; a class is raised, and the end of input follows."""
    left = iter([*lines, EOFError])

    def typed(prompt: str = "") -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", typed)


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine("ok")
    said(monkeypatch, "one", "  ", "/reset", "two", "/etc/passwd?", "/nonsense", KeyboardInterrupt, "/exit", "never")
    reports: list[str] = []
    talk(Conversation(engine), lambda text, answer: reports.append(text), print)
    assert reports == ["one", "two", "/etc/passwd?"]
    assert engine.prompts() == ["<u>one<a>", "<u>two<a>", "<u>two<a>ok<u>/etc/passwd?<a>"]
    out, err = capsys.readouterr()
    assert out == "ok\n" * 3 and err.count("/exit  leave") == 1 and "Ctrl-D or /exit leaves" in err


def test_a_refused_question_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("ok")
    said(monkeypatch, "far too long a question", "x")
    refused: list[SparseportError] = []
    talk(Conversation(engine, context=10), lambda text, answer: None, refused.append)
    assert [error.code for error in refused] == ["E_CONTEXT"] and engine.prompts() == ["<u>x<a>"]


@pytest.fixture
def own_signal_stack() -> None:
    """Handlers run on the ordinary stack again.

    OpenVINO's tokenizers (2026.4) give the thread that makes them another stack for signals, and free it with them:
    after other tests of this process a signal would be handled on memory that is gone.
    """
    if sys.platform != "linux":
        return

    class Stack(ctypes.Structure):
        _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    disabled = 2  # SS_DISABLE
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(None, disabled, 0)), None) == 0


def test_ctrl_c_stops_an_answer_and_the_next_one_is_whole(
    own_signal_stack: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine("one ", "two ", "three ")
    finishes: list[str] = []
    said(monkeypatch, "first", "second")
    show, pressed = terminal.show, []

    def show_and_press(piece: str) -> None:
        show(piece)
        if piece == "two " and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal, "show", show_and_press)
    before = signal.getsignal(signal.SIGINT)
    talk(Conversation(engine), lambda text, answer: finishes.append(answer.finish), print)
    assert finishes == ["stopped", "end"] and capsys.readouterr().out == "one two \none two three \n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_it(own_signal_stack: None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stoppable() as goes_on:
        signal.raise_signal(signal.SIGINT)
        assert not goes_on()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_real_terminal(tmp_path: Path) -> None:
    """Typed text, a streamed answer, Ctrl-C in it, Ctrl-C at the prompt, another answer, Ctrl-D."""
    child, master = pty.fork()
    if child == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("fake_engine.py"))])
    seen = b""

    def wait_for(text: bytes, again: bytes = b"") -> None:
        """Read until the text is there; `again` is typed every second until then."""
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            os.write(master, again)
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        seen = seen.partition(text)[2]

    wait_for(b"> ")
    os.write(master, b"hello\n")
    wait_for(b"word3 ")
    os.write(master, b"\x03")
    wait_for(b"[stopped]")
    wait_for(b"> ")
    # Between its prompt and its wait for keys, Python's input() takes a signal in without waking up.
    wait_for(b"/exit leaves", again=b"\x03")
    wait_for(b"> ")
    os.write(master, b"again\n")
    wait_for(b"word2 ")
    os.write(master, b"\x03")
    wait_for(b"[stopped]")
    wait_for(b"> ")
    os.write(master, b"\x04")
    wait_for(b"left")
    _, status = os.waitpid(child, 0)
    os.close(master)
    assert os.waitstatus_to_exitcode(status) == 0


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A folder that is one for the verb, with a fake model in it."""

    class Chosen:
        path, target, adapter = tmp_path / "out", "openvino", None
        certificate = type("Sealed", (), {"seal": staticmethod(lambda: "f" * 64)})

    def hold(engine: FakeEngine) -> str:
        monkeypatch.setattr(chat, "open_folder", lambda *_: Chosen)
        monkeypatch.setattr(chat, "require_tokenizer", lambda chosen: None)
        monkeypatch.setattr(chat, "context_length", lambda chosen: 100)
        monkeypatch.setattr(engines, "load_engine", lambda chosen: engine)
        return str(tmp_path)

    return hold


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_answer(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder(FakeEngine("Paris", ".\x1b[2J"))
    assert main(["chat", where, "--prompt", "Capital?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris.\\x1b[2J\n" and "4.0 tokens/s" in err and "first after 0.25 s" in err
    assert main(["chat", where, "--prompt", "Capital?", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_one_document(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder(FakeEngine("Par", "is", "!"))
    words = ["--json", "--quiet", "--temperature", "0.5", "--seed", "7", "--max-tokens", "2", "--system", "brief"]
    assert main(["chat", where, "--prompt", "Capital?", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "prompt": "Capital?",
        "text": "Paris",
        "prompt_tokens": 22,
        "tokens": 2,
        "first_token": 0.25,
        "per_second": 4.0,
        "finish": "length",
        "target": "openvino",
        "adapter": None,
        "template": True,
        "temperature": 0.5,
        "seed": 7,
        "certificate_sha256": "f" * 64,
    }


def test_text_from_a_pipe(folder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("ok")
    where = folder(engine)
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert main(["chat", where, "--quiet"]) == 0 and engine.prompts() == ["<u>two\nlines<a>"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert main(["chat", where, "--quiet"]) == 2 and "standard input" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main(["chat", where, "--quiet"]) == 2 and "no text" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("not read"))
    assert main(["chat", where, "--quiet", "--prompt", "x"]) == 0 and engine.prompts()[-1] == "<u>x<a>"


def test_a_conversation_of_documents(
    folder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder(FakeEngine("ok"))
    said(monkeypatch, "one", "x" * 200, "two", "/exit")
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["chat", where, "--json", "--quiet"]) == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one.get("prompt", one.get("error", {}).get("code")) for one in documents] == ["one", "E_CONTEXT", "two"]


def test_that_there_is_no_template_is_said(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder(FakeEngine("ok", has_template=False))
    assert main(["chat", where, "--prompt", "x"]) == 0
    assert "no chat template" in capsys.readouterr().err
    assert main(["chat", where, "--prompt", "x", "--system", "y"]) == 3
    assert "error[E_TEMPLATE]" in capsys.readouterr().err


def test_the_only_answer_was_stopped(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder(FakeEngine("one ", "two "))
    monkeypatch.setattr(terminal, "show", lambda piece: signal.raise_signal(signal.SIGINT) if piece == "one " else None)
    assert main(["chat", where, "--prompt", "x", "--quiet"]) == 130


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--max-tokens", "0"], "--max-tokens"),
        (["--seed", "1"], "--seed"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "1", "--seed", "-1"], "--seed"),
        (["--temperature", "1", "--seed", str(2**31)], "--seed"),
        (["--prompt", " "], "--prompt"),
    ],
)
def test_options_that_do_not_fit(
    words: list[str], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(tmp_path / "nothing"), *words]) == 2
    assert f"in {where}" in capsys.readouterr().err


def test_seeds_are_drawn_and_told(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine("ok")
    where = folder(engine)
    seeds = set()
    for _ in range(3):
        assert main(["chat", where, "--prompt", "x", "--temperature", "1", "--json", "--quiet"]) == 0
        seeds.add(json.loads(capsys.readouterr().out)["seed"])
    assert len(seeds) == 3 and {sampling.seed for sampling in engine.sampling} == seeds


def test_the_line_below_an_answer() -> None:
    assert chat.summary(Answer("x", 3, 1, 0.5, None, "end")) == "1 tokens, first after 0.50 s"
    assert "--max-tokens" in chat.summary(Answer("x", 3, 9, 0.5, 12.34, "length"))
    assert "12.3 tokens/s" in chat.summary(Answer("x", 3, 9, 0.5, 12.34, "stopped"))
