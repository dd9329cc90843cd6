"""The command line reference, from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from sparseport.cli import _parser
from tools.pages.tables import cell

COMMON = ("help", "json", "quiet", "debug")
"""Options of every verb."""


def cli_part() -> str:
    """One section for each verb (what it does, an example, its options), and one for the options of all."""
    verbs = verb_parsers(_parser())
    lines = ["| verb | |", "|---|---|"]
    lines += [f"| [`{name}`](#sparseport-{name}) | {cell(verb.description or '')} |" for name, verb in verbs.items()]
    for name, verb in verbs.items():
        lines += ["", f"## sparseport {name}", "", verb.description or "", "", *_example(verb)]
        for title, actions in groups(verb):
            lines += ["", *([f"{title[0].upper()}{title[1:]}:", ""] if title else [])]
            lines += ["| option | |", "|---|---|"]
            lines += _rows(actions)
    lines += ["", "## Options of every verb", "", "| option | |", "|---|---|"]
    lines += _rows([action for action in next(iter(verbs.values()))._actions if action.dest in COMMON])
    return "\n".join(lines)


def _rows(actions: list[argparse.Action]) -> list[str]:
    return [f"| {_words(action)} | {cell(_help(action))} |" for action in actions]


def verb_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb, by its name."""
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(verbs.choices)


def groups(verb: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Titles and options, without those that every verb has; the first title is empty."""
    usual = verb._positionals._group_actions + verb._optionals._group_actions
    yield "", [action for action in usual if action.dest not in COMMON]
    for group in verb._action_groups:
        if group not in (verb._positionals, verb._optionals) and group._group_actions:
            yield group.title or "", list(group._group_actions)


def _example(verb: argparse.ArgumentParser) -> list[str]:
    """The example of the help text."""
    return [f"    {line.strip()}" for line in (verb.epilog or "").splitlines() if line.strip().startswith("sparseport")]


def _words(action: argparse.Action) -> str:
    """`--rounds N`, `PATH ...`."""
    value = action.metavar or (None if action.nargs == 0 else action.dest.rpartition(".")[2].upper())
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    words = ", ".join(action.option_strings)
    text = " ".join(word for word in (words, str(value) if value else "") if word)
    more = " ..." if action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction) else ""
    return f"`{text}`{more}".replace("|", "\\|")


def _help(action: argparse.Action) -> str:
    needed = "" if not action.option_strings or not action.required else "; required"
    return (action.help or "") % {"default": action.default} + needed if action.help else needed.lstrip("; ")
