"""Every command in the documentation parses: verbs, options and choices are those of the real parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.pages.cli import verb_parsers

from docs.markdown_text import REPO, Block, blocks, documents, spans
from sparseport.cli import _parser

# What stands before our own words: `$ `, variables, a launcher or a path to the command.
_BEFORE = r"(?:\$ )?(?:\w+=\S+ )*(?:(?:torchrun|accelerate launch|python)\b.* -m |[\w./\\]*[/\\])?"
_OURS = re.compile(rf"^{_BEFORE}sparseport(?= |$)(?P<words>.*)$")
_DOOR = re.compile(r"^(?:\$ )?python export\.py(?P<words> .*)$")
_SHELLS = {"", "bash", "sh", "console", "shell", "text"}


def commands(block: Block) -> Iterator[list[str]]:
    """Words after `sparseport` of every command in a block; continued lines are joined, comments and pipes cut off."""
    if block.language not in _SHELLS:
        return
    for line in re.sub(r"\\\n\s*", " ", block.code).splitlines():
        line = line.strip()
        match, door = _OURS.match(line), _DOOR.match(line)
        if match or door:
            words = (match or door)["words"]  # type: ignore[index]
            words = re.split(r"\s+(?:#|\||&&|>)\s*", words)[0]
            yield [*(["export"] if door else []), *shlex.split(words)]


def parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The parser's complaint, or nothing; abbreviations, which it would take, are wrong in a documentation."""
    verb = verb_parsers(_parser()).get(words[0] if words else "")
    for word in words[1:]:
        if verb and word.startswith("--") and word.partition("=")[0] not in verb._option_string_actions:
            return f"there is no {word}"
    try:
        _parser().parse_args(words)
    except SystemExit as leave:
        return "" if leave.code == 0 else capsys.readouterr().err.splitlines()[-1]
    return ""


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_commands_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        f"{block.place}: sparseport {shlex.join(words)}: {complaint}"
        for block in blocks(path)
        for words in commands(block)
        if (complaint := parse(words, capsys))
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["examples", "export_configs"])
def test_commands_in_comments_parse(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Docstrings of examples and comments of recipes are copied as well."""
    wrong, seen = [], 0
    for path in sorted((REPO / folder).rglob("*")):
        if path.suffix in (".py", ".yaml"):
            text = "\n".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines())
            for words in commands(Block(path, 1, "", text)):
                seen += 1
                if complaint := parse(words, capsys):
                    wrong.append(f"{path.name}: sparseport {shlex.join(words)}: {complaint}")
    assert wrong == []
    assert folder == "examples" or seen > 10


def test_the_examples_of_the_help_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in verb_parsers(_parser()).items():
        found = list(commands(Block(REPO, 1, "", verb.epilog or "")))
        assert found, f"{name} has no example"
        assert [complaint for words in found if (complaint := parse(words, capsys))] == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_inline_commands_name_real_verbs_and_options(path: Path) -> None:
    """`sparseport bench --sweep` in a sentence is no whole command, but its words exist."""
    verbs = verb_parsers(_parser())
    wrong = []
    for span in spans(path):
        words = span.split()
        if words[0] != "sparseport" or len(words) < 2 or not words[1].isalpha() or words[1].isupper():
            continue
        verb = verbs.get(words[1])
        options = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
        if verb is None or [option for option in options if option not in verb._option_string_actions]:
            wrong.append(span)
    assert wrong == []


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md", "docs/certificate.md", "docs/how-to/fine-tuned.md"])
def test_options_in_sentences_exist(page: str) -> None:
    """These pages speak of no other program's options."""
    known = {option for verb in verb_parsers(_parser()).values() for option in verb._option_string_actions}
    found = [match[0] for span in spans(REPO / page) if (match := re.match(r"--[a-z][\w-]*", span))]
    assert found and sorted(set(found) - known) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sparseport verify out    # again", ["verify", "out"]),
        ("$ .venv/bin/sparseport verify out | head", ["verify", "out"]),
        ("torchrun --nproc_per_node 2 -m sparseport finetune --base DIR", ["finetune", "--base", "DIR"]),
        ("python export.py --base \\\n    DIR", ["export", "--base", "DIR"]),
        ("PYTHONPATH=examples sparseport run 'a b'", ["run", "a b"]),
        ("sparseports verify", None),
        ("pip install sparseport", None),
    ],
)
def test_the_reader_finds_commands(line: str, words: list[str] | None) -> None:
    assert list(commands(Block(REPO, 1, "", line))) == ([] if words is None else [words])


@pytest.mark.parametrize(
    "line", ["verify", "explode", "export --target tensorrt", "bench out --no-such-option", "verify out --numeric"]
)
def test_a_wrong_command_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(line.split(), capsys)
