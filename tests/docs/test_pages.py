"""The generated parts of the documentation are what `make pages` would write now, and say what the sources say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tools.pages.api import items, public_names, sections
from tools.pages.cli import groups, verb_parsers
from tools.pages.error_codes import codes, error_classes
from tools.pages.parts import BEGIN, DOCS, END, PARTS, filled

from docs.markdown_text import REPO
from sparseport.cli import _parser
from sparseport.errors import SparseportError


@pytest.mark.parametrize("page", PARTS)
def test_the_page_is_up_to_date(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert filled(text, PARTS[page](), page) == text, "run `make pages`"


def test_only_what_is_between_the_marks_is_written() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert filled(text, "new \\1", "page") == f"before\n{BEGIN}\nnew \\1\n{END}\nafter\n"
    with pytest.raises(ValueError, match=r"docs/page\.md"):
        filled("no marks", "new", "page.md")


def test_every_verb_and_option_is_in_the_reference() -> None:
    """Compared with argparse's own help, not with what the page is written from."""
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    sections_of = dict(part.split("\n", 1) for part in page.split("\n## sparseport ")[1:])
    verbs = verb_parsers(_parser())
    assert list(sections_of) == list(verbs)
    for name, verb in verbs.items():
        for word in verb.format_help().replace(",", " ").replace("[", " ").replace("]", " ").split():
            if word.startswith("--") and word not in ("--help", "--json", "--quiet", "--debug"):
                assert word in sections_of[name] or word.strip("`;.()") in sections_of[name], f"{name} {word}"


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{name} {action.dest}"
        for name, verb in verb_parsers(_parser()).items()
        for _, actions in groups(verb)
        for action in actions
        if not action.help
    ]
    assert silent == []


# --- docstrings of the public names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [one.name for one in public_names()])
def test_docstrings_are_complete(name: str) -> None:
    (one,) = [one for one in public_names() if one.name == name]
    parts = dict(sections(one.docstring))
    assert parts[""] and parts[""][0].endswith(".")
    if isinstance(one.node, ast.ClassDef):
        return
    args = one.node.args
    given = [arg.arg for arg in args.posonlyargs + args.args + args.kwonlyargs]
    assert [item for item, _ in items(parts["Args"])] == given
    assert "".join(parts["Returns"]).strip()
    errors = {error for item, _ in items(parts["Raises"]) for error in item.split(", ")}
    assert errors and errors <= set(error_classes())


def test_fields_of_public_dataclasses_are_described() -> None:
    """Those with `name  text` lines name every field that a reader can see."""
    checked = 0
    for one in public_names():
        if "dataclass" in str([ast.unparse(mark) for mark in one.node.decorator_list]):
            fields = {ast.unparse(line.target) for line in one.node.body if isinstance(line, ast.AnnAssign)}
            told = {line.split("  ")[0].strip() for line in one.docstring.splitlines()}
            assert {field for field in fields if not field.startswith("_")} <= told, one.name
            checked += 1
    assert checked >= 6


def test_entries_of_a_section_are_read() -> None:
    assert items(["a: one", "    two", "b, c: three"]) == [("a", "one two"), ("b, c", "three")]
    with pytest.raises(ValueError, match="no entry"):
        items(["what is this"])
    assert sections("Say.\n\nArgs:\n    a: b\n\nRaises:\n    C: d") == [
        ("", ["Say.", ""]),
        ("Args", ["a: b", ""]),
        ("Raises", ["C: d"]),
    ]


# --- error codes -----------------------------------------------------------------------------------------------------


def test_every_code_in_the_sources_is_on_the_page() -> None:
    """Found a second time, as plain text."""
    text = "".join(path.read_text(encoding="utf-8") for path in (REPO / "src").rglob("*.py"))
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    found = set(re.findall(r"[\"'](E_[A-Z_]+)[\"']", text))
    assert len(found) > 60 and sorted(code for code in found if f"`{code}`" not in page) == []
    for kind in error_classes().values():
        assert issubclass(kind, SparseportError) and f"| {kind.exit_code} | `{kind.__name__}`" in page


def test_codes_are_found_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(
        "raise BadInput('x', code='E_CALL')\n"
        "raise errors.Unsupported('x', code='E_ATTRIBUTE')\n"
        "parse_json(data, code='E_PASSED')\n"
        "def parse_json(data, *, code: str = 'E_DEFAULT'): ...\n"
        "class Special(FidelityError):\n    default_code = 'E_CLASS'\n",
        encoding="utf-8",
    )
    found = {code: (sorted(facts.exits), sorted(facts.modules)) for code, facts in codes(tmp_path).items()}
    assert found == {
        "E_CALL": ([3], ["part"]),
        "E_ATTRIBUTE": ([7], ["part"]),
        "E_PASSED": ([3], ["part"]),
        "E_DEFAULT": ([3], ["part"]),
        "E_CLASS": ([4], ["part"]),
    }
    (tmp_path / "part.py").write_text("helper(code='E_NEW')\n", encoding="utf-8")
    with pytest.raises(ValueError, match="name the error"):
        codes(tmp_path)
