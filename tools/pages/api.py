"""The Python reference: signatures and docstrings of the public names, read from the sources without importing them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sparseport
from tools.pages.tables import cell

SOURCES = Path(__file__).resolve().parents[2] / "src"
_SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises"}
# `name  text` and `name, other  text`: how docstrings of dataclasses describe their fields.
_FIELD = re.compile(r"^(\w+(?:, \w+)*)\s{2,}(\S.*)$")
_ITEM = re.compile(r"^(\w+(?:, \w+)*): (.*)$")
_WIDTH = 100


@dataclass(frozen=True)
class Public:
    """A public name and its definition."""

    name: str
    module: str
    node: ast.FunctionDef | ast.ClassDef

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


def public_names() -> list[Public]:
    """Every public name, in the order of the page."""
    found = []
    for name, place in sparseport._PUBLIC.items():
        module, _, attribute = place.partition(":")
        found.append(Public(name, *definition(module, attribute)))
    return found


def definition(module: str, name: str) -> tuple[str, ast.FunctionDef | ast.ClassDef]:
    """The module that defines a name, and the definition; imports of it from other modules are followed.

    Raises:
        ValueError: it is defined in none of them.
    """
    path = SOURCES / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return definition(node.module, name)
    raise ValueError(f"{module} has no {name}")


def api_part() -> str:
    """A table of the names, and a section for each."""
    names = public_names()
    lines = ["| name | |", "|---|---|"]
    lines += [f"| [`{one.name}`](#{one.name.lower()}) | {cell(one.docstring.splitlines()[0])} |" for one in names]
    for one in names:
        lines += ["", f"## {one.name}", "", *_section(one)]
    return "\n".join(lines)


def _section(one: Public) -> Iterator[str]:
    if isinstance(one.node, ast.FunctionDef):
        yield from _code(signature(one.node, one.name))
        yield from _docstring(one.docstring, {})
    else:
        yield from _docstring(one.docstring, _types(one.node))
        if rows := list(_recipe_fields(one.module, one.node, "")):
            yield from ("| field | type | default | |", "|---|---|---|---|", *rows, "")
        yield from _methods(one.node)
    yield f"Defined as `{one.module}.{one.node.name}`."


def signature(node: ast.FunctionDef, name: str) -> str:
    """`name(...) -> type`, one parameter a line where it is long; `self` is left out."""
    args = node.args
    words = [_parameter(arg, default) for arg, default in _with_defaults(args.posonlyargs + args.args, args.defaults)]
    words = [word for word in words if word != "self"]
    if args.kwonlyargs:
        words += ["*"]
        words += [_parameter(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    short = f"{name}({', '.join(words)}){returns}"
    if len(short) <= _WIDTH:
        return short
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){returns}"])


def _with_defaults(args: list[ast.arg], defaults: list[ast.expr]) -> list[tuple[ast.arg, ast.expr | None]]:
    missing: list[ast.expr | None] = [None] * (len(args) - len(defaults))
    return list(zip(args, [*missing, *defaults], strict=True))


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation is not None else ""
    if default is None:
        return f"{arg.arg}{kind}"
    return f"{arg.arg}{kind} = {ast.unparse(default)}" if kind else f"{arg.arg}={ast.unparse(default)}"


def _docstring(text: str, types: dict[str, str]) -> Iterator[str]:
    """A docstring as Markdown: sections and descriptions of fields become lists."""
    for title, lines in sections(text):
        if title:
            yield from (f"**{_SECTIONS[title]}**", "")
        if title in ("Args", "Raises"):
            yield from (f"- {_names(name)}: {cell(told)}" for name, told in items(lines))
            yield ""
        else:
            yield from _prose(lines, types)


def sections(text: str) -> list[tuple[str, list[str]]]:
    """(title or empty, lines without their indentation) of a docstring's parts."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        title = line.removesuffix(":")
        if title in _SECTIONS and line.endswith(":"):
            found.append((title, []))
        else:
            found[-1][1].append(line.removeprefix("    ") if found[-1][0] else line)
    return found


def items(lines: list[str]) -> list[tuple[str, str]]:
    """(name, text) of `name: text` entries; indented lines go on with the text above them.

    Raises:
        ValueError: a line is neither.
    """
    found: list[tuple[str, str]] = []
    for line in lines:
        match = _ITEM.match(line)
        if match:
            found.append((match[1], match[2]))
        elif line.startswith(" ") and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif line.strip():
            raise ValueError(f"no entry of a section: {line!r}")
    return found


def _prose(lines: list[str], types: dict[str, str]) -> Iterator[str]:
    """Paragraphs; `name  text` lines become a list, with the types of these fields."""
    made: list[str] = []
    for line in lines:
        match = _FIELD.match(line)
        if match:
            kinds = {types[name] for name in match[1].split(", ") if name in types}
            kind = f" (`{kinds.pop()}`)" if len(kinds) == 1 else ""
            made.append(f"- {_names(match[1])}{kind}: {match[2]}")
        elif made and made[-1].startswith("- ") and line.startswith("  "):
            made[-1] += f" {line.strip()}"
        else:
            made.append(line)
    yield from ("\n".join(made).strip("\n"), "")


def _types(node: ast.ClassDef) -> dict[str, str]:
    """Annotations of the fields of a class."""
    fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return {line.target.id: ast.unparse(line.annotation) for line in fields if isinstance(line.target, ast.Name)}


def _recipe_fields(module: str, node: ast.ClassDef, prefix: str) -> Iterator[str]:
    """Rows for the fields of a recipe, those of its sections among them: name, type, default, description."""
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.value, ast.Call):
            continue
        name, made = ast.unparse(line.target), ast.unparse(line.value.func)
        if made == "Field":
            words = {word.arg: word.value for word in line.value.keywords}
            default = ast.unparse(line.value.args[0]) if line.value.args else "required"
            told = ast.literal_eval(words["description"])
            yield f"| `{prefix}{name}` | `{_pipe(ast.unparse(line.annotation))}` | `{_pipe(default)}` | {cell(told)} |"
        elif made.endswith("Recipe"):
            where, section = definition(module, made)
            assert isinstance(section, ast.ClassDef)
            yield from _recipe_fields(where, section, f"{prefix}{name}.")


def _methods(node: ast.ClassDef) -> Iterator[str]:
    """Public methods and properties that have a docstring."""
    rows = []
    for line in node.body:
        if not isinstance(line, ast.FunctionDef) or line.name.startswith("_") or not ast.get_docstring(line):
            continue
        text = (ast.get_docstring(line) or "").splitlines()[0]
        marks = {ast.unparse(mark) for mark in line.decorator_list}
        if "property" in marks:
            shown = f".{line.name}" + (f" -> {ast.unparse(line.returns)}" if line.returns else "")
        else:
            owner = node.name if "staticmethod" in marks else ""
            shown = " ".join(signature(line, f"{owner}.{line.name}").split())
        rows.append(f"- `{shown}`: {text}")
    yield from (*rows, *([""] if rows else []))


def _names(text: str) -> str:
    return ", ".join(f"`{name}`" for name in text.split(", "))


def _pipe(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> list[str]:
    return ["```text", text, "```", ""]
