"""Every error code of the sources: its exit status, what it means, and which modules raise it."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from sparseport import errors
from sparseport.errors import SparseportError
from tools.pages.meanings import MEANINGS

SOURCES = Path(__file__).resolve().parents[2] / "src" / "sparseport"
# Functions that take a code for the error that they raise -> that error.
_PASSED_ON = {"parse_json": "BadInput", "value": "BadInput", "values": "BadInput"}


@dataclass
class Code:
    """Where a code is raised: exit statuses of its errors, modules."""

    exits: set[int] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


def error_classes() -> dict[str, type[SparseportError]]:
    """The errors of `sparseport.errors`, by name, in the order of their exit status."""
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SparseportError)]
    return {kind.__name__: kind for kind in sorted(found, key=lambda kind: kind.exit_code)}


def errors_part() -> str:
    """Two tables: exit status by class, and the codes."""
    lines = ["| exit status | error | default code | |", "|---|---|---|---|"]
    for name, kind in error_classes().items():
        first = (kind.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| {kind.exit_code} | `{name}` | `{kind.default_code}` | {first} |")
    lines += ["", "| code | exit status | what it means, and the way out | raised in |", "|---|---|---|---|"]
    found = codes()
    if missing := sorted(set(found) - set(MEANINGS)):
        raise ValueError(f"tools/pages/meanings.py has no sentence for {', '.join(missing)}")
    if unused := sorted(set(MEANINGS) - set(found)):
        raise ValueError(f"tools/pages/meanings.py has sentences for codes that nothing raises: {', '.join(unused)}")
    for name, code in sorted(found.items()):
        exits = ", ".join(map(str, sorted(code.exits)))
        modules = ", ".join(f"`{module}`" for module in sorted(code.modules))
        lines.append(f"| `{name}` | {exits} | {MEANINGS[name]} | {modules} |")
    return "\n".join(lines)


def codes(sources: Path = SOURCES) -> dict[str, Code]:
    """Every `code="E_..."` of a call, `code: str = "E_..."` of a parameter and `default_code = "E_..."` of a class.

    Raises:
        ValueError: a call passes a code on, and what it raises is not known here.
    """
    found: dict[str, Code] = defaultdict(Code)
    for path in sorted(sources.rglob("*.py")):
        module = ".".join(path.relative_to(sources).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for code, kind in _of(node):
                exits = error_classes().get(_PASSED_ON.get(kind, kind))
                if exits is None:
                    raise ValueError(f"{path.name} passes {code} to {kind}: name the error it raises in _PASSED_ON")
                found[code].exits.add(exits.exit_code)
                if module != "errors":
                    found[code].modules.add(module)
    return {code: facts for code, facts in found.items() if facts.modules}


def _of(node: ast.AST) -> list[tuple[str, str]]:
    """(code, name of the error's class or of the function that raises it) that a node of the syntax tree states."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        return [(code, name) for word in node.keywords if word.arg == "code" and (code := _literal(word.value))]
    if isinstance(node, ast.FunctionDef):
        defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        return [(code, node.name) for given, default in defaults if given.arg == "code" and (code := _literal(default))]
    if isinstance(node, ast.ClassDef) and node.name not in error_classes():
        values = [line.value for line in node.body if isinstance(line, ast.Assign) and "default_code" in _names(line)]
        return [(code, ast.unparse(node.bases[0])) for value in values if (code := _literal(value))]
    return []


def _names(line: ast.Assign) -> list[str]:
    return [target.id for target in line.targets if isinstance(target, ast.Name)]


def _literal(node: ast.expr | None) -> str:
    value = node.value if isinstance(node, ast.Constant) else ""
    return value if isinstance(value, str) and value.startswith("E_") else ""
