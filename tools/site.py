"""Hook of mkdocs: files outside docs/ that pages link to become pages of the site, and links follow them.

On GitHub a page under docs/ links to `../examples/NAME.py` or `../CONTRIBUTING.md`; on the site both are pages. Links
to other files of the repository, such as sources and tests, are text there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[1]
# File in the repository -> page of the site.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
MOVED = {**ROOT_PAGES, "README.md": "index.md"}
# Folders whose files become pages -> the language that they are shown in.
SOURCES = {"examples": ("*.py", "python"), "export_configs": ("**/*.yaml", "yaml")}
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Decisions, and pages that the navigation does not name, enter it."""
    nav: list[Any] = list(config.nav or [])
    decisions = next(part["Decisions"] for part in nav if isinstance(part, dict) and "Decisions" in part)
    decisions += [f"adr/{path.name}" for path in sorted((REPO / "docs" / "adr").glob("[0-9]*.md"))]
    named = set(_named(nav))
    more = [page for page in pages() if page not in named]
    config.nav = [*nav, *([{"More": more}] if more else [])]
    return config


def pages() -> list[str]:
    """Every page under docs/, as the navigation names it."""
    docs = REPO / "docs"
    return sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie under docs/."""
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(REPO / name).read_text(encoding="utf-8")))
    for folder, (pattern, language) in SOURCES.items():
        for path in sorted((REPO / folder).glob(pattern)):
            name = path.relative_to(REPO).as_posix()
            fence = "````"  # some docstrings have three
            text = f"# {path.name}\n\n{fence}{language}\n{path.read_text(encoding='utf-8').rstrip()}\n{fence}\n"
            text = "---\nsearch:\n  boost: 0.2\n---\n" + text  # prose comes first
            files.append(File.generated(config, source_page(name), content=text))
    return files


def source_page(name: str) -> str:
    """The page of a source file: `examples/export_and_ask.py` -> `examples/export_and_ask.md`."""
    return posixpath.splitext(name)[0] + ".md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into links that are right on the site.

    Raises:
        PluginError: a link leads to nothing in the repository.
    """
    back = {uri: name for name, uri in ROOT_PAGES.items()}
    uri = page.file.src_uri
    here = back.get(uri, f"docs/{uri}")

    def moved(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if not target or "://" in target or target.startswith(("/", "mailto:")):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if place.startswith("docs/"):
            new = place.removeprefix("docs/")
        elif place in MOVED:
            new = MOVED[place]
        elif place.split("/")[0] in SOURCES and files.get_file_from_path(source_page(place)):
            new = source_page(place)
        elif (REPO / place).exists():
            return match["text"]
        else:
            raise PluginError(f"{here}: the link to {target} leads nowhere")
        new = "adr/README.md" if new == "adr" else new
        return f"[{match['text']}]({posixpath.relpath(new, posixpath.dirname(uri) or '.')}{anchor})"

    return _outside_code(markdown, lambda text: _LINK.sub(moved, text))


def _outside_code(markdown: str, change: Any) -> str:
    """Apply a change to everything but fenced blocks."""
    parts = re.split(r"(^(`{3,}).*?^\2\s*$)", markdown, flags=re.M | re.S)
    # re.split gives text, block, fence, text, ...
    return "".join(change(part) if index % 3 == 0 else part for index, part in enumerate(parts) if index % 3 != 2)


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [name for part in parts for name in _named(part)]
